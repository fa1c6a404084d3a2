"""The sequence: what one pass over a window equals, and what acting computes from the cache."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mllm_act.models import presets
from mllm_act.models.language import LanguageConfig
from mllm_act.models.layers import LoRA
from mllm_act.models.mllm import HISTORIES, MLLM
from mllm_act.models.perceiver import PerceiverConfig
from mllm_act.models.vision import VisionConfig

B, T, N, D = 3, 3, 5, 32


def small(history: str) -> MLLM:
    """A model of two cameras, three layers and grouped heads, at sizes that take no time."""
    config = dataclasses.replace(
        presets.get("tiny", ("front", "wrist"), history).model,
        vision=VisionConfig(image_size=8, patch_size=4, width=16, layers=2, heads=2, mlp_width=32),
        perceiver=PerceiverConfig(width=16, heads=2, mlp_width=32),
        language=LanguageConfig(
            vocabulary=32, action_tokens=16, width=D, layers=3, heads=4, kv_heads=2, mlp_width=48,
            lora=LoRA(targets=("q", "down"), rank=2),
        ),
    )  # fmt: skip
    return MLLM(config, nnx.Rngs(0))


@pytest.fixture(params=HISTORIES)
def model(request: pytest.FixtureRequest) -> MLLM:
    return small(request.param)


def inputs(fed: int) -> dict[str, jax.Array]:
    rng = np.random.default_rng(0)
    return {
        "prompt": jnp.array(rng.integers(0, 16, (B, N))),
        "prompt_mask": jnp.arange(N) < jnp.array([[5], [3], [1]]),
        "latents": jnp.array(rng.normal(size=(B, T, 8, D)), jnp.float32),
        "step_mask": jnp.ones((B, T), bool),
        "fed": jnp.array(rng.normal(size=(B, T, fed, D)), jnp.float32),
    }


def run(model: MLLM, given: dict[str, jax.Array]) -> jax.Array:
    return nnx.jit(lambda model, given: model(**given))(model, given)


def test_one_pass_over_a_window_equals_a_pass_for_each_step(model: MLLM) -> None:
    """In every reading of history, step t's hidden states are those of a window that ends at t."""
    whole = inputs(fed=2)
    together = run(model, whole)
    for t in range(T):
        cut = {
            k: v[:, : t + 1] if k in ("latents", "step_mask", "fed") else v
            for k, v in whole.items()
        }
        np.testing.assert_allclose(run(model, cut)[:, t], together[:, t], atol=2e-5)


def test_with_observations_alone_earlier_actions_change_nothing() -> None:
    model = small("observations")
    given = inputs(fed=2)
    other = {**given, "fed": given["fed"].at[:, 0].add(1.0)}
    a, b = run(model, given), run(model, other)
    np.testing.assert_array_equal(a[:, 1:], b[:, 1:])
    assert not np.allclose(a[:, 0, 1:], b[:, 0, 1:])


def test_with_actions_in_the_history_later_steps_see_them() -> None:
    model = small("observations_and_actions")
    given = inputs(fed=2)
    other = {**given, "fed": given["fed"].at[:, 0].add(1.0)}
    a, b = run(model, given), run(model, other)
    np.testing.assert_array_equal(a[:, 0, 0], b[:, 0, 0])
    assert not np.allclose(a[:, 1:], b[:, 1:])


def test_padding_of_prompt_and_window_changes_nothing(model: MLLM) -> None:
    given = inputs(fed=2)
    base = run(model, given)
    longer = {
        **given,
        "prompt": jnp.pad(given["prompt"], ((0, 0), (0, 4)), constant_values=7),
        "prompt_mask": jnp.pad(given["prompt_mask"], ((0, 0), (0, 4))),
    }
    np.testing.assert_allclose(run(model, longer), base, atol=2e-5)
    shorter = {
        **given,
        "step_mask": given["step_mask"].at[:, -1].set(False),
        "latents": given["latents"].at[:, -1].set(9),
    }
    np.testing.assert_array_equal(run(model, shorter)[:, :-1], base[:, :-1])


def test_decoding_with_the_cache_equals_the_pass_over_everything(model: MLLM) -> None:
    """Prefill, then one token at a time, for windows of every length."""
    given = inputs(fed=2)
    expected = run(model, given)
    past = given["fed"] if model.config.history != "observations" else given["fed"][:, :, :0]

    @nnx.jit
    def decode(model: MLLM, step_mask: jax.Array, fed: jax.Array) -> list[jax.Array]:
        hidden, state = model.prefill(
            given["prompt"], given["prompt_mask"], given["latents"], step_mask, past
        )
        out = [hidden]
        for j in range(2):
            hidden, state = model.extend(fed[:, j], state)
            out.append(hidden)
        return out

    for newest in range(T):
        step_mask = jnp.broadcast_to(jnp.arange(T) <= newest, (B, T))
        for j, hidden in enumerate(decode(model, step_mask, given["fed"][:, newest])):
            np.testing.assert_allclose(hidden, expected[:, newest, j], atol=2e-5)


def test_latents_of_all_cameras_are_in_the_order_of_the_config() -> None:
    model = small("observations")
    rng = np.random.default_rng(1)
    images = {
        name: jnp.array(rng.integers(0, 256, (B, T, 10, 10, 3)), jnp.uint8)
        for name in ("front", "wrist")
    }
    latents = model.latents(images)
    assert latents.shape == (B, T, 8, D)
    swapped = model.latents({"front": images["wrist"], "wrist": images["front"]})
    np.testing.assert_allclose(swapped[:, :, :4], latents[:, :, 4:], atol=1e-6)
