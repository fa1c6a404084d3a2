"""The mobile Fetch robot in MuJoCo: what an action does, success, failures, the expert and the image."""

import importlib.util
import math
import subprocess
import sys
from collections.abc import Iterator

import numpy as np
import pytest

from mllm_act import envs
from mllm_act.envs.fetch_pick import rooms
from mllm_act.envs.fetch_pick.fetch_pick import FORCE_LIMIT, REST_DISTANCE, FetchPickEnv
from mllm_act.envs.fetch_pick.objects import KINDS, NAMES
from mllm_act.errors import UserError
from tests.envs.apart import OneEnv

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("gymnasium_robotics") is None,
        reason="the extra fetch is not installed: make setup",
    ),
]
SPEC, SPLITS = envs.spec("fetch_pick"), envs.splits("fetch_pick")
VALIDATION = SPLITS["validation"]


@pytest.fixture(scope="module")
def env() -> Iterator[FetchPickEnv]:
    env = envs.make("fetch_pick", render=False)
    yield env
    env.close()


def action(forward: float = 0.0, turn: float = 0.0, suction: float = -1.0, **joints: float) -> np.ndarray:  # fmt: skip
    """An action from its names, the rest 0 and suction off."""
    values = {"forward": forward, "turn": turn, "suction": suction, **joints}
    return np.array([values.get(name, 0.0) for name in SPEC.action_names], np.float32)


def until(env: FetchPickEnv, held: bool) -> None:
    """Lets the expert act until it holds the target, or, if not ``held``, is about to take it."""
    for _ in range(SPEC.horizon):
        chosen = env.expert_action()
        if not held and chosen[-1] > 0:
            return
        env.step(chosen)
        if env._scene.held:
            return
    pytest.fail("the target was never taken")


@pytest.mark.parametrize("kind", ["ball", "plate", "cleanser", "padlock"])
def test_the_expert_brings_the_object_in_unseen_rooms(env: FetchPickEnv, kind: str) -> None:
    env.reset(kind, VALIDATION[3], 0)
    for steps in range(1, SPEC.horizon + 1):  # noqa: B007 (used after the loop)
        chosen = env.expert_action()
        assert chosen.shape == (10,) and chosen.dtype == np.float32 and abs(chosen).max() <= 1
        observation, reward, success = env.step(chosen)
        assert reward == 10 * success
        if success:
            break
    assert 10 < steps < 100 and env._scene.held == kind
    assert env.rest_distance() < REST_DISTANCE and observation["proprio"][-1] == 1
    # The gripper keeps what it holds, and the task stays solved.
    assert all(env.step(env.expert_action())[2] for _ in range(5))


def test_an_episode_names_one_target_that_is_near_and_ahead() -> None:
    headings = []
    for i in range(200):
        kind = KINDS[i % len(KINDS)]
        episode = rooms.episode(kind, i, (0, i))
        target = episode.things[0]
        assert [thing.kind for thing in episode.things].count(kind) == 1 and target.kind == kind
        assert len({thing.kind for thing in episode.things}) == len(episode.things) >= 3
        x, y, heading = episode.start
        assert 0.9 < math.hypot(x - target.x, y - target.y) <= 2.0
        off = math.atan2(target.y - y, target.x - x) - heading
        headings.append((off + math.pi) % (2 * math.pi) - math.pi)
        assert all(piece.distance(x, y) >= 0.4 for piece in episode.room.pieces)
        assert episode == rooms.episode(kind, i, (0, i)) != rooms.episode(kind, i, (1, i))
    assert np.std(headings) == pytest.approx(rooms.HEADING_NOISE, rel=0.2)
    heights = [piece.height for number in range(50) for piece in rooms.room(number).pieces]
    assert min(heights) < 0.45 and max(heights) > 0.85


def test_evaluation_has_rooms_of_its_own() -> None:
    rooms_of = {
        name: {c % 200 if name == "train" else c for c in split} for name, split in SPLITS.items()
    }
    assert set(SPLITS) == {"train", "validation", "test"} and len(SPLITS["test"]) * 20 == 1000
    for name, numbers in rooms_of.items():
        assert not numbers.intersection(*(rooms_of[other] for other in SPLITS if other != name))
    assert len({rooms.room(n) for numbers in rooms_of.values() for n in numbers}) == 300


def test_instructions_name_twenty_objects() -> None:
    sentences = envs.instructions("fetch_pick")
    assert sentences["mug"] == "pick up the red mug"
    assert len(set(sentences.values())) == len(NAMES) == 20


def test_an_action_moves_base_and_arm_by_its_scale(env: FetchPickEnv) -> None:
    env.reset("mug", 3, 0)
    x, y, heading = env._scene.base()
    for _ in range(5):
        env.step(action(forward=-1))
    moved = np.array(env._scene.base()[:2]) - (x, y)
    assert moved @ (math.cos(heading), math.sin(heading)) == pytest.approx(-0.25, abs=0.05)
    before = env._scene.arm()
    for _ in range(5):
        observation, *_ = env.step(action(turn=1, elbow_flex=-0.5))
    for _ in range(3):
        observation, *_ = env.step(action())
    assert env._scene.base()[2] - heading == pytest.approx(0.5, abs=0.1)
    change = observation["proprio"][:7] - before
    assert change[SPEC.proprio_names.index("elbow_flex")] == pytest.approx(-0.25, abs=0.03)
    assert abs(np.delete(change, 3)).max() < 0.03


