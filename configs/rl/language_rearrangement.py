"""Trains a policy on Language Rearrangement by PPO.

    python -m mllm_act.train_ppo --config=configs/rl/language_rearrangement.py:semlang,preset=smollm2_vit_s \
        --workdir=runs/rl/semlang --config.rollout.simulators=128
    python -m mllm_act.evaluate --checkpoint=runs/rl/semlang --env=language_rearrangement --split=test

Variants: ``semlang``, ``lang``, ``categorical``; then ``,preset=NAME``. Keys and what they mean are in common.py. The
paper's: 32 steps in 18 simulators on each of 8 GPUs, 2 epochs, 6 minibatches.
"""

from pathlib import Path

from ml_collections.config_dict import ConfigDict

from mllm_act.config import load_config


def get_config(variant: str = "semlang") -> ConfigDict:
    """Returns the config of ``adapter[,preset=NAME]``."""
    config = load_config(f"{Path(__file__).parent / 'common.py'}:{variant}")
    policy = load_config(f"{Path(__file__).parents[1]}/policy/language_rearrangement.py:{variant}")
    for key in ("prompt_template", "prompt_tokens", "bridge"):
        config[key] = policy[key]
    if config.preset.startswith(
        "tiny"
    ):  # what is the same in all prompts tells nothing to a fresh model
        config.prompt_template = "{instruction}"
        config.prompt_tokens = 32
    small = config.preset.startswith("tiny")
    config.env.name = "language_rearrangement" + ("_112" if small else "")
    config.env.tasks = "rearrange"
    return config
