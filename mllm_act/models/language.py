"""The language model, a Llama: RMSNorm, rotary positions, SwiGLU, grouped-query heads (arXiv 2302.13971)."""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from mllm_act import placement
from mllm_act.errors import UserError
from mllm_act.models.layers import (
    Linear,
    LoRA,
    RMSNorm,
    attend,
    dropout,
    heads,
    keep,
    scan,
    stack,
)

PROJECTIONS = ("q", "k", "v", "o", "gate", "up", "down")

# Keys and values of some inputs, [B, N, G, K] per layer: stacked over layers, or a list of pairs if the layers of the
# model are unstacked.
KeysValues = tuple[Float[Array, "... B _ G K"], Float[Array, "... B _ G K"]]
Cache = KeysValues | list[KeysValues]


@dataclasses.dataclass(frozen=True)
class LanguageConfig:
    """Sizes of the decoder.

    Attributes:
      action_tokens: the first id of the reserved range that actions are written over.
      tied: whether the head's rows are the embedding's.
      max_positions: the longest sequence it was trained for.
    """

    vocabulary: int
    action_tokens: int
    width: int
    layers: int
    heads: int
    kv_heads: int
    mlp_width: int
    rope_theta: float = 10_000.0
    epsilon: float = 1e-5
    tied: bool = False
    max_positions: int = 4096
    lora: LoRA | None = None


def rotate(
    x: Float[Array, "B N H K"], positions: Int[Array, "B N"], theta: float
) -> Float[Array, "B N H K"]:
    """Rotary position embedding in the half-split layout (Su et al. 2021; Hugging Face's Llama), in float32."""
    half = x.shape[-1] // 2
    frequency = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angle = positions[..., None, None].astype(jnp.float32) * frequency
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    a, b = x[..., :half].astype(jnp.float32), x[..., half:].astype(jnp.float32)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


def attend_past(
    q: Float[Array, "B N H K"],
    k: Float[Array, "B N G K"],
    v: Float[Array, "B N G K"],
    mask: Bool[Array, "B N S"],
    past: tuple[KeysValues, ...],
) -> Float[Array, "B N HK"]:
    """Attention to earlier inputs, whose keys and values are given, and to the inputs themselves."""
    keys = jnp.concatenate([*(part[0] for part in past), k], axis=1)
    values = jnp.concatenate([*(part[1] for part in past), v], axis=1)
    return attend(q, keys, values, mask)


class LanguageBlock(nnx.Module):
    """One decoder layer."""

    def __init__(self, config: LanguageConfig, weight_dtype: str, rngs: nnx.Rngs) -> None:
        self.config = config
        d, head = config.width, config.width // config.heads
        residual = (2 * config.layers) ** -0.5

        def linear(name: str, inputs: int, outputs: int, scale: float = 1.0) -> Linear:
            lora = config.lora if config.lora is not None and config.lora.aims_at(name) else None
            return Linear(
                inputs,
                outputs,
                name=name,
                lora=lora,
                scale=scale,
                weight_dtype=weight_dtype,
                rngs=rngs,
            )

        self.norm1 = RMSNorm(d, epsilon=config.epsilon)
        self.norm2 = RMSNorm(d, epsilon=config.epsilon)
        self.q = linear("q", d, config.heads * head)
        self.k = linear("k", d, config.kv_heads * head)
        self.v = linear("v", d, config.kv_heads * head)
        self.o = linear("o", config.heads * head, d, residual)
        self.gate, self.up = linear("gate", d, config.mlp_width), linear("up", d, config.mlp_width)
        self.down = linear("down", config.mlp_width, d, residual)

    def __call__(
        self,
        x: Float[Array, "B N D"],
        positions: Int[Array, "B N"],
        mask: Bool[Array, "B N S"],
        past: tuple[KeysValues, ...],
        key: PRNGKeyArray | None,
    ) -> tuple[Float[Array, "B N D"], KeysValues]:
        c = self.config
        draws = [None] * 4 if key is None else list(jax.random.split(key, 4))
        rate = 0.0 if c.lora is None else c.lora.dropout

        y, bound = self.norm1(x), self.norm1.bound()
        dropped = dropout(y, rate, draws[0])  # one mask for all projections of the same input
        q, k, v = (project(y, dropped, bound) for project in (self.q, self.k, self.v))
        q = keep(rotate(heads(q, c.heads), positions, c.rope_theta))
        k = keep(rotate(heads(k, c.kv_heads), positions, c.rope_theta))
        v = keep(heads(v, c.kv_heads))
        y = keep(attend_past(q, k, v, mask, past))
        x = keep(x + self.o(y, dropout(y, rate, draws[1])))

        y, bound = self.norm2(x), self.norm2.bound()
        dropped = dropout(y, rate, draws[2])
        gate, up = keep(self.gate(y, dropped, bound)), keep(self.up(y, dropped, bound))
        y = jax.nn.silu(gate) * up
        return x + self.down(y, dropout(y, rate, draws[3])), (k, v)


