"""Pred for discrete actions: an MLP on the hidden state, one logit an action (arXiv 2406.07904, section 3.2.1).

The appendix has two layers of width 2048 with ReLU, as for continuous actions. The vocabulary is not used.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from mllm_act.adapters.base import Extend, RunFacts, Vocabulary
from mllm_act.adapters.discrete import Discrete
from mllm_act.adapters.token_filter import Keys, choose, filtered_log_softmax
from mllm_act.models.layers import Linear
from mllm_act.normalization import Statistics


@dataclasses.dataclass(frozen=True)
class CategoricalConfig:
    """The names of the actions, and the settings."""

    actions: tuple[str, ...]
    hidden: int = 2048  # width of the MLP


class Categorical(Discrete):
    """One "token", the index of the action."""

    Config = CategoricalConfig

    tokens_per_action = 1

    def __init__(
        self,
        statistics: Statistics,
        names: Sequence[str],
        width: int,
        hidden: int,
        rngs: nnx.Rngs,
    ) -> None:
        super().__init__(statistics, names)
        self.layer1 = Linear(width, hidden, bias=True, rngs=rngs)
        self.layer2 = Linear(hidden, hidden, bias=True, rngs=rngs)
        self.output = Linear(hidden, len(self.names), bias=True, rngs=rngs)
        self.embedding = nnx.Param(jax.random.normal(rngs.params(), (len(self.names), width)))

    @classmethod
    def configure(cls, settings: Mapping[str, Any], facts: RunFacts) -> CategoricalConfig:
        """See ``Adapter.configure``."""
        return CategoricalConfig(facts.actions, **settings)

    @classmethod
    def make(
        cls,
        config: CategoricalConfig,
        statistics: Statistics,
        vocabulary: Vocabulary,
        rngs: nnx.Rngs,
    ) -> "Categorical":
        """See ``Adapter.make``."""
        return cls(statistics, config.actions, vocabulary.width, config.hidden, rngs)

    def encode(self, action: Float[Array, "... 1"]) -> Int[Array, "... 1"]:
        """See ``Adapter.encode``."""
        return self.to_index(action)[..., None]

    def decode(self, tokens: Int[Array, "... 1"]) -> Float[Array, "... 1"]:
        """See ``Adapter.decode``."""
        return self.from_index(tokens[..., 0])

    def embed(self, tokens: Int[Array, "... 1"]) -> Float[Array, "... 1 D"]:
        """Returns the action's row of an embedding table; used where the history includes actions."""
        return self.embedding[...][tokens]

    def allowed(self, prefix: Int[Array, "... 0"]) -> Bool[Array, "... actions"]:
        """See ``Adapter.allowed``: the head has one logit per action, and all are allowed."""
        return jnp.ones((*prefix.shape[:-1], len(self.names)), bool)

    def _logits(self, hidden: Float[Array, "... D"]) -> Float[Array, "... actions"]:
        x = hidden.astype(jnp.float32)  # in float32, as regression, whatever the model computes in
        x = jax.nn.relu(self.layer1(x))
        x = jax.nn.relu(self.layer2(x))
        return self.output(x)

    def loss(
        self,
        hidden: Float[Array, "B T 1 D"],
        tokens: Int[Array, "B T 1"],
        mask: Bool[Array, "B T"],
        proprio: Float[Array, "B T P"],
    ) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
        """Cross-entropy of the actions; see ``Adapter.loss``. Proprioception is not used."""
        logits = self._logits(hidden[..., 0, :])
        count = jnp.maximum(mask.sum(), 1)
        log_probs = jax.nn.log_softmax(logits)
        cross_entropy = -jnp.take_along_axis(log_probs, tokens, axis=-1)[..., 0]
        correct = logits.argmax(-1) == tokens[..., 0]
        accuracy = jnp.where(mask, correct, False).sum() / count
        return jnp.where(mask, cross_entropy, 0).sum() / count, {"token_accuracy_0": accuracy}

    def log_prob(
        self, hidden: Float[Array, "B T 1 D"], tokens: Int[Array, "B T 1"]
    ) -> Float[Array, "B T"]:
        """See ``Adapter.log_prob``."""
        log_probs, _ = self.log_probs(hidden, tokens)
        return jnp.take_along_axis(log_probs, tokens[..., None], axis=-1)[..., 0, 0]

    def log_probs(
        self, hidden: Float[Array, "B T 1 D"], tokens: Int[Array, "B T 1"]
    ) -> tuple[Float[Array, "B T 1 actions"], Int[Array, "B T 1"]]:
        """See ``Adapter.log_probs``."""
        logits = self._logits(hidden)
        return filtered_log_softmax(logits, jnp.ones_like(logits, bool)), tokens

    def sample(
        self,
        hidden: Float[Array, "B D"],
        proprio: Float[Array, "B P"],
        extend: Extend,
        state: Any,
        key: Keys | None = None,
    ) -> Int[Array, "B 1"]:
        """See ``Adapter.sample``."""
        logits = self._logits(hidden)
        return choose(logits, jnp.ones_like(logits, bool), key)[:, None].astype(jnp.int32)
