"""`make demo-rl`: two tasks of Language Rearrangement in one room, by PPO from scratch on two cores, no GPU.

    python -m mllm_act.train_ppo --config=configs/rl/language_rearrangement_demo.py:semlang --workdir=runs/demo_rl
    python -m mllm_act.evaluate --checkpoint=runs/demo_rl --env=language_rearrangement_112 --split=test

The sentence says what to do with the fridge, and the robot has to drive there first. A policy that draws among the 70
actions hardly ever does both in 5 steps: 0 % before, 99 % in that room after 10 updates (docs/results.md). 15 updates
take 5 minutes of processor time.
"""

from pathlib import Path

from ml_collections.config_dict import ConfigDict

from mllm_act.config import load_config


def get_config(variant: str = "semlang") -> ConfigDict:
    """Returns the config of an adapter; see language_rearrangement.py, whose values these replace."""
    file = Path(__file__).parent / "language_rearrangement.py"
    config = load_config(f"{file}:{variant},preset=tiny_grid")
    config.env.tasks = "open-fridge,close-fridge"
    config.env.stride = 60  # configurations c, c + 60, ... are in the same room
    config.env.horizon = 5
    config.rollout.simulators = 32
    config.rollout.steps = 16
    config.ppo.minibatches = 4
    config.ppo.epochs = 3
    config.ppo.reward_scale = 0.1
    config.ppo.normalize_advantages = True
    config.ppo.entropy_coefficient = 0.02
    config.ppo.target_kl = 0.2
    config.optimizer.learning_rate = 2e-4
    config.optimizer.max_grad_norm = 1.0
    config.steps = 15
    config.evaluate.every = 5
    config.evaluate.splits = "train,test"  # the room with new starts, and 20 other rooms
    return config
