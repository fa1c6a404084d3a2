"""Pred for discrete actions: its loss is a cross-entropy, what it decodes is in the list, and it learns."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from mllm_act.adapters.categorical import Categorical
from mllm_act.errors import UserError
from tests.adapters.discrete import D, moments, statistics

NAMES = ("left", "right", "forward")


def make() -> Categorical:
    return Categorical(statistics(0, 2), NAMES, D, 32, nnx.Rngs(0))


def extend(embedding: jax.Array, state: Any) -> tuple[jax.Array, Any]:
    raise AssertionError("one token is all")


def test_shapes_of_the_contract() -> None:
    adapter, action = make(), jnp.arange(6.0).reshape(2, 3, 1) % 3
    tokens = adapter.encode(action)
    assert tokens.shape == (2, 3, 1) and tokens.dtype == jnp.int32
    assert adapter.embed(tokens).shape == (2, 3, 1, D)
    assert adapter.allowed(tokens[..., :0]).shape == (2, 3, 3)
    np.testing.assert_array_equal(adapter.decode(tokens), action)


def test_the_loss_is_the_cross_entropy_of_the_steps_that_count() -> None:
    adapter = make()
    hidden = jax.random.normal(jax.random.key(0), (2, 4, 1, D))
    tokens = adapter.encode(jnp.arange(8.0).reshape(2, 4, 1) % 3)
    mask = jnp.arange(4) < jnp.array([[2], [4]])
    loss, _ = adapter.loss(hidden, tokens, mask, jnp.zeros((2, 4, 0)))
    np.testing.assert_allclose(loss, -adapter.log_prob(hidden, tokens)[mask].mean(), rtol=1e-5)
    other = jnp.where(mask[..., None, None], hidden, 7.0)
    assert loss == adapter.loss(other, tokens, mask, jnp.zeros((2, 4, 0)))[0]
    every = jnp.broadcast_to(hidden[:, :1], (2, 3, 1, D))
    log_prob = adapter.log_prob(every, jnp.broadcast_to(jnp.arange(3)[:, None], (2, 3, 1)))
    np.testing.assert_allclose(np.exp(log_prob).sum(1), 1.0, rtol=1e-5)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**16), scale=st.sampled_from([0.0, 1.0, 1e30, float("nan")]))
def test_whatever_the_hidden_state_the_action_is_in_the_list(seed: int, scale: float) -> None:
    adapter = make()
    hidden = scale * jax.random.normal(jax.random.key(seed), (4, D))
    for key in (None, jax.random.key(seed)):
        action = adapter.decode(adapter.sample(hidden, jnp.zeros((4, 0)), extend, None, key))
        assert action.shape == (4, 1) and set(np.array(action)[:, 0]) <= {0.0, 1.0, 2.0}


def test_it_learns() -> None:
    adapter = make()
    hidden = jax.random.normal(jax.random.key(0), (1, 12, 1, D))
    tokens = adapter.encode(jnp.arange(12.0).reshape(1, 12, 1) % 3)
    optimizer = nnx.Optimizer(adapter, optax.adam(1e-2), wrt=nnx.Param)

    @nnx.jit
    def update(adapter: Categorical, optimizer: nnx.Optimizer) -> None:
        ones, proprio = jnp.ones((1, 12), bool), jnp.zeros((1, 12, 0))
        grads = nnx.grad(lambda a: a.loss(hidden, tokens, ones, proprio)[0])(adapter)
        optimizer.update(adapter, grads)

    for _ in range(60):
        update(adapter, optimizer)
    found = adapter.sample(hidden[0, :, 0], jnp.zeros((12, 0)), extend, None)
    np.testing.assert_array_equal(found, tokens[0])


def test_demonstrations_that_do_not_fit_the_list_are_refused() -> None:
    with pytest.raises(UserError, match="from 0 to 2 .*left, right, forward.*found 0 to 3"):
        Categorical(statistics(0, 3), NAMES, D, 32, nnx.Rngs(0))
    continuous = dataclasses.replace(statistics(), action=moments((-1.0, -1.0), (1.0, 1.0)))
    with pytest.raises(UserError, match="expected one dimension.*found 2"):
        Categorical(continuous, NAMES, D, 32, nnx.Rngs(0))
