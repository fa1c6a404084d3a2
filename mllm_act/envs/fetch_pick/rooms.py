"""Rooms and episodes: which furniture stands where, in which colours, what lies on it, and where the robot starts.

A room is drawn from its number alone, an episode from its room, target, configuration and seed. Angles are in radians,
lengths in metres, colours are red, green, blue from 0 to 1. The origin is the middle of the room.
"""

import colorsys
import math
from typing import NamedTuple

import numpy as np

from mllm_act.envs.fetch_pick.objects import KINDS

START_DISTANCE = (1.0, 2.0)  # from the target
START_BEARING = (
    0.5  # radians, at most, between the way to the target and the normal of the furniture's front
)
HEADING_NOISE = 0.52  # radians, standard deviation
ARM_NOISE = 0.1  # radians, at most, of each joint
CLEARANCE = 0.48  # of the middle of the robot from furniture and walls
SPACING = 0.27  # between the middles of two objects
REACH = (0.1, 0.26)  # of a target, behind the front edge
EDGE = 0.14  # of objects from the sides
PIECES = 4  # of furniture, one at each wall
ATTEMPTS = 400


class Surface(NamedTuple):
    """What objects can lie on. x points out of the piece's front, y along it.

    Attributes:
      front: x of the front edge; the piece's middle is 0.
      depth: from the front edge to the back, where objects can be.
      half_width: half of it where objects can be.
      heights: from the lowest to the highest.
      half_x: half the depth of the whole piece.
      half_y: half its width.
    """

    front: float
    depth: float
    half_width: float
    heights: tuple[float, float]
    half_x: float
    half_y: float


SURFACES = {
    "dining table": Surface(0.4, 0.7, 0.75, (0.68, 0.8), 0.4, 0.75),
    "coffee table": Surface(0.32, 0.55, 0.55, (0.4, 0.52), 0.32, 0.55),
    "sideboard": Surface(0.24, 0.4, 0.7, (0.7, 0.88), 0.24, 0.7),
    "counter": Surface(0.32, 0.5, 0.9, (0.82, 0.9), 0.32, 0.9),
    "bookcase": Surface(0.2, 0.36, 0.55, (0.74, 0.92), 0.2, 0.55),
    "sofa": Surface(0.45, 0.5, 0.66, (0.4, 0.46), 0.45, 0.86),
    "TV stand": Surface(0.23, 0.38, 0.75, (0.45, 0.58), 0.23, 0.75),
    "desk": Surface(0.34, 0.6, 0.62, (0.7, 0.78), 0.34, 0.62),
}


class Piece(NamedTuple):
    """A piece of furniture: the pose of its middle on the floor, the height of its surface, its colours."""

    kind: str
    x: float
    y: float
    turn: float
    height: float
    main: tuple[float, float, float]
    trim: tuple[float, float, float]

    def point(self, forward: float, left: float) -> tuple[float, float]:
        """Returns a point of the piece's frame in the room's."""
        c, s = math.cos(self.turn), math.sin(self.turn)
        return self.x + c * forward - s * left, self.y + s * forward + c * left

    def distance(self, x: float, y: float) -> float:
        """Returns how far a point of the room is from the piece's outline, 0 inside."""
        surface, c, s = SURFACES[self.kind], math.cos(self.turn), math.sin(self.turn)
        ahead = abs(c * (x - self.x) + s * (y - self.y)) - surface.half_x
        aside = abs(-s * (x - self.x) + c * (y - self.y)) - surface.half_y
        return math.hypot(max(ahead, 0.0), max(aside, 0.0))


class Room(NamedTuple):
    """A room: half its side, its furniture, colours of walls and floor."""

    half: float
    pieces: tuple[Piece, ...]
    wall: tuple[float, float, float]
    floor: tuple[float, float, float]


class Thing(NamedTuple):
    """An object: its kind, where it stands, and its turn."""

    kind: str
    x: float
    y: float
    z: float
    turn: float


class Episode(NamedTuple):
    """What an episode starts from; the target is the first of the things, and the only one of its kind.

    ``start`` is x, y and heading of the robot, ``arm`` the offsets of its joints from rest.
    """

    room: Room
    things: tuple[Thing, ...]
    start: tuple[float, float, float]
    arm: tuple[float, ...]


def _color(
    rng: np.random.Generator, saturation: tuple[float, float], value: tuple[float, float]
) -> tuple[float, float, float]:
    return colorsys.hsv_to_rgb(
        float(rng.uniform()), float(rng.uniform(*saturation)), float(rng.uniform(*value))
    )


