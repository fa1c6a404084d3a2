"""Makes the action tokenizer of CALVIN demonstrations.

    python -m mllm_act.train_tokenizer --config=configs/tokenizer/calvin.py:rvq \
        --workdir=runs/calvin/tokenizer_rvq --config.data.directory=data/calvin

Variants and keys are those of metaworld.py. The training configurations of CALVIN are not replayed at the end: their
starts depend on the seed of each demonstration.
"""

from pathlib import Path

from ml_collections.config_dict import ConfigDict

from mllm_act.config import load_config


def get_config(variant: str = "rvq") -> ConfigDict:
    """Returns the config of ``kind[,chunk=H]``."""
    config = load_config(f"{Path(__file__).parent / 'metaworld.py'}:{variant}")
    config.data.directory = "data/calvin"
    config.replay = False
    return config
