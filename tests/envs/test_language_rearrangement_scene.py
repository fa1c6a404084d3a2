"""The drawn rooms of Language Rearrangement: what is where, in every image."""

import math
from collections.abc import Iterator

import numpy as np
import pytest

from mllm_act import envs
from mllm_act.envs.language_rearrangement import rooms, scene
from mllm_act.envs.language_rearrangement.entities import (
    FRIDGE,
    INDEX,
    OBJECTS,
    OPEN_AIR,
    RECEPTACLE,
    Action,
)
from mllm_act.envs.language_rearrangement.language_rearrangement import episode
from mllm_act.envs.language_rearrangement.layout import Pose
from mllm_act.envs.language_rearrangement.world import Episode, Thing, World
from tests.envs.apart import OneEnv, OneScene

pytestmark = pytest.mark.slow

SIZE = 112
BROWN = RECEPTACLE["brown table"]


@pytest.fixture(scope="module")
def drawn() -> Iterator[OneScene]:
    drawn = OneScene(SIZE)
    yield drawn
    drawn.process.shutdown()


def difference(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Pixels that differ visibly, bool[size, size]."""
    return (abs(a.astype(int) - b.astype(int)) > 20).any(-1)


def room_with(*things: Thing) -> World:
    world = World(Episode("", "", rooms.room(0), Pose(-9, -9, 0), things, "not_holding()"))
    world.act(Action("nav", BROWN))
    return world


def image(drawn: OneScene, *things: Thing) -> np.ndarray:
    drawn.start(Episode("", "", rooms.room(0), Pose(-9, -9, 0), things, "not_holding()"))
    return drawn.render(room_with(*things))


def test_every_class_of_objects_is_seen_and_looks_different(drawn: OneScene) -> None:
    empty = image(drawn)
    x, y = rooms.room(0).target(BROWN)
    looks = {}
    for kind in OBJECTS:
        found = image(drawn, Thing(f"{kind}_0", kind, BROWN, x, y))
        where = np.nonzero(difference(found, empty))
        assert len(where[0]) >= 12, kind
        # On the table before the robot: in the upper half, in the middle.
        assert where[0].mean() < 0.5 * SIZE and abs(where[1].mean() - SIZE / 2) < 0.1 * SIZE, kind
        looks[kind] = found
    for i, a in enumerate(OBJECTS):
        for b in OBJECTS[:i]:
            assert difference(looks[a], looks[b]).sum() >= 8, (a, b)


def test_left_is_left_and_near_is_low(drawn: OneScene) -> None:
    empty, table = image(drawn), rooms.room(0).furniture["brown table"]

    def middle(forward: float, right: float) -> np.ndarray:
        thing = Thing("ball_0", "ball", BROWN, *table.point(-forward, right))
        return np.argwhere(difference(image(drawn, thing), empty)).mean(0)

    assert middle(0, 0.4)[1] - middle(0, -0.4)[1] > 0.3 * SIZE
    assert middle(-0.3, 0)[0] - middle(0.3, 0)[0] > 0.06 * SIZE


def test_what_is_held_is_in_the_gripper_and_leaves_its_place(drawn: OneScene) -> None:
    x, y = rooms.room(0).target(BROWN)
    things = (Thing("orange_0", "orange", BROWN, x, y),)
    before, empty = image(drawn, *things), image(drawn)
    world = room_with(*things)
    world.act(Action("pick", "orange"))
    drawn.start(Episode("", "", rooms.room(0), Pose(-9, -9, 0), things, "not_holding()"))
    held = drawn.render(world)
    where = np.argwhere(difference(held, empty))
    assert len(where) > 60 and where[:, 0].mean() > 0.6 * SIZE
    assert difference(held, before)[: SIZE // 2].any()
    world.act(Action("place", BROWN))
    again = drawn.render(world)
    assert difference(again, empty)[: SIZE // 2].sum() > 30


def test_open_doors_and_drawers_look_open() -> None:
    env = OneEnv("language_rearrangement_112")
    env.reset("open-fridge", 4, 0)
    for place, handle in ((FRIDGE, FRIDGE), ("cab_push_point_7",) * 2, ("cab_push_point_5",) * 2):
        images = []
        for verb, target in (("nav", place), ("open", handle)):
            action = np.array([INDEX[Action(verb, target)]], np.float32)
            images.append(env.step(action)[0]["images"]["head"])
        assert difference(*images).mean() > 0.05
        env.reset("open-fridge" if handle == FRIDGE else "go-to", 4, 0)
    env.pool.close()


def test_objects_are_in_view_from_before_their_receptacle(drawn: OneScene) -> None:
    found = episode("rearrange", 8, 0)
    drawn.start(found)
    world = World(found)
    for word in OPEN_AIR:
        world.act(Action("nav", RECEPTACLE[word]))
        for thing in found.things:
            if thing.receptacle == RECEPTACLE[word]:
                x, y = world.robot.local(thing.x, thing.y)
                assert x > 0 and abs(y) < x * math.tan(math.radians(scene.FIELD / 2)) + 0.1


def test_the_same_state_gives_the_same_image_at_both_sizes() -> None:
    images = {}
    for name in ("language_rearrangement", "language_rearrangement_112"):
        env = OneEnv(name)
        spec = envs.spec(name)
        env.reset("rearrange", 0, 0)
        first = env.reset("rearrange", 5, 1)["images"]["head"]
        assert first.shape == (spec.image_size, spec.image_size, 3) and first.dtype == np.uint8
        env.step(np.zeros(1, np.float32))
        np.testing.assert_array_equal(env.reset("rearrange", 5, 1)["images"]["head"], first)
        images[name] = first
        env.pool.close()
    large, small = images.values()
    averaged = large.reshape(112, 3, 112, 3, 3).mean((1, 3))
    assert abs(averaged - small).mean() < 8
