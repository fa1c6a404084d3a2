"""The Perceiver resampler (Jaegle et al. 2021; Alayrac et al. 2022).

Two layers turn the patch features of one image into 4 latents of the language model's width (arXiv 2406.07904,
section 4.1 and appendix). It works at the vision encoder's width and projects up at the end, which is what the
paper's budget of trainable parameters leaves room for.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from mllm_act.models.layers import LayerNorm, Linear, attend, heads, scan, stack


@dataclasses.dataclass(frozen=True)
class PerceiverConfig:
    """Sizes of the resampler."""

    width: int
    heads: int
    mlp_width: int
    latents: int = 4
    layers: int = 2


class PerceiverBlock(nnx.Module):
    """Latents attend to features and to each other, then pass an MLP."""

    def __init__(self, config: PerceiverConfig, rngs: nnx.Rngs) -> None:
        d = config.width
        self.norm_features, self.norm_latents, self.norm_mlp = (
            LayerNorm(d),
            LayerNorm(d),
            LayerNorm(d),
        )
        self.q, self.k, self.v, self.o = (Linear(d, d, rngs=rngs) for _ in range(4))
        self.up = Linear(d, config.mlp_width, rngs=rngs)
        self.down = Linear(config.mlp_width, d, rngs=rngs)
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


class Perceiver(nnx.Module):
    """Features of one image to ``config.latents`` embeddings of the language model."""

    def __init__(
        self, config: PerceiverConfig, feature_width: int, output_width: int, rngs: nnx.Rngs
    ) -> None:
        d = config.width
        self.input = None if feature_width == d else Linear(feature_width, d, rngs=rngs)
        self.latents = nnx.Param(jax.random.normal(rngs.params(), (config.latents, d)))
        self.blocks = stack(lambda r: PerceiverBlock(config, r), config.layers, rngs)
        self.norm = LayerNorm(d)
        self.output = Linear(d, output_width, rngs=rngs)

    def __call__(
        self, features: Float[Array, "B N F"], *, remat: str = "none"
    ) -> Float[Array, "B L D"]:
        x = features if self.input is None else self.input(features)
        latents = jnp.broadcast_to(self.latents[...].astype(x.dtype), (len(x), *self.latents.shape))
        latents, _ = scan(
            self.blocks, lambda block, z, _: (block(z, x), None), latents, remat=remat
        )
        return self.output(self.norm(latents))
