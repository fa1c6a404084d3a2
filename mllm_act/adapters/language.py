"""SemLang and Lang: actions in the language model's own tokens, head and embedding (arXiv 2406.07904, section 3.2.1).

SemLang writes an action in words, Lang in meaningless digits: the same adapter with different token sequences. It has
no parameters. It borrows the language model's tables (``with_rows``), so they are frozen or trained as the model's
are. Of the head it reads only the rows of tokens that occur in some action.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from mllm_act.adapters import action_words
from mllm_act.adapters.action_words import Sequences
from mllm_act.adapters.base import Extend, RunFacts, Vocabulary
from mllm_act.adapters.discrete import Discrete
from mllm_act.adapters.token_filter import Keys, Trie, choose, filtered_log_softmax, fold_in
from mllm_act.errors import UserError
from mllm_act.normalization import Statistics


@dataclasses.dataclass(frozen=True)
class LanguageConfig:
    """The names of the actions, the token ids of each, and the token that ends and pads them.

    Without ``filter`` the whole vocabulary may follow, as an ablation: tokens that are no action decode to -1, which
    simulators refuse. Reinforcement learning takes it for an action that does nothing.
    """

    actions: tuple[str, ...]
    sequences: Sequences
    end: int
    filter: bool = True


class Language(Discrete):
    """M is the length of the longest sequence; shorter ones are padded with the ``end`` token.

    Where one action's sequence is the beginning of another's, the end token after it tells them apart. Where nothing
    else can follow, the end token has probability one and costs nothing, and the model is not run for it.
    """

    Config = LanguageConfig
    writes_words = True

    def __init__(
        self,
        statistics: Statistics,
        names: Sequence[str],
        sequences: Sequence[Sequence[int]],
        end: int,
        vocabulary: int,
        filter: bool = True,
    ) -> None:
        """Makes the trie.

        Args:
          statistics: of the demonstrations.
          names: of the actions, in the environment's order.
          sequences: the token ids of each action.
          end: the token that pads shorter sequences.
          vocabulary: V, the number of token ids of the language model.
          filter: whether only tokens may follow that lead to an action.

        Raises:
          UserError: if a sequence is empty or occurs twice, a token is not in the vocabulary, or the demonstrations
            have an action that is not in the list.
        """
        super().__init__(statistics, names)
        self.end, self.vocabulary, self.filter = end, vocabulary, filter
        self.trie = Trie(_padded(self.names, sequences, end, vocabulary))
        self.tokens_per_action = len(self.trie.sequences[0])
        self.embedding: Float[Array, "V D"] | None = nnx.data(None)
        self.head: Float[Array, "C D"] | None = nnx.data(None)

    @classmethod
    def make(
        cls, config: LanguageConfig, statistics: Statistics, vocabulary: Vocabulary, rngs: nnx.Rngs
    ) -> "Language":
        """See ``Adapter.make``."""
        sequences, size = config.sequences, vocabulary.size
        return cls(statistics, config.actions, sequences, config.end, size, config.filter)

    def with_rows(self, embedding: Float[Array, "V D"], head: Float[Array, "V D"]) -> "Language":
        """See ``Adapter.with_rows``."""
        sequences, size = self.trie.sequences, self.vocabulary
        adapter = type(self)(self.statistics, self.names, sequences, self.end, size, self.filter)
        adapter.embedding = embedding
        adapter.head = head[self.trie.candidates] if self.filter else head
        return adapter

    def encode(self, action: Float[Array, "... 1"]) -> Int[Array, "... M"]:
        """See ``Adapter.encode``; -1, whose loss is infinite, for an action that is not in the list."""
        table = jnp.asarray(self.trie.sequences, jnp.int32)
        rows = table.at[self.to_index(action)]
        return rows.get(mode="fill", fill_value=-1, wrap_negative_indices=False)

    def decode(self, tokens: Int[Array, "... M"]) -> Float[Array, "... 1"]:
        """See ``Adapter.decode``; -1 for tokens that are not an action, which ``sample`` never returns."""
        return self.from_index(self.trie.index(tokens))

    def embed(self, tokens: Int[Array, "... M"]) -> Float[Array, "... M D"]:
        """See ``Adapter.embed``."""
        assert self.embedding is not None, "call with_rows first"
        return self.embedding[tokens]

    def allowed(self, prefix: Int[Array, "... j"]) -> Bool[Array, "... C"]:
        """See ``Adapter.allowed``; the C tokens are ``trie.candidates``, without the filter all V."""
        if not self.filter:
            return jnp.ones((*prefix.shape[:-1], self.vocabulary), bool)
        return self.trie.allowed(self.trie.walk(prefix)[..., -1])

    def _logits(self, hidden: Float[Array, "... D"]) -> Float[Array, "... C"]:
        assert self.head is not None, "call with_rows first"
        head = self.head.astype(hidden.dtype)
        return jnp.matmul(hidden, head.T, preferred_element_type=jnp.float32)

    def _log_probs(
        self, hidden: Float[Array, "B T M D"], tokens: Int[Array, "B T M"]
    ) -> Float[Array, "B T M C"]:
        logits = self._logits(hidden)
        if not self.filter:
            return filtered_log_softmax(logits, jnp.ones_like(logits, bool))
        return filtered_log_softmax(logits, self.trie.allowed(self.trie.walk(tokens[..., :-1])))

    def _columns(self, tokens: Int[Array, "*B"]) -> Int[Array, "*B"]:
        """Returns which of the head's rows tokens are."""
        return self.trie.columns(tokens) if self.filter else jnp.maximum(tokens, 0)

    def _of_tokens(
        self, log_probs: Float[Array, "B T M C"], tokens: Int[Array, "B T M"]
    ) -> Float[Array, "B T M"]:
        """Picks the log-probabilities of the tokens; -inf for a token that is not a candidate."""
        column = self._columns(tokens)[..., None]
        known = tokens >= 0
        if self.filter:
            known = (tokens[..., None] == self.trie.candidates).any(-1)
        return jnp.where(known, jnp.take_along_axis(log_probs, column, axis=-1)[..., 0], -jnp.inf)

    def loss(
        self,
        hidden: Float[Array, "B T M D"],
        tokens: Int[Array, "B T M"],
        mask: Bool[Array, "B T"],
        proprio: Float[Array, "B T P"],
    ) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
        """Cross-entropy of the tokens among those allowed, averaged over all M positions; see ``Adapter.loss``.

        Proprioception is not used.
        """
        log_probs = self._log_probs(hidden, tokens)
        cross_entropy = -self._of_tokens(log_probs, tokens)
        correct = log_probs.argmax(-1) == self._columns(tokens)
        count = jnp.maximum(mask.sum(), 1)
        per_token = jnp.where(mask[..., None], cross_entropy, 0).sum((0, 1)) / count
        accuracy = jnp.where(mask[..., None], correct, False).sum((0, 1)) / count
        metrics = {f"token_accuracy_{j}": accuracy[j] for j in range(self.tokens_per_action)}
        return per_token.mean(), metrics

    def log_prob(
        self, hidden: Float[Array, "B T M D"], tokens: Int[Array, "B T M"]
    ) -> Float[Array, "B T"]:
        """See ``Adapter.log_prob``; -inf for tokens that are not an action."""
        return self._of_tokens(self._log_probs(hidden, tokens), tokens).sum(-1)

    def log_probs(
        self, hidden: Float[Array, "B T M D"], tokens: Int[Array, "B T M"]
    ) -> tuple[Float[Array, "B T M C"], Int[Array, "B T M"]]:
        """See ``Adapter.log_probs``."""
        return self._log_probs(hidden, tokens), self._columns(tokens)

    def sample(
        self,
        hidden: Float[Array, "B D"],
        proprio: Float[Array, "B P"],
        extend: Extend,
        state: Any,
        key: Keys | None = None,
    ) -> Int[Array, "B M"]:
        """See ``Adapter.sample``. The model runs up to the last token that the earlier ones do not determine."""
        if not self.filter:
            return self._sample_any(hidden, extend, state, key)
        trie, node, tokens = self.trie, jnp.zeros(len(hidden), jnp.int32), []
        last = max(trie.decisions, default=-1)
        for j in range(self.tokens_per_action):
            allowed = trie.allowed(node)
            if j in trie.decisions:
                token_key = None if key is None else fold_in(key, j)
                column = choose(self._logits(hidden), allowed, token_key)
            else:
                column = allowed.argmax(-1)
            node = trie.step(node, column)
            tokens.append(jnp.asarray(trie.candidates)[column])
            if j < last:
                hidden, state = extend(self.embed(tokens[-1]), state)
        return jnp.stack(tokens, axis=-1)

    def _sample_any(
        self, hidden: Float[Array, "B D"], extend: Extend, state: Any, key: Keys | None
    ) -> Int[Array, "B M"]:
        """Decodes M tokens without the filter."""
        tokens: list[Array] = []
        for j in range(self.tokens_per_action):
            if tokens:
                hidden, state = extend(self.embed(tokens[-1]), state)
            logits = self._logits(hidden)
            token_key = None if key is None else fold_in(key, j)
            tokens.append(choose(logits, jnp.ones_like(logits, bool), token_key).astype(jnp.int32))
        return jnp.stack(tokens, axis=-1)


