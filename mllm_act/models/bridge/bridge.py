"""The bridge from vision to language: parts in the order that the config names them."""

from typing import Any

from flax import nnx
from jaxtyping import Array, Float

from mllm_act.errors import UserError
from mllm_act.models.bridge.film import Film
from mllm_act.models.bridge.mixer import Mixer
from mllm_act.models.bridge.part import BridgePart, PartShape
from mllm_act.models.bridge.perceiver import Perceiver
from mllm_act.models.bridge.projector import Projector

# A new part is one file and one line here.
PARTS: dict[str, type[BridgePart]] = {
    "projector": Projector,
    "perceiver": Perceiver,
    "mixer": Mixer,
    "film": Film,
}

Sizes = tuple[tuple[str, Any], ...]  # (name of a part, its Config) pairs


def part_config(name: str, sizes: Sizes) -> Any:
    """Returns the config of a part: the one in ``sizes``, or that of its defaults."""
    return dict(sizes).get(name) or PARTS[name].Config()


def shapes(
    parts: tuple[str, ...], sizes: Sizes, positions: int, features: int, tokens: int
) -> dict[str, PartShape]:
    """Returns what each part is placed between, the first part first.

    The last part puts out the language model's width, and so does the projector. Others keep the features' width.

    Args:
      parts: their names.
      sizes: of the parts.
      positions: the features of an image.
      features: their width.
      tokens: the width of the language model's embeddings.
    """
    result, width = {}, features
    for i, name in enumerate(parts):
        outputs = tokens if i + 1 == len(parts) or name == "projector" else features
        result[name] = PartShape(positions, width, outputs, tokens)
        positions = PARTS[name].positions_out(part_config(name, sizes), positions)
        width = outputs
    return result


def latents_per_image(parts: tuple[str, ...], sizes: Sizes, positions: int) -> int:
    """Returns how many embeddings one image becomes; UserError if the parts do not fit together."""
    check_parts(parts)
    for name in parts:
        positions = PARTS[name].positions_out(part_config(name, sizes), positions)
    return positions


def check_parts(parts: tuple[str, ...]) -> None:
    """Raises UserError if a part does not exist or occurs twice, there is none, or a grid comes too late."""
    if not parts or not set(parts) <= set(PARTS) or len(set(parts)) < len(parts):
        raise UserError(
            f"bridge: expected one or more of {', '.join(PARTS)}, each once, found {','.join(parts)!r}"
        )
    for name in parts[1:]:
        if PARTS[name].needs_grid:
            raise UserError(
                f"bridge: expected {name} first, where features still form a grid, found {','.join(parts)!r}"
            )


class Bridge(nnx.Module):
    """Features of one image to latents of the language model's width."""

    def __init__(
        self,
        parts: tuple[str, ...],
        sizes: Sizes,
        positions: int,
        features: int,
        tokens: int,
        rngs: nnx.Rngs,
    ) -> None:
        """Makes the parts; the arguments are those of ``shapes``.

        Raises:
          UserError: if the parts do not fit together.
        """
        check_parts(parts)
        self.parts = parts
        for name, shape in shapes(parts, sizes, positions, features, tokens).items():
            setattr(self, name, PARTS[name](part_config(name, sizes), shape, rngs))

    @property
    def reader(self) -> BridgePart | None:
        """The part that reads the instruction, if there is one."""
        readers = [name for name in self.parts if PARTS[name].reads_instruction]
        return getattr(self, readers[0]) if readers else None

    def __call__(
        self,
        features: Float[Array, "B N F"],
        instruction: Float[Array, "B C"] | None = None,
        *,
        remat: str = "none",
    ) -> Float[Array, "B L D"]:
        """Runs the parts; ``instruction`` comes from ``reader``, where there is one."""
        x = features
        for name in self.parts:
            x = getattr(self, name)(x, instruction, remat=remat)
        return x
