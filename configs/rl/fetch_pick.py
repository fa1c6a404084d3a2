"""Trains a policy on Fetch Pick by PPO, best from one that has learned from demonstrations.

    python -m mllm_act.train_ppo --config=configs/rl/fetch_pick.py:uniform --workdir=runs/rl/fetch_pick \
        --config.init=runs/fetch_pick/uniform
    python -m mllm_act.evaluate --checkpoint=runs/rl/fetch_pick --env=fetch_pick --split=test

Variants: ``uniform``; ``vq`` and ``rvq`` with ``config.init``, which has the action tokenizer. Keys and what they mean
are in common.py. The reward is 10 for success and nothing else, so that PPO from scratch has little to learn from.
"""

from pathlib import Path

from ml_collections.config_dict import ConfigDict

from mllm_act.config import load_config


def get_config(variant: str = "uniform") -> ConfigDict:
    """Returns the config of ``adapter[,preset=NAME]``."""
    config = load_config(f"{Path(__file__).parent / 'common.py'}:{variant}")
    config.env.name = "fetch_pick"
    config.env.tasks = "orange"
    config.env.horizon = 100  # the expert takes 28 steps
    config.context = 3  # as in supervised training; see mllm_act/rl/segments.py
    config.rollout.simulators = 32
    config.rollout.steps = 64
    config.ppo.normalize_advantages = True
    return config
