"""The autoencoder with codebooks: an MLP encoder, a residual vector quantizer and an MLP decoder.

Default sizes are those of arXiv 2406.07904, section 3.2.2 and appendix: encoder and decoder of four layers, hidden
width 2048, ReLU; codes of width 512; K = 512 codes; Q = 2 codebooks (RVQ) or one (VQ).
"""

import dataclasses
import itertools
import math
from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from mllm_act.action_tokenizer import quantizer
from mllm_act.action_tokenizer.quantizer import Codebooks


@dataclasses.dataclass(frozen=True)
class TokenizerConfig:
    """Sizes of a tokenizer. A chunk of ``chunk`` actions becomes Q = ``quantizers`` codes out of K = ``codes``."""

    action_dim: int  # A, the dimensions of one action
    chunk: int = 1  # H, the number of actions encoded together
    quantizers: int = 2
    codes: int = 512
    width: int = 512
    hidden: int = 2048
    layers: int = 4

    @property
    def kind(self) -> str:
        """The name of the adapter that uses the tokenizer."""
        return "vq" if self.quantizers == 1 else "rvq"


class CodebookVariable(nnx.Variable):
    """A quantizer's state: saved and restored like parameters, but trained by moving averages."""


class ActionTokenizer(nnx.Module):
    """Encodes normalised actions, about [-1, 1] in each dimension, as codes and decodes them.

    A chunk of actions is one vector of H*A numbers, time first. Nothing is clipped: a decoded action may lie slightly
    outside the range of the training actions.
    """

    def __init__(self, config: TokenizerConfig, *, rngs: nnx.Rngs) -> None:
        self.config = config
        numbers = config.action_dim * config.chunk
        inner = (config.hidden,) * (config.layers - 1)
        self.encoder = Mlp((numbers, *inner, config.width), rngs)
        self.decoder = Mlp((config.width, *inner, numbers), rngs)
        shape = (config.quantizers, config.codes, config.width)
        self.codebooks = CodebookVariable(jnp.zeros(shape))
        # Moving averages of each code's use and of its vectors' sum: see quantizer.Codebooks.
        self.counts = CodebookVariable(jnp.zeros(shape[:2]))
        self.sums = CodebookVariable(jnp.zeros(shape))

    def encode(self, action: Float[Array, "... HA"]) -> Int[Array, "... Q"]:
        """Returns the codes int32[..., Q], in [0, K), of normalised chunks."""
        chex.assert_axis_dimension(action, -1, self.config.action_dim * self.config.chunk)
        return quantizer.encode(self.codebooks[...], self.encoder(action))

    def decode(self, codes: Int[Array, "... Q"]) -> Float[Array, "... HA"]:
        """Returns the normalised chunks float32[..., H*A] of codes in [0, K)."""
        chex.assert_axis_dimension(codes, -1, self.config.quantizers)
        return self.decoder(quantizer.decode(self.codebooks[...], codes))

    def quantizer_state(self) -> Codebooks:
        """Returns the codebooks and their statistics as one tree of arrays."""
        return Codebooks(self.codebooks[...], self.counts[...], self.sums[...])

    def set_quantizer_state(self, state: Codebooks) -> None:
        """Replaces the codebooks and their statistics."""
        self.codebooks[...], self.counts[...], self.sums[...] = state


class Mlp(nnx.Module):
    """Linear layers with ReLU between them: float[..., sizes[0]] -> float[..., sizes[-1]]."""

    def __init__(self, sizes: tuple[int, ...], rngs: nnx.Rngs) -> None:
        self.layers = nnx.List(
            [
                nnx.Linear(
                    inputs,
                    outputs,
                    kernel_init=_uniform(inputs),
                    bias_init=_uniform(inputs),
                    rngs=rngs,
                )
                for inputs, outputs in itertools.pairwise(sizes)
            ]
        )

    def __call__(self, x: Float[Array, "... I"]) -> Float[Array, "... O"]:
        for layer in self.layers[:-1]:
            x = jax.nn.relu(layer(x))
        return self.layers[-1](x)


def _uniform(inputs: int) -> Callable[..., Array]:
    """Uniform within 1/sqrt(inputs), also for biases: PyTorch's default for linear layers.

    It is smaller than He's initialisation, so the network starts nearly linear and the residuals around all codes of
    the first codebook look alike. With two codebooks the error is half of that with He's.
    """
    bound = 1 / math.sqrt(inputs)

    def init(key: Array, shape: tuple[int, ...], dtype: Any = jnp.float32, **_: Any) -> Array:
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init