class SemLang(Language):
    """Actions in the words of their names."""

    @classmethod
    def configure(cls, settings: Mapping[str, Any], facts: RunFacts) -> LanguageConfig:
        """See ``Adapter.configure``."""
        sequences = action_words.words(facts.text_tokenizer, facts.actions)
        end = action_words.end(facts.text_tokenizer)
        return LanguageConfig(facts.actions, sequences, end, **settings)


class Lang(Language):
    """Actions in digits, as many as SemLang has tokens."""

    @classmethod
    def configure(cls, settings: Mapping[str, Any], facts: RunFacts) -> LanguageConfig:
        """See ``Adapter.configure``."""
        words = action_words.words(facts.text_tokenizer, facts.actions)
        digits = action_words.digits(facts.text_tokenizer)
        sequences = action_words.digit_sequences(facts.actions, words, digits)
        end = action_words.end(facts.text_tokenizer)
        return LanguageConfig(facts.actions, sequences, end, **settings)


def _padded(
    names: Sequence[str], sequences: Sequence[Sequence[int]], end: int, vocabulary: int
) -> Sequences:
    """Returns the sequences padded to one length; UserError where they cannot stand for the actions."""
    assert len(names) == len(sequences)
    longest = max(map(len, sequences))
    owner: dict[tuple[int, ...], str] = {}
    for name, sequence in zip(names, sequences, strict=True):
        if not sequence:
            raise UserError(
                f"config.actions: expected words for every action, found {name!r}, which has no token; rename it"
            )
        for token in (*sequence, end):
            if not 0 <= token < vocabulary:
                raise UserError(
                    f"config.actions: expected token ids below {vocabulary}, the model's vocabulary, found {token} in "
                    f"{name!r}; the text tokenizer belongs to another model: import the weights again with "
                    "python -m mllm_act.import_hf"
                )
        padded = (*map(int, sequence), *[end] * (longest - len(sequence)))
        if padded in owner:
            raise UserError(
                f"config.actions: expected different tokens for every action, found {owner[padded]!r} and {name!r}, "
                f"both {list(sequence)}; rename one of them"
            )
        owner[padded] = name
    return tuple(owner)
