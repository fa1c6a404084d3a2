"""The contract of a bridge part: what turns the features of one image into the next part's input."""

import dataclasses
from typing import Any, ClassVar

from flax import nnx
from jaxtyping import Array, Bool, Float, PRNGKeyArray


@dataclasses.dataclass(frozen=True)
class PartShape:
    """What a part is placed between.

    Attributes:
      positions: N, the features of an image that come in.
      inputs: F, their width.
      outputs: D, the width of what comes out.
      tokens: the width of the language model's hidden states.
    """

    positions: int
    inputs: int
    outputs: int
    tokens: int


class BridgePart(nnx.Module):
    """The base of all parts. A part is one file, and one line in ``PARTS`` of ``bridge.py``.

    Attributes:
      Config: a frozen dataclass of its sizes, all with defaults.
      needs_grid: whether its features must be those of a square grid of patches, so that it must be the first part.
      reads_instruction: whether it needs the instruction; it then has ``attend_instruction``.
      instruction_layer: after how many layers of the language model it reads the instruction.
    """

    Config: ClassVar[type]
    needs_grid: ClassVar[bool] = False
    reads_instruction: ClassVar[bool] = False
    instruction_layer: int

    def __init__(self, config: Any, shape: PartShape, rngs: nnx.Rngs) -> None:
        raise NotImplementedError

    def __call__(
        self,
        features: Float[Array, "B N F"],
        instruction: Float[Array, "B C"] | None = None,
        *,
        remat: str = "none",
    ) -> Float[Array, "B L D"]:
        """Returns L features or latents; ``instruction`` is from ``attend_instruction``."""
        raise NotImplementedError

    def attend_instruction(
        self,
        tokens: Float[Array, "B N T"],
        exists: Bool[Array, "B N"],
        key: PRNGKeyArray | None = None,
    ) -> Float[Array, "B C"]:
        """Returns what the part needs of the prompt's hidden states; ``key`` turns its noise on."""
        raise NotImplementedError

    @staticmethod
    def positions_out(config: Any, positions: int) -> int:
        """Returns L, the number of features or latents that come out."""
        raise NotImplementedError

    @staticmethod
    def flops(config: Any, shape: PartShape) -> float:
        """Returns the floating-point operations of one image, two for a multiply-add."""
        raise NotImplementedError
