"""SemLang and Lang: actions in the language model's own tokens, head and embedding (arXiv 2406.07904, section 3.2.1).

SemLang says an action by its words, Lang by digits that mean nothing: the same adapter on other token sequences. It has
no parameters. The rows of the language model's tables are lent to it (``with_rows``), so that they are frozen or
trained as the model's are; of the head it reads only those of tokens that occur in some action.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from mllm_act.adapters.base import Extend
from mllm_act.adapters.discrete import Discrete
from mllm_act.adapters.token_filter import Trie, choose, filtered_log_softmax
from mllm_act.errors import UserError
from mllm_act.normalization import Statistics

Sequences = tuple[tuple[int, ...], ...]


class Language(Discrete):
    """M is the longest sequence's length; shorter ones are filled up with the ``end`` token.

    An action whose sequence begins another's is told from it by the end token that follows. Where nothing else can
    follow, the end token has probability one, costs nothing, and the model is not run for it.
    """

    def __init__(
        self,
        statistics: Statistics,
        names: Sequence[str],
        sequences: Sequence[Sequence[int]],
        end: int,
        vocabulary: int,
    ) -> None:
        """Makes the trie.

        Args:
          statistics: of the demonstrations.
          names: of the actions, in the environment's order.
          sequences: the token ids of each action.
          end: fills shorter sequences up.
          vocabulary: V, how many tokens the language model knows.

        Raises:
          UserError: if a sequence is empty or is another's, a token is not in the vocabulary, or the demonstrations
            have an action that is not in the list.
        """
        super().__init__(statistics, names)
        self.end, self.vocabulary = end, vocabulary
        self.trie = Trie(_filled_up(self.names, sequences, end, vocabulary))
        self.tokens_per_action = len(self.trie.sequences[0])
        self.embedding: Float[Array, "V D"] | None = nnx.data(None)
        self.head: Float[Array, "C D"] | None = nnx.data(None)

    def with_rows(self, embedding: Float[Array, "V D"], head: Float[Array, "V D"]) -> "Language":
        """See ``Adapter.with_rows``."""
        sequences = self.trie.sequences
        lent = Language(self.statistics, self.names, sequences, self.end, self.vocabulary)
        lent.embedding, lent.head = embedding, head[self.trie.candidates]
        return lent

    def encode(self, action: Float[Array, "... 1"]) -> Int[Array, "... M"]:
        """See ``Adapter.encode``; -1, whose loss is infinite, for an action that is not in the list."""
        table = jnp.asarray(self.trie.sequences, jnp.int32)
        rows = table.at[self.to_index(action)]
        return rows.get(mode="fill", fill_value=-1, wrap_negative_indices=False)

    def decode(self, tokens: Int[Array, "... M"]) -> Float[Array, "... 1"]:
        """See ``Adapter.decode``; -1 for tokens that are no action's, which ``sample`` never gives."""
        return self.from_index(self.trie.index(tokens))

    def embed(self, tokens: Int[Array, "... M"]) -> Float[Array, "... M D"]:
        """See ``Adapter.embed``."""
        assert self.embedding is not None, "with_rows comes first"
        return self.embedding[tokens]

    def allowed(self, prefix: Int[Array, "... j"]) -> Bool[Array, "... C"]:
        """See ``Adapter.allowed``; the C tokens are ``trie.candidates``."""
        return self.trie.allowed(self.trie.walk(prefix)[..., -1])

    def _logits(self, hidden: Float[Array, "... D"]) -> Float[Array, "... C"]:
        assert self.head is not None, "with_rows comes first"
        head = self.head.astype(hidden.dtype)
        return jnp.matmul(hidden, head.T, preferred_element_type=jnp.float32)

    def _log_probs(
        self, hidden: Float[Array, "B T M D"], tokens: Int[Array, "B T M"]
    ) -> Float[Array, "B T M C"]:
        allowed = self.trie.allowed(self.trie.walk(tokens[..., :-1]))
        return filtered_log_softmax(self._logits(hidden), allowed)

    def _of_tokens(
        self, log_probs: Float[Array, "B T M C"], tokens: Int[Array, "B T M"]
    ) -> Float[Array, "B T M"]:
        """Picks the tokens' log-probabilities; -inf where one is no candidate."""
        column = self.trie.columns(tokens)[..., None]
        known = (tokens[..., None] == self.trie.candidates).any(-1)
        return jnp.where(known, jnp.take_along_axis(log_probs, column, axis=-1)[..., 0], -jnp.inf)

    def loss(
        self,
        hidden: Float[Array, "B T M D"],
        tokens: Int[Array, "B T M"],
        mask: Bool[Array, "B T"],
        proprio: Float[Array, "B T P"],
    ) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
        """Cross-entropy of the tokens among those that may follow, averaged over all M places; see ``Adapter.loss``.

        Proprioception is not used.
        """
        log_probs = self._log_probs(hidden, tokens)
        cross_entropy = -self._of_tokens(log_probs, tokens)
        correct = log_probs.argmax(-1) == self.trie.columns(tokens)
        count = jnp.maximum(mask.sum(), 1)
        per_place = jnp.where(mask[..., None], cross_entropy, 0).sum((0, 1)) / count
        accuracy = jnp.where(mask[..., None], correct, False).sum((0, 1)) / count
        metrics = {f"token_accuracy_{j}": accuracy[j] for j in range(self.tokens_per_action)}
        return per_place.mean(), metrics

    def log_prob(
        self, hidden: Float[Array, "B T M D"], tokens: Int[Array, "B T M"]
    ) -> Float[Array, "B T"]:
        """See ``Adapter.log_prob``; -inf for tokens that are no action's."""
        return self._of_tokens(self._log_probs(hidden, tokens), tokens).sum(-1)

    def sample(
        self,
        hidden: Float[Array, "B D"],
        proprio: Float[Array, "B P"],
        extend: Extend,
        state: Any,
        key: PRNGKeyArray | None = None,
    ) -> Int[Array, "B M"]:
        """See ``Adapter.sample``. The model is run up to the last token that is not settled by those before it."""
        trie, node, tokens = self.trie, jnp.zeros(len(hidden), jnp.int32), []
        last = max(trie.decisions, default=-1)
        for j in range(self.tokens_per_action):
            allowed = trie.allowed(node)
            if j in trie.decisions:
                place = None if key is None else jax.random.fold_in(key, j)
                column = choose(self._logits(hidden), allowed, place)
            else:
                column = allowed.argmax(-1)
            node = trie.step(node, column)
            tokens.append(jnp.asarray(trie.candidates)[column])
            if j < last:
                hidden, state = extend(self.embed(tokens[-1]), state)
        return jnp.stack(tokens, axis=-1)


