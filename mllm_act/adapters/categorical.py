"""Pred for discrete actions: an MLP on the hidden state, one logit an action (arXiv 2406.07904, section 3.2.1).

The appendix has two layers of width 2048 with ReLU, as for continuous actions. Nothing of the vocabulary is used.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from mllm_act.adapters.base import Extend
from mllm_act.adapters.discrete import Discrete
from mllm_act.adapters.token_filter import choose, filtered_log_softmax
from mllm_act.models.layers import Linear
from mllm_act.normalization import Statistics


class Categorical(Discrete):
    """One "token", the action's place in the list."""

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

    def encode(self, action: Float[Array, "... 1"]) -> Int[Array, "... 1"]:
        """See ``Adapter.encode``."""
        return self.to_index(action)[..., None]

    def decode(self, tokens: Int[Array, "... 1"]) -> Float[Array, "... 1"]:
        """See ``Adapter.decode``."""
        return self.from_index(tokens[..., 0])

    def embed(self, tokens: Int[Array, "... 1"]) -> Float[Array, "... 1 D"]:
        """Returns the action's row of a table; used where actions are part of the history."""
        return self.embedding[...][tokens]

    def allowed(self, prefix: Int[Array, "... 0"]) -> Bool[Array, "... actions"]:
        """See ``Adapter.allowed``: the head has a logit for each action and no other."""
        return jnp.ones((*prefix.shape[:-1], len(self.names)), bool)

    def _logits(self, hidden: Float[Array, "... D"]) -> Float[Array, "... actions"]:
        x = hidden.astype(jnp.float32)  # as the regression, whatever the model computes in
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
        log_probs = filtered_log_softmax(self._logits(hidden[..., 0, :]), self.allowed(tokens))
        return jnp.take_along_axis(log_probs, tokens, axis=-1)[..., 0]

    def sample(
        self,
        hidden: Float[Array, "B D"],
        proprio: Float[Array, "B P"],
        extend: Extend,
        state: Any,
        key: PRNGKeyArray | None = None,
    ) -> Int[Array, "B 1"]:
        """See ``Adapter.sample``."""
        logits = self._logits(hidden)
        return choose(logits, jnp.ones_like(logits, bool), key)[:, None].astype(jnp.int32)
