"""VQ and residual VQ: the codes of a learned, frozen action tokenizer as tokens (arXiv 2406.07904, section 3.2.3)."""

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from mllm_act.action_tokenizer.autoencoder import ActionTokenizer
from mllm_act.adapters.action_tokens import ActionTokenAdapter
from mllm_act.normalization import Statistics


class VectorQuantized(ActionTokenAdapter):
    """One token for each of the tokenizer's Q codebooks. The tokenizer is part of the adapter, but never trained."""

    def __init__(
        self,
        statistics: Statistics,
        width: int,
        first_token: int,
        tokenizer: ActionTokenizer,
        rngs: nnx.Rngs,
    ) -> None:
        config = tokenizer.config
        super().__init__(statistics, width, config.quantizers, config.codes, first_token, rngs)
        self.tokenizer = tokenizer

    def to_codes(self, action: Float[Array, "... A"]) -> Int[Array, "... Q"]:
        """Returns the nearest codes, codebook by codebook."""
        return self.tokenizer.encode(action)

    def from_codes(self, codes: Int[Array, "... Q"]) -> Float[Array, "... A"]:
        """Returns what the tokenizer's decoder makes of the codes, within the demonstrations' range."""
        return jnp.clip(self.tokenizer.decode(codes), -1, 1)
