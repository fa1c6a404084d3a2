"""The contract of an action space adapter (ASA; arXiv 2406.07904, section 3).

An adapter is three trainable parts, a head (hidden state to token), an embedding (token to what is fed back) and a
decoder (tokens to action), and a filter of the tokens that may follow. It turns any multimodal language model into a
policy for its action space. Everything here traces under ``jax.jit``.

``tokens`` are vocabulary ids, int32[..., M]. For regression, which has no vocabulary, the one "token" is the
normalised action itself, float32[..., A]; the rest of the program need not know.
"""

from collections.abc import Callable
from typing import Any

from flax import nnx
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from mllm_act.normalization import Statistics

# Feeds one token's embedding back to the model: (embedding [B, D], state) -> (hidden [B, D], state).
Extend = Callable[[Float[Array, "B D"], Any], tuple[Float[Array, "B D"], Any]]
Tokens = Array


class Adapter(nnx.Module):
    """What the seven adapters have in common.

    Attributes:
      tokens_per_action: M, how many tokens an action takes.
      codes: K, how many rows of the vocabulary it writes over; none where it has no vocabulary.
      statistics: of the demonstrations; they map actions to [-1, 1] and back.
    """

    tokens_per_action: int
    codes: int = 0

    def __init__(self, statistics: Statistics) -> None:
        self.statistics = statistics

    def with_rows(self, embedding: Float[Array, "V D"], head: Float[Array, "V D"]) -> "Adapter":
        """Returns the adapter with the language model's tables lent to it, for the computation at hand.

        Adapters that write actions in the model's own tokens need them for all but ``encode`` and ``decode``. The
        others have rows of their own, and are returned as they are.
        """
        return self

    def encode(self, action: Float[Array, "... A"]) -> Tokens:
        """Returns the training target of an action in the environment's own numbers."""
        raise NotImplementedError

    def decode(self, tokens: Tokens) -> Float[Array, "... A"]:
        """Returns the action, in the environment's own numbers, that tokens stand for."""
        raise NotImplementedError

    def embed(self, tokens: Tokens) -> Float[Array, "... M D"]:
        """Returns what is fed back to the model for each token of an action."""
        raise NotImplementedError

    def allowed(self, prefix: Tokens) -> Bool[Array, "... V"]:
        """Returns which of the V tokens the head can emit may follow the first j tokens ``prefix`` [..., j]."""
        raise NotImplementedError

    def loss(
        self,
        hidden: Float[Array, "B T M D"],
        tokens: Tokens,
        mask: Bool[Array, "B T"],
        proprio: Float[Array, "B T P"],
    ) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
        """Returns the teacher-forced loss, averaged over the steps that exist, and metrics by name.

        Args:
          hidden: the hidden states that predict each token.
          tokens: the targets, from ``encode``.
          mask: which steps count.
          proprio: normalised proprioception.
        """
        raise NotImplementedError

    def log_prob(self, hidden: Float[Array, "B T M D"], tokens: Tokens) -> Float[Array, "B T"]:
        """Returns the log-probability of whole actions on the filtered, renormalised distribution."""
        raise NotImplementedError

    def sample(
        self,
        hidden: Float[Array, "B D"],
        proprio: Float[Array, "B P"],
        extend: Extend,
        state: Any,
        key: PRNGKeyArray | None = None,
    ) -> Tokens:
        """Decodes one action's tokens, a fixed number of them.

        Args:
          hidden: the hidden state that predicts the first token.
          proprio: normalised proprioception.
          extend: feeds a token back to the model.
          state: what ``extend`` carries on.
          key: draws from the distribution; without it decoding is greedy.
        """
        raise NotImplementedError
