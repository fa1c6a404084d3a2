"""Adapters that write a new token space over rarely used rows of the vocabulary (arXiv 2406.07904, section 3.2.3).

K consecutive ids from ``first_token`` on are shared by all M tokens of an action; the position of a token says which
codebook, or which dimension, its id belongs to. The rows of the embedding and of the head that belong to these ids are
trained in full, so they are parameters of the adapter; no other rows are computed.
"""

from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from mllm_act.adapters.base import Adapter, Extend, Vocabulary
from mllm_act.adapters.token_filter import Keys, draw, filtered_log_softmax, fold_in
from mllm_act.errors import UserError
from mllm_act.normalization import Statistics


class ActionTokenAdapter(Adapter):
    """Head, embedding, loss and decoding over K ids. Subclasses say what the codes mean."""

    # Those that leave what is to be encoded in [-1, 1].
    normalizations: ClassVar[tuple[str, ...]] = ("range", "quantiles")

    def __init__(
        self,
        statistics: Statistics,
        vocabulary: Vocabulary,
        tokens_per_action: int,
        codes: int,
        rngs: nnx.Rngs,
    ) -> None:
        """Makes head and embedding for ``codes`` ids.

        Raises:
          UserError: if the vocabulary has fewer reserved rows.
        """
        super().__init__(statistics)
        rows = vocabulary.size - vocabulary.first_action
        if codes > rows:
            raise UserError(
                f"config.adapter: expected at most {rows} codes, the reserved rows of the model's vocabulary, found "
                f"{codes}; use fewer, or another preset"
            )
        self.tokens_per_action = tokens_per_action
        self.codes, self.first_token = codes, vocabulary.first_action
        width = vocabulary.width
        self.embedding = nnx.Param(jax.random.normal(rngs.params(), (codes, width)))
        self.head = nnx.Param(jax.random.normal(rngs.params(), (codes, width)) * width**-0.5)

    def to_codes(self, action: Float[Array, "... A"]) -> Int[Array, "... M"]:
        """Returns the codes in [0, K) of a normalised action."""
        raise NotImplementedError

    def from_codes(self, codes: Int[Array, "... M"]) -> Float[Array, "... A"]:
        """Returns the normalised action of codes; ``decode`` clips it."""
        raise NotImplementedError

    def encode(self, action: Float[Array, "... A"]) -> Int[Array, "... M"]:
        """See ``Adapter.encode``."""
        return self.first_token + self.to_codes(self.statistics.normalize_for_codes(action))

    def decode(self, tokens: Int[Array, "... M"]) -> Float[Array, "... A"]:
        """See ``Adapter.decode``."""
        return self.statistics.unnormalize_codes(self.from_codes(tokens - self.first_token))

    def embed(self, tokens: Int[Array, "... M"]) -> Float[Array, "... M D"]:
        """See ``Adapter.embed``."""
        return self.embedding[...][tokens - self.first_token]

    def allowed(self, prefix: Int[Array, "... j"]) -> Bool[Array, "... K"]:
        """See ``Adapter.allowed``: the head emits these K ids only, and each of them may follow."""
        return jnp.ones((*prefix.shape[:-1], self.codes), bool)

    def _log_probs(
        self, hidden: Float[Array, "... D"], allowed: Bool[Array, "... K"]
    ) -> Float[Array, "... K"]:
        head = self.head[...].astype(hidden.dtype)
        # Sums are kept in float32: 512 logits rounded to bfloat16 would tie.
        logits = jnp.matmul(hidden, head.T, preferred_element_type=jnp.float32)
        return filtered_log_softmax(logits, allowed)

    def _all_log_probs(
        self, hidden: Float[Array, "B T M D"], tokens: Int[Array, "B T M"]
    ) -> Float[Array, "B T M K"]:
        per_token = [
            self._log_probs(hidden[..., j, :], self.allowed(tokens[..., :j]))
            for j in range(self.tokens_per_action)
        ]
        return jnp.stack(per_token, axis=-2)

    def loss(
        self,
        hidden: Float[Array, "B T M D"],
        tokens: Int[Array, "B T M"],
        mask: Bool[Array, "B T"],
        proprio: Float[Array, "B T P"],
    ) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
        """Cross-entropy of the tokens, averaged over tokens; see ``Adapter.loss``. Proprioception is not used."""
        return self._cross_entropy(hidden, tokens, mask, jnp.ones(tokens.shape, bool))

    def _cross_entropy(
        self,
        hidden: Float[Array, "B T M D"],
        tokens: Int[Array, "B T M"],
        mask: Bool[Array, "B T"],
        counted: Bool[Array, "B T M"],
    ) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
        """The mean over steps of the mean over the tokens of a step that count; the metrics are of all tokens."""
        log_probs = self._all_log_probs(hidden, tokens)
        target = (tokens - self.first_token)[..., None]
        cross_entropy = -jnp.take_along_axis(log_probs, target, axis=-1)[..., 0]
        correct = log_probs.argmax(-1) == target[..., 0]
        count = jnp.maximum(mask.sum(), 1)
        per_step = cross_entropy.mean(-1, where=counted)
        accuracy = jnp.where(mask[..., None], correct, False).sum((0, 1)) / count
        metrics = {f"token_accuracy_{j}": accuracy[j] for j in range(self.tokens_per_action)}
        return jnp.where(mask, per_step, 0).sum() / count, metrics

    def log_prob(
        self, hidden: Float[Array, "B T M D"], tokens: Int[Array, "B T M"]
    ) -> Float[Array, "B T"]:
        """See ``Adapter.log_prob``."""
        target = (tokens - self.first_token)[..., None]
        return jnp.take_along_axis(self._all_log_probs(hidden, tokens), target, axis=-1)[
            ..., 0
        ].sum(-1)

    def log_probs(
        self, hidden: Float[Array, "B T M D"], tokens: Int[Array, "B T M"]
    ) -> tuple[Float[Array, "B T M K"], Int[Array, "B T M"]]:
        """See ``Adapter.log_probs``."""
        return self._all_log_probs(hidden, tokens), tokens - self.first_token

    def sample(
        self,
        hidden: Float[Array, "B D"],
        proprio: Float[Array, "B P"],
        extend: Extend,
        state: Any,
        key: Keys | None = None,
    ) -> Int[Array, "B M"]:
        """See ``Adapter.sample``."""
        tokens = jnp.zeros((len(hidden), 0), jnp.int32)
        for j in range(self.tokens_per_action):
            tokens = self._add_token(hidden, tokens, key)
            if j + 1 < self.tokens_per_action:
                hidden, state = extend(self.embed(tokens[:, -1:])[:, 0], state)
        return tokens

    def _add_token(
        self, hidden: Float[Array, "B D"], tokens: Int[Array, "B j"], key: Keys | None
    ) -> Int[Array, "B j+1"]:
        """Chooses the next token and returns all j + 1 of them."""
        log_probs = self._log_probs(hidden, self.allowed(tokens))
        if key is None:
            code = log_probs.argmax(-1)
        else:
            code = draw(fold_in(key, tokens.shape[1]), log_probs)
        token = self.first_token + code.astype(jnp.int32)
        return jnp.concatenate([tokens, token[:, None]], axis=1)
