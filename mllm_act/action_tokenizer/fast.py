"""FAST: encodes a chunk of actions as byte pairs of its rounded cosine coefficients (arXiv 2501.09747).

Each action dimension is transformed along the chunk's H steps by the discrete cosine transform (DCT-II, orthonormal),
multiplied by a scale and rounded. The result is H*A integers, most of them 0 for smooth motion. They form one sequence,
lowest frequency first, with the dimensions interleaved. Trailing zeros are dropped, and byte pairs shorten the rest.
Nothing is trained by gradient.
"""

import dataclasses
import functools
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Num

from mllm_act.action_tokenizer import byte_pair
from mllm_act.action_tokenizer.byte_pair import END
from mllm_act.errors import UserError

# Coefficients must round the same on every accelerator: no TF32, no bfloat16 passes.
_EXACT = jax.lax.Precision.HIGHEST


@dataclasses.dataclass(frozen=True)
class FastConfig:
    """Sizes of a tokenizer, including those that ``fit`` derives from the training chunks.

    Attributes:
      action_dim: A, the dimensions of one action.
      chunk: H, the number of actions encoded together.
      scale: coefficients are multiplied by it before rounding; the paper has 10.
      low: the least integer in the training chunks; at most 0.
      high: the greatest; at least 0.
      merges: R, the number of merged pairs.
      codes: K: END, one code for each integer from ``low`` to ``high``, and the merged codes.
      tokens: M, the number of codes of the longest training chunk.
    """

    action_dim: int
    chunk: int
    scale: float
    low: int
    high: int
    merges: int
    codes: int
    tokens: int

    @property
    def kind(self) -> str:
        """The name of the adapter that uses the tokenizer."""
        return "fast"


class TableVariable(nnx.Variable):
    """Integers set by ``fit``: saved and restored like parameters, but never trained."""


class FastTokenizer(nnx.Module):
    """Encodes chunks of normalised actions, about [-1, 1] in each dimension, as codes and decodes them.

    The codes of a chunk end with END, which stands for zeros up to the chunk's end and pads the row. END is not needed
    if the chunk's coefficients are all written, or if it takes all M codes. A chunk that needs more codes is cut: its
    last coefficients become zeros. Integers outside ``low`` .. ``high`` are clipped. So every chunk can be encoded.
    Every row of codes can be decoded: codes after END, and coefficients beyond the chunk's end, are ignored.
    """

    def __init__(self, config: FastConfig) -> None:
        """Makes empty tables, to be filled by ``fit`` or from a checkpoint."""
        self.config = config
        size = config.chunk * config.action_dim
        self.merges = TableVariable(jnp.zeros((config.merges, 3), jnp.int32))
        # The coefficients that each code stands for, padded with zeros, and their number; END has none.
        self.coefficients = TableVariable(jnp.zeros((config.codes, size), jnp.int32))
        self.lengths = TableVariable(jnp.zeros(config.codes, jnp.int32))

    @property
    def size(self) -> int:
        """H*A, the number of values in a chunk."""
        return self.config.chunk * self.config.action_dim

    def encode(self, action: Float[Array, "... HA"]) -> Int[Array, "... M"]:
        """Returns the codes int32[..., M], in [0, K), of normalised chunks."""
        chex.assert_axis_dimension(action, -1, self.size)
        config = self.config
        rounded = quantize(action, config.action_dim, config.scale)
        symbols = to_symbols(rounded, config.low, config.high).reshape(-1, self.size)
        codes = byte_pair.merge(symbols, self.merges[...], config.codes)
        return codes[:, : config.tokens].reshape(*action.shape[:-1], config.tokens)

    def decode(self, codes: Int[Array, "... M"]) -> Float[Array, "... HA"]:
        """Returns the normalised chunks float32[..., H*A] of any codes in [0, K)."""
        chex.assert_axis_dimension(codes, -1, self.config.tokens)
        start = self.size - self.room(codes)  # where each code's coefficients begin in the chunk
        position = jnp.arange(self.size)
        # The index of the code that writes each coefficient; M if none does, at the end of a chunk that was cut.
        writer = (start[..., None, 1:] <= position[:, None]).sum(-1)
        written = jnp.minimum(writer, self.config.tokens - 1)
        code = jnp.take_along_axis(codes, written, axis=-1)
        offset = position - jnp.take_along_axis(start, written, axis=-1)
        rounded = jnp.where(writer < self.config.tokens, self.coefficients[...][code, offset], 0)
        return dequantize(rounded, self.config.action_dim, self.config.scale)

    def room(self, codes: Int[Array, "... j"]) -> Int[Array, "... j+1"]:
        """Returns how many coefficients remain to be written before each of j codes and after the last; 0 after END."""
        taken = jnp.where(codes == END, self.size, self.lengths[...][codes]).cumsum(-1)
        before = jnp.pad(taken, [(0, 0)] * (codes.ndim - 1) + [(1, 0)])
        return jnp.maximum(self.size - before, 0)

    def allowed(self, prefix: Int[Array, "... j"]) -> Bool[Array, "... K"]:
        """Returns which codes may follow: END, and those whose coefficients fit; only END after END."""
        return self.fitting(self.room(prefix)[..., -1])

    def fitting(self, room: Int[Array, "..."]) -> Bool[Array, "... K"]:
        """Returns which codes have at most ``room`` coefficients."""
        return self.lengths[...] <= room[..., None]


