"""Compiles the update of a run for devices that are not there, and says what it would need: ``train --dry_run``."""

import dataclasses
import importlib.util
import math
import os
import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from ml_collections.config_dict import ConfigDict

from mllm_act import parameters
from mllm_act.batch import Batch
from mllm_act.errors import UserError
from mllm_act.training import chips, roofline, sharding
from mllm_act.training.compiled import Collective, collectives
from mllm_act.training.setup import Run, set_up
from mllm_act.training.step import jit_update

GIB = 2.0**30
TOPOLOGY = re.compile(r"(?:(\d+)\*)?(v5e|v5p|v6e):(\d+x\d+(?:x\d+)?)$|cpu:(\d+)$")


def dry_run(config: ConfigDict, topology: str) -> None:
    """Compiles the update and prints mesh, placements, memory, collectives and a prediction of the time.

    Args:
      config: of the run.
      topology: a TPU slice such as ``v5p:8x8x8`` (v5e, v5p, v6e), several such as ``2*v5e:16x16``, or ``cpu:64``: as
        many virtual devices of the CPU, where the target is a cluster of GPUs. Placements and collectives are then
        those of the target, the memory is roughly so (attention is not cuDNN's), and no time is predicted.

    Raises:
      UserError: if the topology does not exist, or its compiler is not installed.
    """
    devices, slices = target(topology)
    run = set_up(config, devices)
    batches = {name: _batch(run, name) for name in run.embodiments}
    step = jax.ShapeDtypeStruct((), jnp.int32)
    compiled = (
        jit_update(run.recipe, run.state).lower(run.state, run.frozen, batches, step).compile()
    )
    text = compiled.as_text()
    found = collectives(text, run.mesh)
    kind = devices[0].device_kind
    print(f"\nCompiled for {topology}: {len(devices)} devices ({kind}), {slices} slice(s)")
    print(f"Mesh: {', '.join(f'{axis} {size}' for axis, size in run.mesh.shape.items())}")
    print(f"Global batch: {_rows(run)} windows, {_rows(run) / len(devices):g} a device")
    print("Placement (axes of the mesh that split each dimension):\n" + _placements(run))
    print("Memory per device:\n" + _memory(run, batches, compiled.memory_analysis()))
    print("Collectives per step:\n" + _collectives(found, run))
    chip = chips.named(kind)
    if chip is None:
        print("Prediction: none; the chip's figures are not known here")
        return
    prediction = roofline.predict(text, found, chip)
    print(_prediction(prediction, chip, run.operations / len(devices), slices))


def target(topology: str) -> tuple[Sequence[jax.Device], int]:
    """Returns the devices of a topology, and the number of its slices; see ``dry_run``."""
    match = TOPOLOGY.match(topology)
    if match is None:
        raise UserError(
            f"--topology: expected a TPU slice such as v5p:8x8x8, v5e:16x16 or v6e:4x4, several such as 2*v5e:16x16, "
            f"or cpu:64, found {topology!r}"
        )
    jax.config.update("jax_platforms", "cpu")  # nothing runs, here or elsewhere
    if match[4]:
        jax.config.update("jax_num_cpu_devices", int(match[4]))
        return jax.devices(), 1
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(
            f"--topology={topology}: expected libtpu, TPUs' compiler, found none; pip install 'mllm-act[tpu]' "
            "installs it, on a machine without TPUs too"
        )
    # libtpu would ask Google Cloud's metadata server which TPU this machine has.
    os.environ.update(TPU_SKIP_MDS_QUERY="1", TPU_WORKER_HOSTNAMES="localhost")
    slices = int(match[1] or 1)
    several = {"num_slices": slices} if slices > 1 else {}
    try:
        target = topologies.get_topology_desc(f"{match[2]}:{match[3]}", "tpu", **several)
    except Exception as error:  # libtpu's own kinds
        raise UserError(
            f"--topology={topology}: expected a slice that exists, found none: {str(error).splitlines()[0]}"
        ) from error
    return target.devices, slices


def _batch(run: Run, name: str) -> Batch:
    """Returns the shapes of a batch of one embodiment, from the first window of its held-out data."""
    robot = run.embodiments[name]
    one = dataclasses.replace(robot, rows=1, share=1)
    batch = one.to_batch(next(iter(one.validation_batches(1))))
    split, steps = sharding.of_batch(run.mesh), batch.observation.mask.shape[1:]

    def whole(path: Any, x: Any) -> jax.ShapeDtypeStruct:
        packed = "/images/" in parameters.name(path) and x.ndim == 4  # see mllm_act.batch
        shape = (robot.rows, *(steps if packed else ()), *x.shape[1:])
        return jax.ShapeDtypeStruct(shape, x.dtype, sharding=split)

    return jax.tree_util.tree_map_with_path(whole, batch)


