"""Makes the action tokenizer of Meta-World demonstrations.

    python -m mllm_act.train_tokenizer --config=configs/tokenizer/metaworld.py:rvq \
        --workdir=runs/metaworld/tokenizer_rvq --config.data.directory=data/metaworld

Variants: ``rvq`` (two codebooks), ``vq`` (one) and ``fast`` (byte pairs of cosine coefficients); then ``,chunk=H``, how
many future actions are encoded together: 1 unless it is given, 8 for ``fast``.

Sizes and epochs of ``rvq`` and ``vq`` are those of arXiv 2406.07904; for what it does not state see
mllm_act/action_tokenizer/training.py. On two CPU cores an update takes 0.16 s; 400 updates on 16 configurations of
each ML-45 task reach a mean squared error of about 0.0002 (rvq) and 0.003 (vq) on unseen ones, for single actions.

``fast`` makes no updates: it takes seconds. Its scale is that of arXiv 2501.09747; the vocabulary, 1024 there, has as
many codes as the other tokenizers'.
"""

from ml_collections.config_dict import ConfigDict, placeholder

from mllm_act.errors import UserError, nearest

QUANTIZERS = {"rvq": 2, "vq": 1}
KINDS = (*QUANTIZERS, "fast")


def get_config(variant: str = "rvq") -> ConfigDict:
    """Returns the config of ``kind[,chunk=H]``."""
    kind, *options = variant.split(",")
    chosen = dict(option.partition("=")[::2] for option in options)
    if kind not in KINDS:
        raise UserError(
            f"--config=...:{variant}: expected {', '.join(KINDS)}, found {kind!r}; {nearest(kind, KINDS)}"
        )
    if set(chosen) - {"chunk"}:
        raise UserError(f"--config=...:{variant}: expected KIND or KIND,chunk=H, found {options}")
    chunk = chosen.get("chunk", "8" if kind == "fast" else "1")
    if not chunk.isdecimal():
        raise UserError(
            f"--config=...:{variant}: expected a number of actions, found chunk={chunk}"
        )

    config = ConfigDict()
    config.data = ConfigDict({"directory": "data/metaworld", "mapping": ""})
    config.normalization = "range"  # of actions: range, quantiles or meanstd; see docs/guide.md
    config.replay = True  # at the end, on the test configurations of the tasks trained on
    if kind == "fast":
        config.tokenizer = ConfigDict({"chunk": int(chunk), "vocabulary": 512, "scale": 10.0})
        return config

    config.seed = 0
    config.data.batch_size = 512
    config.tokenizer = ConfigDict({
        "chunk": int(chunk), "quantizers": QUANTIZERS[kind], "codes": 512, "width": 512, "hidden": 2048, "layers": 4,
    })  # fmt: skip
    config.quantizer = ConfigDict({
        "decay": 0.95, "commitment": 1.0, "revive_below": 0.03, "initial_samples": 8192,
    })  # fmt: skip
    config.epochs = 3.0
    config.steps = placeholder(int)  # updates; where given, it overrides epochs
    config.optimizer = ConfigDict({
        "learning_rate": 3e-4, "warmup": 0.05, "b1": 0.9, "b2": 0.999, "weight_decay": 1e-4,
        "max_grad_norm": 1.0, "schedule": "cosine", "decay": 0.2,  # see configs/policy/common.py
    })  # fmt: skip
    config.log_every = 20  # also how many updates one dispatch makes
    config.checkpoint_every = 500  # a multiple of log_every
    config.validation_actions = 4096  # of the held-out split, spread evenly, at each log
    return config
