"""The value head: what the policy expects to earn, from the hidden state before the first action token.

That state has seen the images so far and no action, so the value does not depend on what is about to be done. One
linear layer is LLaRP's (arXiv 2310.17722); four layers of width 2048 are GEA's (arXiv 2412.08442), with GELU here.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from mllm_act.models.layers import Linear


@dataclasses.dataclass(frozen=True)
class ValueConfig:
    """Sizes: ``layers`` linear layers, all but the last of width ``hidden``."""

    layers: int = 1
    hidden: int = 2048


class ValueHead(nnx.Module):
    """Computes in float32, whatever the model computes in. A fresh head says 0."""

    def __init__(self, config: ValueConfig, width: int, rngs: nnx.Rngs) -> None:
        widths = [width, *[config.hidden] * (config.layers - 1)]
        self.layers = nnx.List(
            [
                Linear(i, o, bias=True, name=f"layer{n}", rngs=rngs)
                for n, (i, o) in enumerate(zip(widths[:-1], widths[1:], strict=True))
            ]
        )
        self.output = Linear(widths[-1], 1, bias=True, scale=0.0, name="output", rngs=rngs)

    def __call__(self, hidden: Float[Array, "*B D"]) -> Float[Array, "*B"]:
        """Returns values, in the unit of rewards."""
        x = hidden.astype(jnp.float32)
        for layer in self.layers:
            x = jax.nn.gelu(layer(x))
        return self.output(x)[..., 0]