def quantize(
    action: Float[Array, "... HA"], action_dim: int, scale: float
) -> Float[Array, "... HA"]:
    """Returns the rounded coefficients of normalised chunks: integers in float32, lowest frequency first."""
    steps = action.reshape(*action.shape[:-1], -1, action_dim)
    basis = cosines(steps.shape[-2])
    return jnp.round(scale * jnp.matmul(basis, steps, precision=_EXACT)).reshape(action.shape)


def dequantize(
    rounded: Num[Array, "... HA"], action_dim: int, scale: float
) -> Float[Array, "... HA"]:
    """Returns the normalised chunks of rounded coefficients: the inverse transform."""
    rows = rounded.reshape(*rounded.shape[:-1], -1, action_dim) / scale
    basis = cosines(rows.shape[-2])
    return jnp.matmul(basis.T, rows, precision=_EXACT).reshape(rounded.shape)


def cosines(chunk: int) -> Float[np.ndarray, "H H"]:
    """Returns the orthonormal DCT-II as a matrix: row k is the k-th frequency over H steps."""
    frequency, step = np.arange(chunk)[:, None], np.arange(chunk)
    basis = np.cos(math.pi / chunk * (step + 0.5) * frequency) * math.sqrt(2 / chunk)
    basis[0] /= math.sqrt(2)
    return basis.astype(np.float32)


def to_symbols(
    rounded: Float[Array, "... HA"], low: int | Int[Array, ""], high: int | Int[Array, ""]
) -> Int[Array, "... HA"]:
    """Returns the symbols of ``byte_pair``, int32: 1 for ``low`` and so on; END after the last non-zero coefficient."""
    clipped = jnp.clip(rounded, low, high).astype(jnp.int32)
    position = jnp.arange(1, rounded.shape[-1] + 1)
    count = jnp.where(clipped == 0, 0, position).max(-1, keepdims=True)
    return jnp.where(position <= count, clipped - low + 1, END)


def fit(
    actions: Float[np.ndarray, "n HA"], action_dim: int, chunk: int, vocabulary: int, scale: float
) -> FastTokenizer:
    """Fits a tokenizer of at most ``vocabulary`` codes to normalised training chunks; deterministic.

    Raises:
      UserError: naming ``config.tokenizer.scale`` or ``vocabulary``, if the scale is not a positive number, or the
        rounded coefficients take more integers than the vocabulary has codes.
    """
    assert actions.shape[-1] == chunk * action_dim
    if not 0 < scale < math.inf:
        raise UserError(f"config.tokenizer.scale: expected a positive number, found {scale}")
    rounded = jax.jit(quantize, static_argnums=(1, 2))(actions, action_dim, scale)
    low, high = min(0, int(rounded.min())), max(0, int(rounded.max()))
    symbols = high - low + 1
    if symbols >= vocabulary:
        raise UserError(
            f"config.tokenizer.vocabulary: expected more than the {symbols} integers, {low} to {high}, that the "
            f"coefficients take at scale {scale}, found {vocabulary}; lower config.tokenizer.scale"
        )
    sequences = jax.jit(to_symbols)(rounded, low, high)
    merges = byte_pair.learn(np.asarray(sequences), symbols, vocabulary)
    expanded = byte_pair.expand(merges, symbols)
    longest = int(_most_codes(sequences, merges, len(expanded)))
    config = FastConfig(
        action_dim, chunk, scale, low, high, len(merges), len(expanded), tokens=max(1, longest)
    )
    coefficients = np.zeros((len(expanded), chunk * action_dim), np.int32)
    for code, stands_for in enumerate(expanded):
        coefficients[code, : len(stands_for)] = np.array(stands_for, np.int32) - 1 + low
    tokenizer = FastTokenizer(config)
    tokenizer.merges[...] = jnp.array(merges)
    tokenizer.coefficients[...] = jnp.array(coefficients)
    tokenizer.lengths[...] = jnp.array([len(stands_for) for stands_for in expanded], jnp.int32)
    return tokenizer


@functools.partial(jax.jit, static_argnums=2)
def _most_codes(
    sequences: Int[Array, "n HA"], merges: Int[Array, "R 3"], codes: int
) -> Int[Array, ""]:
    """Returns the number of codes of the longest sequence after merging."""

    def count(row: Int[Array, " HA"]) -> Int[Array, ""]:
        return (byte_pair.merge(row[None], merges, codes) != END).sum()

    return jax.lax.map(count, sequences, batch_size=4096).max()
