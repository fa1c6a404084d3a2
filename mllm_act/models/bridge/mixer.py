"""The mixer: features to latents by weights of their positions, with no attention.

Each latent is made of several weighted sums over the positions of an image, the weights being parameters (what mixes
tokens in Tolstikhin et al. 2021, arXiv 2105.01601). The Perceiver has to learn where to look through its softmax,
which costs many updates before it tells positions apart; here position is what the weights are of. What that is worth
is in docs/performance.md.
"""

import dataclasses

import jax
from flax import nnx
from jaxtyping import Array, Float

from mllm_act.models.layers import LayerNorm, Linear


@dataclasses.dataclass(frozen=True)
class MixerConfig:
    """Sizes of the mixer: features pass at ``width``, a latent is made of ``sums`` weighted sums of them."""

    width: int = 64
    sums: int = 8
    mlp_width: int = 1024
    latents: int = 4


class Mixer(nnx.Module):
    """Features of one image to ``config.latents`` embeddings of the language model."""

    def __init__(
        self,
        config: MixerConfig,
        positions: int,
        feature_width: int,
        output_width: int,
        rngs: nnx.Rngs,
    ) -> None:
        self.norm = LayerNorm(feature_width)
        self.input = Linear(feature_width, config.width, bias=True, rngs=rngs)
        self.mix = Linear(positions, config.latents * config.sums, bias=True, rngs=rngs)
        self.up = Linear(config.sums * config.width, config.mlp_width, bias=True, rngs=rngs)
        self.down = Linear(config.mlp_width, output_width, bias=True, rngs=rngs)
        self.latents = config.latents

    def __call__(self, features: Float[Array, "B N F"]) -> Float[Array, "B L D"]:
        x = jax.nn.gelu(self.input(self.norm(features)))
        sums = self.mix(x.mT).mT  # [B, L * sums, width]
        x = sums.reshape(len(x), self.latents, -1)
        return self.down(jax.nn.gelu(self.up(x)))
