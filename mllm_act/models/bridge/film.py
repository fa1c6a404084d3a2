"""FiLM: a bridge part that reads the instruction before it makes latents of an image.

A few queries attend to the language model's hidden states of the instruction after its first layers, where a word is
still close to words of the same meaning (docs/experiments.md). Their result scales and shifts the channels of blocks
over the grid of image features (FiLM, Perez et al. 2018, arXiv 1709.07871; for BabyAI Chevalier-Boisvert et al. 2019,
arXiv 1810.08272). So relevant features are selected while each grid cell still has its own; the language model sees
latents of what the instruction is about. Latents are made of each channel's maximum over all cells, as in BabyAI's own
network: a channel can say that something is anywhere in the image ("the target is to your left"), and what it learns in
one cell holds for all.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from mllm_act import placement
from mllm_act.errors import UserError
from mllm_act.models.bridge.part import BridgePart, PartShape
from mllm_act.models.layers import LayerNorm, Linear


@dataclasses.dataclass(frozen=True)
class FilmConfig:
    """Sizes: ``blocks`` blocks of ``width`` channels, an MLP of ``mlp_width`` to ``latents`` latents.

    Attributes:
      merge: squares of ``merge`` x ``merge`` grid cells become one cell with their features concatenated.
      instruction_layer: after how many layers of the language model the instruction is read.
      queries: that attend to the instruction.
      neighbours: tokens on either side of a token that are part of its key.
      noise: standard deviation of the noise added to normalised hidden states in training, so that words close to
        those of the demonstrations are treated alike.
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


def normalize_cells(x: Float[Array, "B S S C"]) -> Float[Array, "B S S C"]:
    """Gives each channel of each image mean 0 and variance 1 over the grid cells, in float32.

    A norm over the channels of one cell would undo much of FiLM's scaling. With batch normalisation, which FiLM
    originally uses, the latents of an image would depend on the other images.
    """
    x32 = x.astype(jnp.float32)
    mean, variance = x32.mean((1, 2), keepdims=True), x32.var((1, 2), keepdims=True)
    return ((x32 - mean) * jax.lax.rsqrt(variance + 1e-5)).astype(x.dtype)


