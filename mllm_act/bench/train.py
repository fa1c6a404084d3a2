"""Measures the update of ``mllm_act.train`` at real shapes, with random weights and images made on the device.

    python -m mllm_act.bench train                                    # the paper's Meta-World shape, LLaVA-1.5-7B
    python -m mllm_act.bench train --context=12                       # its CALVIN shape
    python -m mllm_act.bench train --bridge=projector --lora_targets='q|k|v|o|gate|up|down' --batch_size=16 --context=1
    python -m mllm_act.bench train --preset=smollm2_vit_s --context=32 --batch_size=64 --episode=10     # BabyAI's shape
    python -m mllm_act.bench train --weight_dtype=float8 ...          # frozen matrices held and multiplied in 8 bits
    python -m mllm_act.bench train --mesh=1,2,1 --batch_size=64 ...   # devices along data, fsdp and tensor

The last line is JSON. mllm_act/flops.py counts the operations, also those of steps that do not exist. A step is
timed on the host over ``--steps`` updates that run back to back on the device. ``--trace`` lists the kernels of the
first device by time. ``collective_ms`` is the time of that device's collectives, ``exposed_ms`` the part of it in which
nothing else ran.
"""

import argparse
import functools
import json
import time

import jax
import jax.numpy as jnp

from mllm_act import flops
from mllm_act.bench import synthetic, trace
from mllm_act.config import load_config
from mllm_act.placement import AXES
from mllm_act.ranges import check_flags
from mllm_act.training import memory, optimizer, sharding
from mllm_act.training.step import Recipe, jit_update


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m mllm_act.bench train", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add_model_flags(parser)
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument(
        "--episode", type=int, help="steps of a window that exist; the others are skipped"
    )
    parser.add_argument("--remat", default="", help="none, projections or full; default: preset's")
    parser.add_argument("--lora_targets", default="q|k|v")
    parser.add_argument("--scan", action="store_true", help="layers stacked, not unrolled")
    parser.add_argument("--layers", type=int, help="only so many of each encoder: compiles faster")
    parser.add_argument("--mesh", default="1,1,1", help="devices along data, fsdp and tensor")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--trace", action="store_true", help="list the kernels by time")
    flags = parser.parse_args(argv)
    check_flags(flags)
    print(json.dumps(measure(flags)))


def add_model_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags that the benchmarks of models share."""
    parser.add_argument("--preset", default="llava_1_5_7b")
    parser.add_argument("--context", type=int, default=3, help="T, steps per window")
    parser.add_argument("--prompt_tokens", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=2, help="M, tokens per action")
    parser.add_argument("--bridge", default="perceiver", help="its parts in order, comma-separated")
    parser.add_argument(
        "--weight_dtype", default="", help="float32, bfloat16 or float8; default: preset's"
    )


def measure(flags: argparse.Namespace) -> dict[str, object]:
    """Runs the updates and returns the report."""
    network_config = synthetic.network_config(flags)
    if flags.layers is not None:
        network_config = synthetic.with_layers(network_config, flags.layers)
    config = network_config.model
    sizes = dict(zip(AXES, map(int, flags.mesh.split(",")), strict=True))
    mesh = sharding.make_mesh(sizes)
    shards = sizes["data"] * sizes["fsdp"]
    graph, trained, frozen = synthetic.initialize(network_config, mesh)
    shape = (flags.context, flags.prompt_tokens, flags.tokens)
    estimated = memory.estimate(config, trained, frozen, flags.batch_size // shards, 1, *shape)
    if not flags.scan:
        frozen = sharding.unstack(frozen, mesh)[0](frozen)
    make_batch = functools.partial(
        synthetic.batch, config, flags.batch_size, flags.context, flags.prompt_tokens, flags.episode
    )
    batch = jax.jit(make_batch, out_shardings=sharding.of_batch(mesh))()
    tx, _ = optimizer.build(load_config("configs/policy/common.py:rvq").optimizer, flags.steps)
    recipe = Recipe(
        graph=graph,
        mesh=mesh,
        optimizer=tx,
        key=jax.random.key(0),
        shares={synthetic.NAME: 1.0},
        skip_padding={synthetic.NAME: None if flags.episode is None else shards},
        action_units={},
    )
    moments = sharding.of_parameters(jax.eval_shape(tx.init, trained), mesh)
    state = {"trained": trained, "optimizer": jax.jit(tx.init, out_shardings=moments)(trained)}
    batches, step = {synthetic.NAME: batch}, jnp.int32(1)
    started = time.perf_counter()
    compiled = jit_update(recipe, state).lower(state, frozen, batches, step).compile()
    compiling = time.perf_counter() - started
    analysis = compiled.memory_analysis()
    assert analysis is not None
    needed = (
        analysis.argument_size_in_bytes
        + analysis.temp_size_in_bytes
        + analysis.output_size_in_bytes
        - analysis.alias_size_in_bytes
    )

    losses = []
    for _ in range(3):
        state, metrics = compiled(state, frozen, batches, step)
        losses.append(float(metrics["loss"]))
    started = time.perf_counter()
    for _ in range(flags.steps):
        state, metrics = compiled(state, frozen, batches, step)
    metrics["loss"].block_until_ready()
    seconds = (time.perf_counter() - started) / flags.steps

    def run() -> None:
        nonlocal state
        for _ in range(3):
            state, metrics = compiled(state, frozen, batches, step)
        metrics["loss"].block_until_ready()

    collective, exposed = 0.0, 0.0
    if flags.trace or mesh.size > 1:
        events = trace.events(run)
        collective, exposed = trace.collectives(events)
    if flags.trace:
        print(trace.table(trace.kernels(events), runs=3))
    operations = flops.train(config, network_config.trained, flags.batch_size, 1, *shape, codes=512)
    return {
        "benchmark": "train",
        **vars(flags),
        "step_ms": round(1e3 * seconds, 2),
        "samples_per_s": round(flags.batch_size / seconds, 1),
        "supervised_actions_per_s": round(flags.batch_size * flags.context / seconds, 1),
        "tflop_per_s": round(operations / seconds / 1e12, 1),
        "tflop": round(operations / 1e12, 2),
        "collective_ms": round(collective / 3, 2),
        "exposed_ms": round(exposed / 3, 2),
        "memory_gib": round(needed / 2**30, 2),
        "estimated_gib": round(sum(estimated.values()) / 2**30, 2),
        "compile_s": round(compiling, 1),
        "losses": losses,
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
    }
