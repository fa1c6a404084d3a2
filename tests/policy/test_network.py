"""What a config says of the model goes into the preset's sizes, and a description survives JSON."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from ml_collections.config_dict import ConfigDict

from mllm_act.adapters.language import LanguageConfig
from mllm_act.adapters.uniform import UniformConfig
from mllm_act.batch import Observation
from mllm_act.config import load_config
from mllm_act.errors import UserError
from mllm_act.models import presets
from mllm_act.policy.network import (
    NOISE,
    EmbodimentConfig,
    NetworkConfig,
    PolicyNetwork,
    override_model,
)
from tests.models import tiny

ROOT = Path(__file__).parents[2]


def load(variant: str, **overrides: Any) -> ConfigDict:
    config = load_config(f"{ROOT / 'configs/policy/metaworld.py'}:{variant}")
    for key, value in overrides.items():
        node, _, name = key.replace("__", ".").rpartition(".")
        (config[node] if node else config)[name] = value
    return config


@pytest.mark.parametrize("preset", presets.PRESETS)
def test_what_is_left_open_is_the_presets(preset: str) -> None:
    model = presets.get(preset).model
    assert override_model(model, load(f"rvq,preset={preset}")) == model


def test_what_is_given_replaces_the_presets() -> None:
    model = presets.get("smollm2_vit_s").model
    config = load(
        "rvq,preset=smollm2_vit_s", bridge="projector,perceiver", weight_dtype="float8", remat="full",
        history="observations_and_actions", lora__rank=8, lora__dropout=0.0,
    )  # fmt: skip
    found = override_model(model, config)
    assert found.bridge == ("projector", "perceiver") and found.weight_dtype == "float8"
    assert found.remat == "full" and found.history == "observations_and_actions"
    lora = found.language.lora
    assert lora is not None
    assert (lora.targets, lora.rank, lora.alpha, lora.dropout) == ("q|k|v", 8, 32.0, 0.0)


def test_pretrained_presets_start_from_their_folder_with_the_papers_settings() -> None:
    config = load("rvq,preset=smollm2_vit_s")
    assert config.pretrained == "pretrained/smollm2_vit_s"
    assert (config.optimizer.learning_rate, config.optimizer.warmup) == (3e-4, 0.1)
    lora = presets.get("smollm2_vit_s").model.language.lora
    assert lora is not None
    assert (lora.targets, lora.rank, lora.alpha, lora.dropout) == ("q|k|v", 128, 32.0, 0.1)
    assert load("rvq").pretrained == ""


def test_a_description_survives_json() -> None:
    preset = presets.get("smollm2_vit_s")
    bodies = {
        "arm": EmbodimentConfig("uniform", UniformConfig(16), ("front", "wrist"), 3, 8),
        "maze": EmbodimentConfig(
            "lang", LanguageConfig(("left", "pick up"), ((5,), (6, 7)), end=9), ("top",), 32, 1
        ),
    }
    description = NetworkConfig("smollm2_vit_s", preset.model, preset.trained, bodies)
    text = json.dumps(dataclasses.asdict(description))
    assert NetworkConfig.from_dict(json.loads(text)) == description
    values = json.loads(text)
    del values["model"]
    with pytest.raises(UserError, match="network: expected the description"):
        NetworkConfig.from_dict(values)


def test_noise_and_dropout_have_keys_of_their_own() -> None:
    """The bridge's noise is not drawn with the key of a layer's dropout, however many layers there are."""
    given = tiny.sequence(fed=0)
    prompt, exists = given["prompt"], given["prompt_mask"]
    images = {"front": tiny.images()["front"][:, :1]}
    observation = Observation(images, jnp.zeros((tiny.B, 1, 0)), exists[:, :1], prompt, exists)

    @tiny.jit
    def latents(network: PolicyNetwork, key: jax.Array, *others: jax.Array) -> list[jax.Array]:
        model = network.mllm
        instructions = [model.instruction(prompt, exists, other) for other in others]
        expected = [model.latents(images, instruction) for instruction in instructions]
        return [network.latents(observation, key=key), *expected]

    key = jax.random.key(0)
    noise, of_layers = jax.random.fold_in(key, NOISE), jax.random.split(key, 2)
    network = PolicyNetwork(tiny.mllm(bridge=("film",)), {})
    found, with_noise, *with_dropout = latents(network, key, noise, *of_layers)
    assert jnp.array_equal(found, with_noise)
    assert not any(jnp.array_equal(found, other) for other in with_dropout)
    for layers in (2, 40):
        of_layers = jax.random.split(key, layers)
        inside = jax.vmap(lambda key: jax.random.split(key, 4))(of_layers).ravel()
        for keys in (of_layers, inside):
            assert not (jax.random.key_data(keys) == jax.random.key_data(noise)).all(-1).any()
