"""Fine-tunes a policy on CALVIN demonstrations with one of the adapters of continuous actions.

    python -m data_pipelines.generate --env=calvin_static --tasks=all --episodes=17000 --out=data/calvin
    python -m mllm_act.train_tokenizer --config=configs/tokenizer/calvin.py:rvq --workdir=runs/calvin/tokenizer_rvq
    python -m mllm_act.train --config=configs/policy/calvin.py:rvq,preset=smollm2_vit_s \
        --workdir=runs/calvin/rvq --config.tokenizer=runs/calvin/tokenizer_rvq
    python -m mllm_act.evaluate --checkpoint=runs/calvin/rvq --env=calvin_static --split=test

Variants: ``regression``, ``uniform``, ``vq``, ``rvq``, ``fast``; then ``,preset=NAME``. Keys and what they mean are in
common.py. Context, epochs, batch and the static camera are those of arXiv 2406.07904, appendix, table 3. The paper
trains on CALVIN's own 17,871 human demonstrations: ``data_pipelines.import_calvin`` imports them, and
``--config.data.mapping=calvin`` reads them.
"""

from pathlib import Path

from ml_collections.config_dict import ConfigDict

from mllm_act.config import load_config


def get_config(variant: str = "rvq") -> ConfigDict:
    """Returns the config of ``adapter[,preset=NAME]``."""
    config = load_config(f"{Path(__file__).parent / 'common.py'}:{variant}")
    config.data.directory = "data/calvin"
    config.data.context = 12
    return config
