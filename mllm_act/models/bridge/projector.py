"""LLaVA-1.5's projector: two layers with GELU between them, for each feature by itself (arXiv 2310.03744)."""

import dataclasses

import jax
from flax import nnx
from jaxtyping import Array, Float

from mllm_act.models.bridge.part import BridgePart, PartShape
from mllm_act.models.layers import Linear


@dataclasses.dataclass(frozen=True)
class ProjectorConfig:
    """It has no sizes of its own."""


class Projector(BridgePart):
    """Features to as many embeddings of the language model."""

    Config = ProjectorConfig

    def __init__(self, config: ProjectorConfig, shape: PartShape, rngs: nnx.Rngs) -> None:
        self.layer1 = Linear(shape.inputs, shape.outputs, bias=True, rngs=rngs)
        self.layer2 = Linear(shape.outputs, shape.outputs, bias=True, rngs=rngs)

    def __call__(
        self,
        features: Float[Array, "B N F"],
        instruction: Float[Array, "B C"] | None = None,
        *,
        remat: str = "none",
    ) -> Float[Array, "B N D"]:
        return self.layer2(jax.nn.gelu(self.layer1(features), approximate=False))

    @staticmethod
    def positions_out(config: ProjectorConfig, positions: int) -> int:
        """See ``BridgePart.positions_out``."""
        return positions

    @staticmethod
    def flops(config: ProjectorConfig, shape: PartShape) -> float:
        """See ``BridgePart.flops``."""
        return 2 * shape.positions * shape.outputs * (shape.inputs + shape.outputs)
