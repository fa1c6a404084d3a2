"""A model as it acts: LoRA merged into the matrices, layers one by one.

One decision multiplies few rows by every matrix, so that its time is the time of reading them. A loop over stacked
blocks would copy each matrix out of its stack first. Matrices that read the same input are one, wide enough to keep
a whole GPU reading, and have taken up the factors of the norm before them. They are laid out with the axis that is
summed over contiguous, in the dtype the model computes in.

Where the model holds them in float8 they stay so, but for those that LoRA adds to: most of what it adds is less than
half a step of e4m3, and rounding the sum would lose it.
"""

import dataclasses
import functools
import operator
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from mllm_act.models import float8
from mllm_act.models.layers import Linear, LoRA, RMSNorm, unstack
from mllm_act.models.mllm import MLLM

ARRAYS = ("kernel", "kernel_scale", "bias", "lora_a", "lora_b")


def _arrays(linear: Linear) -> dict[str, Any]:
    found = {name: getattr(linear, name, None) for name in ARRAYS}
    return {name: variable[...] for name, variable in found.items() if variable is not None}


def _joined(
    parts: list[dict[str, Any]], lora: LoRA | None, dtype: str, in_float8: bool
) -> dict[str, Any]:
    """Returns one layer's matrix made of those of several projections, by name of its arrays."""
    kernels = [part["kernel"].astype(jnp.float32) * part.get("kernel_scale", 1.0) for part in parts]
    if lora is not None:
        for i, part in enumerate(parts):
            if "lora_a" in part:
                update = jnp.matmul(part["lora_a"], part["lora_b"], precision="highest")
                kernels[i] += update * (lora.alpha / lora.rank)
    kernel = jnp.concatenate(kernels, axis=-1)
    if "factors" in parts[0]:
        kernel *= parts[0]["factors"][:, None]
    made: dict[str, Any] = {}
    if in_float8:
        kernel, made["kernel_scale"] = float8.quantize(kernel)
    made["kernel"] = float8.lay_out(kernel if in_float8 else kernel.astype(dtype), backward=False)
    if "bias" in parts[0]:
        made["bias"] = jnp.concatenate([part["bias"] for part in parts])
    return made


def _join(
    blocks: Any,
    names: tuple[str, ...],
    joined: str,
    norm: RMSNorm | None,
    lora: LoRA | None,
    dtype: str,
    in_float8: bool,
) -> None:
    """Makes one matrix of stacked ones that read the same input, layer by layer; ``norm`` gives that its factors."""
    linear, parts = getattr(blocks, names[0]), [_arrays(getattr(blocks, name)) for name in names]
    if norm is not None:
        parts[0]["factors"] = norm.scale[...]
        norm.scale[...] = jnp.ones_like(norm.scale[...])
    in_float8 = in_float8 and not any("lora_a" in part for part in parts)
    make = jax.jit(functools.partial(_joined, lora=lora, dtype=dtype, in_float8=in_float8))
    layers = range(len(parts[0]["kernel"]))
    each = [make(jax.tree.map(operator.itemgetter(i), parts)) for i in layers]
    for name in ARRAYS:
        variable = nnx.Param(tuple(one[name] for one in each)) if name in each[0] else None
        if variable is not None or hasattr(linear, name):
            setattr(linear, name, variable)
    linear.lora = None
    for name in names:
        delattr(blocks, name)
    setattr(blocks, joined, linear)


def _know_inputs(mllm: MLLM) -> None:
    """Works out once what bounds the inputs of the vision encoder's float8 products; training does it in every step."""
    vision = mllm.vision.blocks
    for bound, readers in (
        (vision.norm1.bound(), (vision.q, vision.k, vision.v)),
        (vision.v.bound(vision.norm1.length()), (vision.o,)),
        (vision.norm2.bound(), (vision.up,)),
        (vision.up.bound(vision.norm2.length()), (vision.down,)),
    ):
        for linear in readers:
            linear.input_scale = nnx.Param(float8.scale_of(bound))


def for_acting(mllm: MLLM) -> MLLM:
    """Readies a model for acting.

    Args:
      mllm: the model as it was trained. It is used up: its arrays are taken out of it.

    Returns:
      A model whose hidden states are those of the one given without dropout, up to rounding: in bfloat16 the sum of a
      matrix and its update is rounded to 8 bits, which is noise of the size of an update of 0.2 %.
    """
    config = mllm.config
    in_float8, lora = config.weight_dtype == "float8", config.language.lora
    if in_float8:
        _know_inputs(mllm)
    for name in ("q", "k", "v", "o", "up", "down"):
        _join(mllm.vision.blocks, (name,), name, None, None, config.dtype, in_float8)
    blocks = mllm.language.blocks
    for names, joined, norm in (
        (("q", "k", "v"), "qkv", blocks.norm1),
        (("gate", "up"), "gate_up", blocks.norm2),
        (("o",), "o", None),
        (("down",), "down", None),
    ):
        _join(blocks, names, joined, norm, lora, config.dtype, in_float8)
    language = dataclasses.replace(config.language, lora=None)
    held = "float8" if in_float8 else config.dtype
    mllm.language.config = language
    mllm.config = dataclasses.replace(config, language=language, weight_dtype=held)

    def cast(path: tuple, leaf: jax.Array) -> jax.Array:
        matrix = str(getattr(path[0], "key", "")) == "bridge" and leaf.ndim > 1
        return leaf.astype(config.dtype) if matrix else leaf

    graph, state = nnx.split(mllm)
    state = unstack(jax.tree_util.tree_map_with_path(cast, state), backward=False)
    return jax.block_until_ready(nnx.merge(graph, state))
