"""Fine-tunes one policy on the demonstrations of several environments, each with its own adapter.

    python -m mllm_act.train --config=configs/policy/mixture.py:metaworld=rvq,babyai=semlang --workdir=runs/mixture \
        --config.mixture.metaworld.tokenizer=runs/metaworld/tokenizer_rvq --config.mixture.babyai.weight=2
    python -m mllm_act.evaluate --checkpoint=runs/mixture --env=babyai --split=synonyms
    python -m mllm_act.train --config=configs/policy/mixture.py:metaworld=rvq,robot=rvq,bridge=uniform ... \
        --config.mixture.robot.data.directory=DIR --config.mixture.robot.data.mapping=my_robot.py

Variants: ``NAME=ADAPTER`` for each, separated by commas; then ``,preset=NAME``. A name is an environment with a config,
a robot with a mapping in configs/robots, or, for sets of your own, ``robot`` or any name that begins so. Every batch
contains windows of all of them, in proportion to their weights. ``config.mixture.NAME`` has the keys that belong to one
of them; all other keys are those of the first one's config.
"""

from pathlib import Path

from ml_collections.config_dict import ConfigDict

from mllm_act.config import load_config
from mllm_act.errors import UserError, nearest
from mllm_act.training.embodiments import KEYS

HERE = Path(__file__).parent


def get_config(variant: str = "metaworld=rvq,babyai=semlang") -> ConfigDict:
    """Returns the config of ``environment=adapter,...[,preset=NAME]``."""
    parts = [part.partition("=")[::2] for part in variant.split(",")]
    chosen = dict(parts)
    preset = chosen.pop("preset", "tiny")
    environments = {file.stem for file in HERE.glob("*.py")} - {"common", "mixture"}
    robots = {file.stem for file in HERE.parent.glob("robots/*.py")}
    files = {
        name: name if name in environments else "robot"
        for name in chosen
        if name in environments | robots or name.startswith("robot")
    }
    wrong = next((name for name in chosen if name not in files), None)
    if wrong is not None:
        known = environments | robots
        raise UserError(
            f"--config=...:{variant}: expected environments with a config, or robots with a mapping, "
            f"{', '.join(sorted(known))}, found {wrong!r}; {nearest(wrong, known)}"
        )
    if not chosen or len(dict(parts)) < len(parts):
        raise UserError(
            f"--config=...:{variant}: expected ENVIRONMENT=ADAPTER,... with each environment once, found "
            f"{'one of them twice' if chosen else 'none'}"
        )
    own = {
        name: load_config(f"{HERE / files[name]}.py:{kind},preset={preset}")
        for name, kind in chosen.items()
    }
    config = next(iter(own.values()))
    mixture = ConfigDict()
    for name, one in own.items():
        data = {key: one.data[key] for key in ("directory", "mapping", "context")}
        if name in robots:
            data["mapping"] = name
        mixture[name] = ConfigDict({"weight": 1.0, "data": data, **{key: one[key] for key in KEYS}})
    for key in KEYS:
        del config[key]
    del config.data.directory, config.data.mapping, config.data.context
    config.mixture = mixture
    return config
