"""Fine-tunes a policy on BabyAI demonstrations with one of the adapters of discrete actions.

    python -m data_pipelines.generate --env=babyai --tasks=all --episodes=1000 --out=data/babyai
    python -m mllm_act.train --config=configs/policy/babyai.py:semlang,preset=smollm2_vit_s \
        --workdir=runs/babyai/semlang
    python -m mllm_act.evaluate --checkpoint=runs/babyai/semlang --env=babyai --split=synonyms

Variants: ``categorical``, ``semlang``, ``lang``; then ``,preset=NAME``. Keys and what they mean are in common.py.
Prompt, context, epochs and batch (64 over eight GPUs there, 8 on one) are those of arXiv 2406.07904, appendix.
"""

from pathlib import Path

from ml_collections.config_dict import ConfigDict

from mllm_act.config import load_config


def get_config(variant: str = "semlang") -> ConfigDict:
    """Returns the config of ``adapter[,preset=NAME]``."""
    config = load_config(f"{Path(__file__).parent / 'common.py'}:{variant}")
    config.prompt_template = (
        "Prompt: Control the red triangle to complete the instruction using left, right, forward, pick, drop and "
        "toggle. USER: {instruction} ASSISTANT: "
    )
    config.prompt_tokens = 48
    config.data.directory = "data/babyai"
    config.data.context = 32
    config.data.batch_size = 8
    config.epochs = 20.0
    config.bridge = "film"
    return config
