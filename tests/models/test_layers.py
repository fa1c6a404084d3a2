"""LoRA's update, dropout, norms, and stacked blocks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from mllm_act.models.layers import REMAT, LayerNorm, Linear, LoRA, RMSNorm, dropout, scan, stack
from tests.models import tiny

LORA = LoRA(rank=4, alpha=8.0, dropout=0.5)


def test_lora_is_the_base_at_first_and_a_low_rank_update_of_it_later() -> None:
    layer = Linear(6, 5, lora=LORA, rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(0), (3, 6))
    np.testing.assert_array_equal(layer(x), x @ layer.kernel[...])
    layer.lora_b[...] = jax.random.normal(jax.random.key(1), (4, 5))
    merged = layer.kernel[...] + 8.0 / 4 * layer.lora_a[...] @ layer.lora_b[...]
    np.testing.assert_allclose(layer(x), x @ merged, atol=1e-5)


def test_the_factors_alone_read_what_dropout_left() -> None:
    layer = Linear(6, 5, lora=LORA, rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(0), (3, 6))
    nothing = jnp.zeros_like(x)
    np.testing.assert_array_equal(layer(x, nothing), layer(x))  # B is zero
    layer.lora_b[...] = jnp.ones((4, 5))
    np.testing.assert_allclose(layer(x, nothing), x @ layer.kernel[...], atol=1e-6)
    assert not np.allclose(layer(x, nothing), layer(x))


def test_dropout_needs_a_key() -> None:
    model, inputs = tiny.mllm(), tiny.sequence(fed=1)

    @tiny.jit
    def run(model: nnx.Module, key: jax.Array | None) -> jax.Array:
        return model(**inputs, key=key)

    plain, dropped = run(model, None), run(model, jax.random.key(0))
    np.testing.assert_array_equal(plain, run(model, None))
    assert not np.allclose(plain, dropped)
    assert not np.allclose(dropped, run(model, jax.random.key(1)))


def test_dropout_keeps_the_mean() -> None:
    x = jnp.ones(100_000)
    dropped = dropout(x, 0.1, jax.random.key(0))
    assert abs(float(dropped.mean()) - 1) < 0.01
    assert abs(float((dropped == 0).mean()) - 0.1) < 0.01


def test_norms_are_computed_in_float32_whatever_the_input() -> None:
    x = 1000 + jax.random.normal(jax.random.key(0), (4, 64)).astype(jnp.bfloat16)
    norm = RMSNorm(64, epsilon=1e-5)
    wide = norm(x.astype(jnp.float32))
    np.testing.assert_array_equal(norm(x), wide.astype(jnp.bfloat16))


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 1000), sharpness=st.integers(0, 12))
def test_no_output_exceeds_its_bound(seed: int, sharpness: int) -> None:
    """Nor nearly flat rows' nor those of one large entry, which come nearest to it."""
    rng = np.random.default_rng(seed)
    x = jnp.array(np.sign(rng.normal(size=(16, 8))) * np.exp(sharpness * rng.normal(size=(16, 8))))
    layer_norm, rms_norm = LayerNorm(8), RMSNorm(8, epsilon=1e-5)
    layer_norm.bias[...] = jnp.array(rng.normal(size=8))
    linear = Linear(8, 6, bias=True, rngs=nnx.Rngs(seed))
    linear.bias[...] = jnp.array(rng.normal(size=6))
    for norm in (layer_norm, rms_norm):
        norm.scale[...] = jnp.array(rng.normal(size=8))
        assert float(jnp.abs(norm(x)).max()) <= float(norm.bound()) * (1 + 1e-5)
    y = layer_norm(x)
    assert float(jnp.linalg.norm(y, axis=-1).max()) <= float(layer_norm.length()) * (1 + 1e-5)
    assert float(jnp.abs(linear(y)).max()) <= float(linear.bound(layer_norm.length())) * (1 + 1e-5)


@pytest.mark.parametrize("remat", REMAT)
def test_scanned_blocks_are_the_blocks_one_after_the_other(remat: str) -> None:
    blocks = stack(lambda rngs: Linear(4, 4, rngs=rngs), 3, nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(0), (2, 4))
    expected = x
    for kernel in blocks.kernel[...]:
        expected = jnp.tanh(expected @ kernel)
    assert not np.allclose(blocks.kernel[0], blocks.kernel[1])
    found, _ = scan(blocks, lambda block, x, _: (jnp.tanh(block(x)), None), x, remat=remat)
    np.testing.assert_allclose(found, expected, atol=1e-6)
