"""The few layers that all parts of the model are made of.

Matrices are multiplied in the dtype of their input, which the model sets once (bfloat16 on accelerators). Norms and
softmax are computed in float32. Parameters are float32, except frozen matrices, whose dtype the model's config names.
"""

import dataclasses
import functools
import operator
import re
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from mllm_act import placement
from mllm_act.errors import UserError
from mllm_act.models import float8

Block = TypeVar("Block", bound=nnx.Module)

MULTIPLE = 8  # of sequence lengths: fused attention and 8-bit products need even, aligned sizes

# Dtypes for the matrices of vision encoder and language model.
WEIGHT_DTYPES = ("float32", "bfloat16", "float8")


@dataclasses.dataclass(frozen=True)
class LoRA:
    """Low-rank adaptation of chosen matrices (Hu et al. 2021); defaults of arXiv 2406.07904, appendix.

    Attributes:
      targets: regular expression; projections (q, k, v, o, gate, up, down) that match it in full get factors.
      rank: inner width of the factors.
      alpha: the update is scaled by ``alpha / rank``.
      dropout: probability of zeroing an input of the first factor in training.
    """

    targets: str = "q|k|v"
    rank: int = 128
    alpha: float = 32.0
    dropout: float = 0.1

    def aims_at(self, projection: str) -> bool:
        """Returns whether a projection gets factors.

        Raises:
          UserError: if ``targets`` is not a regular expression.
        """
        try:
            return re.fullmatch(self.targets, projection) is not None
        except re.error as error:
            raise UserError(
                f"lora.targets: expected a regular expression such as q|k|v, found {self.targets!r} ({error})"
            ) from error


