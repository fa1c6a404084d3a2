"""Matrices in 8 bits: how far products and gradients are from float32's, and that a model trains and acts with them.

e4m3 has three bits of mantissa, so a number is off by at most 1/16 of itself, by 1/39 in the root mean square. A
product of two such numbers is off by 1/28 then, and a sum of many independent products is off by the same part of its
length. The bound of 0.05 on whole arrays leaves room for unlucky scales.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mllm_act.models import float8
from mllm_act.models.acting.prepare import for_acting
from mllm_act.models.language import PROJECTIONS
from mllm_act.models.mllm import MLLM
from mllm_act.models.vision import VisionConfig
from tests.models import tiny

pytestmark = pytest.mark.slow

CLOSE = 0.05


def distance(found: jax.Array, expected: jax.Array) -> float:
    """The length of the difference as a part of the length of what was expected."""
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def normal(seed: int, *shape: int) -> jax.Array:
    return jnp.array(np.random.default_rng(seed).normal(size=shape), jnp.float32)


@settings(max_examples=20, deadline=None)
@given(exponent=st.integers(-20, 20), seed=st.integers(0, 1000))
def test_an_entry_is_off_by_a_sixteenth_at_most(exponent: int, seed: int) -> None:
    """Or by half of the least number, the scale's 1/1024, where it is among the smallest."""
    kernel = normal(seed, 24, 16) * 10.0**exponent
    quantized, scale = float8.quantize(kernel)
    assert quantized.dtype == jnp.float8_e4m3fn and scale.dtype == jnp.float32
    error = jnp.abs(quantized.astype(jnp.float32) * scale - kernel)
    assert bool((error <= jnp.maximum(jnp.abs(kernel) / 16, scale / 1024) * 1.001).all())


def test_stacked_matrices_are_quantised_each_by_itself() -> None:
    kernels = normal(0, 3, 24, 16) * jnp.array([1e-3, 1.0, 1e3])[:, None, None]
    quantized, scale = float8.quantize(kernels)
    for i, kernel in enumerate(kernels):
        alone, its_scale = float8.quantize(kernel)
        np.testing.assert_array_equal(quantized[i].astype(jnp.float32), alone.astype(jnp.float32))
        np.testing.assert_array_equal(scale[i], its_scale)


def test_zeros_stay_zeros() -> None:
    quantized, scale = float8.quantize(jnp.zeros((24, 16)))
    x = jnp.zeros((3, 24))
    np.testing.assert_array_equal(float8.matmul(x, quantized, scale), jnp.zeros((3, 16)))
    np.testing.assert_array_equal(float8.matmul(x + 1, quantized, scale), jnp.zeros((3, 16)))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_product_and_gradient_of_the_input_are_close_to_float32s(dtype: str) -> None:
    x, kernel, gradient = normal(0, 2, 40, 256), normal(1, 256, 192) / 16, normal(2, 2, 40, 192)
    x = x * jnp.exp(normal(3, 2, 40, 1) * 3)  # rows of very different sizes
    expected, back = jax.vjp(lambda x: x @ kernel, x)
    quantized, scale = float8.quantize(kernel)
    found, back8 = jax.vjp(lambda x: float8.matmul(x, quantized, scale), x.astype(dtype))
    assert found.dtype == dtype
    assert distance(found, expected) < CLOSE
    (found_gradient,) = back8(gradient.astype(dtype))
    assert found_gradient.dtype == dtype
    assert distance(found_gradient, back(gradient)[0]) < CLOSE
    each = jax.vmap(jax.vmap(lambda a, b: jnp.linalg.norm(a - b) / jnp.linalg.norm(b)))
    assert float(each(found.astype(jnp.float32), expected).max()) < 2 * CLOSE  # small rows too


