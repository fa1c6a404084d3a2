"""FiLM: what it makes of an image depends on the instruction, and teaches the language model to read it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mllm_act import parameters
from mllm_act.errors import UserError
from mllm_act.models.bridge.film import (
    Film,
    FilmConfig,
    InstructionAttention,
    convolved,
    normalize_cells,
)
from mllm_act.models.bridge.part import PartShape
from mllm_act.models.mllm import MLLM
from tests.models import tiny

pytestmark = pytest.mark.slow

SIZES = FilmConfig(width=8, blocks=2, instruction_layer=1, queries=3, mlp_width=16, latents=2)


def test_a_channel_of_an_image_has_mean_0_and_variance_1_over_its_places() -> None:
    x = 5 + 3 * jax.random.normal(jax.random.key(0), (2, 4, 4, 3))
    y = normalize_cells(x)
    np.testing.assert_allclose(y.mean((1, 2)), 0, atol=1e-5)
    np.testing.assert_allclose(y.var((1, 2)), 1, atol=1e-3)
    np.testing.assert_allclose(normalize_cells(x[:1]), y[:1], atol=1e-6)  # alone as in company


def test_the_convolution_is_xlas() -> None:
    x, kernel = (
        jax.random.normal(jax.random.key(i), s) for i, s in enumerate([(2, 5, 5, 3), (3, 3, 3, 4)])
    )
    layout = ("NHWC", "HWIO", "NHWC")
    expected = jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=layout)
    np.testing.assert_allclose(convolved(x, kernel), expected, atol=1e-5)


def test_latents_depend_on_image_and_instruction_of_their_own_row_alone() -> None:
    film = Film(SIZES, PartShape(9, 5, 6, 7), nnx.Rngs(0))
    features = jax.random.normal(jax.random.key(0), (3, 9, 5))
    told = jax.random.normal(jax.random.key(1), (3, 3 * 8))
    latents = film(features, told)
    assert latents.shape == (3, 2, 6)
    for other in (
        film(features, told.at[1].add(1.0 - 2 * told[1])),
        film(features.at[1].multiply(-1), told),
    ):
        np.testing.assert_allclose(other[::2], latents[::2], atol=1e-6)
        assert not np.allclose(other[1], latents[1], atol=1e-3)


def test_merged_places_are_squares_of_the_grid() -> None:
    film = Film(dataclasses.replace(SIZES, merge=2), PartShape(16, 5, 6, 7), nnx.Rngs(0))
    grid = jax.random.normal(jax.random.key(0), (1, 4, 4, 5))
    told = jax.random.normal(jax.random.key(1), (1, 3 * 8))
    square = [[2 * i + r, 2 * j + c] for i, j, r, c in np.ndindex(2, 2, 2, 2)]
    squares = jnp.stack([grid[:, row, column] for row, column in square], axis=1)
    kernel = film.input.kernel[...].reshape(4, 5, -1)  # of each place of a square
    expected = jnp.einsum("bskf,kfc->bsc", film.norm(squares).reshape(1, 4, 4, 5), kernel)
    found = film.merged(grid.reshape(1, 16, 5)).reshape(1, 4, -1)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert film(grid.reshape(1, 16, 5), told).shape == (1, 2, 6)


def test_a_grid_that_cannot_be_merged_is_refused() -> None:
    with pytest.raises(UserError, match="film.merge: expected a divisor of 3, the side"):
        Film(dataclasses.replace(SIZES, merge=2), PartShape(9, 5, 6, 7), nnx.Rngs(0))


@tiny.jit
def instruction(model: MLLM, prompt: jax.Array, exists: jax.Array) -> jax.Array | None:
    return model.instruction(prompt, exists)


def test_the_instruction_is_that_of_the_prompts_tokens_wherever_they_stand() -> None:
    model, given = tiny.mllm(bridge=("film",)), tiny.sequence(fed=0)
    expected = instruction(model, given["prompt"], given["prompt_mask"])
    config = dict(model.config.sizes)["film"]
    assert expected is not None and expected.shape == (tiny.B, config.queries * config.width)
    moved = jnp.pad(given["prompt"], ((0, 0), (2, 1)), constant_values=7)
    exists = jnp.pad(given["prompt_mask"], ((0, 0), (2, 1)))
    np.testing.assert_allclose(instruction(model, moved, exists), expected, atol=2e-5)
    assert instruction(tiny.mllm(), given["prompt"], given["prompt_mask"]) is None


@tiny.jit
def gradient(model: MLLM) -> nnx.State:
    """Of latents alone: the language model has no other part in them than the instruction."""
    graph, moved, rest = nnx.split(model, nnx.Param, ...)
    given = tiny.sequence(fed=0)

    def total(moved: nnx.State) -> jax.Array:
        model = nnx.merge(graph, moved, rest)
        instruction = model.instruction(given["prompt"], given["prompt_mask"])
        return jnp.square(model.latents(tiny.images(cameras=("front",)), instruction)).sum()

    return jax.grad(total)(moved)


def test_the_language_models_factors_learn_through_the_instruction() -> None:
    found = parameters.flatten(gradient(tiny.mllm(bridge=("film",))))
    factors = {path: leaf for path, leaf in found.items() if "lora_" in path}
    assert factors and all(np.abs(leaf).max() > 1e-6 for leaf in factors.values())


def test_where_queries_look_depends_on_the_tokens_around_that_exist() -> None:
    listener = InstructionAttention(SIZES, 7, nnx.Rngs(0))
    tokens = jax.random.normal(jax.random.key(0), (1, 3, 7))
    first_two = jnp.array([[True, True, False]])
    found = listener(tokens, first_two)
    swapped = listener(tokens[:, [1, 0, 2]], first_two)  # without neighbours the same
    assert not np.allclose(swapped, found, atol=1e-3)
    np.testing.assert_allclose(listener(tokens.at[0, 2].add(5.0), first_two), found, atol=1e-6)
