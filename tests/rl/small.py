"""A run of PPO in the corridor with a model of one layer, as small as a real one can be."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
from ml_collections.config_dict import ConfigDict

from mllm_act.config import load_config
from mllm_act.models import presets
from mllm_act.models.bridge.perceiver import PerceiverConfig
from mllm_act.models.vision import VisionConfig

ROOT = Path(__file__).parents[2]
PRESET = presets.Preset(
    dataclasses.replace(
        presets.TINY,
        vision=VisionConfig(image_size=8, patch_size=4, width=16, layers=1, heads=2, mlp_width=32),
        sizes=(
            ("perceiver", PerceiverConfig(width=16, heads=2, mlp_width=32, latents=2, layers=1)),
        ),
        language=dataclasses.replace(
            presets.TINY.language, width=32, layers=1, heads=2, kv_heads=1, mlp_width=64
        ),
    ),
    trained=presets.EVERYTHING,
    text_tokenizer="trained",
)


def register(monkeypatch: Any) -> None:
    """Makes the environment and the preset known."""
    from mllm_act import envs

    monkeypatch.setitem(envs.ENVS, "corridor", "tests.rl.corridor")
    monkeypatch.setitem(presets.PRESETS, "corridor", PRESET)


def config(**overrides: Any) -> ConfigDict:
    """Returns the config of a run; ``overrides`` have double underscores for dots."""
    adapter = overrides.pop("adapter", "categorical")
    result = load_config(f"{ROOT}/configs/rl/common.py:{adapter},preset=corridor")
    if adapter == "categorical":
        result.adapter.hidden = 32
    result.update_from_flattened_dict({
        "env.name": "corridor", "prompt_template": "{instruction}", "prompt_tokens": 4, "steps": 4,
        "rollout.simulators": 16, "rollout.steps": 8, "rollout.workers": 1,
        "ppo.minibatches": 2, "optimizer.learning_rate": 3e-3, "optimizer.max_grad_norm": 1.0,
        "checkpoint_every": 100,
        **{key.replace("__", "."): value for key, value in overrides.items()},
    })  # fmt: skip
    return result


def in_bfloat16() -> presets.Preset:
    """Returns the preset in 16 bits."""
    return dataclasses.replace(PRESET, model=dataclasses.replace(PRESET.model, dtype="bfloat16"))


def cpu() -> Any:
    """Returns a device."""
    return jax.devices("cpu")[0]
