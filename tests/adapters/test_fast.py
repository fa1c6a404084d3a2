"""FAST as an adapter: what is no choice costs nothing, and what is drawn always fits."""

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from mllm_act.action_tokenizer.fast import FastConfig
from mllm_act.adapters.action_tokens import ActionTokenAdapter
from mllm_act.adapters.base import Vocabulary
from mllm_act.adapters.fast import Fast
from mllm_act.normalization import Statistics
from tests.action_tokenizer.tables import random_tokenizer
from tests.adapters.discrete import D, extend, moments, teacher_forced
from tests.models import tiny

pytestmark = pytest.mark.slow

FIRST = 100
# Chunks of 3 steps of one dimension in at most 3 tokens out of 6: END, three integers, two merged codes.
CONFIG = FastConfig(1, 3, scale=2.0, low=-1, high=1, merges=2, codes=6, tokens=3)
LOW, HIGH = -3.0, 5.0
STATISTICS = Statistics(
    action=moments((LOW,) * 3, (HIGH,) * 3),
    proprio=moments((), ()),
    num_steps=1,
    num_episodes=1,
    num_segments=1,
    split="train",
    fingerprint="",
    tasks=("reach",),
    instructions=("reach",),
)
ALL = FIRST + jnp.array(list(itertools.product(range(6), repeat=3)))[:, None]  # [216, 1, M]


def make(seed: int = 0, width: int = D, first: int = FIRST) -> Fast:
    return Fast(
        STATISTICS,
        Vocabulary(first + CONFIG.codes, width, first),
        random_tokenizer(seed, CONFIG),
        nnx.Rngs(1),
    )


def actions(seed: int, *shape: int) -> jax.Array:
    return jnp.array(np.random.default_rng(seed).uniform(LOW, HIGH, (*shape, 3)), jnp.float32)


def hidden_of(adapter: Fast, tokens: jax.Array, scale: float = 1.0) -> jax.Array:
    return scale * teacher_forced(jnp.ones(D), adapter.embed(tokens))


def of_others() -> tuple[jax.Array, jax.Array]:
    """Hidden states and tokens of a batch [2, 4]."""
    tokens = make().encode(actions(0, 2, 4))
    return hidden_of(make(), tokens), tokens


def proprio(batch: int, *steps: int) -> jax.Array:
    return jnp.zeros((batch, *steps, 0))


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 2**16), scale=st.floats(0, 100))
def test_log_probabilities_of_all_sequences_sum_to_one(seed: int, scale: float) -> None:
    """Those that the filter refuses have none."""
    adapter = make(seed)
    log_prob = adapter.log_prob(hidden_of(adapter, ALL, scale), ALL)
    np.testing.assert_allclose(jnp.exp(log_prob).sum(), 1.0, rtol=1e-4)
    lengths = np.array(adapter.tokenizer.lengths[...])
    codes = np.array(ALL[:, 0] - FIRST)
    fits = (lengths[codes].sum(-1) <= 3) & ~((codes[:, :-1] == 0) & (codes[:, 1:] != 0)).any(-1)
    np.testing.assert_array_equal(np.isfinite(log_prob[:, 0]), fits)


def test_log_probabilities_are_the_base_s() -> None:
    adapter, (hidden, tokens) = make(), of_others()
    expected = ActionTokenAdapter._all_log_probs(adapter, hidden, tokens)
    np.testing.assert_allclose(adapter._all_log_probs(hidden, tokens), expected, rtol=1e-5)


def test_the_loss_is_the_mean_over_the_tokens_that_are_a_choice() -> None:
    adapter, (hidden, tokens) = make(), of_others()
    mask = jnp.arange(4) < jnp.array([[2], [4]])
    loss, metrics = adapter.loss(hidden, tokens, mask, proprio(2, 4))
    room = np.array(adapter.tokenizer.room(tokens - FIRST))[..., :-1]
    count = (room > 0)[np.array(mask)].sum()
    assert count < 3 * mask.sum()  # some chunk ends early
    log_prob = adapter.log_prob(hidden, tokens)
    np.testing.assert_allclose(loss, -log_prob[mask].sum() / count, rtol=1e-5)
    assert sorted(metrics) == ["token_accuracy", "tokens"]
    np.testing.assert_allclose(metrics["tokens"], count / mask.sum(), rtol=1e-6)
    assert 0 <= metrics["token_accuracy"] <= 1
    changed = jnp.where(mask[..., None, None] & (room > 0)[..., None], hidden, 7.0)
    assert loss == adapter.loss(changed, tokens, mask, proprio(2, 4))[0]
    none, metrics = adapter.loss(hidden, tokens, jnp.zeros_like(mask), proprio(2, 4))
    assert none == 0 and metrics["tokens"] == 0


