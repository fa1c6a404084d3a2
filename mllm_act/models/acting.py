"""A model as it acts: LoRA merged into the matrices, layers one by one.

One decision multiplies few rows by every matrix, so that its time is the time of reading them. A loop over stacked
blocks would copy each matrix out of its stack first. Matrices that read the same input are one, wide enough to keep
a whole GPU reading. They are in the dtype the model computes in, or in float8 where the model holds them so.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from mllm_act.models import float8
from mllm_act.models.language import LanguageBlock
from mllm_act.models.layers import Linear, unstack
from mllm_act.models.mllm import MLLM
from mllm_act.models.vision import VisionBlock


def _merged(linear: Linear) -> Float[Array, "L I O"]:
    """Returns stacked matrices with scale and LoRA's factors folded in."""
    kernel = linear.kernel[...].astype(jnp.float32)
    if linear.kernel_scale is not None:
        kernel = kernel * linear.kernel_scale[...][:, None, None]
    if linear.lora is not None:
        update = jnp.matmul(linear.lora_a[...], linear.lora_b[...], precision="highest")
        kernel = kernel + update * (linear.lora.alpha / linear.lora.rank)
        del linear.lora_a, linear.lora_b
        linear.lora = None
    return kernel


def _join(blocks: nnx.Module, names: tuple[str, ...], joined: str, held: str) -> None:
    """Makes one matrix of those that read the same input."""
    linear = getattr(blocks, names[0])
    kernel = jnp.concatenate([_merged(getattr(blocks, name)) for name in names], axis=-1)
    if held == "float8":
        kernel, scale = float8.quantize(kernel)
        linear.kernel_scale = nnx.Param(scale)
    linear.kernel = nnx.Param(kernel if held == "float8" else kernel.astype(held))
    for name in names:
        delattr(blocks, name)
    setattr(blocks, joined, linear)


def _scale(bound: Float[Array, " L"]) -> nnx.Param:
    return nnx.Param(float8.scale_of(bound))


def _know_inputs(
    blocks: VisionBlock | LanguageBlock, first: tuple[str, ...], second: tuple[str, ...]
) -> None:
    """Works out once what bounds the input of the matrices behind each norm; training does it in every step."""
    for norm, names in ((blocks.norm1, first), (blocks.norm2, second)):
        for name in names:
            getattr(blocks, name).input_scale = _scale(norm.bound())


def for_acting(mllm: MLLM) -> MLLM:
    """Readies a model for acting. The model given is used up: its arrays are changed in place.

    Args:
      mllm: the model as it was trained.

    Returns:
      The same model; its hidden states are those of the one given without dropout, up to rounding.
    """
    config = mllm.config
    held = "float8" if config.weights == "float8" else config.dtype
    for name in ("q", "k", "v", "o", "up", "down"):
        _join(mllm.vision.blocks, (name,), name, held)
    for name in ("o", "down"):
        _join(mllm.language.blocks, (name,), name, held)
    _join(mllm.language.blocks, ("q", "k", "v"), "qkv", held)
    _join(mllm.language.blocks, ("gate", "up"), "gate_up", held)
    if held == "float8":
        _know_inputs(mllm.vision.blocks, ("q", "k", "v"), ("up",))
        _know_inputs(mllm.language.blocks, ("qkv",), ("gate_up",))
        blocks = mllm.vision.blocks
        blocks.down.input_scale = _scale(blocks.up.bound(blocks.norm2.length()))
    language = dataclasses.replace(config.language, lora=None)
    mllm.config = dataclasses.replace(config, language=language, weights=held)
    graph, state = nnx.split(mllm)
    return jax.block_until_ready(nnx.merge(graph, unstack(state, backward=False)))
