"""Chunks whose first actions are committed before the decision: given, not supervised, returned unchanged."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from mllm_act.adapters import adapter_class
from mllm_act.adapters.base import Adapter, Vocabulary
from mllm_act.errors import UserError
from mllm_act.policy.network import EmbodimentConfig, build_adapter
from tests.adapters.test_adapters import FIRST, STATISTICS, D, P
from tests.models import tiny

CHUNK = 4
B, T, A = 2, 3, 3


def make(name: str, max_delay: int = 3) -> Adapter:
    config = {"regression": {"hidden": 32}, "uniform": {"bins": 8}}[name]
    kind = adapter_class(name)
    statistics, vocabulary = STATISTICS.chunked(CHUNK), Vocabulary(FIRST + 512, D, FIRST)
    adapter = kind.make(kind.Config(**config), statistics, vocabulary, nnx.Rngs(1))
    adapter.take_prefix(CHUNK, max_delay, nnx.Rngs(2))
    return adapter


ADAPTERS = {name: make(name) for name in ("regression", "uniform")}
each = pytest.mark.parametrize("adapter", ADAPTERS.values(), ids=ADAPTERS)


def drawn(adapter: Adapter, seed: int) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Hidden states, tokens of valid chunks, a mask and proprioception."""
    rng = np.random.default_rng(seed)
    low, high = (np.array(getattr(adapter.statistics.action, key)) for key in ("min", "max"))
    actions = jnp.array(rng.uniform(low, high, (B, T, CHUNK * A)), jnp.float32)
    hidden = jnp.array(rng.normal(size=(B, T, adapter.tokens_per_action, D)), jnp.float32)
    proprio = jnp.array(rng.normal(size=(B, T, P)), jnp.float32)
    return hidden, adapter.encode(actions), jnp.arange(T) < jnp.array([[2], [3]]), proprio


def extend(embedding: jax.Array, state: Any) -> tuple[jax.Array, Any]:
    """A model whose next hidden state follows from all tokens so far."""
    state = jnp.tanh(state + embedding)
    return state, state


@each
def test_with_nothing_committed_it_is_the_plain_chunk(adapter: Adapter) -> None:
    hidden, tokens, mask, proprio = drawn(adapter, 0)
    none = adapter.committed(jnp.zeros((B, T), jnp.int32))
    assert not none.any()
    plain, metrics = adapter.loss(hidden, tokens, mask, proprio)
    loss, others = adapter.loss_after(hidden, tokens, mask, proprio, none)
    assert loss == plain and metrics == others
    first = (hidden[:, 0, 0], proprio[:, 0], extend, jnp.zeros((B, D)))
    expected = adapter.sample(*first)
    found = adapter.sample_after(*first, None, tokens[:, 0], none[:, 0])
    np.testing.assert_array_equal(found, expected)


@each
@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**16), delays=st.lists(st.integers(0, 3), min_size=B, max_size=B))
def test_committed_actions_come_back_and_the_rest_follows_them(
    adapter: Adapter, seed: int, delays: list[int]
) -> None:
    hidden, tokens, _, proprio = drawn(adapter, seed)
    committed = adapter.committed(jnp.array(delays))
    np.testing.assert_array_equal(committed.sum(-1), A * np.array(delays))

    def sample(prefix: jax.Array) -> np.ndarray:
        first = (hidden[:, 0, 0], proprio[:, 0], extend, jnp.zeros((B, D)))
        return np.asarray(adapter.sample_after(*first, None, prefix, committed))

    found = sample(tokens[:, 0])
    np.testing.assert_array_equal(found[committed], tokens[:, 0][committed])
    # What is not committed is not read.
    np.testing.assert_array_equal(sample(jnp.where(committed, tokens[:, 0], tokens[:, 1])), found)


@each
def test_other_committed_actions_give_another_rest(adapter: Adapter) -> None:
    hidden, tokens, _, proprio = drawn(adapter, 1)
    committed = adapter.committed(jnp.array([3, 3]))
    rests = [
        adapter.sample_after(
            hidden[:, 0, 0], proprio[:, 0], extend, jnp.zeros((B, D)), None, tokens[:, i], committed
        )[:, -A:]
        for i in (0, 1)
    ]
    assert (rests[0] != rests[1]).any()


def test_the_loss_is_of_what_is_not_committed() -> None:
    delay = jnp.array([[0, 1, 2], [3, 0, 1]])
    adapter = ADAPTERS["uniform"]
    hidden, tokens, mask, proprio = drawn(adapter, 2)
    committed = adapter.committed(delay)
    loss, _ = adapter.loss_after(hidden, tokens, mask, proprio, committed)
    noise = jnp.where(committed[..., None], 5.0, hidden)  # what predicts the prefix's tokens
    assert adapter.loss_after(noise, tokens, mask, proprio, committed)[0] == loss
    regression = make("regression")
    hidden, tokens, mask, proprio = drawn(regression, 2)
    committed = jnp.broadcast_to(regression.committed(jnp.array(2)), tokens.shape)
    loss, _ = regression.loss_after(hidden, tokens, mask, proprio, committed)
    regression.output.bias[...] = regression.output.bias[...].at[: 2 * A].set(9.0)
    assert regression.loss_after(hidden, tokens, mask, proprio, committed)[0] == loss


@pytest.mark.parametrize(
    ("max_delay", "found"),
    [(4, "expected 0 to 3, less than the 4 actions of a chunk, found 4"), (-1, "found -1")],
)
def test_a_delay_of_the_whole_chunk_is_refused(max_delay: int, found: str) -> None:
    config = EmbodimentConfig("uniform", adapter_class("uniform").Config(8), ("top",), 1, CHUNK)
    config = dataclasses.replace(config, max_delay=max_delay)
    with pytest.raises(UserError, match=f"config.max_delay: .*{found}"):
        build_adapter(config, tiny.mllm().config, STATISTICS, nnx.Rngs(0))


def test_codes_of_a_whole_chunk_have_no_prefix() -> None:
    rvq = adapter_class("rvq")
    sizes = {"action_dim": 3, "chunk": 4, "quantizers": 2, "codes": 8, "width": 4, "hidden": 8}
    config = EmbodimentConfig("rvq", rvq.Config(sizes), ("top",), 1, CHUNK, max_delay=2)
    with pytest.raises(UserError, match="config.max_delay: .*VectorQuantized.* use regression or"):
        build_adapter(config, tiny.mllm().config, STATISTICS, nnx.Rngs(0))
