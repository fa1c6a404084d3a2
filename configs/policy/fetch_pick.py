"""Fine-tunes a policy on demonstrations of `fetch_pick` with one of the adapters of continuous actions.

    python -m data_pipelines.generate --env=fetch_pick --tasks=all --episodes=1000 --out=data/fetch_pick
    python -m mllm_act.train_tokenizer --config=configs/tokenizer/fetch_pick.py:rvq \
        --workdir=runs/fetch_pick/tokenizer_rvq
    python -m mllm_act.train --config=configs/policy/fetch_pick.py:rvq,preset=smollm2_vit_s \
        --workdir=runs/fetch_pick/rvq --config.tokenizer=runs/fetch_pick/tokenizer_rvq
    python -m mllm_act.evaluate --checkpoint=runs/fetch_pick/rvq --env=fetch_pick --split=test

Variants: ``regression``, ``uniform``, ``vq``, ``rvq``, ``fast``; then ``,preset=NAME``. Keys and what they mean are in
common.py. Prompt, context, epochs and batch (128 over four GPUs there, 32 on one) are those of Habitat Pick in arXiv
2406.07904, appendix.
"""

from pathlib import Path

from ml_collections.config_dict import ConfigDict

from mllm_act.config import load_config


def get_config(variant: str = "rvq") -> ConfigDict:
    """Returns the config of ``adapter[,preset=NAME]``."""
    config = load_config(f"{Path(__file__).parent / 'common.py'}:{variant}")
    config.data.directory = "data/fetch_pick"
    config.data.context = 3
    config.epochs = 20.0
    return config
