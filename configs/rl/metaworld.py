"""Trains a policy on Meta-World by PPO, best from one that has learned from demonstrations.

    python -m mllm_act.train_ppo --config=configs/rl/metaworld.py:uniform --workdir=runs/rl/metaworld \
        --config.init=runs/metaworld/uniform
    python -m mllm_act.evaluate --checkpoint=runs/rl/metaworld --env=metaworld --split=test

Variants: ``uniform``; ``vq`` and ``rvq`` with ``config.init``, which has the action tokenizer. Keys and what they mean
are in common.py. Meta-World's rewards are 0 to 10 at every step, so returns are in the hundreds.
"""

from pathlib import Path

from ml_collections.config_dict import ConfigDict

from mllm_act.config import load_config


def get_config(variant: str = "uniform") -> ConfigDict:
    """Returns the config of ``adapter[,preset=NAME]``."""
    config = load_config(f"{Path(__file__).parent / 'common.py'}:{variant}")
    config.env.name = "metaworld"
    config.env.tasks = "reach-v3"
    config.env.horizon = 200
    config.context = 3  # as in supervised training; see mllm_act/rl/segments.py
    config.rollout.simulators = 32
    config.rollout.steps = 64
    config.ppo.normalize_advantages = True
    return config
