"""The demo's policy: `make demo ENV=language_rearrangement`. A tiny model from scratch on two cores, no GPU.

    python -m mllm_act.train --config=configs/policy/language_rearrangement_demo.py:semlang \
        --workdir=runs/demo_language_rearrangement/policy_semlang \
        --config.data.directory=runs/demo_language_rearrangement/data

Images have 112 pixels (environment ``language_rearrangement_112``).
"""

from pathlib import Path

from ml_collections.config_dict import ConfigDict

from mllm_act.config import load_config


def get_config(variant: str = "semlang") -> ConfigDict:
    """Returns the config of an adapter; see language_rearrangement.py, whose values these replace."""
    config = load_config(
        f"{Path(__file__).parent / 'language_rearrangement.py'}:{variant},preset=tiny"
    )
    config.bridge = "perceiver"
    config.prompt_template = "{instruction}"  # what is the same in all prompts tells nothing here
    config.prompt_tokens = 32
    config.data.directory = "data/language_rearrangement_112"
    config.data.context = 1  # the gripper and the furniture in the newest image tell what is done
    config.data.batch_size = 64
    config.data.shuffle_megabytes = 512  # the whole dataset
    config.optimizer.learning_rate = 1e-3
    config.optimizer.b2 = 0.95
    config.steps = 600
    config.validate_every = 200
    config.validation_windows = 256
    config.checkpoint_every = 200
    return config