class Linear(nnx.Module):
    """``y = x W + b``, plus ``alpha / rank * dropout(x) A B`` where it has LoRA factors."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        *,
        name: str = "",
        bias: bool = False,
        lora: LoRA | None = None,
        scale: float = 1.0,
        weight_dtype: str = "float32",
        rngs: nnx.Rngs,
    ) -> None:
        """Initialises ``W`` normal with standard deviation ``scale / sqrt(inputs)``, ``B`` and ``b`` with zeros.

        ``W`` is stored in ``weight_dtype``, one of ``WEIGHT_DTYPES``; factors and bias are float32. ``name`` is that of
        the attribute that holds the map, for the rules of ``mllm_act.placement``.
        """
        self.name = name
        kernel = jax.random.normal(rngs.params(), (inputs, outputs)) * (scale * inputs**-0.5)
        if weight_dtype == "float8":
            kernel, kernel_scale = float8.quantize(kernel)
        else:
            kernel, kernel_scale = kernel.astype(weight_dtype), None
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
        self,
        x: Float[Array, "... I"],
        dropped: Float[Array, "... I"] | None = None,
        bound: Float[Array, ""] | None = None,
    ) -> Float[Array, "... O"]:
        """Applies the map.

        Args:
          x: the input, whose dtype the map is computed in.
          dropped: ``x`` after dropout, as LoRA's factors read it; ``x`` by default.
          bound: a known upper bound on the entries of ``x``; without it, products in float8 have to find one.
        """
        inputs, outputs = placement.ends(self.name)
        x = placement.activation(x, inputs)
        kernel = placement.gathered(self.kernel.get_value(), f"{self.name}/kernel")
        if self.kernel_scale is None:
            y = x @ kernel.astype(x.dtype)
        else:
            input_scale = None if bound is None else float8.scale_of(bound)
            y = float8.matmul(x, kernel, self.kernel_scale[...], input_scale)
        y = placement.activation(y, outputs)
        if self.bias is not None:
            y = y + self.bias[...].astype(x.dtype)
        if self.lora is not None:
            lora_a = placement.gathered(self.lora_a[...], f"{self.name}/lora_a")
            lora_b = placement.gathered(self.lora_b[...], f"{self.name}/lora_b")
            low = placement.activation((x if dropped is None else dropped) @ lora_a.astype(x.dtype))
            low = keep(low) * (self.lora.alpha / self.lora.rank)
            y = placement.activation(y + low @ lora_b.astype(x.dtype), outputs)
        return y

    def bound(self, length: Float[Array, "*L"]) -> Float[Array, "*L"]:
        """Returns a bound on every output, for inputs whose Euclidean length is at most ``length`` (Cauchy-Schwarz).

        Here and in norms, ``L`` are the layers of a stacked block.
        """
        kernel = self.kernel.get_value()
        transposed = kernel[1] if isinstance(kernel, tuple) else kernel.mT
        squares = jnp.square(transposed.astype(jnp.float32)).sum(-1)
        scale = 1.0 if self.kernel_scale is None else self.kernel_scale[...][..., None]
        column = jnp.sqrt(squares) * scale * length[..., None]
        return (column if self.bias is None else column + jnp.abs(self.bias[...])).max(-1)


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
        # Both sums in one pass over x; in float32 that is exact enough if the mean is within 100 deviations of 0.
        mean = x32.mean(-1, keepdims=True)
        variance = jnp.maximum(jnp.square(x32).mean(-1, keepdims=True) - jnp.square(mean), 0)
        normal = (x32 - mean) * jax.lax.rsqrt(variance + self.epsilon)
        return (normal * self.scale[...] + self.bias[...]).astype(x.dtype)

    def bound(self) -> Float[Array, "*L"]:
        """Returns a bound on every output: no entry of a row of unit variance exceeds the root of its width."""
        root = self.scale.shape[-1] ** 0.5
        return root * jnp.abs(self.scale[...]).max(-1) + jnp.abs(self.bias[...]).max(-1)

    def length(self) -> Float[Array, "*L"]:
        """Returns a bound on the Euclidean length of every output row."""
        root = self.scale.shape[-1] ** 0.5
        bias = jnp.sqrt(jnp.square(self.bias[...]).sum(-1))
        return root * jnp.abs(self.scale[...]).max(-1) + bias


class RMSNorm(nnx.Module):
    """Root-mean-square normalisation over the last axis, in float32 (Llama)."""

    def __init__(self, width: int, *, epsilon: float) -> None:
        self.scale = nnx.Param(jnp.ones(width))
        self.epsilon = epsilon

    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        x32 = x.astype(jnp.float32)
        normal = x32 * jax.lax.rsqrt(jnp.square(x32).mean(-1, keepdims=True) + self.epsilon)
        return (normal * self.scale[...]).astype(x.dtype)

    def bound(self) -> Float[Array, "*L"]:
        """Returns a bound on every output; see ``LayerNorm.bound``."""
        return self.scale.shape[-1] ** 0.5 * jnp.abs(self.scale[...]).max(-1)


def attend(
    q: Float[Array, "B Q H K"],
    k: Float[Array, "B N G K"],
    v: Float[Array, "B N G K"],
    mask: Bool[Array, "B Q N"] | None = None,
    *,
    length: int | None = None,
) -> Float[Array, "B Q HK"]:
    """Scaled dot-product attention; G may divide H (grouped-query heads).

    On NVIDIA GPUs in 16 bits it is cuDNN's fused kernel, which needs even Q and N where there is a gradient; with a
    mask they are even (``MULTIPLE``).

    Args:
      q: queries.
      k: keys.
      v: values.
      mask: which keys each query attends to.
      length: the number of keys to attend to, if those are the same first ones for all queries.
    """
    whole = length is None or length == k.shape[1]
    even = mask is not None or not (q.shape[1] % 2 or k.shape[1] % 2)

    def local(q: Array, k: Array, v: Array, mask: Array | None) -> Array:
        return jax.nn.dot_product_attention(
            q,
            k,
            v,
            mask=None if mask is None else mask[:, None],
            key_value_seq_lengths=None if whole else jnp.full(len(q), jnp.int32(length)),
            implementation="cudnn" if fused(q.dtype) and even else None,
        )

    out = placement.local_attention(local, q, k, v, mask)
    return out.reshape(*out.shape[:2], -1)


def fused(dtype: jnp.dtype) -> bool:
    """Whether attention in this dtype is cuDNN's."""
    return jax.default_backend() == "gpu" and jnp.dtype(dtype).itemsize == 2


def heads(x: Float[Array, "B N HK"], count: int) -> Float[Array, "B N H K"]:
    """Splits the last axis into ``count`` heads."""
    return x.reshape(*x.shape[:-1], count, -1)


def stack(make: Callable[[nnx.Rngs], Block], layers: int, rngs: nnx.Rngs) -> Block:
    """Makes ``layers`` blocks as one module whose parameters have a leading layer axis."""
    split = nnx.split_rngs(splits=layers)
    return split(nnx.vmap(make, in_axes=(0,), out_axes=0))(rngs)