class LanguageModel(nnx.Module):
    """Embeddings to hidden states, with or without a key-value cache."""

    def __init__(self, config: LanguageConfig, weight_dtype: str, rngs: nnx.Rngs) -> None:
        """Makes the decoder; its matrices are stored in ``weight_dtype``, one of ``layers.WEIGHT_DTYPES``.

        Raises:
          UserError: if LoRA's pattern matches no projection.
        """
        if config.lora is not None and not any(map(config.lora.aims_at, PROJECTIONS)):
            raise UserError(
                f"lora.targets: expected a pattern that matches some of {', '.join(PROJECTIONS)} in full, found "
                f"{config.lora.targets!r}; for example q|k|v"
            )
        self.config = config
        table = (config.vocabulary, config.width)
        # Tables are looked up rather than multiplied.
        dtype = "bfloat16" if weight_dtype == "float8" else weight_dtype
        scale = config.width**-0.5 if config.tied else 1.0  # tied rows also make logits
        self.embedding = nnx.Param((scale * jax.random.normal(rngs.params(), table)).astype(dtype))
        rows = jax.random.normal(rngs.params(), table) * config.width**-0.5
        self.head = None if config.tied else nnx.Param(rows.astype(dtype))
        self.blocks = stack(lambda r: LanguageBlock(config, weight_dtype, r), config.layers, rngs)
        self.norm = RMSNorm(config.width, epsilon=config.epsilon)

    def embed(self, tokens: Int[Array, "*B"], dtype: DTypeLike) -> Float[Array, "*B D"]:
        """Returns the embeddings of tokens."""
        table = placement.gathered(self.embedding[...], "language/embedding")
        return placement.activation(table[tokens].astype(dtype))

    def logits(self, hidden: Float[Array, "... D"]) -> Float[Array, "... V"]:
        """Returns the logits of every token of the vocabulary, summed in float32."""
        table = self.embedding if self.head is None else self.head
        rows = table[...].astype(hidden.dtype)
        return jnp.matmul(hidden, rows.T, preferred_element_type=jnp.float32)

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
        """Runs the decoder.

        Args:
          x: input embeddings; everything is computed in their dtype.
          positions: rotary positions of ``x``.
          mask: whether input i attends to key j; keys are those of the past, then those of ``x``.
          past: the caches of earlier inputs in order, when decoding.
          key: turns LoRA's dropout on.
          keep_cache: whether to return keys and values.
          remat: what the backward pass recomputes; one of ``layers.REMAT``.

        Returns:
          The hidden states after the final norm, and the cache of ``x`` (None unless kept).
        """
        layer_keys = None if key is None else jax.random.split(key, self.config.layers)

        def step(block: LanguageBlock, x: Array, layer: tuple) -> tuple[Array, KeysValues | None]:
            x, cache = block(x, positions, mask, layer[0], layer[1])
            return x, cache if keep_cache else None

        x, cache = scan(self.blocks, step, x, (tuple(past), layer_keys), remat=remat)
        return self.norm(x), cache if keep_cache else None

    def first_layers(
        self,
        x: Float[Array, "B N D"],
        positions: Int[Array, "B N"],
        mask: Bool[Array, "B N N"],
        layers: int,
        remat: str,
    ) -> Float[Array, "B N D"]:
        """Returns the hidden states after the first ``layers`` layers, without a norm; see ``__call__``."""

        def step(block: LanguageBlock, x: Array, _: None) -> tuple[Array, None]:
            return block(x, positions, mask, (), None)[0], None

        return scan(self.blocks, step, x, remat=remat, layers=layers)[0]
