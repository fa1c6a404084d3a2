"""Fine-tunes a policy on demonstrations of Language Rearrangement with one of the adapters of discrete actions.

    python -m data_pipelines.generate --env=language_rearrangement --tasks=all --episodes=20000 \
        --out=data/language_rearrangement
    python -m mllm_act.train --config=configs/policy/language_rearrangement.py:semlang,preset=smollm2_vit_s \
        --workdir=runs/langr/semlang
    python -m mllm_act.evaluate --checkpoint=runs/langr/semlang --env=language_rearrangement --split=new_scenes

Variants: ``semlang``, ``lang``, ``categorical``; then ``,preset=NAME``. Keys and what they mean are in common.py. The
prompt is the paper's (arXiv 2406.07904, appendix), the context is the horizon. The paper trains by PPO; there are no
supervised settings to follow, so epochs and batch are those of its other discrete environment, BabyAI.

The words of actions are the original's, which uses three names for two places each. A further word tells them apart
(``fridge`` and ``fridge inside``, and the same for two drawers): adapters that write actions need different ones.
``--config.actions`` renames them.
"""

from pathlib import Path

from ml_collections.config_dict import ConfigDict

from mllm_act.config import load_config
from mllm_act.envs.language_rearrangement.entities import OBJECTS, PLACES

# The paper's twelve receptacles, in its order: those of the environment, and the middle drawer.
_RECEPTACLES = (
    "chair", "black table", "brown table", "TV stand", "sink", "right counter", "left counter", "sofa", "fridge",
    "left drawer", "right drawer", "middle drawer",
)  # fmt: skip
assert set(_RECEPTACLES) <= set(PLACES.values())


def get_config(variant: str = "semlang") -> ConfigDict:
    """Returns the config of ``adapter[,preset=NAME]``."""
    config = load_config(f"{Path(__file__).parent / 'common.py'}:{variant}")
    config.prompt_template = (
        "Prompt: You are a home robot assistant. Your possible actions are: pick object, place receptacle, nav "
        "receptacle, open receptacle, close receptacle, STOP. - Objects: "
        f"{', '.join(OBJECTS)} - Receptacles: {', '.join(_RECEPTACLES)}. "
        "USER: {instruction} ASSISTANT: "
    )
    config.prompt_tokens = 208  # SmolLM2 needs 192 for the longest official instruction
    config.data.directory = "data/language_rearrangement"
    config.data.context = 32
    config.data.batch_size = 8
    config.epochs = 20.0
    config.bridge = "film"
    return config
