"""Meta-World in the real simulator."""

import os
import subprocess
import sys
from collections.abc import Iterator

import numpy as np
import pytest

from mllm_act import envs
from mllm_act.envs import Env, EnvObservation
from mllm_act.envs.metaworld.tasks import TEST, TRAIN
from mllm_act.errors import UserError
from tests.envs.apart import OneEnv

pytestmark = pytest.mark.slow

SPEC = envs.spec("metaworld")


@pytest.fixture(scope="module")
def env() -> Iterator[OneEnv]:
    env = OneEnv("metaworld")
    yield env
    env.pool.close()


def corner4(observation: EnvObservation) -> np.ndarray:
    return observation["images"]["corner4"].astype(int)


def test_the_tasks_are_those_of_ml45_each_with_its_own_sentence() -> None:
    from metaworld.env_dict import ML45_V3

    assert list(TRAIN) == list(ML45_V3["train"])
    assert list(TEST) == list(ML45_V3["test"])
    sentences = list(envs.instructions("metaworld").values())
    assert len(set(sentences)) == 50


def test_observations_are_as_the_spec_says(env: OneEnv) -> None:
    observation = env.reset("reach-v3", 0, 0)
    assert tuple(observation["images"]) == SPEC.cameras
    assert observation["images"]["corner4"].shape == (200, 200, 3)
    assert observation["images"]["corner4"].dtype == np.uint8
    assert observation["proprio"].shape == (4,)
    assert observation["proprio"].dtype == np.float32
    assert observation["instruction"] == envs.instructions("metaworld")["reach-v3"]


def test_the_image_is_upright_and_not_mirrored(env: OneEnv) -> None:
    image = corner4(env.reset("reach-v3", 0, 0))
    sky = (abs(image - np.array([128, 124, 122])).max(-1) < 12).mean(1)
    assert sky[0] > 0.8 and sky[-1] < 0.1
    # The camera stands at the robot's right and looks at the table: the red arm is at the left.
    red = (image[..., 0] > 90) & (image[..., 1] < 50) & (image[..., 2] < 50)
    assert red[:, :100].sum() > 3 * red[:, 100:].sum()


def test_a_goal_that_metaworld_would_not_draw_is_in_the_image(env: OneEnv) -> None:
    image = corner4(env.reset("pick-out-of-hole-v3", 2, 0))
    blue = (image[..., 2] > 100) & (image[..., :2].max(-1) < 60)
    assert blue.sum() > 5


@pytest.mark.parametrize("task", ["coffee-button-v3", "handle-press-v3"])
def test_the_expert_succeeds_on_a_test_configuration(env: OneEnv, task: str) -> None:
    env.reset(task, 45, 0)
    for _ in range(100):
        action = env.expert_action()
        assert abs(action).max() <= 1 and action.dtype == np.float32
        *_, success = env.step(action)
        if success:
            return
    pytest.fail("no success in 100 steps")


def play(
    env: OneEnv | Env, task: str, actions: np.ndarray
) -> list[tuple[EnvObservation, float, bool]]:
    env.reset(task, 3, 0)
    return [env.step(action) for action in actions]


def test_an_episode_depends_on_its_job_and_actions_only(env: OneEnv) -> None:
    actions = np.random.default_rng(0).uniform(-1, 1, (10, 4))
    first_play = play(env, "drawer-close-v3", actions)
    play(env, "coffee-push-v3", actions)
    env.reset("drawer-close-v3", 4, 0)
    again = play(env, "drawer-close-v3", actions)
    np.testing.assert_array_equal(corner4(first_play[-1][0]), corner4(again[-1][0]))
    assert [step[1:] for step in first_play] == [step[1:] for step in again]
    # Rendering, which moves the goal markers, does not affect the physics.
    blind = envs.make("metaworld", render=False)
    blind_play = play(blind, "drawer-close-v3", actions)
    blind.close()
    assert blind_play[-1][0]["images"] == {}
    for step, blind_step in zip(first_play, blind_play, strict=True):
        assert step[1] == np.float32(blind_step[1])
        np.testing.assert_array_equal(step[0]["proprio"], blind_step[0]["proprio"])


def test_an_action_of_one_moves_the_hand_by_its_scale_a_step(env: OneEnv) -> None:
    before = env.reset("reach-v3", 0, 0)["proprio"]
    for _ in range(20):
        observation, _, _ = env.step(np.array([0, 1, 0, -1]))
    moved = (observation["proprio"] - before)[:3]
    assert moved[1] == pytest.approx(20 * SPEC.action_scale[1], rel=0.3)  # it lags behind
    assert abs(moved[[0, 2]]).max() < 0.02


def test_bad_input_is_named() -> None:
    env = envs.make("metaworld", render=False)
    with pytest.raises(UserError, match="'reach-v3'"):
        env.reset("raech-v3", 0, 0)
    with pytest.raises(UserError, match=r"reach-v3: no configuration 50, expected 0\.\.49"):
        env.reset("reach-v3", 50, 0)
    env.reset("reach-v3", 7, 0)
    with pytest.raises(UserError, match="reach-v3, configuration 7, step 0: the action is not"):
        env.step(np.array([0, np.nan, 0, 0]))
    for _ in range(SPEC.horizon):
        env.step(np.zeros(4))
    with pytest.raises(RuntimeError, match="step 500 without a reset"):
        env.step(np.zeros(4))


@pytest.mark.parametrize("broken", ["__EGL_VENDOR_LIBRARY_FILENAMES", "PYOPENGL_PLATFORM"])
def test_without_egl_one_error_says_what_to_install(broken: str) -> None:
    program = (
        "from mllm_act import envs, errors;"
        "errors.run(lambda: envs.make('metaworld').reset('reach-v3', 0, 0))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ | {broken: "osmesa" if broken.startswith("PY") else "/nowhere.json"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert done.stderr.startswith("error: cannot render without a screen")
    assert "apt-get install libegl1" in done.stderr and "make doctor" in done.stderr
    assert done.stderr.count("\n") == 1
