"""Rules over parameter paths: first match decides, nothing is left without a rule, trees survive flattening."""

import jax
import numpy as np
import optax
import pytest
from flax import nnx

from mllm_act import parameters
from mllm_act.adapters.regression import RegressionConfig
from mllm_act.adapters.uniform import UniformConfig
from mllm_act.bench import synthetic
from mllm_act.models import presets
from mllm_act.models.layers import Linear
from mllm_act.policy.network import EmbodimentConfig, NetworkConfig, build_network
from mllm_act.training import optimizer


def test_the_first_matching_rule_decides() -> None:
    table = ((r"lora", True), (r"language/", False), (r".", True))
    assert parameters.find(table, "mllm/language/blocks/q/lora_a") is True
    assert parameters.find(table, "mllm/language/blocks/q/kernel") is False
    assert parameters.find(table, "adapter/head") is True


def test_a_path_without_a_rule_is_an_error() -> None:
    with pytest.raises(ValueError, match="no rule matches"):
        parameters.find(((r"lora", True),), "adapter/head")


def test_flatten_names_leaves_and_unflatten_is_its_inverse() -> None:
    params = nnx.state(Linear(2, 3, bias=True, rngs=nnx.Rngs(0)))
    tree = {"model": params, "optimizer": optax.adam(1e-3).init(params)}
    named = parameters.flatten(tree)
    assert {"model/kernel", "model/bias"} <= named.keys()
    back = parameters.unflatten({name: leaf + 1 for name, leaf in named.items()}, like=tree)
    assert jax.tree.structure(back) == jax.tree.structure(tree)
    np.testing.assert_array_equal(back["model"]["kernel"][...], params["kernel"][...] + 1)


LANGUAGE = {f"language/blocks/{name}/kernel" for name in ("q", "k", "v", "o", "gate", "up", "down")}
VISION = {f"vision/blocks/{name}/kernel" for name in ("q", "k", "v", "o", "up", "down")} | {
    "vision/patch/kernel"
}
PERCEIVER = {
    f"bridge/perceiver/blocks/{name}/kernel" for name in ("q", "k", "v", "o", "up", "down")
} | {"bridge/perceiver/output/kernel"}
MIXER = {f"bridge/mixer/{name}/kernel" for name in ("input", "mix", "up", "down")}
FILM = {
    f"bridge/film/{name}/kernel"
    for name in ("input", "hidden", "up", "down", "listener/key", "listener")
} | {f"bridge/film/stages/{i}/{name}" for i in range(2) for name in ("kernel", "film/kernel")}
LORA = {f"language/blocks/{name}/lora_{factor}" for name in "qkv" for factor in "ab"}
# Of the model: what decays where the preset's own rules choose what is trained, and where everything is.
DECAYS = {
    "tiny": (LANGUAGE | VISION | PERCEIVER, LANGUAGE | VISION | PERCEIVER),
    "tiny_grid": (LANGUAGE | VISION | FILM, LANGUAGE | VISION | FILM),
    "smollm2_vit_s": (LORA | MIXER, LORA | MIXER | LANGUAGE | VISION),
    "llava_1_5_7b": (LORA | PERCEIVER, LORA | PERCEIVER | LANGUAGE | VISION | {"language/head"}),
}


@pytest.mark.parametrize("name", presets.PRESETS)
def test_matrices_decay_and_nothing_else(name: str) -> None:
    """Not DINOv2's layer scales, for example."""
    preset = presets.get(name)
    # Names of embodiments are the user's: they do not decide.
    bodies = {
        "norm1": EmbodimentConfig("uniform", UniformConfig(), ("top",), 1, 1),
        "bias": EmbodimentConfig("regression", RegressionConfig(8), ("top",), 1, 1),
    }
    config = NetworkConfig(name, preset.model, preset.trained, bodies)
    statistics = {body: synthetic.statistics() for body in bodies}
    network = nnx.eval_shape(lambda: build_network(config, statistics, nnx.Rngs(0)))
    adapters = {
        "adapters/norm1/head",
        *(f"adapters/bias/{x}/kernel" for x in ("layer1", "layer2", "output")),
    }
    for trained, expected in zip((preset.trained, ((r".", True),)), DECAYS[name], strict=True):
        paths = parameters.flatten(parameters.split(network, trained)[1])
        found = {path for path in paths if parameters.find(optimizer.DECAYED, path)}
        assert found == adapters | {f"mllm/{path}" for path in expected}
