"""What every continuous adapter must keep: encode and decode, the loss, and decoding that cannot go wrong."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from mllm_act.action_tokenizer.autoencoder import ActionTokenizer, TokenizerConfig
from mllm_act.adapters import ADAPTERS, adapter_class
from mllm_act.adapters.action_tokens import ActionTokenAdapter
from mllm_act.adapters.base import Adapter, RunFacts, Vocabulary
from mllm_act.adapters.token_filter import filtered_log_softmax
from mllm_act.normalization import Moments, Statistics

D, P, FIRST = 16, 2, 100


def moments(low: tuple[float, ...], high: tuple[float, ...]) -> Moments:
    zeros, ones = (0.0,) * len(low), (1.0,) * len(low)
    two_valued = (False,) * len(low)
    return Moments(zeros, ones, min=low, max=high, q01=low, q99=high, two_valued=two_valued)


STATISTICS = Statistics(
    action=moments((-1.0, 0.0, -3.0), (1.0, 5.0, -2.0)),
    proprio=moments((-1.0, -1.0), (1.0, 1.0)),
    num_steps=1,
    num_episodes=1,
    num_segments=1,
    split="train",
    fingerprint="",
    tasks=("reach",),
    instructions=("reach",),
)
LOW, HIGH = np.array(STATISTICS.action.min), np.array(STATISTICS.action.max)


def tokenizer(quantizers: int) -> ActionTokenizer:
    config = TokenizerConfig(action_dim=3, quantizers=quantizers, codes=8, width=4, hidden=8)
    return ActionTokenizer(config, rngs=nnx.Rngs(0))


def make(name: str) -> Adapter:
    kind = adapter_class(name)
    sizes = tokenizer({"vq": 1, "rvq": 2}[name]).config if kind.needs_tokenizer else None
    settings = {"hidden": 32} if name == "regression" else {}
    config = kind.configure(settings, RunFacts((), sizes, "", chunk=1))
    return kind.make(config, STATISTICS, Vocabulary(FIRST + 512, D, FIRST), nnx.Rngs(1))


CONTINUOUS = [name for name, kind in ADAPTERS.items() if not kind.discrete and name != "fast"]


@pytest.fixture(params=CONTINUOUS)
def adapter(request: pytest.FixtureRequest) -> Adapter:
    return make(request.param)


def actions(seed: int, *shape: int) -> jax.Array:
    return jnp.array(np.random.default_rng(seed).uniform(LOW, HIGH, (*shape, 3)), jnp.float32)


def test_shapes_of_the_contract(adapter: Adapter) -> None:
    m = adapter.tokens_per_action
    tokens = adapter.encode(actions(0, 2, 5))
    assert adapter.embed(tokens).shape == (2, 5, m, D)
    assert adapter.decode(tokens).shape == (2, 5, 3)
    hidden = jnp.ones((2, 5, m, D))
    loss, _ = adapter.loss(hidden, tokens, jnp.ones((2, 5), bool), jnp.zeros((2, 5, P)))
    assert loss.shape == () and jnp.isfinite(loss)


def test_masked_steps_do_not_count(adapter: Adapter) -> None:
    m = adapter.tokens_per_action
    hidden = jnp.array(np.random.default_rng(0).normal(size=(2, 4, m, D)), jnp.float32)
    tokens, proprio = adapter.encode(actions(0, 2, 4)), jnp.zeros((2, 4, P))
    mask = jnp.arange(4) < jnp.array([[2], [4]])
    loss, _ = adapter.loss(hidden, tokens, mask, proprio)
    other, _ = adapter.loss(jnp.where(mask[..., None, None], hidden, 7.0), tokens, mask, proprio)
    assert loss == other


def test_uniform_errs_by_half_a_bin_at_most_and_clips() -> None:
    adapter = make("uniform")
    action = actions(0, 1000)
    half_bin = (HIGH - LOW) / 512 / 2
    assert (np.abs(adapter.decode(adapter.encode(action)) - action) <= half_bin * 1.01).all()
    beyond = adapter.decode(adapter.encode(jnp.array(HIGH + 10.0)))
    np.testing.assert_allclose(beyond, HIGH - half_bin, rtol=1e-5)


def test_codes_of_all_places_share_the_reserved_ids() -> None:
    for name, codes in (("uniform", 512), ("vq", 8), ("rvq", 8)):
        tokens = np.array(make(name).encode(actions(0, 500)))
        assert tokens.min() >= FIRST and tokens.max() < FIRST + codes


def test_decoding_a_token_tuple_and_encoding_it_again_gives_the_same_uniform_tokens() -> None:
    adapter = make("uniform")
    tokens = FIRST + jnp.array(np.random.default_rng(0).integers(0, 512, (100, 3)))
    np.testing.assert_array_equal(adapter.encode(adapter.decode(tokens)), tokens)


@pytest.mark.parametrize("name", ["regression", "uniform", "rvq"])
def test_in_bfloat16_the_head_decides_as_in_float32(name: str) -> None:
    """The hidden state is rounded, the logits and the regression are not."""
    adapter = make(name)
    rounded = jax.random.normal(jax.random.key(0), (64, D)).astype(jnp.bfloat16)

    def extend(embedding: jax.Array, state: Any) -> tuple[jax.Array, Any]:
        return jnp.zeros_like(embedding), state

    if isinstance(adapter, ActionTokenAdapter):
        adapter.head[...] = adapter.head[...].astype(jnp.bfloat16).astype(jnp.float32)
    proprio = jax.random.normal(jax.random.key(1), (64, P))
    found = adapter.sample(rounded, proprio, extend, None)
    expected = adapter.sample(rounded.astype(jnp.float32), proprio, extend, None)
    np.testing.assert_array_equal(found[:, :1], expected[:, :1])


def test_log_probabilities_are_those_that_sampling_draws_from() -> None:
    """Over all pairs of tokens they sum to one, and the loss is their mean with the sign turned."""
    adapter = make("rvq")
    base = jax.random.normal(jax.random.key(0), (D,))
    pairs = FIRST + jnp.stack(
        jnp.meshgrid(jnp.arange(8), jnp.arange(8), indexing="ij"), -1
    ).reshape(1, -1, 2)
    embedded = adapter.embed(pairs)
    hidden = jnp.stack(
        [jnp.broadcast_to(base, embedded[..., 0, :].shape), base + embedded[..., 0, :]], axis=-2
    )
    log_prob = adapter.log_prob(hidden, pairs)
    np.testing.assert_allclose(jnp.exp(log_prob).sum(), 1.0, rtol=1e-5)
    loss, _ = adapter.loss(hidden, pairs, jnp.ones((1, 64), bool), jnp.zeros((1, 64, P)))
    np.testing.assert_allclose(loss, -log_prob.mean() / 2, rtol=1e-5)


def test_regression_has_no_distribution() -> None:
    adapter = make("regression")
    with pytest.raises(TypeError, match="use a token adapter"):
        adapter.log_prob(jnp.ones((1, 1, 1, D)), adapter.encode(actions(0, 1, 1)))


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 2**16), count=st.integers(1, 7))
def test_the_filter_renormalises_over_the_allowed(seed: int, count: int) -> None:
    rng = np.random.default_rng(seed)
    allowed = np.zeros(8, bool)
    allowed[rng.choice(8, count, replace=False)] = True
    log_probs = np.array(
        filtered_log_softmax(jnp.array(rng.normal(size=8) * 100), jnp.array(allowed))
    )
    assert np.isneginf(log_probs[~allowed]).all()
    np.testing.assert_allclose(np.exp(log_probs[allowed]).sum(), 1.0, rtol=1e-5)
