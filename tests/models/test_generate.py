"""Greedy generation: the cache changes nothing, nor does padding."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mllm_act.errors import UserError
from mllm_act.models import generate
from mllm_act.models.language import LanguageConfig, LanguageModel
from tests.models import tiny

STEPS = 6


@pytest.fixture(scope="module")
def language() -> LanguageModel:
    config = LanguageConfig(
        vocabulary=32, action_tokens=16, width=32, layers=2, heads=4, kv_heads=2, mlp_width=48, max_positions=16
    )  # fmt: skip
    return LanguageModel(config, "float32", nnx.Rngs(0))


def text(exists: list[list[int]]) -> tuple[jax.Array, jax.Array]:
    """Input embeddings that are no word's, as those of images are not, and which of them exist."""
    x = np.random.default_rng(0).normal(size=(len(exists), len(exists[0]), 32))
    return jnp.array(x, jnp.float32), jnp.array(exists, bool)


@tiny.jit
def uncached(
    language: LanguageModel, x: jax.Array, exists: jax.Array, tokens: jax.Array
) -> jax.Array:
    """Logits [B, N+steps, V] of the texts with what was generated after them, in one pass."""
    x = jnp.concatenate([x, language.embed(tokens, x.dtype)], axis=1)
    positions, mask = generate.layout(jnp.pad(exists, ((0, 0), (0, STEPS)), constant_values=True))
    return language.logits(language(x, positions, mask)[0])


@tiny.jit
def decode(language: LanguageModel, x: jax.Array, exists: jax.Array) -> tuple[jax.Array, jax.Array]:
    return generate.decode(language, x, exists, STEPS)


def test_cached_logits_equal_uncached_ones(language: LanguageModel) -> None:
    x, exists = text([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1], [1, 1, 0, 0, 0], [0, 1, 0, 0, 0]])
    tokens, logits = decode(language, x, exists)
    np.testing.assert_array_equal(tokens, logits.argmax(-1))
    np.testing.assert_array_equal(tokens, generate.generate(language, x, exists, steps=STEPS))
    expected = uncached(language, x, exists, tokens)
    for row, newest in enumerate([4, 4, 1, 1]):
        places = [newest, *range(5, 5 + STEPS - 1)]
        np.testing.assert_allclose(logits[row], expected[row, np.array(places)], atol=2e-5)


def test_what_stands_in_the_padding_changes_nothing(language: LanguageModel) -> None:
    x, exists = text([[0, 0, 1, 1, 1], [1, 1, 0, 0, 0]])
    other = jnp.where(exists[..., None], x, 100.0)
    for a, b in zip(decode(language, x, exists), decode(language, other, exists), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_text_longer_than_the_models_context_is_one_clear_error(language: LanguageModel) -> None:
    x, exists = text([[1] * 12])
    with pytest.raises(UserError, match="at most 16 tokens.* found 12 of text and 6 to generate"):
        generate.generate(language, x, exists, steps=6)
