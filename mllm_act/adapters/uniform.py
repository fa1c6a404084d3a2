"""Uniform: each action dimension in equal bins over [-1, 1], one token per dimension (arXiv 2406.07904, 3.2.3)."""

import dataclasses
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from mllm_act.adapters.action_tokens import ActionTokenAdapter
from mllm_act.adapters.base import Extend, Vocabulary
from mllm_act.adapters.token_filter import Keys
from mllm_act.normalization import Statistics


@dataclasses.dataclass(frozen=True)
class UniformConfig:
    """The settings."""

    bins: int = 512  # of each dimension; 512 in the paper


class Uniform(ActionTokenAdapter):
    """M = A tokens; code k of a dimension stands for the centre of its k-th bin."""

    Config = UniformConfig

    @classmethod
    def make(
        cls, config: UniformConfig, statistics: Statistics, vocabulary: Vocabulary, rngs: nnx.Rngs
    ) -> "Uniform":
        """See ``Adapter.make``."""
        return cls(statistics, vocabulary, len(statistics.action.min), config.bins, rngs)

    def take_prefix(self, chunk: int, max_delay: int, rngs: nnx.Rngs) -> None:
        """See ``Adapter.take_prefix``. Tokens follow the order of the actions, so the prefix's are fed as they are."""
        self.chunk, self.max_delay = chunk, max_delay

    def loss_after(
        self,
        hidden: Float[Array, "B T M D"],
        tokens: Int[Array, "B T M"],
        mask: Bool[Array, "B T"],
        proprio: Float[Array, "B T P"],
        committed: Bool[Array, "B T M"],
    ) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
        """See ``Adapter.loss_after``."""
        return self._cross_entropy(hidden, tokens, mask, ~committed)

    def sample_after(
        self,
        hidden: Float[Array, "B D"],
        proprio: Float[Array, "B P"],
        extend: Extend,
        state: Any,
        key: Keys | None,
        prefix: Int[Array, "B M"],
        committed: Bool[Array, "B M"],
    ) -> Int[Array, "B M"]:
        """See ``Adapter.sample_after``."""
        tokens = prefix[:, :0]
        for j in range(self.tokens_per_action):
            tokens = self._add_token(hidden, tokens, key)
            taken = jnp.where(committed[:, j], prefix[:, j], tokens[:, j])
            tokens = tokens.at[:, j].set(taken)
            if j + 1 < self.tokens_per_action:
                hidden, state = extend(self.embed(tokens[:, -1:])[:, 0], state)
        return tokens

    def to_codes(self, action: Float[Array, "... A"]) -> Int[Array, "... A"]:
        """Returns the bin of each dimension; values outside [-1, 1] fall into the outermost bins."""
        k = jnp.floor((action + 1) / 2 * self.codes)
        return jnp.clip(k, 0, self.codes - 1).astype(jnp.int32)

    def from_codes(self, codes: Int[Array, "... A"]) -> Float[Array, "... A"]:
        """Returns the centres of the bins."""
        return (codes + 0.5) / self.codes * 2 - 1
