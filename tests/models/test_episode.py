"""Kept keys and values of episodes: what one decision reads of them equals the pass over everything."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mllm_act.models import episode
from mllm_act.models.mllm import MLLM
from tests.rl.small import PRESET

pytestmark = pytest.mark.slow

CAMERA, STEPS, TOKENS = "front", 4, 5


@pytest.fixture(scope="module")
def mllm() -> MLLM:
    return MLLM(PRESET.model, nnx.Rngs(0))


@pytest.mark.parametrize("past", [0, 2])
def test_equals_one_pass_per_step(mllm: MLLM, past: int) -> None:
    """Steps one by one, after ``past`` of them were read at once; prompts of two lengths, one row of them later."""
    rng = np.random.default_rng(past)
    images = rng.integers(0, 256, (2, STEPS, 8, 8, 3), np.uint8)
    prompt = jnp.array(rng.integers(0, 200, (2, TOKENS)), jnp.int32)
    prompt_mask = jnp.arange(TOKENS) < jnp.array([[5], [3]])
    latents = mllm.latents({CAMERA: jnp.array(images)})
    fed = jnp.array(rng.normal(size=(2, STEPS, 1, mllm.width)), jnp.float32)
    whole = mllm(prompt, prompt_mask, latents, jnp.ones((2, STEPS), bool), fed)

    memory = episode.empty(mllm, 2, TOKENS, STEPS, latents.shape[2])
    memory = jax.tree.map(jnp.ones_like, memory)  # of an earlier episode
    for row in (0, 1):  # each alone
        first = {CAMERA: jnp.array(images[[row], :past])}
        step_mask = jnp.ones((1, past), bool)
        ids, mask = prompt[row : row + 1], prompt_mask[row : row + 1]
        memory = episode.read(mllm, memory, jnp.array([row]), ids, mask, first, step_mask)
    for step in range(past, STEPS):
        position = jnp.full(2, step)
        hidden, decoding, memory = episode.look(mllm, memory, latents[:, step], position)
        np.testing.assert_allclose(hidden, whole[:, step, 0], atol=2e-5)
        hidden, _ = mllm.extend(fed[:, step, 0], decoding)
        np.testing.assert_allclose(hidden, whole[:, step, 1], atol=2e-5)


def test_position_zero_forgets(mllm: MLLM) -> None:
    rng = np.random.default_rng(5)
    prompt, mask = jnp.array([[7, 8, 9]], jnp.int32), jnp.ones((1, 3), bool)
    latents = jnp.array(rng.normal(size=(2, 1, 2, mllm.width)), jnp.float32)
    memory = episode.empty(mllm, 1, 3, 2, 2)
    nothing = jnp.ones((1, 0), bool)
    memory = episode.read(mllm, memory, jnp.array([0]), prompt, mask, {}, nothing)
    _, _, after = episode.look(mllm, memory, latents[0], jnp.array([0]))
    seen, _, _ = episode.look(mllm, after, latents[1], jnp.array([1]))
    forgotten, _, _ = episode.look(mllm, after, latents[1], jnp.array([0]))
    fresh, _, _ = episode.look(mllm, memory, latents[1], jnp.array([0]))
    np.testing.assert_array_equal(forgotten, fresh)
    assert not np.allclose(seen, fresh)
