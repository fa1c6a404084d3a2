"""Uniform: each action dimension in equal bins over [-1, 1], one token a dimension (arXiv 2406.07904, 3.2.3)."""

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from mllm_act.adapters.action_tokens import ActionTokenAdapter
from mllm_act.normalization import Statistics


class Uniform(ActionTokenAdapter):
    """M = A tokens; code k of a dimension stands for the centre of its k-th bin. The paper has 512 bins."""

    def __init__(
        self, statistics: Statistics, width: int, first_token: int, bins: int, rngs: nnx.Rngs
    ) -> None:
        super().__init__(statistics, width, len(statistics.action.min), bins, first_token, rngs)

    def to_codes(self, action: Float[Array, "... A"]) -> Int[Array, "... A"]:
        """Returns each dimension's bin; values outside [-1, 1] fall into the outermost."""
        k = jnp.floor((action + 1) / 2 * self.codes)
        return jnp.clip(k, 0, self.codes - 1).astype(jnp.int32)

    def from_codes(self, codes: Int[Array, "... A"]) -> Float[Array, "... A"]:
        """Returns the bins' centres."""
        return (codes + 0.5) / self.codes * 2 - 1
