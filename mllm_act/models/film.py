"""FiLM: a bridge that reads the instruction before it makes latents of an image.

Blocks over the grid of an image's features, whose channels the instruction scales and shifts (FiLM, Perez et al. 2018,
arXiv 1709.07871; for BabyAI in Chevalier-Boisvert et al. 2019, arXiv 1810.08272). Which features matter is settled
here, while there is still one for each place; the language model sees latents of what it was told of. What the blocks
leave is summed to latents as the mixer does it.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from mllm_act.models.layers import LayerNorm, Linear
from mllm_act.models.mixer import Mixer, MixerConfig


@dataclasses.dataclass(frozen=True)
class FilmConfig:
    """Sizes: ``blocks`` blocks of ``width`` channels; ``sums`` to ``latents`` are the mixer's (``MixerConfig``)."""

    width: int = 128
    blocks: int = 2
    sums: int = 8
    mlp_width: int = 512
    latents: int = 4


def normalize_places(x: Float[Array, "B S S C"]) -> Float[Array, "B S S C"]:
    """Gives each channel of each image mean 0 and variance 1 over its places, in float32.

    A norm over the channels of one place would undo much of a scale that singles channels out. Batch normalisation,
    which FiLM was made with, would have an image's latents depend on the other images.
    """
    x32 = x.astype(jnp.float32)
    mean, variance = x32.mean((1, 2), keepdims=True), x32.var((1, 2), keepdims=True)
    return ((x32 - mean) * jax.lax.rsqrt(variance + 1e-5)).astype(x.dtype)


class FilmBlock(nnx.Module):
    """A 3 x 3 convolution, the norm over places, FiLM and ReLU, added to the input (Perez et al., figure 3)."""

    def __init__(self, width: int, instruction_width: int, rngs: nnx.Rngs) -> None:
        kernel = jax.random.normal(rngs.params(), (3, 3, width, width))
        self.kernel = nnx.Param(kernel * (9 * width) ** -0.5)
        self.film = Linear(instruction_width, 2 * width, bias=True, rngs=rngs)

    def __call__(
        self, x: Float[Array, "B S S C"], instruction: Float[Array, "B D"]
    ) -> Float[Array, "B S S C"]:
        kernel = self.kernel[...].astype(x.dtype)
        layout = ("NHWC", "HWIO", "NHWC")
        y = jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=layout)
        scale, shift = jnp.split(self.film(instruction)[:, None, None], 2, axis=-1)
        return x + jax.nn.relu(normalize_places(y) * (1 + scale) + shift)


class Film(nnx.Module):
    """Features of one image and an instruction to ``config.latents`` embeddings of the language model."""

    def __init__(
        self,
        config: FilmConfig,
        positions: int,
        feature_width: int,
        instruction_width: int,
        output_width: int,
        rngs: nnx.Rngs,
    ) -> None:
        """Makes the blocks; ``positions`` is how many features an image has, those of a square grid row by row."""
        self.side = math.isqrt(positions)
        self.norm = LayerNorm(feature_width)
        self.norm_instruction = LayerNorm(instruction_width)
        self.input = Linear(feature_width, config.width, bias=True, rngs=rngs)
        self.stages = nnx.List([
            FilmBlock(config.width, instruction_width, rngs) for _ in range(config.blocks)
        ])  # fmt: skip
        sums = MixerConfig(config.width, config.sums, config.mlp_width, config.latents)
        self.mixer = Mixer(sums, positions, config.width, output_width, rngs)

    def __call__(
        self, features: Float[Array, "B N F"], instruction: Float[Array, "B D"]
    ) -> Float[Array, "B L D_out"]:
        x = self.input(self.norm(features))
        grid = x.reshape(len(x), self.side, self.side, -1)
        # Prompts differ in few tokens; at unit variance the little they differ in is as large as it can be.
        instruction = self.norm_instruction(instruction).astype(x.dtype)
        for block in self.stages:
            grid = block(grid, instruction)
        return self.mixer(grid.reshape(x.shape))
