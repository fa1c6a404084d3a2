"""What the configs of PPO share: every key, with its default.

Variants: the adapter, then ``,preset=NAME``, as in configs/policy/common.py, which has the keys of the model. Values
are those of arXiv 2406.07904, appendix, where it states them, else LLaRP's (arXiv 2310.17722).
"""

import dataclasses
from pathlib import Path

from ml_collections.config_dict import ConfigDict, placeholder

from mllm_act.config import load_config
from mllm_act.rl.update import PPOConfig
from mllm_act.rl.value import ValueConfig

POLICY = Path(__file__).parents[1] / "policy" / "common.py"
# Keys of supervised training that say what the policy is.
KEPT = (
    "seed", "adapter", "preset", "pretrained", "bridge", "weight_dtype", "remat", "lora", "history", "fit",
    "prompt_template", "prompt_tokens", "mesh", "wandb", "stall_minutes",
)  # fmt: skip


def get_config(variant: str = "semlang") -> ConfigDict:
    """Returns the config of ``adapter[,preset=NAME]``; an environment's own adds its tasks, prompt and lengths."""
    policy = load_config(f"{POLICY}:{variant}")
    config = ConfigDict({key: policy[key] for key in KEPT})
    config.init = (
        ""  # a run's folder whose policy is where this run starts; its model and prompt are used
    )

    config.env = ConfigDict({
        "name": "",
        "tasks": "",  # names or groups, with commas; "": all
        "split": "train",
        "stride": 1,  # every how many-th configuration of the split is played
        "horizon": placeholder(int),  # steps of an episode; the environment's own by default
    })  # fmt: skip
    # Steps that the policy sees at once; the horizon by default. Longer episodes begin with an empty memory again.
    config.context = placeholder(int)

    config.steps = 1000  # updates
    config.rollout = ConfigDict({
        "simulators": 18, "steps": 32,
        "workers": 0,  # processes; 0: one per core
        "timeout": 300.0,  # seconds that a simulator may take for a step
    })  # fmt: skip
    ppo = dataclasses.asdict(PPOConfig())  # see mllm_act/rl/update.py
    ppo["target_kl"] = placeholder(float)
    config.ppo = ConfigDict(ppo)
    config.value = ConfigDict(dataclasses.asdict(ValueConfig()))
    config.optimizer = ConfigDict({
        "learning_rate": 3e-4, "b1": 0.9, "b2": 0.999, "epsilon": 1e-5, "weight_decay": 0.01, "max_grad_norm": 0.2,
    })  # fmt: skip

    # Success on splits while it trains, before the first update too, and videos of the best and the worst episode.
    config.evaluate = ConfigDict({
        "every": 0,  # updates; 0: never
        "splits": "test",  # with commas
        "configurations": 100,  # of each split and task, at most
    })  # fmt: skip
    config.log_every = 1
    config.checkpoint_every = 50
    return config
