"""FAST: chunks of actions as byte pairs of their rounded cosine coefficients (arXiv 2501.09747).

The discrete cosine transform (DCT-II, orthonormal) of each action dimension along the chunk's H steps, times a scale,
rounded: H*A integers, most of them 0 where the motion is smooth. Lowest frequency first, the dimensions in turn, they
are one sequence; its zeros at the end are not written, and byte pairs shorten the rest. Nothing is trained by gradient.
"""

import dataclasses
import functools
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from mllm_act.action_tokenizer import byte_pair
from mllm_act.action_tokenizer.byte_pair import END
from mllm_act.errors import UserError

# Coefficients must round alike on every accelerator: no TF32, no bfloat16 passes.
_EXACT = jax.lax.Precision.HIGHEST


@dataclasses.dataclass(frozen=True)
class FastConfig:
    """Sizes of a tokenizer, those that ``fit`` found in the training chunks included.

    Attributes:
      action_dim: A, of one action.
      chunk: H, how many actions are encoded together.
      scale: what coefficients are multiplied by before they are rounded; the paper has 10.
      low: the least integer seen in training, 0 at the most.
      high: the greatest, 0 at the least.
      merges: R, how many pairs are merged.
      codes: K: END, one code for each integer from ``low`` to ``high``, and the merged ones.
      tokens: M, as many as the longest training chunk takes.
    """

    action_dim: int
    chunk: int
    scale: float
    low: int
    high: int
    merges: int
    codes: int
    tokens: int


class TableVariable(nnx.Variable):
    """Integers that ``fit`` learnt: saved and restored as parameters are, but never trained."""


class FastTokenizer(nnx.Module):
    """Chunks to codes and back. Works on normalised actions, about [-1, 1] in each dimension.

    The codes of a chunk end with END, which stands for zeros up to the chunk's end and fills the row up. Where the
    chunk is full, or takes all M codes, none is needed. A chunk that would take more is cut: the coefficients that it
    could not write are zeros. Integers beyond ``low`` and ``high`` are clipped. So encoding cannot fail, nor can
    decoding: what overflows the chunk is dropped, and whatever follows END.
    """

    def __init__(self, config: FastConfig) -> None:
        """Makes the tables, empty: ``fit`` or a checkpoint fills them."""
        self.config = config
        size = config.chunk * config.action_dim
        self.merges = TableVariable(jnp.zeros((config.merges, 3), jnp.int32))
        # What each code stands for, and how many coefficients that are; END, all zeros, writes none.
        self.coefficients = TableVariable(jnp.zeros((config.codes, size), jnp.int32))
        self.lengths = TableVariable(jnp.zeros(config.codes, jnp.int32))

    @property
    def size(self) -> int:
        """H*A, the numbers of a chunk."""
        return self.config.chunk * self.config.action_dim

    def encode(self, action: Float[Array, "... HA"]) -> Int[Array, "... M"]:
        """Codes int32[..., M], in [0, K), of normalised chunks."""
        chex.assert_axis_dimension(action, -1, self.size)
        config = self.config
        rounded = quantize(action, config.action_dim, config.scale)
        symbols = to_symbols(rounded, config.low, config.high).reshape(-1, self.size)
        codes = byte_pair.merge(symbols, self.merges[...], config.codes)
        return codes[:, : config.tokens].reshape(*action.shape[:-1], config.tokens)

    def decode(self, codes: Int[Array, "... M"]) -> Float[Array, "... HA"]:
        """Normalised chunks float32[..., H*A] of any codes in [0, K)."""
        chex.assert_axis_dimension(codes, -1, self.config.tokens)
        start = self.size - self.room(codes)  # of each code's coefficients in the chunk
        place = jnp.arange(self.size)
        # Of each coefficient the code that writes it; none, M, behind those of a chunk that was cut.
        writer = (start[..., None, 1:] <= place[:, None]).sum(-1)
        written = jnp.minimum(writer, self.config.tokens - 1)
        code = jnp.take_along_axis(codes, written, axis=-1)
        offset = place - jnp.take_along_axis(start, written, axis=-1)
        rounded = jnp.where(writer < self.config.tokens, self.coefficients[...][code, offset], 0)
        return dequantize(rounded, self.config.action_dim, self.config.scale)

    def room(self, codes: Int[Array, "... j"]) -> Int[Array, "... j+1"]:
        """How many coefficients there is room for before each of j codes and after the last; none after END."""
        taken = jnp.where(codes == END, self.size, self.lengths[...][codes]).cumsum(-1)
        before = jnp.pad(taken, [(0, 0)] * (codes.ndim - 1) + [(1, 0)])
        return jnp.maximum(self.size - before, 0)

    def allowed(self, prefix: Int[Array, "... j"]) -> Bool[Array, "... K"]:
        """Which codes may follow: those whose coefficients fit, and END, which alone does after END."""
        return self.fitting(self.room(prefix)[..., -1])

    def fitting(self, room: Int[Array, "..."]) -> Bool[Array, "... K"]:
        """Which codes fit into the room there is."""
        return self.lengths[...] <= room[..., None]


