"""The Perceiver resampler (Jaegle et al. 2021; Alayrac et al. 2022).

Two layers turn the patch features of one image into 4 latents of the language model's width (arXiv 2406.07904,
section 4.1 and appendix). It works at the vision encoder's width and projects up at the end, which fits the paper's
number of trainable parameters.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from mllm_act.models.bridge.part import BridgePart, PartShape
from mllm_act.models.layers import LayerNorm, Linear, attend, heads, scan, stack


@dataclasses.dataclass(frozen=True)
class PerceiverConfig:
    """Sizes of the resampler. The defaults are LLaVA-1.5's: the width and the MLP of CLIP ViT-L."""

    width: int = 1024
    heads: int = 16
    mlp_width: int = 4096
    latents: int = 4
    layers: int = 2


class PerceiverBlock(nnx.Module):
    """Latents attend to features and to each other, followed by an MLP."""

    def __init__(self, config: PerceiverConfig, rngs: nnx.Rngs) -> None:
        d = config.width
        self.norm_features, self.norm_latents, self.norm_mlp = (
            LayerNorm(d),
            LayerNorm(d),
            LayerNorm(d),
        )
        self.q, self.k, self.v, self.o = (Linear(d, d, name=name, rngs=rngs) for name in "qkvo")
        self.up = Linear(d, config.mlp_width, name="up", rngs=rngs)
        self.down = Linear(config.mlp_width, d, name="down", rngs=rngs)
        self.heads = config.heads

    def __call__(
        self, latents: Float[Array, "B L D"], features: Float[Array, "B N D"]
    ) -> Float[Array, "B L D"]:
        query = self.norm_latents(latents)
        source = jnp.concatenate([self.norm_features(features), query], axis=1)
        q, k, v = (
            heads(self.q(query), self.heads),
            heads(self.k(source), self.heads),
            heads(self.v(source), self.heads),
        )
        latents = latents + self.o(attend(q, k, v))
        return latents + self.down(jax.nn.gelu(self.up(self.norm_mlp(latents))))


class Perceiver(BridgePart):
    """Features of one image to ``config.latents`` embeddings of the language model."""

    Config = PerceiverConfig

    def __init__(self, config: PerceiverConfig, shape: PartShape, rngs: nnx.Rngs) -> None:
        d = config.width
        self.input = None if shape.inputs == d else Linear(shape.inputs, d, rngs=rngs)
        self.latents = nnx.Param(jax.random.normal(rngs.params(), (config.latents, d)))
        self.blocks = stack(lambda r: PerceiverBlock(config, r), config.layers, rngs)
        self.norm = LayerNorm(d)
        self.output = Linear(d, shape.outputs, rngs=rngs)

    def __call__(
        self,
        features: Float[Array, "B N F"],
        instruction: Float[Array, "B C"] | None = None,
        *,
        remat: str = "none",
    ) -> Float[Array, "B L D"]:
        x = features if self.input is None else self.input(features)
        queries = self.latents[...].astype(x.dtype)
        latents = jnp.broadcast_to(queries, (len(x), *queries.shape))
        latents, _ = scan(
            self.blocks, lambda block, z, _: (block(z, x), None), latents, remat=remat
        )
        return self.output(self.norm(latents))

    @staticmethod
    def positions_out(config: PerceiverConfig, positions: int) -> int:
        """See ``BridgePart.positions_out``."""
        return config.latents

    @staticmethod
    def flops(config: PerceiverConfig, shape: PartShape) -> float:
        """See ``BridgePart.flops``."""
        d, latents, mlp = config.width, config.latents, config.mlp_width
        seen = shape.positions + latents
        layer = 2 * (2 * latents * d * d + 2 * seen * d * d + 2 * latents * d * mlp)
        total = config.layers * (layer + 4 * latents * seen * d) + 2 * latents * d * shape.outputs
        return total + (2 * shape.positions * shape.inputs * d if shape.inputs != d else 0)
