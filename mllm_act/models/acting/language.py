"""The language model at inference: fused projections, and decode kernels where they fit."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from mllm_act.models.acting.attention import Segment, attend
from mllm_act.models.acting.linear import fuse
from mllm_act.models.acting.products import BLOCK_K, RowsWithStats, power_of_two, product
from mllm_act.models.language import (
    Cache,
    KeysValues,
    LanguageBlock,
    LanguageConfig,
    LanguageModel,
    attend_past,
    rotate,
)
from mllm_act.models.layers import RMSNorm, heads, scan

ROW_COUNTS = (16, 32, 64)  # that rows are padded to; tensor cores need 16
MASKED = -1e30


def padded_rows(rows: int) -> int:
    """Returns the number of rows that inputs are padded to, so that the kernels have nothing to cut off."""
    return next((count for count in ROW_COUNTS if count >= rows), -(-rows // 8) * 8)


class ActingLanguageBlock(LanguageBlock):
    """One decoder layer, with one matrix for q, k and v and one for gate and up."""

    def __init__(self, block: LanguageBlock, dtype: str, in_float8: bool) -> None:
        """Takes the stacked blocks of a trained model; their norms become factors of the matrices after them."""
        self.config, lora = block.config, block.config.lora
        self.norm1, self.norm2 = _without_factors(block.norm1), _without_factors(block.norm2)
        self.qkv = fuse([block.q, block.k, block.v], dtype, in_float8, block.norm1, lora)
        self.o = fuse([block.o], dtype, in_float8, lora=lora)
        self.gate_up = fuse([block.gate, block.up], dtype, in_float8, block.norm2, lora)
        self.down = fuse([block.down], dtype, in_float8, lora=lora)

    def __call__(
        self,
        x: Float[Array, "B N D"],
        positions: Int[Array, "B N"],
        mask: Bool[Array, "B N S"],
        past: tuple[KeysValues, ...],
        key: PRNGKeyArray | None = None,
    ) -> tuple[Float[Array, "B N D"], KeysValues]:
        """See ``LanguageBlock.__call__``; there is no dropout."""
        c = self.config
        y = heads(self.qkv(self.norm1(x), bound=self.norm1.bound()), c.heads + 2 * c.kv_heads)
        rotated = rotate(y[:, :, : -c.kv_heads], positions, c.rope_theta)
        q, k, v = rotated[:, :, : c.heads], rotated[:, :, c.heads :], y[:, :, -c.kv_heads :]
        x = x + self.o(attend_past(q, k, v, mask, past))
        y = self.gate_up(self.norm2(x), bound=self.norm2.bound())
        gate, up = jnp.split(y, 2, axis=-1)
        return x + self.down(jax.nn.silu(gate) * up), (k, v)

    def decode(
        self, inputs: "DecodeInputs", past: tuple[Segment, ...]
    ) -> tuple["DecodeInputs", Segment]:
        """The same by the decode kernels."""
        c, rows = self.config, inputs.rows
        qkv = product(rows, self.qkv, norm=self.norm1).x
        y, own = attend(qkv, inputs.cos, inputs.sin, inputs.biases, list(past), c.heads, c.kv_heads)
        rows = product(y, self.o, residual=rows.x)
        y = product(rows, self.gate_up, norm=self.norm2, gated=True)
        rows = product(y, self.down, residual=rows.x)
        own = own[0][:, : inputs.count], own[1][:, : inputs.count]
        return dataclasses.replace(inputs, rows=rows), own


def _without_factors(norm: RMSNorm) -> RMSNorm:
    scale = norm.scale[...]
    result = RMSNorm(scale.shape[-1], epsilon=norm.epsilon)
    result.scale = nnx.Param(jnp.ones_like(scale))
    return result


class ActingLanguageModel(LanguageModel):
    """A ``LanguageModel`` whose layers are fused."""

    def __init__(self, trained: LanguageModel, dtype: str, in_float8: bool) -> None:
        """Takes a trained model; it is left as it was, and shares its tables."""
        self.config = dataclasses.replace(trained.config, lora=None)
        self.embedding, self.head, self.norm = trained.embedding, trained.head, trained.norm
        self.blocks = ActingLanguageBlock(trained.blocks, dtype, in_float8)

    def __call__(
        self,
        x: Float[Array, "B N D"],
        positions: Int[Array, "B N"],
        mask: Bool[Array, "B N S"],
        *,
        past: Sequence[Cache] = (),
        key: PRNGKeyArray | None = None,
        keep_cache: bool = False,
        remat: str = "none",
    ) -> tuple[Float[Array, "B N D"], Cache | None]:
        """See ``LanguageModel.__call__``."""
        if kernels_fit(self.config, x):
            return self.decode(x, positions, mask, past)
        return super().__call__(x, positions, mask, past=past, keep_cache=keep_cache)

    def decode(
        self,
        x: Float[Array, "1 N D"],
        positions: Int[Array, "1 N"],
        mask: Bool[Array, "1 N S"],
        past: Sequence[Cache],
    ) -> tuple[Float[Array, "1 N D"], Cache]:
        """The same by the decode kernels."""
        c = self.config
        lengths = [part[0][0].shape[1] for part in past]
        inputs = DecodeInputs.of(x, positions, mask, lengths, c.width // c.heads, c.rope_theta)

        def step(block: Any, inputs: DecodeInputs, layer: tuple) -> tuple:
            return block.decode(inputs, layer)

        inputs, cache = scan(self.blocks, step, inputs, tuple(past))
        return self.norm(inputs.rows.x[None, : x.shape[1]]), cache


def kernels_fit(config: LanguageConfig, x: Float[Array, "B N D"]) -> bool:
    """Whether the decode kernels can be used: for one robot's rows in bfloat16, on a GPU from Hopper on."""
    head = config.width // config.heads
    sizes = config.width % BLOCK_K == 0 and config.mlp_width % BLOCK_K == 0
    few = len(x) == 1 and x.shape[1] <= ROW_COUNTS[-1] and x.dtype == jnp.bfloat16
    major = str(getattr(jax.devices()[0], "compute_capability", "0")).split(".")[0]
    return sizes and head in (64, 128, 256) and few and major.isdigit() and int(major) >= 9


