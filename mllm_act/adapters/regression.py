"""Pred for continuous actions: an MLP on the hidden state and proprioception, trained by MSE (arXiv 2406.07904, 3.2.2).

The appendix has two layers of width 2048 with ReLU. Only this adapter takes proprioception as an extra input.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from mllm_act.adapters.base import Adapter, Extend, Vocabulary
from mllm_act.adapters.token_filter import Keys
from mllm_act.models.layers import Linear
from mllm_act.normalization import Statistics


@dataclasses.dataclass(frozen=True)
class RegressionConfig:
    """The settings."""

    hidden: int = 2048  # width of the MLP


class Regression(Adapter):
    """One "token", the normalised action itself."""

    Config = RegressionConfig

    tokens_per_action = 1

    def __init__(
        self, statistics: Statistics, width: int, proprio: int, hidden: int, rngs: nnx.Rngs
    ) -> None:
        super().__init__(statistics)
        actions, self.hidden = len(statistics.action.min), hidden
        self.layer1 = Linear(width + proprio, hidden, bias=True, rngs=rngs)
        self.layer2 = Linear(hidden, hidden, bias=True, rngs=rngs)
        self.output = Linear(hidden, actions, bias=True, rngs=rngs)
        self.embedding = Linear(actions, width, rngs=rngs)

    @classmethod
    def make(
        cls,
        config: RegressionConfig,
        statistics: Statistics,
        vocabulary: Vocabulary,
        rngs: nnx.Rngs,
    ) -> "Regression":
        """See ``Adapter.make``."""
        proprio = len(statistics.proprio.mean)
        return cls(statistics, vocabulary.width, proprio, config.hidden, rngs)

    def take_prefix(self, chunk: int, max_delay: int, rngs: nnx.Rngs) -> None:
        """See ``Adapter.take_prefix``. The MLP sees the committed actions, and which numbers they are."""
        self.chunk, self.max_delay = chunk, max_delay
        numbers = len(self.statistics.action.min)
        self.prefix = Linear(2 * numbers, self.hidden, rngs=rngs)

    def encode(self, action: Float[Array, "... A"]) -> Float[Array, "... A"]:
        """Returns the normalised action."""
        return self.statistics.normalize_action(action)

    def decode(self, tokens: Float[Array, "... A"]) -> Float[Array, "... A"]:
        """Returns the valid action nearest to the predicted one, in the environment's units."""
        return self.statistics.unnormalize_action(tokens)

    def embed(self, tokens: Float[Array, "... A"]) -> Float[Array, "... 1 D"]:
        """Returns a linear embedding of the action; used where the history includes actions."""
        return self.embedding(tokens)[..., None, :]

    def allowed(self, prefix: Array) -> Bool[Array, "... 1"]:
        """Every real vector is an action."""
        return jnp.ones((*prefix.shape[:-1], 1), bool)

    def _predict(
        self,
        hidden: Float[Array, "... D"],
        proprio: Float[Array, "... P"],
        tokens: Float[Array, "... A"],
        committed: Bool[Array, "... A"],
    ) -> Float[Array, "... A"]:
        # In float32, whatever the model computes in: bfloat16 has 8 bits of precision.
        x = jnp.concatenate([hidden, proprio], axis=-1, dtype=jnp.float32)
        x = self.layer1(x)
        if self.max_delay:
            given = jnp.where(committed, tokens, 0)
            x += self.prefix(jnp.concatenate([given, committed], axis=-1, dtype=jnp.float32))
        x = jax.nn.relu(self.layer2(jax.nn.relu(x)))
        return self.output(x)

    def loss(
        self,
        hidden: Float[Array, "B T 1 D"],
        tokens: Float[Array, "B T A"],
        mask: Bool[Array, "B T"],
        proprio: Float[Array, "B T P"],
    ) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
        """Mean squared error over normalised dimensions; see ``Adapter.loss``."""
        return self.loss_after(hidden, tokens, mask, proprio, jnp.zeros(tokens.shape, bool))

    def loss_after(
        self,
        hidden: Float[Array, "B T 1 D"],
        tokens: Float[Array, "B T A"],
        mask: Bool[Array, "B T"],
        proprio: Float[Array, "B T P"],
        committed: Bool[Array, "B T A"],
    ) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
        """See ``Adapter.loss_after``."""
        predicted = self._predict(hidden[..., 0, :], proprio, tokens, committed)
        error = jnp.square(predicted - tokens).mean(-1, where=~committed)
        return jnp.where(mask, error, 0).sum() / jnp.maximum(mask.sum(), 1), {}

    def log_prob(
        self, hidden: Float[Array, "B T 1 D"], tokens: Float[Array, "B T A"]
    ) -> Float[Array, "B T"]:
        """Raises TypeError: a deterministic regression has no distribution."""
        raise TypeError(
            "the regression adapter predicts one action and has no log-probability; use a token adapter"
        )

    def sample(
        self,
        hidden: Float[Array, "B D"],
        proprio: Float[Array, "B P"],
        extend: Extend,
        state: Any,
        key: Keys | None = None,
    ) -> Float[Array, "B A"]:
        """Returns the predicted normalised action; see ``Adapter.sample``."""
        none = jnp.zeros((len(hidden), len(self.statistics.action.min)))
        return self._predict(hidden, proprio, none, none.astype(bool))

    def sample_after(
        self,
        hidden: Float[Array, "B D"],
        proprio: Float[Array, "B P"],
        extend: Extend,
        state: Any,
        key: Keys | None,
        prefix: Float[Array, "B A"],
        committed: Bool[Array, "B A"],
    ) -> Float[Array, "B A"]:
        """Returns the predicted normalised chunk; see ``Adapter.sample_after``."""
        return jnp.where(committed, prefix, self._predict(hidden, proprio, prefix, committed))
