"""FAST: a chunk of actions as byte pairs of its cosine coefficients (arXiv 2501.09747)."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from mllm_act.action_tokenizer.byte_pair import END
from mllm_act.action_tokenizer.fast import FastConfig, FastTokenizer
from mllm_act.adapters.action_tokens import ActionTokenAdapter
from mllm_act.adapters.base import Extend, RunFacts, Vocabulary
from mllm_act.adapters.token_filter import Keys
from mllm_act.normalization import NORMALIZATIONS, Statistics


@dataclasses.dataclass(frozen=True)
class FastAdapterConfig:
    """The sizes of the tokenizer: the fields of its ``FastConfig``."""

    tokenizer: Mapping[str, Any]


class Fast(ActionTokenAdapter):
    """At most M tokens. After the end token only the end token is allowed, which costs nothing and teaches nothing.

    The tokenizer is part of the adapter, but never trained. ``statistics`` are those of chunks.
    """

    Config = FastAdapterConfig
    needs_tokenizer = True
    normalizations = NORMALIZATIONS

    def __init__(
        self,
        statistics: Statistics,
        vocabulary: Vocabulary,
        tokenizer: FastTokenizer,
        rngs: nnx.Rngs,
    ) -> None:
        sizes = tokenizer.config
        super().__init__(statistics, vocabulary, sizes.tokens, sizes.codes, rngs)
        self.tokenizer = tokenizer

    @classmethod
    def configure(cls, settings: Mapping[str, Any], facts: RunFacts) -> FastAdapterConfig:
        """See ``Adapter.configure``."""
        assert isinstance(facts.tokenizer, FastConfig)
        return FastAdapterConfig(dataclasses.asdict(facts.tokenizer), **settings)

    @classmethod
    def make(
        cls,
        config: FastAdapterConfig,
        statistics: Statistics,
        vocabulary: Vocabulary,
        rngs: nnx.Rngs,
    ) -> "Fast":
        """See ``Adapter.make``."""
        return cls(statistics, vocabulary, FastTokenizer(FastConfig(**config.tokenizer)), rngs)

    def to_codes(self, action: Float[Array, "... HA"]) -> Int[Array, "... M"]:
        """Returns the codes of the tokenizer; a shorter sequence is padded with the end code."""
        return self.tokenizer.encode(action)

    def from_codes(self, codes: Int[Array, "... M"]) -> Float[Array, "... HA"]:
        """Returns the normalised chunk that the codes stand for."""
        return self.tokenizer.decode(codes)

    def allowed(self, prefix: Int[Array, "... j"]) -> Bool[Array, "... K"]:
        """See ``Adapter.allowed``: codes that still fit into the chunk; after the end code only the end code."""
        return self.tokenizer.allowed(prefix - self.first_token)

    def _all_log_probs(
        self, hidden: Float[Array, "B T M D"], tokens: Int[Array, "B T M"]
    ) -> Float[Array, "B T M K"]:
        # In one product, unlike the base class: M is ten times that of the other adapters.
        room = self.tokenizer.room(tokens - self.first_token)[..., :-1]
        return self._log_probs(hidden, self.tokenizer.fitting(room))

    def loss(
        self,
        hidden: Float[Array, "B T M D"],
        tokens: Int[Array, "B T M"],
        mask: Bool[Array, "B T"],
        proprio: Float[Array, "B T P"],
    ) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
        """Cross-entropy averaged over the tokens up to and including the end token; see ``Adapter.loss``.

        Metrics: ``token_accuracy`` over the same tokens, and ``tokens``, their mean number per action. Proprioception
        is not used.
        """
        log_probs = self._all_log_probs(hidden, tokens)
        target = (tokens - self.first_token)[..., None]
        cross_entropy = -jnp.take_along_axis(log_probs, target, axis=-1)[..., 0]
        correct = log_probs.argmax(-1) == target[..., 0]
        chosen = self._chosen(tokens, mask)
        count = jnp.maximum(chosen.sum(), 1)
        metrics = {
            "token_accuracy": (chosen & correct).sum() / count,
            "tokens": chosen.sum() / jnp.maximum(mask.sum(), 1),
        }
        return jnp.where(chosen, cross_entropy, 0).sum() / count, metrics

    def counts(
        self, tokens: Int[Array, "B T M"], mask: Bool[Array, "B T"]
    ) -> dict[str, Int[Array, ""]]:
        """See ``Adapter.counts``."""
        tokens_that_count = self._chosen(tokens, mask).sum()
        return {"loss": tokens_that_count, "token_accuracy": tokens_that_count}

    def _chosen(
        self, tokens: Int[Array, "B T M"], mask: Bool[Array, "B T"]
    ) -> Bool[Array, "B T M"]:
        """Returns which tokens the model has to choose: those up to and including the end token."""
        room = self.tokenizer.room(tokens - self.first_token)[..., :-1]
        return mask[..., None] & (room > 0)

    def sample(
        self,
        hidden: Float[Array, "B D"],
        proprio: Float[Array, "B P"],
        extend: Extend,
        state: Any,
        key: Keys | None = None,
    ) -> Int[Array, "B M"]:
        """See ``Adapter.sample``. The model is not run any more once every action of the batch has ended."""
        length = self.tokens_per_action

        def rest(hidden: Array, state: Any, tokens: Int[Array, "B j"]) -> Int[Array, "B M"]:
            tokens = self._add_token(hidden, tokens, key)
            missing = length - tokens.shape[1]
            if missing == 0:
                return tokens
            # Nested, so that the model's state need not come out of a branch.
            return jax.lax.cond(
                (self.tokenizer.room(tokens - self.first_token)[:, -1] > 0).any(),
                lambda: rest(*extend(self.embed(tokens[:, -1:])[:, 0], state), tokens),
                lambda: jnp.pad(
                    tokens, ((0, 0), (0, missing)), constant_values=self.first_token + END
                ),
            )

        return rest(hidden, state, jnp.zeros((len(hidden), 0), jnp.int32))
