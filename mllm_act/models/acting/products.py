"""Matrix products for few rows, as when one robot acts: each weight matrix is read once.

A decision multiplies a handful of rows by every matrix, so it is bound by memory bandwidth and kernel launches. Norms,
casts, activations and residual sums are fused into the products next to them (Pallas, lowered through Triton). Each
product also writes the row statistics that the next one needs, block by block: sums of squares, or largest entries.

``models.acting.language`` puts them together; a test compares the result with ``LanguageBlock``.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jaxtyping import Array, Float

from mllm_act.models import float8

BLOCK_K = 256  # entries of a row that are read at a time


def power_of_two(count: int) -> int:
    """Returns the least power of two that is at least ``count`` and 16, the smallest tile of tensor cores."""
    return max(16, 1 << (count - 1).bit_length())


@dataclasses.dataclass(frozen=True)
class RowsWithStats:
    """Rows, and the statistics of each that the next product needs, block by block.

    Attributes:
      x: the rows.
      statistic: sums of squares if a norm comes next, else largest entries; the first ``blocks`` columns are valid.
      blocks: how many blocks there are.
    """

    x: Float[Array, "R I"]
    statistic: Float[Array, "R S"]
    blocks: int


def _norm_factor(squares: Float[Array, "*R"], width: int, epsilon: float) -> Float[Array, "*R"]:
    return jax.lax.rsqrt(squares / width + epsilon)


def _quantize_kernel(
    x_ref: Any,
    stats_ref: Any,
    out_ref: Any,
    factor_ref: Any,
    *,
    width: int,
    blocks: int,
    epsilon: float | None,
) -> None:
    """One row; see ``_quantize``."""
    valid = jax.lax.iota(jnp.int32, stats_ref.shape[0]) < blocks
    statistics = jnp.where(valid, stats_ref[...], 0.0)
    if epsilon is None:
        scale = float8.scale_of(jnp.max(statistics))
        factor = scale
    else:  # no entry of a row exceeds its Euclidean length
        squares = jnp.sum(statistics)
        scale = float8.scale_of(jnp.sqrt(squares))
        factor = scale * _norm_factor(squares, width, epsilon)
    columns = pl.ds(0, x_ref.shape[0])
    valid = jax.lax.iota(jnp.int32, x_ref.shape[0]) < width
    x = triton.load(x_ref.at[columns], mask=valid, other=0.0).astype(jnp.float32) / scale
    x = jnp.clip(x, -float8.LARGEST, float8.LARGEST).astype(out_ref.dtype)
    triton.store(out_ref.at[columns], x, mask=valid)
    factor_ref[...] = factor[None]


def _quantize(
    rows: RowsWithStats, epsilon: float | None
) -> tuple[Float[Array, "R I"], Float[Array, "R 1"]]:
    """Returns rows in float8, and the factor of each that a product is to be multiplied by.

    ``epsilon`` is that of the norm that the rows pass first, or None.
    """
    count, width = rows.x.shape

    def of_row(columns: int) -> pl.BlockSpec:
        return pl.BlockSpec((None, columns), lambda row: (row, 0))

    return pl.pallas_call(
        functools.partial(_quantize_kernel, width=width, blocks=rows.blocks, epsilon=epsilon),
        grid=(count,),
        # Blocks of a power of two, which Triton needs; the kernel masks what lies beyond a row.
        in_specs=[of_row(power_of_two(width)), of_row(rows.statistic.shape[1])],
        out_specs=[of_row(power_of_two(width)), of_row(1)],
        out_shape=[
            jax.ShapeDtypeStruct((count, width), float8.DTYPE),
            jax.ShapeDtypeStruct((count, 1), jnp.float32),
        ],
        compiler_params=triton.CompilerParams(num_warps=8, num_stages=1),
        interpret=jax.default_backend() == "cpu",
        name="quantize",
    )(rows.x, rows.statistic)


def _product_kernel(
    x_ref: Any, factor_ref: Any, *refs: Any, steps: int, blocks: int, epsilon: float | None,
    scaled: bool, gated: bool, residual: bool,
) -> None:  # fmt: skip
    """One block of columns; see ``product``."""
    remaining = list(refs)
    scale_ref = remaining.pop(0) if scaled else None
    kernel_refs = [remaining.pop(0) for _ in range(1 + gated)]
    residual_ref = remaining.pop(0) if residual else None
    out_ref, stats_ref = remaining

    def add(k: Array, sums: tuple[Array, ...]) -> tuple[Array, ...]:
        columns = pl.ds(k * BLOCK_K, BLOCK_K)
        x = x_ref[:, columns]
        return tuple(
            total + jnp.dot(x, kernel[:, columns].T, preferred_element_type=jnp.float32)
            for total, kernel in zip(sums, kernel_refs, strict=True)
        )

    zero = jnp.zeros(out_ref.shape, jnp.float32)
    sums = jax.lax.fori_loop(0, steps, add, (zero,) * len(kernel_refs))
    if scale_ref is not None:
        sums = tuple(total * (factor_ref[...] * scale_ref[0]) for total in sums)
    elif epsilon is not None:
        valid = jax.lax.broadcasted_iota(jnp.int32, factor_ref.shape, 1) < blocks
        squares = jnp.sum(jnp.where(valid, factor_ref[...], 0.0), axis=1, keepdims=True)
        factor = _norm_factor(squares, x_ref.shape[1], epsilon)
        sums = tuple(total * factor for total in sums)
    out = sums[0]
    if gated:
        out = out * jax.nn.sigmoid(out) * sums[1]
    if residual_ref is not None:
        out = out + residual_ref[...].astype(jnp.float32)
    out_ref[...] = out.astype(out_ref.dtype)
    statistic = jnp.sum(out * out, 1) if residual else jnp.max(jnp.abs(out), 1)
    stats_ref[...] = statistic[:, None]


def product(
    rows: RowsWithStats,
    linear: Any,
    *,
    norm: Any = None,
    gated: bool = False,
    residual: Float[Array, "R O"] | None = None,
) -> RowsWithStats:
    """Multiplies rows by a matrix stored for acting, [O, I], in float8 or in the dtype of the rows.

    Args:
      rows: the input.
      linear: the matrix, an ``ActingLinear``.
      norm: an ``RMSNorm`` that the rows pass first; its factors are part of the matrix already.
      gated: whether the matrix is two matrices, and the result ``silu(first) * second``.
      residual: added to the result; a norm comes next.
    """
    epsilon = None if norm is None else norm.epsilon
    kernel = linear.kernel.get_value()[1]
    (count, width), dtype = rows.x.shape, rows.x.dtype
    outputs = kernel.shape[0] // (1 + gated)
    # Smaller blocks if there would be fewer of them than processors.
    block, warps, stages = (16, 2, 5) if outputs <= 8192 and count == 16 else (32, 4, 3)
    blocks = outputs // block

    scaled = linear.kernel_scale is not None
    x, factor = _quantize(rows, epsilon) if scaled else (rows.x, rows.statistic)
    arrays = [x, factor]
    specs = [pl.BlockSpec((count, width), origin), pl.BlockSpec(factor.shape, origin)]
    if scaled:
        arrays.append(linear.kernel_scale[...][None])
        specs.append(pl.BlockSpec((1,), lambda j: (0,)))
    for half in range(1 + gated):
        arrays.append(kernel)
        specs.append(pl.BlockSpec((block, width), functools.partial(_rows_from, half * blocks)))
    if residual is not None:
        arrays.append(residual)
        specs.append(pl.BlockSpec((count, block), column))
    out, statistic = pl.pallas_call(
        functools.partial(
            _product_kernel,
            steps=width // BLOCK_K,
            blocks=rows.blocks,
            epsilon=epsilon,
            scaled=scaled,
            gated=gated,
            residual=residual is not None,
        ),
        grid=(blocks,),
        in_specs=specs,
        out_specs=[pl.BlockSpec((count, block), column), pl.BlockSpec((count, 1), column)],
        out_shape=[
            jax.ShapeDtypeStruct((count, outputs), dtype),
            jax.ShapeDtypeStruct((count, power_of_two(blocks)), jnp.float32),
        ],
        compiler_params=triton.CompilerParams(num_warps=warps, num_stages=stages),
        interpret=jax.default_backend() == "cpu",
        name="product",
    )(*arrays)
    return RowsWithStats(out, statistic, blocks)


def origin(_: Array) -> tuple[int, int]:
    """Block index of an array that every program reads in full."""
    return 0, 0


def _rows_from(first: int, j: Array) -> tuple[Array, int]:
    return first + j, 0


def column(j: Array) -> tuple[int, Array]:
    """Block index of the j-th block of columns."""
    return 0, j
