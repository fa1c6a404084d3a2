"""Augmentation: one draw for each window and camera, and none where the config asks for none."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from mllm_act.policy.network import PolicyNetwork
from mllm_act.training.augment import Augmentation
from mllm_act.training.step import Recipe, update, validate
from tests.training import test_step

pytestmark = pytest.mark.slow

SHAPE = (3, 2, 12, 20, 3)  # windows, steps, height, width
BOTH = Augmentation(crop=0.9, color=0.2)
KEY = jax.random.key(0)


def images() -> dict[str, jax.Array]:
    """Windows whose steps, and cameras, are all the same picture."""
    picture = np.random.default_rng(0).integers(0, 256, SHAPE[2:], np.uint8)
    return {camera: jnp.array(np.broadcast_to(picture, SHAPE)) for camera in ("front", "wrist")}


def test_off_is_the_identity() -> None:
    given = images()
    assert Augmentation()(given, KEY) is given


@pytest.mark.parametrize(
    "augmentation", [BOTH, Augmentation(crop=0.7), Augmentation(color=1.0)], ids=str
)
def test_steps_share_a_draw_that_windows_and_cameras_do_not(augmentation: Augmentation) -> None:
    given = images()
    found = augmentation(given, KEY)
    for camera, changed in found.items():
        assert (changed.shape, changed.dtype) == (SHAPE, jnp.uint8)
        np.testing.assert_array_equal(changed[:, 0], changed[:, 1])
        assert not np.array_equal(changed[0], given[camera][0])
        assert not np.array_equal(changed[0], changed[1])
    assert not np.array_equal(found["front"], found["wrist"])
    again, other = augmentation(given, KEY), augmentation(given, jax.random.key(1))
    np.testing.assert_array_equal(again["front"], found["front"])
    assert not np.array_equal(other["front"], found["front"])


def test_a_crop_enlarges_a_part_of_the_image() -> None:
    """On a slope the crop is known exactly: its values are those of the part, spread over the whole width."""
    slope = jnp.broadcast_to(jnp.linspace(0, 200, 101)[:, None], (101, 3)).astype(jnp.uint8)
    given = jnp.broadcast_to(slope, (8, 1, 5, 101, 3))
    found = np.asarray(Augmentation(crop=0.5)({"top": given}, KEY)["top"], float)[:, 0, 2, :, 0]
    np.testing.assert_allclose(found[:, 90] - found[:, 10], 80, atol=1)  # half of 160
    assert len(set(found[:, 50])) > 4 and found.min() >= 0 and found.max() <= 200


def test_colors_keep_grey_grey_and_change_little_where_the_strength_is_little() -> None:
    grey = jnp.full(SHAPE, 100, jnp.uint8)
    found = np.asarray(Augmentation(color=0.2)({"top": grey}, KEY)["top"], int)
    assert (np.ptp(found, axis=-1) <= 1).all() and np.ptp(found) > 1
    given = images()
    slight = Augmentation(color=0.01)(given, KEY)
    distance = np.abs(np.asarray(slight["front"], int) - np.asarray(given["front"], int))
    assert 0 < distance.max() <= 9


def test_only_updates_are_augmented() -> None:
    adapter, batch = test_step.make("regression"), test_step.windows(False)
    graph, state = nnx.split(PolicyNetwork(test_step.model(), {"arm": adapter}))
    plain = Recipe(
        graph, optax.sgd(0.1), jax.random.key(0), {"arm": 1.0}, {"arm": None}, {"arm": test_step.UNITS}
    )  # fmt: skip
    augmented = dataclasses.replace(plain, augmentation=BOTH)
    start = {"trained": state, "optimizer": optax.sgd(0.1).init(state)}

    def run(recipe: Recipe, step: int) -> tuple[float, dict[str, float]]:
        compiled = jax.jit(partial(update, recipe))
        scored = jax.jit(partial(validate, recipe), static_argnums=2)
        _, metrics = compiled(start, nnx.State({}), {"arm": batch}, jnp.int32(step))
        scores = scored(state, nnx.State({}), "arm", batch)
        return float(metrics["loss"]), {name: float(mean) for name, (mean, _) in scores.items()}

    loss, scores = run(plain, 1)
    changed, same_scores = run(augmented, 1)
    assert changed != loss and same_scores == scores
    assert run(augmented, 1)[0] == changed and run(augmented, 2)[0] != changed
