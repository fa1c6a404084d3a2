"""Named sizes of the model, and what of it is trained."""

import dataclasses
from collections.abc import Callable

from mllm_act.errors import UserError, nearest
from mllm_act.models.language import LanguageConfig
from mllm_act.models.mllm import MLLMConfig
from mllm_act.models.perceiver import PerceiverConfig
from mllm_act.models.vision import VisionConfig

# (pattern, trained): the first pattern found in a parameter's path decides.
Rules = tuple[tuple[str, bool], ...]


@dataclasses.dataclass(frozen=True)
class Preset:
    """A model and the rule of what is trained; ``text_tokenizer`` is how its prompts become token ids.

    ``text_tokenizer`` is ``"trained"`` for byte-level BPE learned from the data set's own instructions, or the path of
    a Hugging Face ``tokenizer.json``.
    """

    model: MLLMConfig
    trained: Rules
    text_tokenizer: str


def tiny(cameras: tuple[str, ...], history: str) -> Preset:
    """The real architecture at a size that trains from scratch on a laptop's CPU: everything is trained."""
    model = MLLMConfig(
        vision=VisionConfig(
            image_size=100, patch_size=20, width=128, layers=3, heads=4, mlp_width=256
        ),
        perceiver=PerceiverConfig(width=128, heads=4, mlp_width=256),
        language=LanguageConfig(
            vocabulary=1024,
            action_tokens=512,
            width=128,
            layers=3,
            heads=4,
            kv_heads=2,
            mlp_width=256,
        ),
        cameras=cameras,
        history=history,
        dtype="float32",
    )
    return Preset(model, trained=((r"tokenizer/", False), (r".", True)), text_tokenizer="trained")


PRESETS: dict[str, Callable[[tuple[str, ...], str], Preset]] = {"tiny": tiny}


def get(name: str, cameras: tuple[str, ...], history: str) -> Preset:
    """Returns a preset by name, for a set of cameras and a reading of history.

    Raises:
      UserError: if there is no such preset; it names the nearest.
    """
    if name not in PRESETS:
        raise UserError(
            f"preset: expected one of {sorted(PRESETS)}, found {name!r}; {nearest(name, PRESETS)}"
        )
    return PRESETS[name](cameras, history)
