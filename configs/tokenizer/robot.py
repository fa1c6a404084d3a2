"""Makes the action tokenizer of any RLDS dataset, such as your own robot's.

    python -m mllm_act.train_tokenizer --config=configs/tokenizer/robot.py:rvq --workdir=runs/robot/tokenizer \
        --config.data.directory=DIR --config.data.mapping=my_robot.py

Variants and keys are those of metaworld.py. Updates are counted in steps, so that a small dataset gets as many as a
large one; there is no simulator to replay actions in.
"""

from pathlib import Path

from ml_collections.config_dict import ConfigDict

from mllm_act.config import load_config


def get_config(variant: str = "rvq") -> ConfigDict:
    """Returns the config of ``kind[,chunk=H]``."""
    config = load_config(f"{Path(__file__).parent / 'metaworld.py'}:{variant}")
    config.data.directory = ""
    config.replay = False
    if "steps" in config:  # fast makes no updates
        config.steps = 2000
    return config
