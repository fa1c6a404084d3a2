"""Where furniture stands, where the robot stands in front of it, and where objects lie on it.

A piece of furniture has a pose: the middle of its footprint, and the direction that its front faces. In its own frame x
points to the front and y to the right of a robot that faces it. Lengths are in metres, angles in radians.
"""

import functools
import math
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from mllm_act.envs.language_rearrangement.entities import FRIDGE, RECEPTACLE


class Pose(NamedTuple):
    """A point on the floor and a direction, counter-clockwise from x."""

    x: float
    y: float
    heading: float

    def point(self, x: float, y: float) -> tuple[float, float]:
        """Returns a point of this frame in the room's."""
        cos, sin = math.cos(self.heading), math.sin(self.heading)
        return self.x + cos * x - sin * y, self.y + sin * x + cos * y

    def local(self, x: float, y: float) -> tuple[float, float]:
        """Returns a point of the room in this frame."""
        cos, sin = math.cos(self.heading), math.sin(self.heading)
        x, y = x - self.x, y - self.y
        return cos * x + sin * y, cos * y - sin * x


class Size(NamedTuple):
    """Of furniture: along its x (depth), y (width) and upwards."""

    depth: float
    width: float
    height: float


class Surface(NamedTuple):
    """A rectangle that objects lie on, in the frame of ``furniture``: its middle, half its sides, its height."""

    furniture: str
    x: float
    y: float
    half_x: float
    half_y: float
    z: float


KITCHEN, REFRIGERATOR = "kitchen", "fridge"
SIZES = {
    KITCHEN: Size(0.74, 3.2, 0.88),
    REFRIGERATOR: Size(0.74, 0.84, 1.8),
    "black table": Size(0.96, 1.5, 0.74),
    "brown table": Size(0.88, 1.5, 0.92),
    "TV stand": Size(0.6, 1.7, 0.6),
    "sofa": Size(0.9, 2.0, 0.8),
    "chair": Size(0.6, 0.6, 0.9),
}
# Within them every object is in reach of a robot that stands before the middle: 1.5 m, 1 rad. The kitchen's are those
# of ReplicaCAD, as the positions of objects in the original episodes show them.
SURFACES = {
    RECEPTACLE["chair"]: Surface("chair", 0.02, 0.0, 0.18, 0.18, 0.46),
    RECEPTACLE["black table"]: Surface("black table", 0.0, 0.0, 0.34, 0.6, 0.74),
    RECEPTACLE["brown table"]: Surface("brown table", 0.0, 0.0, 0.33, 0.62, 0.92),
    RECEPTACLE["TV stand"]: Surface("TV stand", 0.0, 0.0, 0.22, 0.72, 0.6),
    RECEPTACLE["sink"]: Surface(KITCHEN, 0.03, -0.285, 0.19, 0.2, 0.76),
    RECEPTACLE["right counter"]: Surface(KITCHEN, 0.0, 0.77, 0.31, 0.7, 0.88),
    RECEPTACLE["left counter"]: Surface(KITCHEN, 0.0, -1.05, 0.31, 0.45, 0.88),
    RECEPTACLE["sofa"]: Surface("sofa", 0.09, 0.0, 0.27, 0.7, 0.42),
    RECEPTACLE["fridge"]: Surface(REFRIGERATOR, 0.05, 0.0, 0.22, 0.3, 1.0),
    RECEPTACLE["left drawer"]: Surface(KITCHEN, 0.28, -1.05, 0.08, 0.3, 0.66),
    RECEPTACLE["right drawer"]: Surface(KITCHEN, 0.28, 0.77, 0.08, 0.5, 0.66),
}
# The handles: furniture, x and y in its frame, z.
HANDLES = {
    "cab_push_point_7": (KITCHEN, 0.37, -1.05, 0.7),
    "cab_push_point_6": (KITCHEN, 0.37, -0.285, 0.4),
    "cab_push_point_5": (KITCHEN, 0.37, 0.77, 0.7),
    "cab_push_point_4": (KITCHEN, 0.37, 0.77, 0.3),
    FRIDGE: (REFRIGERATOR, 0.37, 0.25, 1.1),
}
GAP = 0.55  # from the front of furniture to the robot's middle


def reaches(robot: Pose, x: float, y: float, distance: float, angle: float) -> bool:
    """Returns whether a point is within a distance of the robot, and within an angle of where it faces."""
    x, y = robot.local(x, y)
    return math.hypot(x, y) < distance and abs(math.atan2(y, x)) < angle


@functools.cache
def _grid(receptacle: str) -> list[tuple[float, float]]:
    surface = SURFACES[receptacle]
    columns, rows = (2 * round(half / 0.2) + 1 for half in (surface.half_y, surface.half_x))
    grid = [
        (surface.x + float(x), surface.y + float(y))
        for x in np.linspace(-surface.half_x, surface.half_x, rows)
        for y in np.linspace(-surface.half_y, surface.half_y, columns)
    ]
    return sorted(grid, key=lambda p: (round(math.dist(p, (surface.x, surface.y)), 6), p))


class Layout(NamedTuple):
    """A furnished room.

    Attributes:
      furniture: name, one of `SIZES`, -> its pose.
      room: the walls: least x and y, greatest x and y.
    """

    furniture: Mapping[str, Pose]
    room: tuple[float, float, float, float]

    def target(self, place: str) -> tuple[float, float]:
        """Returns the point of a place (a receptacle or a handle) that distances are measured to."""
        if place in SURFACES:
            surface = SURFACES[place]
            return self.furniture[surface.furniture].point(surface.x, surface.y)
        name, x, y, _ = HANDLES[place]
        return self.furniture[name].point(x, y)

    def stand(self, place: str) -> Pose:
        """Returns where a robot that went to a place stands: before it, facing it."""
        name, y = (SURFACES[place].furniture, SURFACES[place].y) if place in SURFACES else (
            HANDLES[place][0], HANDLES[place][2] if place != FRIDGE else 0.0
        )  # fmt: skip
        pose = self.furniture[name]
        x, y = pose.point(SIZES[name].depth / 2 + GAP, y)
        return Pose(x, y, pose.heading + math.pi)

    def onto(self, receptacle: str, x: float, y: float) -> tuple[float, float]:
        """Returns the point of the receptacle's surface that is nearest to a point of the room."""
        surface = SURFACES[receptacle]
        pose = self.furniture[surface.furniture]
        x, y = pose.local(x, y)
        return pose.point(
            float(np.clip(x, surface.x - surface.half_x, surface.x + surface.half_x)),
            float(np.clip(y, surface.y - surface.half_y, surface.y + surface.half_y)),
        )

    def spots(self, receptacle: str) -> list[tuple[float, float]]:
        """Returns a grid of points on the receptacle, from its middle outwards, about 0.2 m apart."""
        pose = self.furniture[SURFACES[receptacle].furniture]
        return [pose.point(x, y) for x, y in _grid(receptacle)]

    def is_free(self, x: float, y: float, margin: float) -> bool:
        """Returns whether a robot of radius ``margin`` can stand at a point."""
        left, bottom, right, top = self.room
        if not (left + margin < x < right - margin and bottom + margin < y < top - margin):
            return False
        for name, pose in self.furniture.items():
            a, b = pose.local(x, y)
            size = SIZES[name]
            if abs(a) < size.depth / 2 + margin and abs(b) < size.width / 2 + margin:
                return False
        return True