@settings(max_examples=10, deadline=None)
@given(shifts=st.lists(st.integers(-60, 60), min_size=6, max_size=6))
def test_a_rows_size_does_not_change_how_well_it_is_held(shifts: list[int]) -> None:
    x, (quantized, scale) = normal(0, 6, 32), float8.quantize(normal(1, 32, 16))
    factor = jnp.array([2.0**shift for shift in shifts])[:, None]
    found = float8.matmul(x * factor, quantized, scale)
    np.testing.assert_allclose(found, float8.matmul(x, quantized, scale) * factor, rtol=1e-5)


def dequantized(model: MLLM) -> MLLM:
    """The same model with the values of its 8-bit matrices in float32."""
    plain = tiny.mllm()
    for part, names in (("language", PROJECTIONS), ("vision", ("q", "k", "v", "o", "up", "down"))):
        blocks, theirs = getattr(plain, part).blocks, getattr(model, part).blocks
        for name in names:
            held = getattr(theirs, name)
            scale = held.kernel_scale[...]
            scale = scale.reshape(len(scale), 1, -1)
            getattr(blocks, name).kernel[...] = held.kernel[...].astype(jnp.float32) * scale
            for factor in ("lora_a", "lora_b"):
                if held.lora is not None:
                    getattr(getattr(blocks, name), factor)[...] = getattr(held, factor)[...]
    for name in ("embedding", "head"):
        table = getattr(model.language, name)[...]
        getattr(plain.language, name)[...] = table.astype(jnp.float32)
    return plain


@tiny.jit
def run(model: MLLM, images: dict[str, jax.Array], given: dict[str, jax.Array]) -> jax.Array:
    return model(**{**given, "latents": model.latents(images)})


def test_a_models_hidden_states_are_close_to_those_of_the_very_values_held() -> None:
    """As it trains and as it acts; four layers, each a sum of products that are off by a 28th or less."""
    images, given = tiny.images(cameras=("front",)), tiny.sequence(fed=2)
    model = tiny.mllm(weight_dtype="float8")
    exact = run(dequantized(model), images, given)
    assert distance(run(model, images, given), exact) < 0.1
    assert distance(run(for_acting(model), images, given), exact) < 0.1


def test_acting_keeps_what_the_factors_learned_however_small_it_is() -> None:
    """An update of a hundredth of the matrix is below half a step of e4m3: rounding the merged matrix would lose it."""
    images, given = tiny.images(cameras=("front",)), tiny.sequence(fed=2)

    def model(size: float) -> MLLM:
        model = tiny.mllm(weight_dtype="float8")
        for name in ("q", "down"):
            factor = getattr(model.language.blocks, name).lora_b
            factor[...] = size * factor[...]
        return model

    def difference(ready: Callable[[MLLM], MLLM]) -> np.ndarray:
        with_factors, without = (run(ready(model(size)), images, given) for size in (0.012, 0.0))
        return np.asarray(with_factors - without, np.float64)

    expected, found = difference(dequantized), difference(for_acting)
    kept = (found * expected).sum() / (expected * expected).sum()
    assert abs(kept - 1) < 0.2, kept


@pytest.mark.parametrize("family", ["clip", "dinov2"])
def test_features_are_close_where_norms_and_biases_are_large(family: str) -> None:
    """As they are in trained encoders, where bounds on inputs are loose."""
    vision = VisionConfig(
        image_size=12, patch_size=4, width=64, layers=2, heads=2, mlp_width=128, family=family
    )
    features = []
    for weight_dtype in ("float32", "float8"):
        model = tiny.mllm(weight_dtype=weight_dtype, vision=vision)
        for i, norm in enumerate((model.vision.blocks.norm1, model.vision.blocks.norm2)):
            norm.scale[...] = jnp.exp(normal(i, *norm.scale.shape))
            norm.bias[...] = normal(2 + i, *norm.bias.shape)
        encode = tiny.jit(lambda model, images: model.vision(images, dtype=jnp.dtype("float32")))
        features.append(encode(model, tiny.images()["front"][0]))
    assert distance(features[1], features[0]) < 0.1
