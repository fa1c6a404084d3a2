"""Few rows through a decoder layer on one GPU, as when one robot acts: kernels that read each matrix once.

A decision multiplies a handful of rows by every matrix, so that it lasts as long as reading the matrices and starting
the kernels. Here norms, casts, activations and residual sums are part of the products that they stand beside (Pallas,
lowered through Triton), and rotary positions, softmax and the cache are part of the attention. A product puts out what
the next one has to know of its rows, block by block: sums of squares, or largest entries.

What is computed is what ``language.LanguageBlock`` computes; a test compares them.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jaxtyping import Array, Bool, Float, Int

from mllm_act.models import float8

ROWS = (16, 32, 64)  # to which rows are filled up; tensor cores want 16
STEP = 256  # entries of a row that are read at a time
NEVER = -1e30

# Keys and values of earlier inputs.
Segment = tuple[Float[Array, "1 N G K"], Float[Array, "1 N G K"]]


def filled_up(rows: int) -> int:
    """Returns to how many rows so many are filled up, so that ``layer`` has nothing to cut off."""
    return next((count for count in ROWS if count >= rows), -(-rows // 8) * 8)


def _power(count: int) -> int:
    return max(16, 1 << (count - 1).bit_length())


@dataclasses.dataclass(frozen=True)
class Seen:
    """Rows, and what the next product has to know of each, block by block.

    Attributes:
      x: the rows.
      statistic: sums of squares where a norm comes next, else largest entries. Only the first ``blocks`` columns were
        written.
      blocks: how many blocks.
    """

    x: Float[Array, "R I"]
    statistic: Float[Array, "R S"]
    blocks: int


def _norm_factor(squares: Float[Array, "*R"], width: int, epsilon: float) -> Float[Array, "*R"]:
    return jax.lax.rsqrt(squares / width + epsilon)


def _quantize_kernel(
    x_ref: Any, seen_ref: Any, out_ref: Any, factor_ref: Any, *, blocks: int, epsilon: float | None
) -> None:
    """One row; see ``_quantize``."""
    width = x_ref.shape[0]
    seen = jnp.where(jax.lax.iota(jnp.int32, seen_ref.shape[0]) < blocks, seen_ref[...], 0.0)
    if epsilon is None:
        own = float8.scale_of(jnp.max(seen))
        factor = own
    else:  # no entry of a row exceeds its length
        squares = jnp.sum(seen)
        own = float8.scale_of(jnp.sqrt(squares))
        factor = own * _norm_factor(squares, width, epsilon)
    places = pl.ds(0, _power(width))
    there = jax.lax.iota(jnp.int32, _power(width)) < width
    x = triton.load(x_ref.at[places], mask=there, other=0.0).astype(jnp.float32) / own
    x = jnp.clip(x, -float8.LARGEST, float8.LARGEST).astype(out_ref.dtype)
    triton.store(out_ref.at[places], x, mask=there)
    factor_ref[...] = factor[None]


def _quantize(rows: Seen, epsilon: float | None) -> tuple[Float[Array, "R I"], Float[Array, "R 1"]]:
    """Returns rows in float8, and what a product of them is to be multiplied by; ``epsilon`` is that of a norm."""
    count, width = rows.x.shape

    def of_row(columns: int) -> pl.BlockSpec:
        return pl.BlockSpec((None, columns), lambda row: (row, 0))

    return pl.pallas_call(
        functools.partial(_quantize_kernel, blocks=rows.blocks, epsilon=epsilon),
        grid=(count,),
        in_specs=[of_row(width), of_row(rows.statistic.shape[1])],
        out_specs=[of_row(width), of_row(1)],
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
    left = list(refs)
    scale_ref = left.pop(0) if scaled else None
    kernel_refs = [left.pop(0) for _ in range(1 + gated)]
    residual_ref = left.pop(0) if residual else None
    out_ref, seen_ref = left

    def add(k: Array, sums: tuple[Array, ...]) -> tuple[Array, ...]:
        here = pl.ds(k * STEP, STEP)
        x = x_ref[:, here]
        return tuple(
            total + jnp.dot(x, kernel[:, here].T, preferred_element_type=jnp.float32)
            for total, kernel in zip(sums, kernel_refs, strict=True)
        )

    zero = jnp.zeros(out_ref.shape, jnp.float32)
    sums = jax.lax.fori_loop(0, steps, add, (zero,) * len(kernel_refs))
    if scale_ref is not None:
        sums = tuple(total * (factor_ref[...] * scale_ref[0]) for total in sums)
    elif epsilon is not None:
        written = jax.lax.broadcasted_iota(jnp.int32, factor_ref.shape, 1) < blocks
        squares = jnp.sum(jnp.where(written, factor_ref[...], 0.0), axis=1, keepdims=True)
        factor = _norm_factor(squares, x_ref.shape[1], epsilon)
        sums = tuple(total * factor for total in sums)
    out = sums[0]
    if gated:
        out = out * jax.nn.sigmoid(out) * sums[1]
    if residual_ref is not None:
        out = out + residual_ref[...].astype(jnp.float32)
    out_ref[...] = out.astype(out_ref.dtype)
    seen = jnp.sum(out * out, 1) if residual else jnp.max(jnp.abs(out), 1)
    seen_ref[...] = seen[:, None]


def product(
    rows: Seen,
    linear: Any,
    *,
    norm: Any = None,
    gated: bool = False,
    residual: Float[Array, "R O"] | None = None,
) -> Seen:
    """Multiplies rows by a matrix that is laid out for acting, [O, I], in float8 or in the dtype of the rows.

    Args:
      rows: what is multiplied.
      linear: the matrix, a ``layers.Linear``.
      norm: a ``layers.RMSNorm`` that the rows pass first, whose factors the matrix has taken up.
      gated: the matrix is two, and ``silu(first) * second`` comes out.
      residual: added to what comes out, before a norm.

    Returns:
      The rows that come out.
    """
    epsilon = None if norm is None else norm.epsilon
    kernel = linear.kernel.get_value()[1]
    (count, width), dtype = rows.x.shape, rows.x.dtype
    outputs = kernel.shape[0] // (1 + gated)
    # Small blocks where there would be fewer of them than processors.
    block, warps, stages = (16, 2, 5) if outputs <= 8192 and count == 16 else (32, 4, 3)
    blocks = outputs // block

    scaled = linear.kernel_scale is not None
    x, factor = _quantize(rows, epsilon) if scaled else (rows.x, rows.statistic)
    arrays = [x, factor]
    specs = [pl.BlockSpec((count, width), _origin), pl.BlockSpec(factor.shape, _origin)]
    if scaled:
        arrays.append(linear.kernel_scale[...][None])
        specs.append(pl.BlockSpec((1,), lambda j: (0,)))
    for half in range(1 + gated):
        arrays.append(kernel)
        specs.append(pl.BlockSpec((block, width), functools.partial(_rows_from, half * blocks)))
    if residual is not None:
        arrays.append(residual)
        specs.append(pl.BlockSpec((count, block), _column))
    out, seen = pl.pallas_call(
        functools.partial(
            _product_kernel,
            steps=width // STEP,
            blocks=rows.blocks,
            epsilon=epsilon,
            scaled=scaled,
            gated=gated,
            residual=residual is not None,
        ),
        grid=(blocks,),
        in_specs=specs,
        out_specs=[pl.BlockSpec((count, block), _column), pl.BlockSpec((count, 1), _column)],
        out_shape=[
            jax.ShapeDtypeStruct((count, outputs), dtype),
            jax.ShapeDtypeStruct((count, _power(blocks)), jnp.float32),
        ],
        compiler_params=triton.CompilerParams(num_warps=warps, num_stages=stages),
        interpret=jax.default_backend() == "cpu",
        name="product",
    )(*arrays)
    return Seen(out, seen, blocks)


def _origin(_: Array) -> tuple[int, int]:
    return 0, 0


def _rows_from(first: int, j: Array) -> tuple[Array, int]:
    return first + j, 0


def _column(j: Array) -> tuple[int, Array]:
    return 0, j


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
        there = (jax.lax.iota(jnp.int32, padded) < length)[:, None]

        def read(
            ref: Any, start: Array, count: int, padded: int = padded, there: Array = there
        ) -> Array:
            place = ref.at[pl.ds(0, padded), pl.ds(start, count)]
            mask = jnp.broadcast_to(there, (padded, count))
            return triton.load(place, mask=mask, other=0.0)

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
    qkv: Float[Array, "R (H+2G)K"],
    cos: Float[Array, "R K/2"],
    sin: Float[Array, "R K/2"],
    biases: list[Float[Array, "R N"]],
    past: list[Segment],
    heads: int,
    kv_heads: int,
) -> tuple[Seen, Segment]:
    """Attention of rows to earlier inputs and to each other.

    Args:
      qkv: queries, keys and values of the rows.
      cos: of the angles of rotary positions.
      sin: of them.
      biases: added to scores: of the rows' own keys, then of each segment's, filled up to a power of two.
      past: keys and values of earlier inputs.
      heads: H.
      kv_heads: G.

    Returns:
      The values, and the rows' own keys and values.
    """
    rows = len(qkv)
    size = qkv.shape[1] // (heads + 2 * kv_heads)
    arrays, lengths = [qkv, cos, sin, biases[0]], []
    for (keys, values), bias in zip(past, biases[1:], strict=True):
        lengths.append(keys.shape[1])
        arrays += [keys.reshape(lengths[-1], -1), values.reshape(lengths[-1], -1), bias]
    own = pl.BlockSpec((rows, size), functools.partial(_group, heads // kv_heads))
    cache = jax.ShapeDtypeStruct((rows, kv_heads * size), qkv.dtype)
    out, largest, k, v = pl.pallas_call(
        functools.partial(
            _attention_kernel, heads=heads, kv_heads=kv_heads, lengths=tuple(lengths)
        ),
        grid=(heads,),
        in_specs=[pl.BlockSpec(array.shape, _origin) for array in arrays],
        out_specs=[pl.BlockSpec((rows, size), _column), pl.BlockSpec((rows, 1), _column), own, own],
        out_shape=[
            jax.ShapeDtypeStruct((rows, heads * size), qkv.dtype),
            jax.ShapeDtypeStruct((rows, _power(heads)), jnp.float32),
            cache,
            cache,
        ],
        compiler_params=triton.CompilerParams(num_warps=4, num_stages=1),
        interpret=jax.default_backend() == "cpu",
        name="attend",
    )(*arrays)
    shape = (1, rows, kv_heads, size)
    return Seen(out, largest, heads), (k.reshape(shape), v.reshape(shape))


def _group(heads: int, h: Array) -> tuple[int, Array]:
    return 0, h // heads


@dataclasses.dataclass(frozen=True)
class Rows:
    """What flows from layer to layer, and what all layers read.

    Attributes:
      seen: the rows, filled up to one of ``ROWS``, with their sums of squares.
      count: N, how many there were before.
      cos: of the angles of rotary positions.
      sin: of them.
      biases: see ``attend``.
    """

    seen: Seen
    count: int
    cos: Float[Array, "R K/2"]
    sin: Float[Array, "R K/2"]
    biases: list[Float[Array, "R N"]]

    @classmethod
    def of(
        cls,
        x: Float[Array, "1 N D"],
        positions: Int[Array, "1 N"],
        mask: Bool[Array, "1 N past+N"],
        lengths: list[int],
        head: int,
        theta: float,
    ) -> "Rows":
        """Fills inputs up; ``lengths`` are those of the past's parts, ``head`` is K."""
        n = x.shape[1]
        rows = filled_up(n)
        given = jnp.pad(x[0], ((0, rows - n), (0, 0)))
        frequency = theta ** (-jnp.arange(head // 2, dtype=jnp.float32) / (head // 2))
        angle = jnp.pad(positions[0], (0, rows - n))[:, None] * frequency

        def bias(seen: Bool[Array, "N past"], places: int) -> Float[Array, "R places"]:
            room = ((0, rows - n), (0, places - seen.shape[1]))
            return jnp.pad(jnp.where(seen, 0.0, NEVER), room, constant_values=NEVER)

        ends = [sum(lengths[: i + 1]) for i in range(len(lengths))]
        past = [
            bias(mask[0, :, end - length : end], _power(length))
            for end, length in zip(ends, lengths, strict=True)
        ]
        # Rows that fill up see themselves, which keeps their softmax finite.
        own = jnp.maximum(
            bias(mask[0, :, sum(lengths) :], rows), jnp.where(jnp.eye(rows, dtype=bool), 0.0, NEVER)
        )
        squares = jnp.square(given.astype(jnp.float32)).sum(1, keepdims=True)
        return cls(Seen(given, squares, 1), n, jnp.cos(angle), jnp.sin(angle), [own, *past])


def layer(block: Any, rows: Rows, past: tuple[Segment, ...]) -> tuple[Rows, Segment]:
    """Runs a ``language.LanguageBlock`` that was made ready for acting."""
    c = block.config
    qkv = product(rows.seen, block.qkv, norm=block.norm1).x
    y, own = attend(qkv, rows.cos, rows.sin, rows.biases, list(past), c.heads, c.kv_heads)
    seen = product(y, block.o, residual=rows.seen.x)
    y = product(seen, block.gate_up, norm=block.norm2, gated=True)
    seen = product(y, block.down, residual=seen.x)
    own = own[0][:, : rows.count], own[1][:, : rows.count]
    return dataclasses.replace(rows, seen=seen), own


def fits(config: Any, x: Float[Array, "B N D"], blocks: Any) -> bool:
    """Whether ``layer`` can be used: for one robot's rows, of a model ready for acting, on a GPU from Hopper on."""
    head = config.width // config.heads
    sizes = config.width % STEP == 0 and config.mlp_width % STEP == 0 and head in (64, 128, 256)
    few = len(x) == 1 and x.shape[1] <= ROWS[-1] and x.dtype == jnp.bfloat16
    major = str(getattr(jax.devices()[0], "compute_capability", "0")).split(".")[0]
    return sizes and few and blocks.qkv is not None and major.isdigit() and int(major) >= 9