@dataclasses.dataclass(frozen=True)
class DecodeInputs:
    """What flows from layer to layer, and what all layers read.

    Attributes:
      rows: padded to one of ``ROW_COUNTS``, with their sums of squares.
      count: N, their number before padding.
      cos: of the rotary angles.
      sin: of the rotary angles.
      biases: see ``attend``.
    """

    rows: RowsWithStats
    count: int
    cos: Float[Array, "R half"]
    sin: Float[Array, "R half"]
    biases: list[Float[Array, "R _"]]

    @classmethod
    def of(
        cls,
        x: Float[Array, "1 N D"],
        positions: Int[Array, "1 N"],
        mask: Bool[Array, "1 N S"],
        lengths: list[int],
        head: int,
        theta: float,
    ) -> "DecodeInputs":
        """Pads inputs; ``lengths`` are those of the past's segments, ``head`` is K."""
        n = x.shape[1]
        count = padded_rows(n)
        rows = jnp.pad(x[0], ((0, count - n), (0, 0)))
        frequency = theta ** (-jnp.arange(head // 2, dtype=jnp.float32) / (head // 2))
        angle = jnp.pad(positions[0], (0, count - n))[:, None] * frequency

        def bias(allowed: Bool[Array, "N past"], keys: int) -> Float[Array, "R keys"]:
            padding = ((0, count - n), (0, keys - allowed.shape[1]))
            return jnp.pad(jnp.where(allowed, 0.0, MASKED), padding, constant_values=MASKED)

        ends = [sum(lengths[: i + 1]) for i in range(len(lengths))]
        past = [
            bias(mask[0, :, end - length : end], power_of_two(length))
            for end, length in zip(ends, lengths, strict=True)
        ]
        # Padding attends to itself, which keeps its softmax finite.
        itself = jnp.where(jnp.eye(count, dtype=bool), 0.0, MASKED)
        own = jnp.maximum(bias(mask[0, :, sum(lengths) :], count), itself)
        squares = jnp.square(rows.astype(jnp.float32)).sum(1, keepdims=True)
        return cls(RowsWithStats(rows, squares, 1), n, jnp.cos(angle), jnp.sin(angle), [own, *past])
