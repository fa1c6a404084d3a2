"""BabyAI's `go to` from scratch on two cores, no GPU: a tiny model that learns to read the instruction.

python -m data_pipelines.generate --env=babyai --tasks=goto --episodes=16000 --out=data/goto --workers=2
python -m mllm_act.train --config=configs/policy/babyai_tiny.py:semlang --workdir=runs/goto
python -m mllm_act.evaluate --checkpoint=runs/goto --env=babyai --split=test --tasks=goto
"""

from pathlib import Path

from ml_collections.config_dict import ConfigDict

from mllm_act.config import load_config


def get_config(variant: str = "semlang") -> ConfigDict:
    """Returns the config of an adapter; see babyai.py, whose values these replace."""
    config = load_config(f"{Path(__file__).parent / 'babyai.py'}:{variant},preset=tiny_grid")
    config.prompt_template = "{instruction}"  # what is the same in all prompts tells nothing here
    config.prompt_tokens = 6
    config.data.directory = "data/goto"
    config.data.context = 1  # the newest image has all a step needs
    config.data.batch_size = 64
    config.data.shuffle_megabytes = 1024  # the whole dataset
    config.steps = 3000
    config.optimizer.learning_rate = 1e-3
    config.optimizer.b2 = 0.95
    config.validation_windows = 1024
    return config
