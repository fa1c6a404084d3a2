"""FAST: a chunk of actions as byte pairs of its cosine coefficients, as few as it takes (arXiv 2501.09747)."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from mllm_act.action_tokenizer.byte_pair import END
from mllm_act.action_tokenizer.fast import FastTokenizer
from mllm_act.adapters.action_tokens import ActionTokenAdapter
from mllm_act.adapters.base import Extend
from mllm_act.normalization import Statistics


class Fast(ActionTokenAdapter):
    """M tokens at the most. Where the chunk has its end, only the end may follow: it costs nothing and teaches nothing.

    The tokenizer is part of the adapter, but never trained. ``statistics`` are those of chunks.
    """

    def __init__(
        self,
        statistics: Statistics,
        width: int,
        first_token: int,
        tokenizer: FastTokenizer,
        rngs: nnx.Rngs,
    ) -> None:
        config = tokenizer.config
        super().__init__(statistics, width, config.tokens, config.codes, first_token, rngs)
        self.tokenizer = tokenizer

    def to_codes(self, action: Float[Array, "... HA"]) -> Int[Array, "... M"]:
        """Returns the tokenizer's codes, the end's after the last of a shorter chunk."""
        return self.tokenizer.encode(action)

    def from_codes(self, codes: Int[Array, "... M"]) -> Float[Array, "... HA"]:
        """Returns the chunk that codes stand for, within the demonstrations' range."""
        return jnp.clip(self.tokenizer.decode(codes), -1, 1)

    def allowed(self, prefix: Int[Array, "... j"]) -> Bool[Array, "... K"]:
        """See ``Adapter.allowed``: what still fits into the chunk, and nothing but the end after the end."""
        return self.tokenizer.allowed(prefix - self.first_token)

    def _all_log_probs(
        self, hidden: Float[Array, "B T M D"], tokens: Int[Array, "B T M"]
    ) -> Float[Array, "B T M K"]:
        # As the base's, in one product: M is ten times that of the other adapters.
        room = self.tokenizer.room(tokens - self.first_token)[..., :-1]
        return self._log_probs(hidden, self.tokenizer.fitting(room))

    def loss(
        self,
        hidden: Float[Array, "B T M D"],
        tokens: Int[Array, "B T M"],
        mask: Bool[Array, "B T"],
        proprio: Float[Array, "B T P"],
    ) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
        """Cross-entropy averaged over the tokens that are a choice, the end among them; see ``Adapter.loss``.

        Metrics: ``token_accuracy`` of the same tokens, and ``tokens``, how many an action has. Proprioception is not
        used.
        """
        log_probs = self._all_log_probs(hidden, tokens)
        target = (tokens - self.first_token)[..., None]
        cross_entropy = -jnp.take_along_axis(log_probs, target, axis=-1)[..., 0]
        correct = log_probs.argmax(-1) == target[..., 0]
        chosen = mask[..., None] & (self.tokenizer.room(target[..., 0])[..., :-1] > 0)
        count = jnp.maximum(chosen.sum(), 1)
        metrics = {
            "token_accuracy": (chosen & correct).sum() / count,
            "tokens": chosen.sum() / jnp.maximum(mask.sum(), 1),
        }
        return jnp.where(chosen, cross_entropy, 0).sum() / count, metrics

    def sample(
        self,
        hidden: Float[Array, "B D"],
        proprio: Float[Array, "B P"],
        extend: Extend,
        state: Any,
        key: PRNGKeyArray | None = None,
    ) -> Int[Array, "B M"]:
        """See ``Adapter.sample``. Once every action of the batch has its end, the model is run no more."""
        places = self.tokens_per_action

        def rest(hidden: Array, state: Any, tokens: Int[Array, "B j"]) -> Int[Array, "B M"]:
            tokens = self._add_token(hidden, tokens, key)
            missing = places - tokens.shape[1]
            if missing == 0:
                return tokens
            # Each place within the one before: the model's state need not come out of a branch.
            return jax.lax.cond(
                (self.tokenizer.room(tokens - self.first_token)[:, -1] > 0).any(),
                lambda: rest(*extend(self.embed(tokens[:, -1:])[:, 0], state), tokens),
                lambda: jnp.pad(
                    tokens, ((0, 0), (0, missing)), constant_values=self.first_token + END
                ),
            )

        return rest(hidden, state, jnp.zeros((len(hidden), 0), jnp.int32))
