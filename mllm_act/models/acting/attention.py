"""Attention of few rows to earlier inputs and to each other, in one kernel: rotary positions, softmax and cache."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jaxtyping import Array, Float

from mllm_act.models.acting.products import RowsWithStats, column, origin, power_of_two

# Keys and values of earlier inputs.
Segment = tuple[Float[Array, "1 _ G K"], Float[Array, "1 _ G K"]]


def _attention_kernel(*refs: Any, heads: int, kv_heads: int, lengths: tuple[int, ...]) -> None:
    """One head; see ``attend``."""
    qkv_ref, cos_ref, sin_ref, own_bias_ref, *past_refs = refs[:-4]
    out_ref, largest_ref, k_ref, v_ref = refs[-4:]
    size = out_ref.shape[1]
    half = size // 2
    h = pl.program_id(0)
    g = h // (heads // kv_heads)
    cos, sin = cos_ref[...], sin_ref[...]

    def rotated(start: Array) -> tuple[Array, Array]:
        a = qkv_ref[:, pl.ds(start, half)].astype(jnp.float32)
        b = qkv_ref[:, pl.ds(start + half, half)].astype(jnp.float32)
        dtype = qkv_ref.dtype
        return (a * cos - b * sin).astype(dtype), (b * cos + a * sin).astype(dtype)

    q, k = rotated(h * size), rotated((heads + g) * size)
    v = qkv_ref[:, pl.ds((heads + kv_heads + g) * size, size)]
    k_ref[:, pl.ds(0, half)], k_ref[:, pl.ds(half, half)] = k
    v_ref[...] = v

    def scores(keys: tuple[Array, Array], bias: Array) -> Array:
        dots = [
            jnp.dot(a, b.T, preferred_element_type=jnp.float32)
            for a, b in zip(q, keys, strict=True)
        ]
        return (dots[0] + dots[1]) * size**-0.5 + bias

    parts = [(scores(k, own_bias_ref[...]), v)]
    for i, length in enumerate(lengths):
        keys_ref, values_ref, bias_ref = past_refs[3 * i : 3 * i + 3]
        padded = bias_ref.shape[1]
        valid = (jax.lax.iota(jnp.int32, padded) < length)[:, None]

        def read(
            ref: Any, start: Array, count: int, padded: int = padded, valid: Array = valid
        ) -> Array:
            block = ref.at[:, pl.ds(start, count)]
            return triton.load(block, mask=jnp.broadcast_to(valid, (padded, count)), other=0.0)

        keys = read(keys_ref, g * size, half), read(keys_ref, g * size + half, half)
        parts.append((scores(keys, bias_ref[...]), read(values_ref, g * size, size)))
    top = functools.reduce(jnp.maximum, [jnp.max(s, 1) for s, _ in parts])
    weights = [(jnp.exp(s - top[:, None]), values) for s, values in parts]
    total = functools.reduce(jnp.add, [jnp.sum(p, 1) for p, _ in weights])
    sums = [
        jnp.dot(p.astype(values.dtype), values, preferred_element_type=jnp.float32)
        for p, values in weights
    ]
    out = functools.reduce(jnp.add, sums) / total[:, None]
    out_ref[...] = out.astype(out_ref.dtype)
    largest_ref[...] = jnp.max(jnp.abs(out), 1)[:, None]


def attend(
    qkv: Float[Array, "R QKV"],
    cos: Float[Array, "R half"],
    sin: Float[Array, "R half"],
    biases: list[Float[Array, "R _"]],
    past: list[Segment],
    heads: int,
    kv_heads: int,
) -> tuple[RowsWithStats, Segment]:
    """Returns the values that rows attend to, and their own keys and values.

    Args:
      qkv: queries, keys and values of the rows.
      cos: of the rotary angles.
      sin: of the rotary angles.
      biases: added to the scores of the rows' own keys, then of each segment's, padded to a power of two.
      past: keys and values of earlier inputs.
      heads: H.
      kv_heads: G.
    """
    rows = len(qkv)
    size = qkv.shape[1] // (heads + 2 * kv_heads)
    arrays, lengths = [qkv, cos, sin, biases[0]], []
    specs = [pl.BlockSpec(array.shape, origin) for array in arrays]
    for (keys, values), bias in zip(past, biases[1:], strict=True):
        length, padded = keys.shape[1], bias.shape[1]
        lengths.append(length)
        arrays += [keys.reshape(length, -1), values.reshape(length, -1), bias]
        # Blocks as long as the bias: a power of two, as Triton needs it. The kernel masks what lies beyond the segment.
        block = pl.BlockSpec((padded, kv_heads * size), origin)
        specs += [block, block, pl.BlockSpec(bias.shape, origin)]
    own = pl.BlockSpec((rows, size), functools.partial(_group, heads // kv_heads))
    cache = jax.ShapeDtypeStruct((rows, kv_heads * size), qkv.dtype)
    out, largest, k, v = pl.pallas_call(
        functools.partial(
            _attention_kernel, heads=heads, kv_heads=kv_heads, lengths=tuple(lengths)
        ),
        grid=(heads,),
        in_specs=specs,
        out_specs=[pl.BlockSpec((rows, size), column), pl.BlockSpec((rows, 1), column), own, own],
        out_shape=[
            jax.ShapeDtypeStruct((rows, heads * size), qkv.dtype),
            jax.ShapeDtypeStruct((rows, power_of_two(heads)), jnp.float32),
            cache,
            cache,
        ],
        compiler_params=triton.CompilerParams(num_warps=4, num_stages=1),
        interpret=jax.default_backend() == "cpu",
        name="attend",
    )(*arrays)
    shape = (1, rows, kv_heads, size)
    return RowsWithStats(out, largest, heads), (k.reshape(shape), v.reshape(shape))


def _group(heads: int, h: Array) -> tuple[int, Array]:
    return 0, h // heads
