"""What the configs of all environments share: every key, with its default.

Variants: the adapter, then ``,preset=NAME``. ``tiny`` and ``tiny_grid`` are trained from scratch. Of ``smollm2_vit_s``
and ``llava_1_5_7b`` LoRA, bridge and adapter are trained; the rest is pretrained, and ``make pretrained`` or
``mllm_act.import_hf`` puts it into ``pretrained/NAME``. Values are those of arXiv 2406.07904, appendix, table 3, where
it states them.
"""

from ml_collections.config_dict import ConfigDict, placeholder

from mllm_act.adapters import adapter_class, adapter_settings
from mllm_act.errors import UserError
from mllm_act.models import presets


def get_config(variant: str = "rvq") -> ConfigDict:
    """Returns the config of ``adapter[,preset=NAME]``; an environment's own adds its data, prompt and lengths."""
    adapter, *options = variant.split(",")
    chosen = dict(option.partition("=")[::2] for option in options)
    if set(chosen) - {"preset"}:
        raise UserError(
            f"--config=...:{variant}: expected ADAPTER or ADAPTER,preset=NAME, found {options}"
        )

    config = ConfigDict()
    config.seed = 0
    config.adapter = ConfigDict(
        {"name": adapter, **adapter_settings(adapter)}
    )  # see mllm_act/adapters/
    config.preset = chosen.get("preset", "tiny")
    # A folder made by mllm_act.import_hf; "" for random weights.
    is_pretrained = presets.get(config.preset).text_tokenizer == "pretrained"
    config.pretrained = f"pretrained/{config.preset}" if is_pretrained else ""
    # The model. "" and None: as in the preset.
    config.bridge = ""  # projector, perceiver, mixer, film, or several in their order with commas
    config.weight_dtype = ""  # of frozen matrices: float32, bfloat16 or float8
    config.remat = ""  # what the backward pass recomputes: none, projections or full
    config.lora = ConfigDict({
        "targets": "", "rank": placeholder(int), "alpha": placeholder(float), "dropout": placeholder(float),
    })  # fmt: skip
    config.history = "observations"  # or observations_and_actions; see mllm_act/models/mllm.py
    config.fit = "squash"  # of images that are not square: squash, pad or crop; also in evaluation and acting

    # The embodiment; see mllm_act/training/embodiments.py.
    config.prompt_template = "Prompt: control the robot. USER: {instruction} ASSISTANT: "
    config.prompt_tokens = 48  # prompts are padded to this many tokens
    config.chunk = 8 if adapter == "fast" else 1  # actions per decision
    # How many of them may be executed while the next are decided on; see docs/serving.md.
    config.max_delay = 0
    config.actions = ()  # names of discrete actions; (): the environment's own
    config.tokenizer = ""  # workdir of train_tokenizer; needed by vq, rvq and fast
    # Of actions: range, quantiles or meanstd; see mllm_act/normalization.py. "": as the tokenizer's.
    config.normalization = "" if adapter_class(adapter).needs_tokenizer else "range"

    config.data = ConfigDict()
    config.data.directory = ""  # a TFDS folder, local or gs://; several with commas are one set
    config.data.mapping = (
        ""  # a file, or a name in configs/robots; "" for what data_pipelines.generate wrote
    )
    config.data.context = 3  # steps of a window
    config.data.batch_size = 32  # windows over all processes and devices
    config.data.shuffle_megabytes = 256

    # Random changes of images in training; see mllm_act/training/augment.py. crop 1.0 and color 0.0: none.
    config.augment = ConfigDict({"crop": 1.0, "color": 0.0})

    config.epochs = 3.0  # over the steps of the demonstrations
    config.steps = placeholder(int)  # updates; overrides epochs
    config.optimizer = ConfigDict({
        "learning_rate": 3e-4, "warmup": 0.1, "b1": 0.9, "b2": 0.999, "weight_decay": 0.01, "max_grad_norm": 1.0,
        "schedule": "cosine",  # or linear, constant, warmup_stable_decay
        "decay": 0.2,  # the last part of the steps, in which warmup_stable_decay goes to zero
    })  # fmt: skip
    config.accumulate = 1  # parts that a batch is cut into, one after another, to need less memory
    config.ema = 0.0  # decay of an average of the trained weights, which then acts and is exported; 0.0: none

    config.wandb = (
        ""  # a project of Weights & Biases that metrics also go to; needs the package wandb
    )
    config.log_every = 20
    config.validate_every = 500
    config.validation_windows = 256  # the paper validates on 1,024
    config.checkpoint_every = 500
    config.stall_minutes = (
        60.0  # without a step, compiling included, after which all processes end with their stacks
    )
    config.mesh = ConfigDict({"data": -1, "fsdp": 1, "tensor": 1})
    return config
