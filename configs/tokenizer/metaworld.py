"""Trains the action tokenizer of Meta-World demonstrations.

    python -m mllm_act.train_tokenizer --config=configs/tokenizer/metaworld.py:rvq \
        --workdir=runs/metaworld/tokenizer_rvq --config.data.directory=data/metaworld

Variants: ``rvq`` (two codebooks) and ``vq`` (one). Sizes and epochs are those of arXiv 2406.07904; for
what it does not state see mllm_act/tokenizer/training.py. On two CPU cores an update takes 0.16 s;
400 updates on 16 configurations of each ML-45 task reach a mean squared error of about 0.0002 (rvq)
and 0.003 (vq) on unseen ones.
"""

from ml_collections.config_dict import ConfigDict, placeholder

from mllm_act.errors import UserError, nearest

QUANTIZERS = {"rvq": 2, "vq": 1}


def get_config(variant: str = "rvq") -> ConfigDict:
    """Returns the config of ``rvq`` or ``vq``."""
    if variant not in QUANTIZERS:
        raise UserError(
            f"--config=...:{variant}: expected {' or '.join(QUANTIZERS)}; "
            f"{nearest(variant, QUANTIZERS)}"
        )
    config = ConfigDict()
    config.seed = 0
    config.data = ConfigDict({"directory": "data/metaworld", "batch_size": 512})
    config.tokenizer = ConfigDict({
        "quantizers": QUANTIZERS[variant], "codes": 512, "width": 512, "hidden": 2048, "layers": 4,
    })  # fmt: skip
    config.quantizer = ConfigDict({
        "decay": 0.95, "commitment": 1.0, "revive_below": 0.03, "initial_samples": 8192,
    })  # fmt: skip
    config.epochs = 3.0
    config.steps = placeholder(int)  # updates; where given, it overrides epochs
    config.optimizer = ConfigDict({
        "learning_rate": 3e-4, "warmup": 0.05, "b1": 0.9, "b2": 0.999, "weight_decay": 1e-4,
        "max_grad_norm": 1.0,
    })  # fmt: skip
    config.log_every = 20  # also how many updates one dispatch makes
    config.checkpoint_every = 500  # a multiple of log_every
    config.validation_actions = 4096  # of the held-out split, spread evenly, at each log
    config.replay = True  # at the end, on the test configurations of the tasks trained on
    return config