def _rows(run: Run) -> int:
    return sum(robot.rows for robot in run.embodiments.values())


def _placements(run: Run) -> str:
    rows, rest = [], 0
    parts = {"trained": run.state["trained"], "frozen": run.frozen}
    for path, leaf in parameters.flatten(parts).items():
        size = math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        if leaf.size * leaf.dtype.itemsize < 2**20:
            rest += size
            continue
        spec = ", ".join(
            _axis(axis) for axis in (*leaf.sharding.spec, *(None,) * leaf.ndim)[: leaf.ndim]
        )
        rows.append(
            f"  {path:<52} {str(leaf.dtype):<14} {str(leaf.shape):<20} ({spec}) {size / 2**20:.1f} MiB"
        )
    return "\n".join([*rows, f"  others, each under 1 MiB: {rest / 2**20:.1f} MiB"])


def _axis(axis: Any) -> str:
    return "-" if axis is None else axis if isinstance(axis, str) else "+".join(axis)


def _bytes(tree: Any) -> float:
    return sum(
        math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree)
    )


def _memory(run: Run, batches: Any, analysis: Any) -> str:
    kinds = {
        "trained weights": _bytes(run.state["trained"]),
        "optimizer": _bytes(run.state["optimizer"]),
        "frozen weights": _bytes(run.frozen),
        "batch": _bytes(batches),
        "temporary": float(analysis.temp_size_in_bytes),
        "results": float(analysis.output_size_in_bytes - analysis.alias_size_in_bytes),
    }
    kinds["total"] = sum(kinds.values())
    return "\n".join(f"  {kind:<16} {_text(size)}" for kind, size in kinds.items())


def _text(size: float) -> str:
    return f"{size / 2**20:8.2f} MiB" if size < GIB else f"{size / GIB:8.2f} GiB"


def _collectives(found: Sequence[Collective], run: Run) -> str:
    """Groups collectives by kind, axes and what they move; sizes of parameters tell weights from activations."""
    sizes = _parameter_sizes(run)
    count: Counter[tuple[str, str, str]] = Counter()
    sent: dict[tuple[str, str, str], float] = {}
    for c in found:
        if not c.axes:
            continue
        size = math.prod(c.shape)
        what = "weights, gradients" if size in sizes else "activations" if size > 2**16 else "small"
        key = (c.kind, " + ".join(c.axes), what)
        count[key] += c.times
        sent[key] = sent.get(key, 0.0) + c.sent * c.times
    rows = [
        f"  {kind:<20} over {axes:<22} {what:<20} {count[kind, axes, what]:>6} times "
        f"{_text(sent[kind, axes, what])} sent"
        for kind, axes, what in sorted(sent, key=lambda key: -sent[key])
    ]
    return "\n".join(rows or ["  none"])


def _parameter_sizes(run: Run) -> set[int]:
    """Returns the numbers of elements that a parameter, one layer of it, or a part of either can have on a device."""
    parts = {1}
    for size in run.mesh.shape.values():
        parts |= {part * size for part in parts}
    sizes = set()
    for path, leaf in parameters.flatten((run.state["trained"], run.frozen)).items():
        layer = leaf.size // leaf.shape[0] if "/blocks/" in path else leaf.size
        sizes |= {
            whole // part for whole in (leaf.size, layer) for part in parts if whole % part == 0
        }
    return {size for size in sizes if size > 2**10}


def _prediction(p: roofline.Prediction, chip: chips.Chip, model: float, slices: int) -> str:
    lines = [
        "Prediction, by a roofline (mllm_act/training/roofline.py); not measured:",
        f"  operations  {p.operations / 1e12:9.2f} TFLOP a device, {model / 1e12:.2f} of them the model's "
        f"(the rest is recomputed); peak {chip.flops / 1e12:g} TFLOP/s",
        f"  memory      {p.traffic / 1e9:9.2f} GB read and written, at {chip.bandwidth / 1e9:g} GB/s",
        f"  sent        {p.sent / 1e9:9.2f} GB to other devices, at {chip.interconnect / 1e9:g} GB/s: "
        f"{1e3 * p.sending:.1f} ms",
        f"  step        {1e3 * p.step:9.1f} ms ({1e3 * p.computing:.1f} ms of operations; collectives beside them)",
        f"  utilisation {model / chip.flops / p.step:9.1%} (the model's operations / (step x peak))",
    ]
    if slices > 1:
        lines.append(
            "  collectives between slices are counted at the speed inside one: they are slower"
        )
    return "\n".join(lines)
