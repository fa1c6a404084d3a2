"""Rules over parameter paths: first match decides, nothing is left without a rule, trees survive flattening."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from mllm_act import parameters
from mllm_act.models.layers import Linear
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


def test_biases_and_norms_do_not_decay() -> None:
    assert parameters.find(optimizer.DECAYED, "mllm/language/blocks/q/kernel")
    assert parameters.find(optimizer.DECAYED, "adapter/head")
    for path in (
        "mllm/vision/blocks/q/bias",
        "mllm/language/norm/scale",
        "adapter/embedding",
        "mllm/vision/position",
    ):
        assert not parameters.find(optimizer.DECAYED, path)


def test_learning_rate_warms_up_and_ends_at_zero() -> None:
    from ml_collections.config_dict import ConfigDict

    config = ConfigDict(
        {
            "learning_rate": 3e-4,
            "warmup": 0.1,
            "b1": 0.9,
            "b2": 0.999,
            "weight_decay": 0.0,
            "max_grad_norm": 1.0,
        }
    )
    _, schedule = optimizer.build(config, 100)
    rates = [float(schedule(step)) for step in range(101)]
    assert rates[0] == 0 and np.isclose(max(rates), 3e-4) and np.argmax(rates) == 10
    assert rates[100] < 1e-9
    assert jnp.isfinite(jnp.array(rates)).all()