def test_suction_holds_only_what_the_cup_touches(env: FetchPickEnv) -> None:
    env.reset("can", VALIDATION[0], 0)
    observation, _, success = env.step(action(suction=1))
    assert observation["proprio"][-1] == 0 and not success
    until(env, held=True)
    assert env._scene.distance("can") < 0.06


def test_letting_go_fails_the_episode_for_good(env: FetchPickEnv) -> None:
    env.reset("can", VALIDATION[1], 0)
    until(env, held=True)
    env.step(action())
    assert env.failure == "the can was dropped"
    before = env._scene.base()
    for _ in range(5):
        *_, success = env.step(action(forward=-1, suction=1))
        assert not success
    assert env._scene.base() == before
    np.testing.assert_array_equal(env.expert_action(), action())  # it stands still


def test_another_object_fails_the_episode(env: FetchPickEnv) -> None:
    env.reset("apple", VALIDATION[2], 0)
    until(env, held=False)
    target, other = (env._scene.model.joint(kind).qposadr[0] for kind in ("apple", "book"))
    qpos = env._scene.data.qpos
    qpos[[*range(target, target + 7), *range(other, other + 7)]] = np.concatenate(
        [qpos[other : other + 7], qpos[target : target + 7]]
    )
    env._scene.model.body_gravcomp[env._scene.model.body("book").id] = 0
    env._floor = -1.0  # the apple is away
    for _ in range(20):
        env.step(action(suction=1, shoulder_lift=0.3))
        if env.failure:
            break
    assert env.failure == "the book was taken, not the apple"


def test_pushing_against_furniture_and_a_fallen_target_fail(env: FetchPickEnv) -> None:
    env.reset("can", VALIDATION[4], 0)
    steps = 0
    while not env.failure and steps < 200:
        env.step(action(forward=-1))
        steps += 1
    assert "pushed too long" in env.failure and env._force > FORCE_LIMIT and steps > 20
    env.reset("can", VALIDATION[4], 0)
    address = env._scene.model.joint("can").qposadr[0]
    x, y, heading = env._scene.base()
    beside = x - 0.6 * math.sin(heading), y + 0.6 * math.cos(heading)
    env._scene.data.qpos[address : address + 2] = beside  # over the floor, at the robot's left
    for _ in range(10):
        env.step(action())
    assert env.failure == "the can fell"


def test_an_episode_depends_on_its_job_and_actions_only(env: FetchPickEnv) -> None:
    actions = np.random.default_rng(0).uniform(-1, 1, (10, 10))

    def play(simulator: FetchPickEnv | OneEnv) -> list[np.ndarray]:
        simulator.reset("bowl", 8, 3)
        return [simulator.step(chosen)[0]["proprio"] for chosen in actions]

    first = play(env)
    env.reset("mug", 9, 0)
    until(env, held=True)
    np.testing.assert_array_equal(play(env), first)
    drawn = OneEnv("fetch_pick")
    np.testing.assert_array_equal(play(drawn), first)
    drawn.pool.close()


def test_the_target_is_where_the_head_camera_should_see_it() -> None:
    drawn = OneEnv("fetch_pick")
    seen = 0
    for seed in range(8):
        episode = rooms.episode("orange", VALIDATION[5], (seed, VALIDATION[5]))
        observation = drawn.reset("orange", VALIDATION[5], seed)
        image = observation["images"]["head"]
        assert image.shape == (200, 200, 3) and image.dtype == np.uint8
        x, y, heading = episode.start
        target, c, s = episode.things[0], math.cos(heading), math.sin(heading)
        ahead = c * (target.x - x) + s * (target.y - y) - 0.167
        left = -s * (target.x - x) + c * (target.y - y) - 0.02
        down = 1.378 - (target.z + 0.066)
        tilt = math.radians(32)
        depth = math.cos(tilt) * ahead + math.sin(tilt) * down
        below = math.cos(tilt) * down - math.sin(tilt) * ahead
        focus = 100 / math.tan(math.radians(40))
        column, row = 100 - focus * left / depth, 100 + focus * below / depth
        if depth > 0 and 5 < column < 130 and 5 < row < 195:  # not behind the arm
            red, green, blue = image[round(row), round(column)]
            assert red > 120 and red > 1.3 * green > 1.3 * blue, (seed, row, column)
            seen += 1
    drawn.pool.close()
    assert seen >= 3


def test_bad_input_is_named(env: FetchPickEnv) -> None:
    with pytest.raises(UserError, match="'mug'"):
        env.reset("mugg", 0, 0)
    with pytest.raises(UserError, match=r"no configuration 10050, expected 0\.\.9999 \(train\)"):
        env.reset("mug", 10_050, 0)
    env.reset("mug", 1, 0)
    with pytest.raises(UserError, match=r"mug, configuration 1, step 0: .* shape \(10,\)"):
        env.step(np.zeros(7))


def test_without_the_package_one_error_says_what_to_install() -> None:
    program = (
        "import sys; sys.modules['gymnasium_robotics'] = None;"
        "from mllm_act import envs, errors;"
        "errors.run(lambda: envs.make('fetch_pick', render=False).reset('mug', 0, 0))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode != 0 and "Traceback" not in done.stderr
    assert "expected the package gymnasium-robotics" in done.stderr and "make setup" in done.stderr
