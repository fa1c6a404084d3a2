"""The mixer: latents as weighted sums over positions, without attention.

Each latent is made of several sums over the positions of an image whose weights are parameters (the token mixing of
Tolstikhin et al. 2021, arXiv 2105.01601). A Perceiver has to learn where to look through its softmax, which takes many
updates before it tells positions apart; here the weights belong to positions from the start. docs/experiments.md
compares the two.
"""

import dataclasses

import jax
from flax import nnx
from jaxtyping import Array, Float

from mllm_act.models.bridge.part import BridgePart, PartShape
from mllm_act.models.layers import LayerNorm, Linear


@dataclasses.dataclass(frozen=True)
class MixerConfig:
    """Sizes: features are reduced to ``width``; a latent is made of ``sums`` weighted sums of them."""

    width: int = 64
    sums: int = 8
    mlp_width: int = 1024
    latents: int = 4


class Mixer(BridgePart):
    """Features of one image to ``config.latents`` embeddings of the language model."""

    Config = MixerConfig

    def __init__(self, config: MixerConfig, shape: PartShape, rngs: nnx.Rngs) -> None:
        self.norm = LayerNorm(shape.inputs)
        self.input = Linear(shape.inputs, config.width, bias=True, rngs=rngs)
        self.mix = Linear(shape.positions, config.latents * config.sums, bias=True, rngs=rngs)
        self.up = Linear(
            config.sums * config.width, config.mlp_width, name="up", bias=True, rngs=rngs
        )
        self.down = Linear(config.mlp_width, shape.outputs, name="down", bias=True, rngs=rngs)
        self.latents = config.latents

    def __call__(
        self,
        features: Float[Array, "B N F"],
        instruction: Float[Array, "B C"] | None = None,
        *,
        remat: str = "none",
    ) -> Float[Array, "B L D"]:
        x = jax.nn.gelu(self.input(self.norm(features)))
        sums = self.mix(x.mT).mT  # [B, L * sums, width]
        x = sums.reshape(len(x), self.latents, -1)
        return self.down(jax.nn.gelu(self.up(x)))

    @staticmethod
    def positions_out(config: MixerConfig, positions: int) -> int:
        """See ``BridgePart.positions_out``."""
        return config.latents

    @staticmethod
    def flops(config: MixerConfig, shape: PartShape) -> float:
        """See ``BridgePart.flops``."""
        sums = config.latents * config.sums
        mixing = 2 * shape.positions * config.width * (shape.inputs + sums)
        mlp = 2 * config.latents * config.mlp_width * (config.sums * config.width + shape.outputs)
        return mixing + mlp