def _wood(rng: np.random.Generator) -> tuple[float, float, float]:
    return colorsys.hsv_to_rgb(
        float(rng.uniform(0.05, 0.11)), float(rng.uniform(0.3, 0.7)), float(rng.uniform(0.25, 0.8))
    )


def room(number: int) -> Room:
    """Returns a room: four different pieces of furniture, one at each wall."""
    rng = np.random.default_rng((7, number))
    half = float(rng.uniform(2.3, 3.0))
    pieces = []
    for side, kind in enumerate(rng.permutation(list(SURFACES))[:PIECES]):
        surface = SURFACES[kind]
        turn = side * math.pi / 2
        out, along = half - surface.half_x - 0.03, float(rng.uniform(-0.3, 0.3))
        x = -math.cos(turn) * out - math.sin(turn) * along
        y = -math.sin(turn) * out + math.cos(turn) * along
        painted = rng.uniform() < 0.5 or kind == "sofa"
        main = _color(rng, (0.05, 0.6), (0.3, 0.9)) if painted else _wood(rng)
        trim = _color(rng, (0.0, 0.3), (0.15, 0.9)) if rng.uniform() < 0.5 else _wood(rng)
        height = float(rng.uniform(*surface.heights))
        pieces.append(Piece(str(kind), x, y, turn, height, main, trim))
    floor = _wood(rng) if rng.uniform() < 0.5 else _color(rng, (0.0, 0.25), (0.3, 0.75))
    return Room(half, tuple(pieces), _color(rng, (0.0, 0.25), (0.65, 0.95)), floor)


def episode(target: str, room_number: int, seed: tuple[int, ...]) -> Episode:
    """Returns an episode in which the kind ``target`` is to be picked up.

    Its furniture, three other objects beside it and on another piece, and a start from which the way is free are drawn
    from ``seed``.
    """
    place = room(room_number)
    rng = np.random.default_rng((11, *seed, KINDS.index(target), room_number))
    for _ in range(ATTEMPTS):
        first, second = rng.permutation(len(place.pieces))[:2]
        others = rng.permutation([kind for kind in KINDS if kind != target])
        things: list[Thing] = []
        for kind, piece in zip(
            (target, *others), (first, first, first, second, second), strict=False
        ):
            _put(rng, str(kind), place.pieces[piece], things, REACH if kind == target else None)
        start = _start(rng, place, things[0], place.pieces[first])
        if start is not None:
            arm = tuple(float(v) for v in rng.uniform(-ARM_NOISE, ARM_NOISE, 7))
            return Episode(place, tuple(things), start, arm)
    raise RuntimeError(f"room {room_number}: no start from which the way to the {target} is free")


def _put(
    rng: np.random.Generator,
    kind: str,
    piece: Piece,
    things: list[Thing],
    reach: tuple[float, float] | None,
) -> None:
    """Adds an object on a piece, away from others; where there is no space for one that is no target, nothing."""
    surface = SURFACES[piece.kind]
    width = surface.half_width - EDGE
    low, high = reach or (0.1, surface.depth - 0.1)
    for _ in range(20):
        x, y = piece.point(
            surface.front - float(rng.uniform(low, high)), float(rng.uniform(-width, width))
        )
        turn = float(rng.uniform(-math.pi, math.pi))
        if all(math.hypot(x - other.x, y - other.y) >= SPACING for other in things):
            things.append(Thing(kind, x, y, piece.height, turn))
            return


def _start(
    rng: np.random.Generator, place: Room, target: Thing, piece: Piece
) -> tuple[float, float, float] | None:
    """Returns a start from which the straight way to the target is free, or None."""
    bearing = piece.turn + float(rng.uniform(-START_BEARING, START_BEARING))
    distance = float(rng.uniform(*START_DISTANCE))
    for travelled in np.arange(0.0, distance - 0.65, 0.1):
        x = target.x + math.cos(bearing) * (distance - travelled)
        y = target.y + math.sin(bearing) * (distance - travelled)
        near = [other.distance(x, y) for other in place.pieces if other is not piece]
        if min(near) < CLEARANCE or max(abs(x), abs(y)) > place.half - CLEARANCE:
            return None
    x, y = target.x + math.cos(bearing) * distance, target.y + math.sin(bearing) * distance
    if piece.distance(x, y) < CLEARANCE:
        return None
    heading = bearing + math.pi + float(rng.normal(0.0, HEADING_NOISE))
    return x, y, (heading + math.pi) % (2 * math.pi) - math.pi
