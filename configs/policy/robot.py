"""Fine-tunes a policy on any RLDS dataset, such as your own robot's, with one of the adapters of continuous actions.

    python -m data_pipelines.check DIR                                  # prints the features, writes a draft mapping
    python -m mllm_act.train_tokenizer --config=configs/tokenizer/robot.py:rvq --workdir=runs/robot/tokenizer \
        --config.data.directory=DIR --config.data.mapping=my_robot.py
    python -m mllm_act.train --config=configs/policy/robot.py:rvq --workdir=runs/robot/rvq \
        --config.tokenizer=runs/robot/tokenizer --config.data.directory=DIR --config.data.mapping=my_robot.py
    python -m mllm_act.evaluate --checkpoint=runs/robot/rvq --data=DIR --split=val

Variants: ``regression``, ``uniform``, ``vq``, ``rvq``, ``fast``; then ``,preset=NAME``. Keys and what they mean are in
common.py. Updates are counted in steps, so that a small dataset gets as many as a large one.
"""

from pathlib import Path

from ml_collections.config_dict import ConfigDict

from mllm_act.config import load_config


def get_config(variant: str = "rvq") -> ConfigDict:
    """Returns the config of ``adapter[,preset=NAME]``."""
    config = load_config(f"{Path(__file__).parent / 'common.py'}:{variant}")
    config.prompt_tokens = 64
    config.steps = 5000
    return config
