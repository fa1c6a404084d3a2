"""Trains a policy on BabyAI by PPO.

    python -m mllm_act.train_ppo --config=configs/rl/babyai.py:semlang,preset=tiny_grid --workdir=runs/rl/babyai \
        --config.env.tasks=goto
    python -m mllm_act.evaluate --checkpoint=runs/rl/babyai --env=babyai --split=test --tasks=goto

Variants: ``semlang``, ``lang``, ``categorical``; then ``,preset=NAME``. Keys and what they mean are in common.py.
"""

from pathlib import Path

from ml_collections.config_dict import ConfigDict

from mllm_act.config import load_config


def get_config(variant: str = "semlang") -> ConfigDict:
    """Returns the config of ``adapter[,preset=NAME]``."""
    config = load_config(f"{Path(__file__).parent / 'common.py'}:{variant}")
    config.prompt_template = "{instruction}"
    config.prompt_tokens = 32
    config.bridge = "film"
    config.env.name = "babyai"
    config.context = 32
    config.rollout.simulators = 32
    return config