def test_the_decision_to_end_is_learnt() -> None:
    adapter = make()
    rest = adapter.encode(jnp.full((1, 1, 3), (LOW + HIGH) / 2))  # at rest: the end alone
    assert (rest == FIRST).all()
    hidden = jnp.ones((1, 1, 3, D))
    loss, metrics = adapter.loss(hidden, rest, jnp.ones((1, 1), bool), proprio(1, 1))
    expected = -jax.nn.log_softmax(hidden[0, 0, 0] @ adapter.head[...].T)[0]
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    assert metrics["tokens"] == 1


def test_gradients_are_finite_and_move_head_and_embedding_only() -> None:
    tokens = of_others()[1]

    def loss(adapter: Fast) -> jax.Array:
        hidden = hidden_of(adapter, tokens)
        return adapter.loss(hidden, tokens, jnp.ones((2, 4), bool), proprio(2, 4))[0]

    found = nnx.to_pure_dict(nnx.grad(loss)(make()))
    assert sorted(found) == ["embedding", "head"]
    assert all(np.isfinite(one).all() and np.abs(one).sum() > 0 for one in found.values())


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 2**16), scale=st.floats(0, 1e4))
def test_what_is_drawn_is_the_base_s_passes_the_filter_and_stays_in_range(
    seed: int, scale: float
) -> None:
    adapter = make(seed)
    first = scale * jax.random.normal(jax.random.key(seed), (4, D))
    for key in (None, jax.random.key(seed)):
        args = (first, proprio(4), extend, first, key)
        tokens = adapter.sample(*args)
        np.testing.assert_array_equal(tokens, ActionTokenAdapter.sample(adapter, *args))
        for j in range(3):
            allowed = np.array(adapter.allowed(tokens[:, :j]))
            assert allowed[np.arange(4), tokens[:, j] - FIRST].all()
        action = np.array(adapter.decode(tokens))
        assert action.shape == (4, 3)
        assert ((action >= LOW - 1e-5) & (action <= HIGH + 1e-5)).all()


@pytest.mark.parametrize(("code", "runs"), [(0, 0), (2, 2)])
def test_the_model_is_run_only_until_all_have_their_end(code: int, runs: int) -> None:
    """Code 2 stands for one zero, of which a chunk takes three; after the last nothing is to be fed back."""
    adapter, seen = make(), list[int]()
    adapter.head[...] = jnp.zeros((6, D)).at[code].set(1.0)

    def counted(embedding: jax.Array, state: Any) -> tuple[jax.Array, Any]:
        jax.debug.callback(lambda: seen.append(1))
        return jnp.ones_like(embedding), state

    tokens = adapter.sample(jnp.ones((2, D)), proprio(2), counted, None)
    jax.effects_barrier()
    assert (tokens == FIRST + code).all() and len(seen) == runs


def test_what_tokens_stand_for_encodes_to_tokens_that_stand_for_it() -> None:
    """Where it is in the demonstrations' range: its coefficients are whole."""
    adapter = make()
    decoded = adapter.decode(ALL)
    inside = (jnp.abs(adapter.tokenizer.decode(ALL - FIRST)) <= 1).all(-1)[:, 0]
    assert inside.sum() > 50
    again = adapter.decode(adapter.encode(decoded))
    np.testing.assert_allclose(again[inside], decoded[inside], atol=1e-5)


def test_in_a_model_decoding_is_teacher_forcing() -> None:
    """What the model and the adapter draw step by step has the highest probability of its place all at once."""
    adapter, mllm = make(width=tiny.D, first=16), tiny.mllm()
    inputs = tiny.sequence(fed=0)

    class Both(nnx.Module):
        def __init__(self) -> None:
            self.mllm, self.adapter = mllm, adapter

    def act(both: Both, prompt: Any, prompt_mask: Any, latents: Any, step_mask: Any) -> jax.Array:
        fed = jnp.zeros((tiny.B, tiny.T, 0, tiny.D))
        reading = both.mllm.read(prompt, prompt_mask)
        hidden, state = both.mllm.prefill(reading, latents, step_mask, fed)
        return both.adapter.sample(hidden, proprio(tiny.B), both.mllm.extend, state)

    def best(both: Both, tokens: jax.Array, inputs: Any) -> jax.Array:
        every = jnp.broadcast_to(tokens[:, None], (tiny.B, tiny.T, 3))
        fed = both.adapter.embed(every)[..., :-1, :]
        hidden = both.mllm(**{**inputs, "fed": fed})
        return 16 + both.adapter._all_log_probs(hidden, every).argmax(-1)[:, -1]

    keys = ("prompt", "prompt_mask", "latents", "step_mask")
    tokens = tiny.jit(act)(Both(), *(inputs[key] for key in keys))
    np.testing.assert_array_equal(tokens, tiny.jit(best)(Both(), tokens, inputs))
