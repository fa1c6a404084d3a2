"""The bridge from vision to language: LLaVA's projector, Perceiver, mixer or FiLM, in the order the config names."""

import jax
from flax import nnx
from jaxtyping import Array, Float

from mllm_act.errors import UserError
from mllm_act.models.bridge.film import Film, FilmConfig
from mllm_act.models.bridge.mixer import Mixer, MixerConfig
from mllm_act.models.bridge.perceiver import Perceiver, PerceiverConfig
from mllm_act.models.layers import Linear

PARTS = ("projector", "perceiver", "mixer", "film")


class Projector(nnx.Module):
    """LLaVA-1.5's projector: two layers with GELU between, for each feature by itself (arXiv 2310.03744)."""

    def __init__(self, inputs: int, outputs: int, rngs: nnx.Rngs) -> None:
        self.layer1 = Linear(inputs, outputs, bias=True, rngs=rngs)
        self.layer2 = Linear(outputs, outputs, bias=True, rngs=rngs)

    def __call__(self, features: Float[Array, "B N F"]) -> Float[Array, "B N D"]:
        return self.layer2(jax.nn.gelu(self.layer1(features), approximate=False))


class Bridge(nnx.Module):
    """Features of one image to latents of the language model's width.

    A part that comes before the projector stays at the features' width.
    """

    def __init__(
        self,
        parts: tuple[str, ...],
        perceiver: PerceiverConfig,
        mixer: MixerConfig,
        film: FilmConfig,
        positions: int,
        feature_width: int,
        output_width: int,
        rngs: nnx.Rngs,
    ) -> None:
        """Makes the parts; ``positions`` is how many features an image has.

        Raises:
          UserError: if a part does not exist or comes twice, or there is none, or film is not the first.
        """
        if not parts or not set(parts) <= set(PARTS) or len(set(parts)) < len(parts):
            raise UserError(
                f"bridge: expected some of {', '.join(PARTS)} in the order they come, found {','.join(parts)!r}"
            )
        if "film" in parts[1:]:
            raise UserError(
                f"bridge: expected film at the beginning, where features are still a grid, found {','.join(parts)!r}"
            )
        self.parts = parts
        width = feature_width
        for i, part in enumerate(parts):
            last = i + 1 == len(parts)
            out = output_width if last or part == "projector" else feature_width
            if part == "projector":
                self.projector = Projector(width, out, rngs)
            elif part == "perceiver":
                self.perceiver = Perceiver(perceiver, width, out, rngs)
                positions = perceiver.latents
            elif part == "mixer":
                self.mixer = Mixer(mixer, positions, width, out, rngs)
                positions = mixer.latents
            else:
                self.film = Film(film, positions, width, output_width, out, rngs)
                positions = film.latents
            width = out

    @property
    def reads_instruction(self) -> bool:
        """Whether a part needs the instruction."""
        return "film" in self.parts

    def __call__(
        self,
        features: Float[Array, "B N F"],
        instruction: Float[Array, "B C"] | None = None,
        *,
        remat: str = "none",
    ) -> Float[Array, "B L D"]:
        """Runs the parts; ``instruction`` is what each image is seen with, needed where ``reads_instruction``."""
        x = features
        for part in self.parts:
            if part == "projector":
                x = self.projector(x)
            elif part == "perceiver":
                x = self.perceiver(x, remat=remat)
            elif part == "mixer":
                x = self.mixer(x)
            else:
                assert instruction is not None, "MLLM.instruction gives it"
                x = self.film(x, instruction)
        return x
