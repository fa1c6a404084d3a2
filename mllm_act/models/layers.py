"""The few layers that all parts of the model are made of.

Matrices are multiplied in the dtype of their input, which the model sets once (bfloat16 on accelerators). Norms and
softmax are computed in float32. Parameters are float32, but for frozen matrices, which are held in what the model's
config names.
"""

import dataclasses
import re
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from mllm_act.models import float8

Block = TypeVar("Block", bound=nnx.Module)

# How the matrices of vision encoder and language model may be held.
WEIGHTS = ("float32", "bfloat16", "float8")


@dataclasses.dataclass(frozen=True)
class LoRA:
    """Low-rank adaptation of chosen matrices (Hu et al. 2021); defaults of arXiv 2406.07904, appendix.

    Attributes:
      targets: regular expression; the projections (q, k, v, o, gate, up, down) it matches wholly get factors.
      rank: the factors' inner width.
      alpha: the update is scaled by ``alpha / rank``.
      dropout: probability of zeroing an input of the first factor in training.
    """

    targets: str = "q|k|v"
    rank: int = 128
    alpha: float = 32.0
    dropout: float = 0.1

    def aims_at(self, projection: str) -> bool:
        """Says whether a projection gets factors."""
        return re.fullmatch(self.targets, projection) is not None


class Linear(nnx.Module):
    """``y = x W + b``, plus ``alpha / rank * dropout(x) A B`` where it has LoRA factors."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        *,
        bias: bool = False,
        lora: LoRA | None = None,
        scale: float = 1.0,
        weights: str = "float32",
        rngs: nnx.Rngs,
    ) -> None:
        """Initialises ``W`` normal with standard deviation ``scale / sqrt(inputs)``, ``B`` and ``b`` with zeros.

        ``weights``, one of ``WEIGHTS``, is how ``W`` is held; factors and bias are float32.
        """
        kernel = jax.random.normal(rngs.params(), (inputs, outputs)) * (scale * inputs**-0.5)
        if weights == "float8":
            kernel, kernel_scale = float8.quantize(kernel)
        else:
            kernel, kernel_scale = kernel.astype(weights), None
        self.kernel = nnx.Param(kernel)
        self.kernel_scale = None if kernel_scale is None else nnx.Param(kernel_scale)
        self.bias = nnx.Param(jnp.zeros(outputs)) if bias else None
        self.lora = lora
        if lora is not None:
            self.lora_a = nnx.Param(
                jax.random.normal(rngs.params(), (inputs, lora.rank)) * inputs**-0.5
            )
            self.lora_b = nnx.Param(jnp.zeros((lora.rank, outputs)))

    def __call__(
        self, x: Float[Array, "... I"], dropped: Float[Array, "... I"] | None = None
    ) -> Float[Array, "... O"]:
        """Applies the map; LoRA's factors read ``dropped``, ``x`` after dropout, where it is given."""
        kernel = self.kernel[...]
        if self.kernel_scale is None:
            y = x @ kernel.astype(x.dtype)
        else:
            y = float8.matmul(x, kernel, self.kernel_scale[...])
        if self.bias is not None:
            y = y + self.bias[...].astype(x.dtype)
        if self.lora is not None:
            low = (x if dropped is None else dropped) @ self.lora_a[...].astype(x.dtype)
            low = low * (self.lora.alpha / self.lora.rank)
            y = y + low @ self.lora_b[...].astype(x.dtype)
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
    """Scaled dot-product attention; G may divide H (grouped-query heads). ``mask`` says what may be seen.

    On NVIDIA GPUs in 16 bits it is cuDNN's fused kernel, which wants Q and N even where there is a gradient.
    """
    seen = None if mask is None else mask[:, None]
    fused = jax.default_backend() == "gpu" and q.dtype.itemsize == 2
    out = jax.nn.dot_product_attention(
        q, k, v, mask=seen, implementation="cudnn" if fused else None
    )
    return out.reshape(*out.shape[:2], -1)


def heads(x: Float[Array, "B N HK"], count: int) -> Float[Array, "B N H K"]:
    """Splits the last axis into ``count`` heads."""
    return x.reshape(*x.shape[:-1], count, -1)


def stack(make: Callable[[nnx.Rngs], Block], layers: int, rngs: nnx.Rngs) -> Block:
    """Makes ``layers`` blocks as one module whose parameters have a leading layer axis."""
    split = nnx.split_rngs(splits=layers)
    return split(nnx.vmap(make, in_axes=(0,), out_axes=0))(rngs)


def unstack(blocks: Block, layers: int) -> nnx.List:
    """Returns stacked blocks one by one. A loop over them reads each matrix where it lies, but compiles longer."""
    graph, state = nnx.split(blocks)
    each = [jax.tree.map(lambda leaf, i=i: leaf[i], state) for i in range(layers)]
    return nnx.List([nnx.merge(graph, one) for one in each])


# What the backward pass computes again; "projections" keeps what the matrix products gave, the rest is cheap.
REMAT = ("none", "projections", "full")
KEPT = "projection"


def keep(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Marks an array as one that ``remat="projections"`` keeps."""
    return checkpoint_name(x, KEPT)


def scan(
    blocks: Block | nnx.List,
    step: Callable[[Block, Any, Any], tuple[Any, Any]],
    carry: Any,
    per_layer: Any = None,
    *,
    remat: str = "none",
) -> tuple[Any, Any]:
    """Runs blocks one after the other: stacked ones compiled once, unstacked ones each by itself.

    Args:
      blocks: what ``stack`` or ``unstack`` made.
      step: ``(block, carry, layer_input) -> (carry, layer_output)``.
      carry: what flows from block to block.
      per_layer: a tree with a leading layer axis, one slice a block.
      remat: one of ``REMAT``.

    Returns:
      The last carry, and the layer outputs stacked on a leading axis.
    """
    if isinstance(blocks, nnx.List):
        outputs = []
        for i, block in enumerate(blocks):
            layer = jax.tree.map(lambda leaf, i=i: leaf[i], per_layer)
            carry, output = step(block, carry, layer)
            outputs.append(output)
        return carry, jax.tree.map(lambda *leaves: jnp.stack(leaves), *outputs)

    graph, state = nnx.split(blocks)

    def body(carry: Any, layer: tuple[Any, Any]) -> tuple[Any, Any]:
        return step(nnx.merge(graph, layer[0]), carry, layer[1])

    if remat != "none":
        policy = None
        if remat == "projections":
            policy = jax.checkpoint_policies.save_only_these_names(KEPT)
        body = jax.checkpoint(body, prevent_cse=False, policy=policy)
    return jax.lax.scan(body, carry, (state, per_layer))
