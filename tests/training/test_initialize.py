"""First parameters: what is pretrained is the folder's to the bit, the rest is random and in its place."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mllm_act import parameters
from mllm_act.errors import UserError
from mllm_act.models import float8, presets
from mllm_act.models.layers import LoRA
from mllm_act.models.mllm import MLLM, MLLMConfig
from mllm_act.training import initialize, sharding
from tests import pretrained_folder

K = 8
TINY = presets.get("tiny").model
CONFIG = dataclasses.replace(
    TINY,
    language=dataclasses.replace(TINY.language, tied=False, lora=LoRA(rank=2)),
    weight_dtype="float8",
)


class Rows(nnx.Module):
    """As much of an adapter as is initialised."""

    def __init__(self, width: int, rngs: nnx.Rngs) -> None:
        self.embedding = nnx.Param(jax.random.normal(rngs.params(), (K, width)))
        self.head = nnx.Param(jax.random.normal(rngs.params(), (K, width)))
        self.bias = nnx.Param(jax.random.normal(rngs.params(), (K,)))


class Network(nnx.Module):
    def __init__(self, config: MLLMConfig) -> None:
        rngs = nnx.Rngs(0)
        self.mllm = MLLM(config, rngs)
        self.adapters = nnx.Dict(arm=Rows(config.language.width, rngs))


def wanted(config: MLLMConfig) -> dict[str, jax.ShapeDtypeStruct]:
    mesh = sharding.make_mesh({"data": -1, "fsdp": 1, "tensor": 1})
    shapes = parameters.flatten(nnx.state(nnx.eval_shape(lambda: Network(config))))
    return parameters.flatten(sharding.abstract(shapes, mesh))


@pytest.fixture(scope="module")
def there(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, np.ndarray]]:
    out = tmp_path_factory.mktemp("pretrained") / "tiny"
    return out, pretrained_folder.write(out, CONFIG, ["close the drawer"], 300)


def test_arrays_come_from_the_folder_from_what_is_given_or_from_chance(
    there: tuple[Path, dict[str, np.ndarray]],
) -> None:
    path, weights = there
    like = wanted(CONFIG)
    given = {"adapters/arm/bias": jnp.arange(float(K))}
    found = initialize.initial_parameters(lambda: Network(CONFIG), like, given, CONFIG, path)
    assert found.keys() == like.keys()
    for name, array in found.items():
        assert (array.shape, array.dtype) == (like[name].shape, like[name].dtype), name
        assert array.sharding == like[name].sharding, name
    np.testing.assert_array_equal(found["adapters/arm/bias"], np.arange(K))
    for name in ("language/embedding", "language/norm/scale", "vision/position"):
        np.testing.assert_array_equal(
            found[f"mllm/{name}"], weights[name].astype(like[f"mllm/{name}"].dtype)
        )
    kernel, scale = float8.quantize(jnp.asarray(weights["language/blocks/q/kernel"][0]))
    np.testing.assert_array_equal(found["mllm/language/blocks/q/kernel"][0], kernel)
    np.testing.assert_array_equal(found["mllm/language/blocks/q/kernel_scale"][0], scale)
    assert not np.any(found["mllm/language/blocks/q/lora_b"])
    assert 0.5 < float(jnp.std(found["mllm/bridge/perceiver/latents"])) < 2
    rows = slice(CONFIG.language.action_tokens, CONFIG.language.action_tokens + K)
    for name in ("embedding", "head"):
        np.testing.assert_array_equal(
            found[f"adapters/arm/{name}"], weights[f"language/{name}"][rows].astype(np.float32)
        )


def test_a_tied_models_action_rows_are_the_embeddings_twice(tmp_path: Path) -> None:
    config = dataclasses.replace(
        CONFIG, language=dataclasses.replace(CONFIG.language, tied=True), weight_dtype="bfloat16"
    )
    pretrained_folder.write(tmp_path / "tied", config, ["close the drawer"], 300)
    found = initialize.initial_parameters(
        lambda: Network(config), wanted(config), {}, config, tmp_path / "tied"
    )
    np.testing.assert_array_equal(found["adapters/arm/head"], found["adapters/arm/embedding"])


def test_weights_that_fit_but_compute_otherwise_are_refused(
    there: tuple[Path, dict[str, np.ndarray]],
) -> None:
    language = dataclasses.replace(CONFIG.language, rope_theta=5.0, heads=8, kv_heads=4)
    config = dataclasses.replace(CONFIG, language=language)
    message = (
        "language.heads: expected 8, found 4; .*language.rope_theta: expected 5.0, found 10000.0"
    )
    with pytest.raises(UserError, match=message):
        initialize.initial_parameters(lambda: Network(config), wanted(config), {}, config, there[0])


def test_a_model_of_another_vocabulary_is_refused(
    there: tuple[Path, dict[str, np.ndarray]],
) -> None:
    language = dataclasses.replace(CONFIG.language, vocabulary=1030)
    config = dataclasses.replace(CONFIG, language=language)
    with pytest.raises(
        UserError, match=r"language/embedding: expected \[1030, 128\], found \[1024"
    ):
        initialize.initial_parameters(lambda: Network(config), wanted(config), {}, config, there[0])
