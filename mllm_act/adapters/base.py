"""The contract of an action space adapter (ASA; arXiv 2406.07904, section 3).

An adapter turns a multimodal language model into a policy for one action space. It is three trainable parts, a head
(hidden state to token), an embedding (token to what is fed back) and a decoder (tokens to action), and a filter of the
tokens that may follow.

An adapter is one file: a subclass of ``Adapter`` with a frozen dataclass ``Config`` and a class method ``make``.
``ADAPTERS`` in ``adapters/__init__.py`` gives it its name. Training, checkpoints and inference need nothing else.

Everything but construction traces under ``jax.jit``. ``tokens`` are vocabulary ids, int32[..., M]. For regression,
which has no vocabulary, the one "token" is the normalised action itself, float32[..., A]; the rest of the program need
not know.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from mllm_act.action_tokenizer.autoencoder import TokenizerConfig
from mllm_act.action_tokenizer.fast import FastConfig
from mllm_act.adapters.token_filter import Keys
from mllm_act.errors import UserError
from mllm_act.normalization import NORMALIZATIONS, Statistics

# Feeds one token's embedding back to the model: (embedding [B, D], state) -> (hidden [B, D], state).
Extend = Callable[[Float[Array, "B D"], Any], tuple[Float[Array, "B D"], Any]]
Tokens = Array


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """The language model's vocabulary, as far as adapters need to know it.

    Attributes:
      size: V, the number of token ids.
      width: D, of embeddings and hidden states.
      first_action: the first of the reserved rows that actions are written over; they run to the end.
    """

    size: int
    width: int
    first_action: int


@dataclasses.dataclass(frozen=True)
class RunFacts:
    """What a training run knows about an embodiment when it configures the adapter.

    Attributes:
      actions: the names of discrete actions, in the environment's order; none for continuous ones.
      tokenizer: the sizes of the action tokenizer of stage one, where the adapter needs one.
      text_tokenizer: the model's text tokenizer, a Hugging Face ``tokenizer.json`` as text.
      chunk: H, the actions of one decision; the adapter sees them as one vector, the first action first.
    """

    actions: tuple[str, ...]
    tokenizer: TokenizerConfig | FastConfig | None
    text_tokenizer: str
    chunk: int


class Adapter(nnx.Module):
    """The base of all adapters.

    Attributes:
      Config: a frozen dataclass of JSON types. It is kept in the checkpoint, and the adapter is rebuilt from it. A
        field with a default is a setting, ``config.adapter.FIELD``; ``configure`` fills in fields without one.
      discrete: whether actions are names out of a list rather than numbers.
      needs_tokenizer: whether stage one has to train an action tokenizer first.
      writes_words: whether actions are written as text, so that the text tokenizer should know their names.
      normalizations: those of ``NORMALIZATIONS`` that it works with.
      tokens_per_action: M, how many tokens an action takes.
      codes: K, how many rows of the vocabulary it writes over; 0 where it has no vocabulary of its own.
      statistics: of the demonstrations; they normalise actions, and decode only to actions that are valid.
      chunk: H, the actions of one decision; known where ``max_delay`` is above 0.
      max_delay: how many of them, at most, may be committed before the decision; see ``take_prefix``.
    """

    Config: ClassVar[type]
    discrete: ClassVar[bool] = False
    needs_tokenizer: ClassVar[bool] = False
    writes_words: ClassVar[bool] = False
    normalizations: ClassVar[tuple[str, ...]] = NORMALIZATIONS

    tokens_per_action: int
    codes: int = 0
    chunk: int = 1
    max_delay: int = 0

    def __init__(self, statistics: Statistics) -> None:
        self.statistics = statistics

    @classmethod
    def configure(cls, settings: Mapping[str, Any], facts: RunFacts) -> Any:
        """Returns a ``Config`` made from the user's settings and what the run knows.

        Raises:
          UserError: if they do not fit; it names the key.
        """
        return cls.Config(**settings)

    @classmethod
    def make(
        cls, config: Any, statistics: Statistics, vocabulary: Vocabulary, rngs: nnx.Rngs
    ) -> "Adapter":
        """Returns an adapter with fresh parameters.

        Args:
          config: a ``Config``.
          statistics: of the vectors to decide on; for chunks of H actions those of H*A numbers.
          vocabulary: the language model's.
          rngs: the source of random parameters.

        Raises:
          UserError: if the config does not fit the statistics or the vocabulary.
        """
        raise NotImplementedError

    def with_rows(self, embedding: Float[Array, "V D"], head: Float[Array, "V D"]) -> "Adapter":
        """Returns the adapter with the language model's tables, for one computation.

        Adapters that write actions in the model's own tokens need the tables for everything but ``encode`` and
        ``decode``. The others have rows of their own and return themselves.
        """
        return self

    def take_prefix(self, chunk: int, max_delay: int, rngs: nnx.Rngs) -> None:
        """Prepares for chunks whose first actions are committed: they are executed while the chunk is decided on.

        Training draws a delay of 0 to ``max_delay`` actions for every decision, gives these actions and supervises the
        rest (training-time action conditioning, arXiv 2512.05964). An adapter that can do so has ``loss_after`` and
        ``sample_after``.

        Args:
          chunk: H.
          max_delay: 1 to H - 1.
          rngs: the source of random parameters.

        Raises:
          UserError: this adapter cannot.
        """
        raise UserError(
            f"config.max_delay: expected 0 with the adapter {type(self).__name__}, none of whose tokens stands for the "
            f"first actions of a chunk alone, found {max_delay}; use regression or uniform"
        )

    def committed(self, delay: Int[Array, "..."]) -> Bool[Array, "... HA"]:
        """Returns which numbers of a chunk belong to its first ``delay`` actions."""
        numbers = len(self.statistics.action.min)
        return jnp.arange(numbers) // (numbers // self.chunk) < delay[..., None]

    def encode(self, action: Float[Array, "... A"]) -> Tokens:
        """Returns the training target of an action in the environment's units."""
        raise NotImplementedError

    def decode(self, tokens: Tokens) -> Float[Array, "... A"]:
        """Returns the action, in the environment's units, that the tokens stand for."""
        raise NotImplementedError

    def embed(self, tokens: Tokens) -> Float[Array, "... M D"]:
        """Returns the embedding of each token of an action, which is fed back to the model."""
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
        """Returns the teacher-forced loss, averaged over the steps of the mask, and metrics by name.

        Args:
          hidden: the hidden states that predict each token.
          tokens: the targets, from ``encode``.
          mask: which steps count.
          proprio: normalised proprioception.
        """
        raise NotImplementedError

    def loss_after(
        self,
        hidden: Float[Array, "B T M D"],
        tokens: Tokens,
        mask: Bool[Array, "B T"],
        proprio: Float[Array, "B T P"],
        committed: Bool[Array, "B T HA"],
    ) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
        """Returns ``loss`` of the actions that are not committed, given those that are; see ``take_prefix``.

        Each step weighs the same, however many of its actions are committed.
        """
        raise NotImplementedError

    def counts(self, tokens: Tokens, mask: Bool[Array, "B T"]) -> dict[str, Int[Array, ""]]:
        """Returns how many items ``loss`` averages over, by name, for the loss and the metrics not over steps."""
        return {}

    def log_prob(self, hidden: Float[Array, "B T M D"], tokens: Tokens) -> Float[Array, "B T"]:
        """Returns the log-probability of whole actions on the filtered, renormalised distribution."""
        raise NotImplementedError

    def log_probs(
        self, hidden: Float[Array, "B T M D"], tokens: Tokens
    ) -> tuple[Float[Array, "B T M V"], Int[Array, "B T M"]]:
        """Returns the distributions that ``log_prob`` sums over, and which of their V entries the tokens are.

        Reinforcement learning needs them: an adapter without them cannot be trained by it. Tokens that must not follow
        have -inf.
        """
        raise NotImplementedError

    def sample(
        self,
        hidden: Float[Array, "B D"],
        proprio: Float[Array, "B P"],
        extend: Extend,
        state: Any,
        key: Keys | None = None,
    ) -> Tokens:
        """Decodes the tokens of one action, a fixed number of them.

        Args:
          hidden: the hidden state that predicts the first token.
          proprio: normalised proprioception.
          extend: feeds a token back to the model.
          state: what ``extend`` carries on.
          key: draws from the distribution, with one for the batch or one per row; without it decoding is greedy.
        """
        raise NotImplementedError

    def sample_after(
        self,
        hidden: Float[Array, "B D"],
        proprio: Float[Array, "B P"],
        extend: Extend,
        state: Any,
        key: Keys | None,
        prefix: Tokens,
        committed: Bool[Array, "B HA"],
    ) -> Tokens:
        """Decodes as ``sample`` does, given the first actions of the chunk; see ``take_prefix``.

        Args:
          hidden: see ``sample``.
          proprio: see ``sample``.
          extend: see ``sample``.
          state: see ``sample``.
          key: see ``sample``.
          prefix: the tokens of a chunk that begins with the committed actions.
          committed: which of its numbers they are; the others are not read.
        """
        raise NotImplementedError
