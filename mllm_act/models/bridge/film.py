"""FiLM: a bridge that reads the instruction before it makes latents of an image.

A few queries look for what the instruction is about among the language model's hidden states of its tokens, after the
first layers, where a word is still much like the words that mean the same (docs/performance.md). Blocks over the grid
of an image's features follow, whose channels that scales and shifts (FiLM, Perez et al. 2018, arXiv 1709.07871; for
BabyAI in Chevalier-Boisvert et al. 2019, arXiv 1810.08272). Which features matter is settled here, while there is still
one for each place; the language model sees latents of what it was told of. They are made of each channel's maximum over
all places, as in BabyAI's own network: a channel can then say that something is anywhere ("what you look for is to your
left"), and what teaches it so at one place holds for all.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from mllm_act.errors import UserError
from mllm_act.models.layers import LayerNorm, Linear


@dataclasses.dataclass(frozen=True)
class FilmConfig:
    """Sizes: ``blocks`` blocks of ``width`` channels, an MLP of ``mlp_width`` to ``latents`` latents.

    Attributes:
      merge: how many places a side of the image's grid become one, whose features are put one after another.
      instruction_layer: after how many of the language model's layers the instruction is read.
      queries: how many there are.
      neighbours: how many tokens before and as many after a token tell a query whether to look at it.
      noise: standard deviation of what is added in training to normalised hidden states, so that words near those of
        the demonstrations are taken for them.
    """

    width: int = 128
    blocks: int = 4
    merge: int = 1
    instruction_layer: int = 8
    queries: int = 8
    neighbours: int = 1
    noise: float = 0.3
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


class Listener(nnx.Module):
    """Queries, parameters each, that attend to the tokens of an instruction.

    Where they look depends on a token's neighbours as well: that a word between "the" and "ball" says what a ball is
    like, is known of a word that was never trained on too. From scratch that is learnt too late (docs/performance.md).
    """

    def __init__(self, config: FilmConfig, token_width: int, rngs: nnx.Rngs) -> None:
        self.norm = LayerNorm(token_width)
        self.neighbours = config.neighbours
        self.key = Linear((2 * self.neighbours + 1) * token_width, config.width, rngs=rngs)
        self.value = Linear(token_width, config.width, rngs=rngs)
        self.queries = nnx.Param(jax.random.normal(rngs.params(), (config.queries, config.width)))
        self.noise = config.noise

    def __call__(
        self,
        tokens: Float[Array, "B N D"],
        exists: Bool[Array, "B N"],
        key: PRNGKeyArray | None = None,
    ) -> Float[Array, "B QC"]:
        """Returns what the queries found, in float32; ``key`` turns the noise on."""
        x = self.norm(tokens.astype(jnp.float32))
        if key is not None:
            x = x + self.noise * jax.random.normal(key, x.shape)
        x = jnp.where(exists[..., None], x, 0.0)
        around = jnp.pad(x, ((0, 0), (self.neighbours, self.neighbours), (0, 0)))
        shifted = [around[:, i : i + x.shape[1]] for i in range(2 * self.neighbours + 1)]
        keys = self.key(jnp.concatenate(shifted, axis=-1))
        queries = self.queries[...] * self.queries.shape[1] ** -0.5
        scores = jnp.einsum("bnc,qc->bqn", keys, queries)
        weights = jax.nn.softmax(jnp.where(exists[:, None], scores, -jnp.inf), axis=-1)
        return (weights @ self.value(x)).reshape(len(x), -1)


class FilmBlock(nnx.Module):
    """The norm over places, FiLM and ReLU, then a 3 x 3 convolution, whose result is added to the input.

    In this order, FiLM picks among what is known of each place; the convolution then sees only what was picked.
    """

    def __init__(self, width: int, instruction_width: int, rngs: nnx.Rngs) -> None:
        # Small at first, or what has nothing to do with the instruction is learnt late.
        self.film = Linear(instruction_width, 2 * width, bias=True, scale=0.3, rngs=rngs)
        kernel = jax.random.normal(rngs.params(), (3, 3, width, width))
        self.kernel = nnx.Param(kernel * (9 * width) ** -0.5)

    def __call__(
        self, x: Float[Array, "B S S C"], instruction: Float[Array, "B QC"]
    ) -> Float[Array, "B S S C"]:
        scale, shift = jnp.split(self.film(instruction)[:, None, None], 2, axis=-1)
        y = jax.nn.relu(normalize_places(x) * (1 + scale) + shift)
        kernel, layout = self.kernel[...].astype(x.dtype), ("NHWC", "HWIO", "NHWC")
        return x + jax.lax.conv_general_dilated(y, kernel, (1, 1), "SAME", dimension_numbers=layout)


class Film(nnx.Module):
    """Features of one image and an instruction to ``config.latents`` embeddings of the language model."""

    def __init__(
        self,
        config: FilmConfig,
        positions: int,
        feature_width: int,
        token_width: int,
        output_width: int,
        rngs: nnx.Rngs,
    ) -> None:
        """Makes the blocks; ``positions`` is how many features an image has, those of a square grid row by row.

        Raises:
          UserError: if ``config.merge`` does not divide the grid's side.
        """
        self.side, self.merge = math.isqrt(positions), config.merge
        if self.side % self.merge:
            raise UserError(
                f"film.merge: expected a divisor of the {self.side} places a side that an image has, found {self.merge}"
            )
        self.norm = LayerNorm(feature_width)
        self.listener = Listener(config, token_width, rngs)
        self.input = Linear(feature_width * self.merge**2, config.width, bias=True, rngs=rngs)
        self.hidden = Linear(config.width, config.width, bias=True, rngs=rngs)
        width = config.queries * config.width
        self.stages = nnx.List([
            FilmBlock(config.width, width, rngs) for _ in range(config.blocks)
        ])  # fmt: skip
        self.up = Linear(config.width, config.mlp_width, bias=True, rngs=rngs)
        self.down = Linear(config.mlp_width, config.latents * output_width, bias=True, rngs=rngs)
        self.latents = config.latents

    def __call__(
        self, features: Float[Array, "B N F"], instruction: Float[Array, "B QC"]
    ) -> Float[Array, "B L D_out"]:
        """Makes latents; ``instruction`` is what the listener gives."""
        b, x = len(features), self.merged(features)
        # A place's own features are worked out first: colour and shape are to be apart when FiLM picks.
        x = jax.nn.relu(normalize_places(self.hidden(jax.nn.relu(normalize_places(x)))))
        instruction = instruction.astype(x.dtype)
        for block in self.stages:
            x = block(x, instruction)
        latents = self.down(jax.nn.gelu(self.up(x.max((1, 2)))))
        return latents.reshape(b, self.latents, -1)

    def merged(self, features: Float[Array, "B N F"]) -> Float[Array, "B S S C"]:
        """Returns the grid, of each square of ``merge`` x ``merge`` places one."""
        b, side, merge = len(features), self.side // self.merge, self.merge
        x = self.norm(features).reshape(b, side, merge, side, merge, -1)
        return self.input(jnp.swapaxes(x, 2, 3).reshape(b, side, side, -1))
