"""VQ and residual VQ: the codes of a learned, frozen action tokenizer as tokens (arXiv 2406.07904, section 3.2.3)."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from flax import nnx
from jaxtyping import Array, Float, Int

from mllm_act.action_tokenizer.autoencoder import ActionTokenizer, TokenizerConfig
from mllm_act.adapters.action_tokens import ActionTokenAdapter
from mllm_act.adapters.base import RunFacts, Vocabulary
from mllm_act.normalization import NORMALIZATIONS, Statistics


@dataclasses.dataclass(frozen=True)
class VectorQuantizedConfig:
    """The sizes of the tokenizer: the fields of its ``TokenizerConfig``."""

    tokenizer: Mapping[str, Any]


class VectorQuantized(ActionTokenAdapter):
    """One token for each of the tokenizer's Q codebooks. The tokenizer is part of the adapter, but never trained."""

    Config = VectorQuantizedConfig
    needs_tokenizer = True
    normalizations = NORMALIZATIONS

    def __init__(
        self,
        statistics: Statistics,
        vocabulary: Vocabulary,
        tokenizer: ActionTokenizer,
        rngs: nnx.Rngs,
    ) -> None:
        sizes = tokenizer.config
        super().__init__(statistics, vocabulary, sizes.quantizers, sizes.codes, rngs)
        self.tokenizer = tokenizer

    @classmethod
    def configure(cls, settings: Mapping[str, Any], facts: RunFacts) -> VectorQuantizedConfig:
        """See ``Adapter.configure``."""
        assert isinstance(facts.tokenizer, TokenizerConfig)
        return VectorQuantizedConfig(dataclasses.asdict(facts.tokenizer), **settings)

    @classmethod
    def make(
        cls,
        config: VectorQuantizedConfig,
        statistics: Statistics,
        vocabulary: Vocabulary,
        rngs: nnx.Rngs,
    ) -> "VectorQuantized":
        """See ``Adapter.make``."""
        tokenizer = ActionTokenizer(TokenizerConfig(**config.tokenizer), rngs=rngs)
        return cls(statistics, vocabulary, tokenizer, rngs)

    def to_codes(self, action: Float[Array, "... A"]) -> Int[Array, "... Q"]:
        """Returns the nearest code of each codebook, the first codebook first."""
        return self.tokenizer.encode(action)

    def from_codes(self, codes: Int[Array, "... Q"]) -> Float[Array, "... A"]:
        """Returns the normalised action that the tokenizer decodes."""
        return self.tokenizer.decode(codes)
