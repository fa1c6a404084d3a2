"""Fine-tunes a policy on Meta-World demonstrations with one of the adapters of continuous actions.

    python -m mllm_act.train --config=configs/policy/metaworld.py:rvq --workdir=runs/metaworld/rvq \
        --config.data.directory=data/metaworld --config.tokenizer=runs/metaworld/tokenizer_rvq

Variants: ``regression``, ``uniform``, ``vq``, ``rvq``, ``fast``; then ``,preset=NAME``. Keys and what they mean are in
common.py.
"""

from pathlib import Path

from ml_collections.config_dict import ConfigDict

from mllm_act.config import load_config


def get_config(variant: str = "rvq") -> ConfigDict:
    """Returns the config of ``adapter[,preset=NAME]``."""
    config = load_config(f"{Path(__file__).parent / 'common.py'}:{variant}")
    config.data.directory = "data/metaworld"
    config.data.context = 3
    return config
