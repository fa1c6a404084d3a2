"""The autoencoder and its training, at small sizes."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from mllm_act.action_tokenizer import training
from mllm_act.action_tokenizer.autoencoder import ActionTokenizer, CodebookVariable, TokenizerConfig

pytestmark = pytest.mark.slow

CONFIG = TokenizerConfig(action_dim=3, quantizers=2, codes=16, width=8, hidden=32)
SETTINGS = training.TrainingConfig(batch_size=32, initial_samples=256)


def actions(count: int = 500) -> np.ndarray:
    return np.random.default_rng(0).uniform(-1, 1, (count, 3)).astype(np.float32)


def trained(updates: int, config: TokenizerConfig = CONFIG) -> tuple[ActionTokenizer, Any]:
    model = ActionTokenizer(config, rngs=nnx.Rngs(0))
    tx = optax.adamw(3e-3)
    state = training.initial_state(model, actions(), tx, SETTINGS)
    update = training.make_update(model, tx, SETTINGS)
    for first in range(0, updates, 50):
        batch = actions()[training.batch_indices(500, 32, first, 50, 0)]
        state, metrics = update(state, batch)
    training.store(state, model)
    return model, metrics


def test_shapes_dtypes_and_kinds_of_variables() -> None:
    model = ActionTokenizer(CONFIG, rngs=nnx.Rngs(0))
    codes = model.encode(jnp.zeros((4, 5, 3)))
    assert codes.shape == (4, 5, 2) and codes.dtype == jnp.int32
    assert model.decode(codes).shape == (4, 5, 3)
    assert len(jax.tree.leaves(nnx.state(model, CodebookVariable))) == 3
    assert "codebooks" not in nnx.to_pure_dict(nnx.state(model, nnx.Param))


def test_an_action_of_another_dimension_is_refused() -> None:
    with pytest.raises(AssertionError):
        ActionTokenizer(CONFIG, rngs=nnx.Rngs(0)).encode(jnp.zeros((4, 7)))


def test_training_lowers_the_error_and_two_codebooks_beat_one() -> None:
    errors = {}
    for quantizers in (1, 2):
        config = TokenizerConfig(3, quantizers=quantizers, codes=16, width=8, hidden=32)
        model, metrics = trained(300, config)
        assert all(np.isfinite(values).all() for values in metrics.values())
        decoded, codes = training.reconstruct(model, actions())
        assert codes.shape == (500, quantizers) and 0 <= codes.min() and codes.max() < 16
        errors[quantizers] = float(np.mean((decoded - actions()) ** 2))
    assert errors[2] < errors[1] < 0.1 < actions().var()


def test_the_same_seed_gives_the_same_tokenizer() -> None:
    first, second = (nnx.to_pure_dict(nnx.state(trained(50)[0])) for _ in range(2))
    jax.tree.map(np.testing.assert_array_equal, first, second)


def test_reconstruction_does_not_depend_on_the_batch_size() -> None:
    model, _ = trained(50)
    whole, codes = training.reconstruct(model, actions())
    parts, codes_of_parts = training.reconstruct(model, actions(), batch_size=64)
    np.testing.assert_array_equal(codes, codes_of_parts)
    np.testing.assert_allclose(whole, parts, atol=1e-6)


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 40), st.integers(1, 16), st.integers(0, 30), st.integers(0, 30))
def test_every_action_once_an_epoch_and_resumable(
    n: int, batch_size: int, first: int, second: int
) -> None:
    whole = training.batch_indices(n, batch_size, 0, first + second + 1, seed=3)
    resumed = training.batch_indices(n, batch_size, first, second + 1, seed=3)
    np.testing.assert_array_equal(whole[first:], resumed)
    stream = whole.reshape(-1)
    for epoch in range(len(stream) // n):
        assert sorted(stream[epoch * n : (epoch + 1) * n]) == list(range(n))
