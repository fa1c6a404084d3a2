"""The few layers that all parts of the model are made of.

Parameters keep the dtype they are created with, float32; matrices are multiplied in the dtype of their
input, which the model sets once (bfloat16 on accelerators). Norms and softmax are computed in float32.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, PRNGKeyArray

Block = TypeVar("Block", bound=nnx.Module)


@dataclasses.dataclass(frozen=True)
class LoRA:
    """Low-rank adaptation of chosen matrices (Hu et al. 2021); defaults of arXiv 2406.07904, appendix.

    Attributes:
      targets: names of the projections that get factors.
      rank: the factors' inner width.
      alpha: the update is scaled by ``alpha / rank``.
      dropout: probability of zeroing an input of the first factor in training.
    """

    targets: tuple[str, ...] = ("q", "k", "v")
    rank: int = 128
    alpha: float = 32.0
    dropout: float = 0.1


class Linear(nnx.Module):
    """``y = x W + b``, plus ``alpha / rank * dropout(x) A B`` where LoRA targets it."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        *,
        bias: bool = False,
        lora: LoRA | None = None,
        scale: float = 1.0,
        rngs: nnx.Rngs,
    ) -> None:
        """Initialises ``W`` normal with standard deviation ``scale / sqrt(inputs)``, ``B`` and ``b`` with zeros."""
        std = scale * inputs**-0.5
        self.kernel = nnx.Param(jax.random.normal(rngs.params(), (inputs, outputs)) * std)
        self.bias = nnx.Param(jnp.zeros(outputs)) if bias else None
        self.lora = lora
        if lora is not None:
            self.lora_a = nnx.Param(
                jax.random.normal(rngs.params(), (inputs, lora.rank)) * inputs**-0.5
            )
            self.lora_b = nnx.Param(jnp.zeros((lora.rank, outputs)))

    def __call__(
        self, x: Float[Array, "... I"], key: PRNGKeyArray | None = None
    ) -> Float[Array, "... O"]:
        """Applies the map; ``key`` turns LoRA's dropout on."""
        y = x @ self.kernel[...].astype(x.dtype)
        if self.bias is not None:
            y = y + self.bias[...].astype(x.dtype)
        if self.lora is not None:
            low = dropout(x, self.lora.dropout, key) @ self.lora_a[...].astype(x.dtype)
            y = y + (low @ self.lora_b[...].astype(x.dtype)) * (self.lora.alpha / self.lora.rank)
        return y


def dropout(x: Float[Array, "..."], rate: float, key: PRNGKeyArray | None) -> Float[Array, "..."]:
    """Zeroes entries with probability ``rate`` and scales the rest up; the identity without a key."""
    if key is None or rate == 0.0:
        return x
    keep = jax.random.bernoulli(key, 1.0 - rate, x.shape)
    return jnp.where(keep, x / (1.0 - rate), 0).astype(x.dtype)


class LayerNorm(nnx.Module):
    """Layer normalisation over the last axis, in float32."""

    def __init__(self, width: int, *, epsilon: float = 1e-5) -> None:
        self.scale = nnx.Param(jnp.ones(width))
        self.bias = nnx.Param(jnp.zeros(width))
        self.epsilon = epsilon

    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        x32 = x.astype(jnp.float32)
        centred = x32 - x32.mean(-1, keepdims=True)
        normal = centred * jax.lax.rsqrt(jnp.square(centred).mean(-1, keepdims=True) + self.epsilon)
        return (normal * self.scale[...] + self.bias[...]).astype(x.dtype)


class RMSNorm(nnx.Module):
    """Root-mean-square normalisation over the last axis, in float32 (Llama)."""

    def __init__(self, width: int, *, epsilon: float) -> None:
        self.scale = nnx.Param(jnp.ones(width))
        self.epsilon = epsilon

    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        x32 = x.astype(jnp.float32)
        normal = x32 * jax.lax.rsqrt(jnp.square(x32).mean(-1, keepdims=True) + self.epsilon)
        return (normal * self.scale[...]).astype(x.dtype)


def attend(
    q: Float[Array, "B Q H K"],
    k: Float[Array, "B N G K"],
    v: Float[Array, "B N G K"],
    mask: Bool[Array, "B Q N"] | None = None,
) -> Float[Array, "B Q HK"]:
    """Scaled dot-product attention; G may divide H (grouped-query heads). ``mask`` says what may be seen."""
    seen = None if mask is None else mask[:, None]
    out = jax.nn.dot_product_attention(q, k, v, mask=seen)
    return out.reshape(*out.shape[:2], -1)


def heads(x: Float[Array, "B N HK"], count: int) -> Float[Array, "B N H K"]:
    """Splits the last axis into ``count`` heads."""
    return x.reshape(*x.shape[:-1], count, -1)


def stack(make: Callable[[nnx.Rngs], Block], layers: int, rngs: nnx.Rngs) -> Block:
    """Makes ``layers`` blocks as one module whose parameters have a leading layer axis."""
    split = nnx.split_rngs(splits=layers)
    return split(nnx.vmap(make, in_axes=(0,), out_axes=0))(rngs)


def scan(
    blocks: Block,
    step: Callable[[Block, Any, Any], tuple[Any, Any]],
    carry: Any,
    per_layer: Any = None,
    *,
    remat: bool = False,
) -> tuple[Any, Any]:
    """Runs stacked blocks one after the other, compiled once.

    Args:
      blocks: what ``stack`` made.
      step: ``(block, carry, layer_input) -> (carry, layer_output)``.
      carry: what flows from block to block.
      per_layer: a tree with a leading layer axis, one slice a block.
      remat: whether activations are computed again in the backward pass instead of kept.

    Returns:
      The last carry, and the layer outputs stacked on a leading axis.
    """
    graph, state = nnx.split(blocks)

    def body(carry: Any, layer: tuple[Any, Any]) -> tuple[Any, Any]:
        return step(nnx.merge(graph, layer[0]), carry, layer[1])

    return jax.lax.scan(
        jax.checkpoint(body, prevent_cse=False) if remat else body, carry, (state, per_layer)
    )