def _filled_up(
    names: Sequence[str], sequences: Sequence[Sequence[int]], end: int, vocabulary: int
) -> Sequences:
    """Returns sequences of one length, and raises UserError where they cannot stand for the actions."""
    assert len(names) == len(sequences)
    longest = max(map(len, sequences))
    owner: dict[tuple[int, ...], str] = {}
    for name, sequence in zip(names, sequences, strict=True):
        if not sequence:
            raise UserError(
                f"config.actions: expected words for every action, found {name!r}, which has no token; name it "
                "otherwise"
            )
        for token in (*sequence, end):
            if not 0 <= token < vocabulary:
                raise UserError(
                    f"config.actions: expected token ids below {vocabulary}, the model's vocabulary, found {token} in "
                    f"{name!r}; the tokenizer is of another model: import the weights anew with python -m "
                    "mllm_act.import_hf"
                )
        filled = (*map(int, sequence), *[end] * (longest - len(sequence)))
        if filled in owner:
            raise UserError(
                f"config.actions: expected every action in tokens of its own, found {owner[filled]!r} and {name!r}, "
                f"both {list(sequence)}; name one of them otherwise"
            )
        owner[filled] = name
    return tuple(owner)


def digit_sequences(
    names: Sequence[str], sequences: Sequence[Sequence[int]], digits: Sequence[int]
) -> Sequences:
    """Returns Lang's sequences: one of digits for each action, as long as the action's words, no two the same.

    Mapping every token to a digit of its own accord, as the paper words it, is not injective beyond ten words. Here
    no sequence begins another where the lengths admit that (Kraft's inequality; they are the canonical code), and the
    actions of each length are numbered where they do not.

    Args:
      names: of the actions.
      sequences: the token ids of their words.
      digits: the token ids of 0 to 9.

    Raises:
      UserError: if there are more actions of a length than numbers of as many digits.
    """
    assert len(digits) == 10
    lengths = [len(sequence) for sequence in sequences]
    longest = max(lengths)
    prefix_free = sum(10 ** (longest - n) for n in lengths) <= 10**longest
    numbers, total, count = [""] * len(lengths), 0, dict.fromkeys(lengths, 0)
    for i in sorted(range(len(lengths)), key=lengths.__getitem__):
        n = lengths[i]
        if count[n] == 10**n:
            raise UserError(
                f"config.actions: expected at most {10**n} actions of {n} tokens, as many as there are numbers of {n} "
                f"digits for adapter lang, found {lengths.count(n)}, {names[i]!r} among them; use more words"
            )
        numbers[i] = f"{total:0{longest}}"[:n] if prefix_free else f"{count[n]:0{n}}"
        total, count[n] = total + 10 ** (longest - n), count[n] + 1
    return tuple(tuple(digits[int(digit)] for digit in number) for number in numbers)
