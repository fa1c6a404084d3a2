"""Rooms of our own, as many as wanted: a kitchen along a wall, and the other furniture at random.

Headings are multiples of a quarter turn. Before every front there is room for the robot.
"""

import functools
import math

import numpy as np

from mllm_act.envs.language_rearrangement.layout import (
    KITCHEN,
    REFRIGERATOR,
    SIZES,
    Layout,
    Pose,
)

CLEAR = 1.0  # metres before furniture that stay free
BETWEEN = 0.1  # metres between furniture
TRIES = 200  # for each piece, before all is moved
AT_A_WALL = {"sofa": 0.7, "TV stand": 0.9, "black table": 0.2, "brown table": 0.4, "chair": 0.2}
Box = tuple[float, float, float, float]  # least x and y, greatest x and y


@functools.lru_cache(maxsize=256)
def room(number: int) -> Layout:
    """Returns the room of a number; the same number gives the same room on any machine."""
    rng = np.random.default_rng([number, 20240611])
    while (layout := _furnish(rng)) is None:
        pass
    return layout


def _furnish(rng: np.random.Generator) -> Layout | None:
    width, length = rng.uniform(6.0, 8.0, 2).round(2).tolist()
    walls = (0.0, 0.0, width, length)
    furniture: dict[str, Pose] = {}
    taken: list[tuple[Box, Box]] = []  # each piece, and the same with what stays free before it
    kitchen, fridge = SIZES[KITCHEN], SIZES[REFRIGERATOR]
    heading = int(rng.integers(4)) * math.pi / 2
    span = kitchen.width + fridge.width + 0.05
    pose = _along_a_wall(rng, walls, heading, kitchen.depth, span)
    side = float(rng.choice((-1, 1)))
    furniture[KITCHEN] = Pose(*pose.point(0, -side * (fridge.width + 0.05) / 2), heading)
    furniture[REFRIGERATOR] = Pose(*pose.point(0, side * (kitchen.width + 0.05) / 2), heading)
    taken.append((_box(pose, kitchen.depth, span, 0), _box(pose, kitchen.depth, span, CLEAR)))
    for name, at_a_wall in AT_A_WALL.items():
        size = SIZES[name]
        for _ in range(TRIES):
            heading = int(rng.integers(4)) * math.pi / 2
            if rng.random() < at_a_wall:
                pose = _along_a_wall(rng, walls, heading, size.depth, size.width)
            else:
                pose = Pose(
                    float(rng.uniform(0.6, width - 0.6)),
                    float(rng.uniform(0.6, length - 0.6)),
                    heading,
                )
            body = _box(pose, size.depth, size.width, 0)
            front = _box(pose, size.depth, size.width, CLEAR)
            if _inside(front, walls) and not any(
                _overlap(front, other) or _overlap(body, other_front)
                for other, other_front in taken
            ):
                break
        else:
            return None
        furniture[name] = Pose(round(pose.x, 3), round(pose.y, 3), pose.heading)
        taken.append((body, front))
    return Layout(furniture, walls)


def _along_a_wall(
    rng: np.random.Generator, walls: Box, heading: float, depth: float, width: float
) -> Pose:
    """Returns a pose with the back to the wall that faces ``heading``."""
    x, y = round(math.cos(heading)), round(math.sin(heading))
    along = float(rng.uniform(width / 2, (walls[3] if x else walls[2]) - width / 2))
    off = depth / 2 + 0.02
    if x:
        return Pose(off if x > 0 else walls[2] - off, along, heading)
    return Pose(along, off if y > 0 else walls[3] - off, heading)


def _box(pose: Pose, depth: float, width: float, clear: float) -> Box:
    """Returns the rectangle of furniture, with ``clear`` metres before it and `BETWEEN` around it."""
    corners = [
        pose.point(x, y)
        for x in (-depth / 2 - BETWEEN, depth / 2 + max(clear, BETWEEN))
        for y in (-width / 2 - BETWEEN, width / 2 + BETWEEN)
    ]
    xs, ys = zip(*corners, strict=True)
    return min(xs), min(ys), max(xs), max(ys)


def _overlap(a: Box, b: Box) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _inside(box: Box, walls: Box) -> bool:
    slack = BETWEEN + 1e-6  # furniture may touch a wall
    return (
        box[0] >= -slack and box[1] >= -slack
        and box[2] <= walls[2] + slack and box[3] <= walls[3] + slack
    )  # fmt: skip
