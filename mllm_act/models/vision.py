"""The vision encoder: CLIP's vision transformer (Radford et al. 2021), as LLaVA uses it.

Features are those after ``layers`` blocks without the final norm and without the class token. LLaVA-1.5 takes the
layer before the last, so ViT-L/14 has ``layers = 23`` here.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, UInt8

from mllm_act.models.layers import LayerNorm, Linear, attend, heads, scan, stack

# CLIP's pixel statistics, RGB in [0, 1].
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclasses.dataclass(frozen=True)
class VisionConfig:
    """Sizes of the encoder; ``layers`` counts the blocks that run. The input is ``image_size`` pixels square."""

    image_size: int
    patch_size: int
    width: int
    layers: int
    heads: int
    mlp_width: int


def preprocess(images: UInt8[Array, "... H W 3"], size: int) -> Float[Array, "... size size 3"]:
    """Resizes (bilinear, antialiased) to ``size`` pixels square and standardises with CLIP's statistics."""
    pixels = images.astype(jnp.float32) / 255.0
    if pixels.shape[-3:-1] != (size, size):
        pixels = jax.image.resize(
            pixels, (*images.shape[:-3], size, size, 3), "linear", antialias=True
        )
    return (pixels - jnp.array(CLIP_MEAN)) / jnp.array(CLIP_STD)


class VisionBlock(nnx.Module):
    """Pre-norm attention and MLP with QuickGELU."""

    def __init__(self, config: VisionConfig, rngs: nnx.Rngs) -> None:
        d, residual = config.width, (2 * config.layers) ** -0.5
        self.norm1, self.norm2 = LayerNorm(d), LayerNorm(d)
        self.q, self.k, self.v = (Linear(d, d, bias=True, rngs=rngs) for _ in range(3))
        self.o = Linear(d, d, bias=True, scale=residual, rngs=rngs)
        self.up = Linear(d, config.mlp_width, bias=True, rngs=rngs)
        self.down = Linear(config.mlp_width, d, bias=True, scale=residual, rngs=rngs)
        self.heads = config.heads

    def __call__(self, x: Float[Array, "B N D"]) -> Float[Array, "B N D"]:
        y = self.norm1(x)
        q, k, v = (heads(project(y), self.heads) for project in (self.q, self.k, self.v))
        x = x + self.o(attend(q, k, v))
        hidden = self.up(self.norm2(x))
        return x + self.down(hidden * jax.nn.sigmoid(1.702 * hidden))


class VisionTransformer(nnx.Module):
    """Images to patch features."""

    def __init__(self, config: VisionConfig, rngs: nnx.Rngs) -> None:
        self.config = config
        patches = (config.image_size // config.patch_size) ** 2
        self.patch = Linear(3 * config.patch_size**2, config.width, rngs=rngs)
        self.class_token = nnx.Param(
            jax.random.normal(rngs.params(), (config.width,)) * config.width**-0.5
        )
        self.position = nnx.Param(
            jax.random.normal(rngs.params(), (patches + 1, config.width)) * 0.02
        )
        self.norm = LayerNorm(config.width)
        self.blocks = stack(lambda r: VisionBlock(config, r), config.layers, rngs)

    def __call__(
        self, images: UInt8[Array, "B H W 3"], *, dtype: jnp.dtype, remat: bool = False
    ) -> Float[Array, "B patches D"]:
        """Encodes images of any size; computes in ``dtype``."""
        size, p = self.config.image_size, self.config.patch_size
        pixels = preprocess(images, size).astype(dtype)
        side = size // p
        patches = (
            pixels.reshape(-1, side, p, side, p, 3)
            .transpose(0, 1, 3, 2, 4, 5)
            .reshape(-1, side**2, 3 * p * p)
        )
        x = self.patch(patches)
        first = jnp.broadcast_to(
            self.class_token[...].astype(dtype), (len(x), 1, self.config.width)
        )
        x = self.norm(jnp.concatenate([first, x], axis=1) + self.position[...].astype(dtype))
        x, _ = scan(self.blocks, lambda block, x, _: (block(x), None), x, remat=remat)
        return x[:, 1:]
