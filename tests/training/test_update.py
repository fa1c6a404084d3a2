"""Updates in parts, averages of weights, schedules of the learning rate."""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from ml_collections.config_dict import ConfigDict

from mllm_act import parameters
from mllm_act.batch import Batch
from mllm_act.training import optimizer
from mllm_act.training.step import Recipe, update
from tests.training import test_step

pytestmark = pytest.mark.slow

STEPS = 20


def prepare(**changes: Any) -> tuple[Recipe, Any, Any, Batch]:
    """FAST, whose loss is a mean over tokens, not steps; nothing drops out."""
    network = test_step.PolicyNetwork(test_step.model(), {"arm": test_step.make("fast")})
    graph, trained, frozen = parameters.split(network, ((r"tokenizer/", False), (r".", True)))
    recipe = Recipe(
        graph, optax.sgd(1.0), jax.random.key(0), {"arm": 1.0}, {"arm": None}, {}, **changes
    )
    state = {"trained": trained, "optimizer": recipe.optimizer.init(trained)}
    batch = jax.tree.map(lambda x: jnp.asarray(x)[:8], test_step.windows(is_discrete=False))
    return recipe, state, frozen, batch


def test_a_batch_in_parts_gives_the_update_of_the_whole() -> None:
    found = []
    for parts in (1, 4):
        recipe, state, frozen, batch = prepare(accumulate=parts)
        after, metrics = jax.jit(partial(update, recipe))(state, frozen, {"arm": batch}, 1)
        found.append((parameters.flatten(after["trained"]), metrics))
    (whole, of_whole), (parts_, of_parts) = found
    assert of_whole.keys() == of_parts.keys()
    for name, value in of_whole.items():
        np.testing.assert_allclose(of_parts[name], value, rtol=1e-5, err_msg=name)
    for path, array in whole.items():
        np.testing.assert_allclose(parts_[path], array, rtol=1e-4, atol=1e-6, err_msg=path)


def test_the_average_follows_the_weights() -> None:
    recipe, state, frozen, batch = prepare(ema=0.9)
    recipe = dataclasses.replace(recipe, optimizer=optax.sgd(0.1))
    state["ema"] = state["trained"]
    compiled = jax.jit(partial(update, recipe))
    weights = [parameters.flatten(state["trained"])]
    for step in (1, 2, 3):
        state, _ = compiled(state, frozen, {"arm": batch}, jnp.int32(step))
        weights.append(parameters.flatten(state["trained"]))
    path = "mllm/language/blocks/q/kernel"
    expected = weights[0][path]
    for step in (1, 2, 3):
        decay = min(0.9, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * weights[step][path]
    np.testing.assert_allclose(parameters.flatten(state["ema"])[path], expected, rtol=1e-5)


@pytest.mark.parametrize(
    ("name", "at"),
    [
        ("cosine", {2: 1.0, 11: 0.5, 20: 0.0}),
        ("linear", {2: 1.0, 11: 0.5, 20: 0.0}),
        ("constant", {2: 1.0, 11: 1.0, 20: 1.0}),
        ("warmup_stable_decay", {2: 1.0, 16: 1.0, 18: 0.5, 20: 0.0}),
    ],
)
def test_schedules(name: str, at: dict[int, float]) -> None:
    config = ConfigDict({"learning_rate": 3e-4, "warmup": 0.1, "decay": 0.2, "schedule": name})
    rate = optimizer.schedule(config, STEPS)
    for step, share in {0: 0.0, 1: 0.5, **at}.items():
        np.testing.assert_allclose(rate(step), 3e-4 * share, atol=1e-10)


def test_the_default_is_warm_up_and_cosine_decay() -> None:
    config = ConfigDict({"learning_rate": 3e-4, "warmup": 0.1, "decay": 0.2, "schedule": "cosine"})
    rate = optimizer.schedule(config, STEPS)
    reference = optax.warmup_cosine_decay_schedule(0.0, 3e-4, 2, STEPS)
    np.testing.assert_allclose(
        [rate(i) for i in range(STEPS + 3)], [reference(i) for i in range(STEPS + 3)], atol=1e-10
    )
