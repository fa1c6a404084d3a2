"""Makes the action tokenizer of `fetch_pick` demonstrations.

    python -m mllm_act.train_tokenizer --config=configs/tokenizer/fetch_pick.py:rvq \
        --workdir=runs/fetch_pick/tokenizer_rvq --config.data.directory=data/fetch_pick

Variants, keys and what they mean are those of metaworld.py.
"""

from pathlib import Path

from ml_collections.config_dict import ConfigDict

from mllm_act.config import load_config


def get_config(variant: str = "rvq") -> ConfigDict:
    """Returns the config of ``kind[,chunk=H]``."""
    config = load_config(f"{Path(__file__).parent / 'metaworld.py'}:{variant}")
    config.data.directory = "data/fetch_pick"
    return config
