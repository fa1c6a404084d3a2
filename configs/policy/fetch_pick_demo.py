"""The demo's policy: `make demo ENV=fetch_pick`. The tiny preset from scratch on one object, two cores, no GPU.

    python -m mllm_act.train --config=configs/policy/fetch_pick_demo.py:regression \
        --workdir=runs/demo_fetch_pick/policy_regression --config.data.directory=runs/demo_fetch_pick/data

``regression`` also sees the arm's joints and whether something is held, which tell it what to do next.
"""

from pathlib import Path

from ml_collections.config_dict import ConfigDict

from mllm_act.config import load_config


def get_config(variant: str = "regression") -> ConfigDict:
    """Returns the config of an adapter; see fetch_pick.py, whose values these replace."""
    config = load_config(f"{Path(__file__).parent / 'fetch_pick.py'}:{variant}")
    config.optimizer.learning_rate = 1e-3
    config.steps = 1600
    config.prompt_tokens = 24
    config.data.context = 1
    config.data.shuffle_megabytes = 512  # the whole dataset
    config.validate_every = 400
    config.checkpoint_every = 400
    return config