# What the backward pass recomputes; "projections" keeps the results of matrix products, the rest is cheap.
REMAT = ("none", "projections", "full")
KEPT = "projection"


def keep(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Marks an array as one that ``remat="projections"`` keeps."""
    return checkpoint_name(x, KEPT)


def unstack(state: nnx.State, *, backward: bool) -> nnx.State:
    """Returns a state in which stacked parameters (those under ``blocks``) are tuples of one array per layer.

    ``scan`` then runs the layers unrolled and reads each matrix in place. Otherwise XLA copies the matrices of a layer
    out of their stack, which takes a tenth of a training step on a GPU but compiles faster. Matrices in float8 are laid
    out for products, and for gradients if there is a ``backward`` pass.
    """

    def cut(value: Array | tuple[Any, ...]) -> tuple[Any, ...]:
        if isinstance(value, tuple):  # already cut
            return value
        if value.dtype == float8.DTYPE:
            return tuple(float8.lay_out(layer, backward) for layer in value)
        return tuple(value)

    def one(path: tuple, variable: nnx.Variable) -> nnx.Variable:
        stacked = any(getattr(key, "key", None) == "blocks" for key in path)
        return variable.replace(cut(variable.get_value())) if stacked else variable

    return jax.tree_util.tree_map_with_path(one, state, is_leaf=_is_variable)


def scan(
    blocks: Block,
    step: Callable[[Block, Any, Any], tuple[Any, Any]],
    carry: Any,
    per_layer: Any = None,
    *,
    remat: str = "none",
    layers: int | None = None,
) -> tuple[Any, Any]:
    """Runs stacked blocks in sequence: compiled once, or unrolled if some parameters are unstacked.

    Args:
      blocks: from ``stack``; parameters may be tuples, see ``unstack``.
      step: ``(block, carry, layer_input) -> (carry, layer_output)``.
      carry: what flows from block to block.
      per_layer: a tree with a leading layer axis, one slice per block; if blocks are unrolled, parts of it may be lists
        with one entry per block.
      remat: one of ``REMAT``.
      layers: how many of the blocks run, from the first; all by default.

    Returns:
      The last carry, and the layer outputs: stacked on a leading axis, or a list if blocks are unrolled.
    """
    graph, state = nnx.split(blocks)
    if layers is not None:
        state = _map_variables(lambda value: value[:layers], state)
    policy = None
    if remat == "none" and placement.gathers():
        remat, policy = "gathered", placement.all_but_gathered
    elif remat == "projections":
        policy = jax.checkpoint_policies.save_only_these_names(KEPT)

    def run(state: nnx.State, carry: Any, layer: Any) -> tuple[Any, Any]:
        return step(nnx.merge(graph, state), carry, layer)

    tuples = [v for v in _variables(state) if isinstance(v.get_value(), tuple)]
    if not tuples:
        body = run if remat == "none" else jax.checkpoint(run, prevent_cse=False, policy=policy)
        return jax.lax.scan(lambda c, xs: body(xs[0], c, xs[1]), carry, (state, per_layer))

    count = len(tuples[0].get_value())
    body = run if remat == "none" else jax.checkpoint(run, policy=policy)
    pieces = _map_variables(functools.partial(_pieces, layers=count), state)
    outputs: list[Any] = []
    before = carry  # of the layer before
    for i in range(count):
        ith = operator.itemgetter(i)
        layer = jax.tree.map(ith, per_layer, is_leaf=lambda node: isinstance(node, list))
        weights = placement.one_layer_ahead(_map_variables(ith, pieces), before)
        before, (carry, output) = carry, body(weights, carry, layer)
        outputs.append(output)
    return carry, outputs


def _is_variable(node: Any) -> bool:
    return isinstance(node, nnx.Variable)


def _variables(state: nnx.State) -> list[nnx.Variable]:
    return jax.tree.leaves(state, is_leaf=_is_variable)


def _map_variables(f: Callable[[Any], Any], state: nnx.State) -> nnx.State:
    return jax.tree.map(lambda v: v.replace(f(v.get_value())), state, is_leaf=_is_variable)


def _pieces(value: Array | tuple[Any, ...], layers: int) -> tuple[Any, ...]:
    """Cuts a stacked parameter into its layers. (The gradient of ``lax.split`` is one concatenation.)"""
    if isinstance(value, tuple):
        return value
    return tuple(piece[0] for piece in jax.lax.split(value, [1] * layers))
