"""Named sizes of the model, and which of its parameters are trained. A new preset is one entry in ``PRESETS``."""

import dataclasses

from mllm_act.errors import UserError, nearest
from mllm_act.models.bridge.film import FilmConfig
from mllm_act.models.bridge.perceiver import PerceiverConfig
from mllm_act.models.language import LanguageConfig
from mllm_act.models.layers import LoRA
from mllm_act.models.mllm import MLLMConfig
from mllm_act.models.vision import VisionConfig

# (pattern, trained): the first pattern found in a parameter's path decides.
Rules = tuple[tuple[str, bool], ...]

EVERYTHING: Rules = ((r"tokenizer/", False), (r".", True))

# arXiv 2406.07904, section 4.1: LoRA, Perceiver and adapter are trained; vision encoder and language model are frozen.
LORA_AND_ADAPTER: Rules = (
    (r"tokenizer/", False),
    (r"lora_", True),
    (r"mllm/(vision|language)/", False),
    (r".", True),
)


@dataclasses.dataclass(frozen=True)
class Preset:
    """A model and the rules of what is trained.

    ``text_tokenizer`` is ``"trained"`` for a byte-level BPE learned from the dataset's instructions, or
    ``"pretrained"`` for the one that comes with the weights.
    """

    model: MLLMConfig
    trained: Rules
    text_tokenizer: str


TINY = MLLMConfig(
    vision=VisionConfig(image_size=100, patch_size=20, width=128, layers=3, heads=4, mlp_width=256),
    bridge=("perceiver",),
    language=LanguageConfig(
        vocabulary=1024,
        action_tokens=512,
        width=128,
        layers=3,
        heads=4,
        kv_heads=2,
        mlp_width=256,
        tied=True,
    ),
    sizes=(("perceiver", PerceiverConfig(width=128, heads=4, mlp_width=256)),),
    dtype="float32",
)

PRESETS = {
    # The real architecture at a size that trains from scratch on a laptop's CPU.
    "tiny": Preset(TINY, trained=EVERYTHING, text_tokenizer="trained"),
    # For worlds of 8 x 8 cells such as BabyAI's rooms: a patch is a cell, and the bridge reads the instruction.
    # It reads embeddings: from scratch, no layer brings words of the same meaning together.
    "tiny_grid": Preset(
        dataclasses.replace(
            TINY,
            vision=VisionConfig(
                image_size=96, patch_size=12, width=64, layers=1, heads=2, mlp_width=128
            ),
            bridge=("film",),
            sizes=(
                *TINY.sizes,
                (
                    "film",
                    FilmConfig(64, 2, queries=4, neighbours=0, latents=2, instruction_layer=0),
                ),
            ),
            language=dataclasses.replace(TINY.language, layers=2),
        ),
        trained=EVERYTHING,
        text_tokenizer="trained",
    ),
    # SmolLM2-135M-Instruct and the penultimate layer of a DINOv2 ViT-S/14: `make pretrained`.
    # In short runs the mixer's validation loss was lower than the Perceiver's (docs/experiments.md).
    "smollm2_vit_s": Preset(
        MLLMConfig(
            vision=VisionConfig(
                image_size=224,
                patch_size=14,
                width=384,
                layers=11,
                heads=6,
                mlp_width=1536,
                family="dinov2",
                position_side=37,
            ),
            bridge=("mixer",),
            sizes=(
                ("perceiver", PerceiverConfig(width=384, heads=6, mlp_width=1536)),
                ("film", FilmConfig(merge=2)),
            ),
            language=LanguageConfig(
                vocabulary=49152,
                action_tokens=48640,
                width=576,
                layers=30,
                heads=9,
                kv_heads=3,
                mlp_width=1536,
                rope_theta=100_000.0,
                tied=True,
                max_positions=8192,
                lora=LoRA(),
            ),
            weight_dtype="bfloat16",
        ),
        trained=LORA_AND_ADAPTER,
        text_tokenizer="pretrained",
    ),
    # The paper's. Its Perceiver works at CLIP's width with an MLP of 4096, which fits its count of trained parameters.
    "llava_1_5_7b": Preset(
        MLLMConfig(
            vision=VisionConfig(
                image_size=336, patch_size=14, width=1024, layers=23, heads=16, mlp_width=4096
            ),
            bridge=("perceiver",),
            sizes=(("perceiver", PerceiverConfig(width=1024, heads=16, mlp_width=4096)),),
            language=LanguageConfig(
                vocabulary=32064,
                action_tokens=31000,
                width=4096,
                layers=32,
                heads=32,
                kv_heads=32,
                mlp_width=11008,
                lora=LoRA(),
            ),
            weight_dtype="bfloat16",
            remat="projections",
        ),
        trained=LORA_AND_ADAPTER,
        text_tokenizer="pretrained",
    ),
}


def get(name: str) -> Preset:
    """Returns a preset by name.

    Raises:
      UserError: if there is no such preset; it names the nearest.
    """
    if name not in PRESETS:
        raise UserError(
            f"preset: expected one of {sorted(PRESETS)}, found {name!r}; {nearest(name, PRESETS)}"
        )
    return PRESETS[name]
