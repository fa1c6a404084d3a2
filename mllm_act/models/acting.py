"""A model as it acts: LoRA merged into the matrices, everything in the dtype it computes in, layers one by one.

One decision multiplies few rows by every matrix, so that its time is the time of reading them. A loop over stacked
blocks would copy each matrix out of its stack first. Matrices that read the same input are one, wide enough to keep
a whole GPU reading.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from mllm_act.models.language import PROJECTIONS
from mllm_act.models.layers import Linear, unstack
from mllm_act.models.mllm import MLLM


def _merge(linear: Linear, dtype: jnp.dtype) -> None:
    """Folds the scale and LoRA's factors of stacked matrices into them, and casts them."""
    kernel = linear.kernel[...].astype(jnp.float32)
    if linear.kernel_scale is not None:
        kernel = kernel * linear.kernel_scale[...][:, None, None]
        linear.kernel_scale = None
    if linear.lora is not None:
        update = jnp.matmul(linear.lora_a[...], linear.lora_b[...], precision="highest")
        kernel = kernel + update * (linear.lora.alpha / linear.lora.rank)
        del linear.lora_a, linear.lora_b
        linear.lora = None
    linear.kernel = nnx.Param(kernel.astype(dtype))


def _join(block: nnx.Module, names: tuple[str, ...], joined: str) -> None:
    """Makes one matrix of several that read the same input."""
    parts = [getattr(block, name) for name in names]
    parts[0].kernel = nnx.Param(jnp.concatenate([part.kernel[...] for part in parts], axis=-1))
    for name in names:
        delattr(block, name)
    setattr(block, joined, parts[0])


def for_acting(mllm: MLLM) -> MLLM:
    """Readies a model for acting. The model given is used up: its arrays are changed in place.

    Args:
      mllm: the model as it was trained.

    Returns:
      The same model; its hidden states are those of the one given without dropout, up to rounding.
    """
    config = mllm.config
    dtype = jnp.dtype(config.dtype)
    for name in PROJECTIONS:
        _merge(getattr(mllm.language.blocks, name), dtype)
    for name in ("q", "k", "v", "o", "up", "down"):
        _merge(getattr(mllm.vision.blocks, name), dtype)
    _join(mllm.language.blocks, ("q", "k", "v"), "qkv")
    _join(mllm.language.blocks, ("gate", "up"), "gate_up")
    language = dataclasses.replace(config.language, lora=None)
    mllm.config = dataclasses.replace(config, language=language, weights=config.dtype)
    graph, state = nnx.split(mllm)
    return jax.block_until_ready(nnx.merge(graph, unstack(state)))
