"""LoRA, dropout, and stacked blocks."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mllm_act.models.layers import Linear, LoRA, dropout, scan, stack

LORA = LoRA(rank=4, alpha=8.0, dropout=0.5)


def test_lora_is_the_base_at_first_and_a_low_rank_update_of_it_later() -> None:
    layer = Linear(6, 5, lora=LORA, rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(0), (3, 6))
    np.testing.assert_array_equal(layer(x), x @ layer.kernel[...])
    layer.lora_b[...] = jax.random.normal(jax.random.key(1), (4, 5))
    merged = layer.kernel[...] + 8.0 / 4 * layer.lora_a[...] @ layer.lora_b[...]
    np.testing.assert_allclose(layer(x), x @ merged, atol=1e-5)


def test_loras_dropout_needs_a_key_and_leaves_the_base_alone() -> None:
    layer = Linear(6, 5, lora=LORA, rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(0), (3, 6))
    np.testing.assert_array_equal(layer(x, jax.random.key(2)), layer(x))  # B is zero
    layer.lora_b[...] = jnp.ones((4, 5))
    assert not np.allclose(layer(x, jax.random.key(2)), layer(x))
    np.testing.assert_array_equal(layer(x), layer(x))


def test_dropout_keeps_the_mean() -> None:
    x = jnp.ones(100_000)
    dropped = dropout(x, 0.1, jax.random.key(0))
    assert abs(float(dropped.mean()) - 1) < 0.01
    assert abs(float((dropped == 0).mean()) - 0.1) < 0.01


def test_scanned_blocks_are_the_blocks_one_after_the_other_with_remat_or_without() -> None:
    blocks = stack(lambda rngs: Linear(4, 4, rngs=rngs), 3, nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(0), (2, 4))
    expected = x
    for kernel in blocks.kernel[...]:
        expected = jnp.tanh(expected @ kernel)
    assert not np.allclose(blocks.kernel[0], blocks.kernel[1])
    for remat in (False, True):
        found, _ = scan(blocks, lambda block, x, _: (jnp.tanh(block(x)), None), x, remat=remat)
        np.testing.assert_allclose(found, expected, atol=1e-6)
