"""The demo's policy: `make demo`. The tiny preset from scratch on six Meta-World tasks, two cores, no GPU.

    python -m mllm_act.train --config=configs/policy/metaworld_demo.py:rvq --workdir=runs/demo/policy_rvq \
        --config.data.directory=runs/demo/data --config.tokenizer=runs/demo/tokenizer_rvq

Learning rate, patch size and steps were chosen on configurations of their own (``MT1(task, seed=1)``), neither
training nor test: at 3e-4 a model from scratch is still learning when the minutes are over, at 2e-3 it is less steady.
On two cores it takes about four minutes. On a GPU 100 of 100 such episodes succeeded, as did 100 of 100 test ones
(95 % interval 96 to 100 %; five tasks, two seeds).
"""

from pathlib import Path

from ml_collections.config_dict import ConfigDict

from mllm_act.config import load_config


def get_config(variant: str = "rvq") -> ConfigDict:
    """Returns the config of an adapter; see metaworld.py, whose values these replace."""
    config = load_config(f"{Path(__file__).parent / 'metaworld.py'}:{variant}")
    config.optimizer.learning_rate = 1e-3
    config.steps = 1200
    config.prompt_tokens = 24
    config.data.shuffle_megabytes = 512  # the whole dataset: three minutes leave no time for order
    config.validate_every = 300
    config.checkpoint_every = 300
    return config