def quantize(
    action: Float[Array, "... HA"], action_dim: int, scale: float
) -> Float[Array, "... HA"]:
    """Rounded coefficients of normalised chunks, whole numbers in float32, lowest frequency first."""
    steps = action.reshape(*action.shape[:-1], -1, action_dim)
    basis = cosines(steps.shape[-2])
    return jnp.round(scale * jnp.matmul(basis, steps, precision=_EXACT)).reshape(action.shape)


def dequantize(
    rounded: Int[Array, "... HA"], action_dim: int, scale: float
) -> Float[Array, "... HA"]:
    """Normalised chunks of rounded coefficients: the inverse transform."""
    rows = rounded.reshape(*rounded.shape[:-1], -1, action_dim) / scale
    basis = cosines(rows.shape[-2])
    return jnp.matmul(basis.T, rows, precision=_EXACT).reshape(rounded.shape)


def cosines(chunk: int) -> Float[np.ndarray, "H H"]:
    """The orthonormal DCT-II as a matrix: row k is the k-th frequency over H steps."""
    frequency, step = np.arange(chunk)[:, None], np.arange(chunk)
    basis = np.cos(math.pi / chunk * (step + 0.5) * frequency) * math.sqrt(2 / chunk)
    basis[0] /= math.sqrt(2)
    return basis.astype(np.float32)


def to_symbols(rounded: Float[Array, "... HA"], low: int, high: int) -> Int[Array, "... HA"]:
    """The symbols of ``byte_pair``, int32: 1 for ``low`` and so on; END from the last coefficient that is not 0 on."""
    clipped = jnp.clip(rounded, low, high).astype(jnp.int32)
    place = jnp.arange(1, rounded.shape[-1] + 1)
    count = jnp.where(clipped == 0, 0, place).max(-1, keepdims=True)
    return jnp.where(place <= count, clipped - low + 1, END)


def fit(
    actions: Float[np.ndarray, "n HA"], action_dim: int, chunk: int, vocabulary: int, scale: float
) -> FastTokenizer:
    """Learns a tokenizer of at most ``vocabulary`` codes from normalised training chunks. The same for the same chunks.

    Raises:
      UserError: naming ``config.tokenizer.scale`` or ``vocabulary``, if the scale is no positive number, or the rounded
        coefficients take more integers than the vocabulary has codes.
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
    tokenizer.lengths[...] = jnp.array([len(one) for one in expanded], jnp.int32)
    return tokenizer


@functools.partial(jax.jit, static_argnums=2)
def _most_codes(
    sequences: Int[Array, "n HA"], merges: Int[Array, "R 3"], codes: int
) -> Int[Array, ""]:
    """How many codes the longest sequence takes once its pairs are merged."""

    def count(row: Int[Array, " HA"]) -> Int[Array, ""]:
        return (byte_pair.merge(row[None], merges, codes) != END).sum()

    return jax.lax.map(count, sequences, batch_size=4096).max()
