"""A model as it acts: LoRA merged into the matrices, everything in the dtype it computes in, blocks one by one.

One decision multiplies few rows by every matrix, so that its time is the time of reading them. A loop over stacked
blocks would copy each matrix out of its stack before reading it.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from mllm_act.models.language import PROJECTIONS
from mllm_act.models.layers import Linear, unstack
from mllm_act.models.mllm import MLLM


def _merge(linear: Linear, dtype: jnp.dtype) -> None:
    """Folds scales and LoRA's factors of a stacked matrix into it, and casts it."""
    kernel = linear.kernel[...].astype(jnp.float32)
    if linear.kernel_scale is not None:
        kernel = kernel * linear.kernel_scale[...][..., None, :]
        linear.kernel_scale = None
    if linear.lora is not None:
        update = jnp.matmul(linear.lora_a[...], linear.lora_b[...], precision="highest")
        kernel = kernel + update * (linear.lora.alpha / linear.lora.rank)
        del linear.lora_a, linear.lora_b
        linear.lora = None
    linear.kernel = nnx.Param(kernel.astype(dtype))


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
    mllm.language.blocks = unstack(mllm.language.blocks, config.language.layers)
    mllm.vision.blocks = unstack(mllm.vision.blocks, config.vision.layers)
    language = dataclasses.replace(config.language, lora=None)
    mllm.config = dataclasses.replace(config, language=language, weights=config.dtype)
    jax.block_until_ready(nnx.state(mllm))
    return mllm
