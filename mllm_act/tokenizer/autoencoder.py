"""The action tokenizer: an MLP encoder, a residual vector quantizer, an MLP decoder.

Sizes of arXiv 2406.07904, section 3.2.2 and appendix: encoder and decoder of four layers, hidden
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

from mllm_act.tokenizer import quantizer
from mllm_act.tokenizer.quantizer import Codebooks


@dataclasses.dataclass(frozen=True)
class TokenizerConfig:
    """Sizes of a tokenizer; Q = ``quantizers`` tokens of ``codes`` values an action."""

    action_dim: int
    quantizers: int = 2
    codes: int = 512
    width: int = 512
    hidden: int = 2048
    layers: int = 4


class CodebookVariable(nnx.Variable):
    """A quantizer's state: saved and restored as parameters are, but trained by moving averages."""


class ActionTokenizer(nnx.Module):
    """Actions to codes and back. Works on normalised actions, about [-1, 1] in each dimension.

    Nothing is clipped: a decoded action may lie a little outside the box of the training actions.
    """

    def __init__(self, config: TokenizerConfig, *, rngs: nnx.Rngs) -> None:
        self.config = config
        inner = (config.hidden,) * (config.layers - 1)
        self.encoder = Mlp((config.action_dim, *inner, config.width), rngs)
        self.decoder = Mlp((config.width, *inner, config.action_dim), rngs)
        shape = (config.quantizers, config.codes, config.width)
        self.codebooks = CodebookVariable(jnp.zeros(shape))
        # How often each code is used, and the sum of what it stands for: see quantizer.Codebooks.
        self.counts = CodebookVariable(jnp.zeros(shape[:2]))
        self.sums = CodebookVariable(jnp.zeros(shape))

    def encode(self, action: Float[Array, "... A"]) -> Int[Array, "... Q"]:
        """Codes int32[..., Q], in [0, K), of normalised actions."""
        chex.assert_axis_dimension(action, -1, self.config.action_dim)
        return quantizer.encode(self.codebooks[...], self.encoder(action))

    def decode(self, codes: Int[Array, "... Q"]) -> Float[Array, "... A"]:
        """Normalised actions float32[..., A] of codes in [0, K)."""
        chex.assert_axis_dimension(codes, -1, self.config.quantizers)
        return self.decoder(quantizer.decode(self.codebooks[...], codes))

    def quantizer_state(self) -> Codebooks:
        """The codebooks and their statistics as one tree of arrays."""
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
    """Uniform within 1/sqrt(inputs), biases too: PyTorch's default for linear layers.

    Smaller than He's: the network starts nearly linear, residuals look alike around every first
    code, and two codebooks reach half the error that a start of unit gain reaches.
    """
    bound = 1 / math.sqrt(inputs)

    def init(key: Array, shape: tuple[int, ...], dtype: Any = jnp.float32, **_: Any) -> Array:
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init