class InstructionAttention(nnx.Module):
    """Learned queries that attend to the tokens of an instruction.

    A token's key includes its neighbours: that a word between "the" and "ball" describes the ball then holds for unseen
    words too. A model trained from scratch learns this too late (docs/experiments.md).
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
        """Returns the values of the queries, in float32; ``key`` turns the noise on."""
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


def convolved(
    x: Float[Array, "B S S C"], kernel: Float[Array, "3 3 C D"]
) -> Float[Array, "B S S D"]:
    """Returns the 3 x 3 convolution with zeros around the grid, as one product of each cell's neighbourhood.

    The gradient of XLA's own convolution is far slower on CPUs where it is inside a condition or a loop.
    """
    side = x.shape[1]
    around = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    cells = [around[:, i : i + side, j : j + side] for i in range(3) for j in range(3)]
    return jnp.concatenate(cells, axis=-1) @ kernel.reshape(-1, kernel.shape[-1])


class FilmBlock(nnx.Module):
    """Norm over cells, FiLM and ReLU, then a 3 x 3 convolution, added to the input.

    In this order FiLM selects among the features of each cell, and the convolution sees only what was selected.
    """

    def __init__(self, width: int, instruction_width: int, rngs: nnx.Rngs) -> None:
        # Small at first; otherwise what does not depend on the instruction is learned late.
        self.film = Linear(instruction_width, 2 * width, bias=True, scale=0.3, rngs=rngs)
        kernel = jax.random.normal(rngs.params(), (3, 3, width, width))
        self.kernel = nnx.Param(kernel * (9 * width) ** -0.5)

    def __call__(
        self, x: Float[Array, "B S S C"], instruction: Float[Array, "B QC"]
    ) -> Float[Array, "B S S C"]:
        scale, shift = jnp.split(self.film(instruction)[:, None, None], 2, axis=-1)
        y = jax.nn.relu(normalize_cells(x) * (1 + scale) + shift)
        kernel = placement.gathered(self.kernel[...], "kernel").astype(x.dtype)
        return x + convolved(y, kernel)


class Film(BridgePart):
    """Features of one image and an instruction to ``config.latents`` embeddings of the language model."""

    Config = FilmConfig
    needs_grid = True
    reads_instruction = True

    def __init__(self, config: FilmConfig, shape: PartShape, rngs: nnx.Rngs) -> None:
        """Makes the blocks; the features are those of a square grid, row by row.

        Raises:
          UserError: if ``config.merge`` does not divide the side of the grid.
        """
        self.side, self.merge = math.isqrt(shape.positions), config.merge
        if self.side % self.merge:
            raise UserError(
                f"film.merge: expected a divisor of {self.side}, the side of an image's grid of features, found "
                f"{self.merge}"
            )
        self.norm = LayerNorm(shape.inputs)
        self.listener = InstructionAttention(config, shape.tokens, rngs)
        self.input = Linear(shape.inputs * self.merge**2, config.width, bias=True, rngs=rngs)
        self.hidden = Linear(config.width, config.width, bias=True, rngs=rngs)
        width = config.queries * config.width
        self.stages = nnx.List([
            FilmBlock(config.width, width, rngs) for _ in range(config.blocks)
        ])  # fmt: skip
        self.up = Linear(config.width, config.mlp_width, name="up", bias=True, rngs=rngs)
        self.down = Linear(
            config.mlp_width, config.latents * shape.outputs, name="down", bias=True, rngs=rngs
        )
        self.latents = config.latents
        self.instruction_layer = config.instruction_layer

    def attend_instruction(
        self,
        tokens: Float[Array, "B N T"],
        exists: Bool[Array, "B N"],
        key: PRNGKeyArray | None = None,
    ) -> Float[Array, "B C"]:
        """See ``BridgePart.attend_instruction``."""
        return self.listener(tokens, exists, key)

    def __call__(
        self,
        features: Float[Array, "B N F"],
        instruction: Float[Array, "B QC"] | None = None,
        *,
        remat: str = "none",
    ) -> Float[Array, "B L D_out"]:
        assert instruction is not None, "it comes from attend_instruction"
        b, x = len(features), self.merged(features)
        # Each cell's own features first: colour and shape should be separate when FiLM selects.
        x = jax.nn.relu(normalize_cells(self.hidden(jax.nn.relu(normalize_cells(x)))))
        instruction = instruction.astype(x.dtype)
        for block in self.stages:
            x = block(x, instruction)
        latents = self.down(jax.nn.gelu(self.up(x.max((1, 2)))))
        return latents.reshape(b, self.latents, -1)

    def merged(self, features: Float[Array, "B N F"]) -> Float[Array, "B S S C"]:
        """Returns the grid with each square of ``merge`` x ``merge`` cells as one cell."""
        b, side, merge = len(features), self.side // self.merge, self.merge
        x = self.norm(features).reshape(b, side, merge, side, merge, -1)
        return self.input(jnp.swapaxes(x, 2, 3).reshape(b, side, side, -1))

    @staticmethod
    def positions_out(config: FilmConfig, positions: int) -> int:
        """See ``BridgePart.positions_out``."""
        return config.latents

    @staticmethod
    def flops(config: FilmConfig, shape: PartShape) -> float:
        """See ``BridgePart.flops``."""
        width, side = config.width, math.isqrt(shape.positions) // config.merge
        taps = (3 * side - 2) ** 2  # of all cells, those inside the grid
        instruction = config.queries * width
        cells = 2 * width * (shape.positions * shape.inputs + side**2 * width)
        blocks = config.blocks * 2 * width * (taps * width + 2 * instruction)
        return cells + blocks + 2 * config.mlp_width * (width + config.latents * shape.outputs)
