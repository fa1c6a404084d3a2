"""Uniform: each action dimension in equal bins over [-1, 1], one token per dimension (arXiv 2406.07904, 3.2.3)."""

import dataclasses

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from mllm_act.adapters.action_tokens import ActionTokenAdapter
from mllm_act.adapters.base import Vocabulary
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

    def to_codes(self, action: Float[Array, "... A"]) -> Int[Array, "... A"]:
        """Returns the bin of each dimension; values outside [-1, 1] fall into the outermost bins."""
        k = jnp.floor((action + 1) / 2 * self.codes)
        return jnp.clip(k, 0, self.codes - 1).astype(jnp.int32)

    def from_codes(self, codes: Int[Array, "... A"]) -> Float[Array, "... A"]:
        """Returns the centres of the bins."""
        return (codes + 0.5) / self.codes * 2 - 1
