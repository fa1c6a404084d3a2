"""The rooms as the head camera sees them: simple shapes in MuJoCo, posed anew for every image, without physics.

One model serves all rooms: walls, furniture and objects are bodies that are put where an episode has them, and what it
does not have is put out of sight.
"""

import functools
import math
import zlib
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from mllm_act.envs.language_rearrangement.entities import CABINETS, FRIDGE, OBJECTS, RECEPTACLE
from mllm_act.envs.language_rearrangement.layout import (
    KITCHEN,
    REFRIGERATOR,
    SIZES,
    SURFACES,
    Layout,
    Pose,
)
from mllm_act.envs.language_rearrangement.shapes import (
    BLACK,
    GRAY,
    SHAPES,
    STEEL,
    WHITE,
    WOOD,
    geom,
    meshes,
)
from mllm_act.envs.language_rearrangement.world import Episode, World
from mllm_act.envs.mujoco_rendering import Renderer, import_mujoco, shared_renderer

INSTANCES = 4  # of each class, more than in any official episode
EYE = 1.25  # metres above the floor
PITCH = math.radians(32)  # the camera looks down
FIELD = 90  # degrees
HELD = (0.36, 0.0, -0.5)  # of the held object, in the camera's level frame: forward, left, up
AWAY = (0.0, 0.0, -50.0)
WALL_HEIGHT = 2.6
PULLED = 0.3  # metres, of an open drawer
SWUNG = math.radians(110)  # of the open door
TURN = 1.0  # radians, at most, of objects
SHOWN, HIDDEN = 0, 5  # groups of geoms; MuJoCo draws the first three
CREAM, PINE, CHARCOAL = (0.9, 0.87, 0.8), (0.72, 0.52, 0.32), (0.1, 0.1, 0.11)


def _box(half: Sequence[float], color: Sequence[float], at: Sequence[float]) -> str:
    return geom("box", half, color, at, scale=1)


def _legs(size: Any, thick: float, color: Sequence[float], top: float) -> list[str]:
    x, y = size.depth / 2 - thick, size.width / 2 - thick
    return [_box((thick, thick, top / 2), color, (a, b, top / 2)) for a in (-x, x) for b in (-y, y)]


def _kitchen() -> list[str]:
    size, gray = SIZES[KITCHEN], (0.55, 0.57, 0.6)
    sink = SURFACES[RECEPTACLE["sink"]]
    left, right = sink.y - sink.half_y - 0.03, sink.y + sink.half_y + 0.03
    half = size.width / 2
    front = sink.x + sink.half_x + 0.03
    back = sink.x - sink.half_x - 0.03
    z, deep = size.height - 0.02, size.depth / 2
    parts = [
        _box((deep, half, 0.33), CREAM, (-0.03, 0, 0.37)),
        _box((deep - 0.06, half - 0.02, 0.05), BLACK, (0, 0, 0.05)),
        # The counter-top around the basin.
        _box((deep, (left + half) / 2, 0.02), gray, (0, (left - half) / 2, z)),
        _box((deep, (half - right) / 2, 0.02), gray, (0, (right + half) / 2, z)),
        _box(((deep - front) / 2, (right - left) / 2, 0.02), gray, ((front + deep) / 2, (left + right) / 2, z)),
        _box(((back + deep) / 2, (right - left) / 2, 0.02), gray, ((back - deep) / 2, (left + right) / 2, z)),
        _box((sink.half_x + 0.03, sink.half_y + 0.03, 0.01), STEEL, (sink.x, sink.y, sink.z - 0.01)),
        # The tap, and the splashback.
        geom("cylinder", (0.018, 0.14), STEEL, (back - 0.05, sink.y, z + 0.14), scale=1),
        geom("cylinder", (0.014, 0.09), STEEL, (back + 0.03, sink.y, z + 0.27), (0, 90, 0), 1),
        _box((0.01, half, 0.25), (0.75, 0.85, 0.85), (-deep + 0.01, 0, z + 0.25)),
    ]  # fmt: skip
    return parts


# Handle -> middle and half sides of its drawer's front.
FRONTS = {
    "cab_push_point_7": ((-1.05, 0.7), (0.46, 0.12)),
    "cab_push_point_6": ((-0.285, 0.45), (0.24, 0.34)),
    "cab_push_point_5": ((0.77, 0.7), (0.72, 0.12)),
    "cab_push_point_4": ((0.77, 0.34), (0.72, 0.2)),
}


def _drawer(handle: str) -> list[str]:
    (y, z), (half_y, half_z) = FRONTS[handle]
    x = SIZES[KITCHEN].depth / 2
    return [
        _box((0.012, half_y, half_z), (0.96, 0.95, 0.92), (x, y, z)),
        _box((0.012, min(half_y * 0.5, 0.18), 0.012), BLACK, (x + 0.03, y, z + half_z * 0.4)),
        _box((0.17, half_y - 0.03, 0.01), WOOD, (x - 0.18, y, z - half_z + 0.03)),
        *(
            _box((0.17, 0.01, half_z * 0.6), WOOD, (x - 0.18, y + s * (half_y - 0.03), z - half_z * 0.3))
            for s in (-1, 1)
        ),
    ]  # fmt: skip


def _fridge() -> list[str]:
    size, shell = SIZES[REFRIGERATOR], (0.8, 0.82, 0.85)
    x, y, h = size.depth / 2, size.width / 2, size.height
    return [
        _box((0.02, y, h / 2), shell, (-x + 0.02, 0, h / 2)),
        *(_box((x - 0.02, 0.025, h / 2), shell, (0, s * (y - 0.025), h / 2)) for s in (-1, 1)),
        *(_box((x - 0.02, y, 0.025), shell, (0, 0, z)) for z in (0.06, h - 0.025)),
        *(_box((x - 0.05, y - 0.05, 0.008), WHITE, (0, 0, z)) for z in (0.55, 0.992, 1.4)),
        _box((0.01, y - 0.05, h / 2 - 0.05), WHITE, (-x + 0.05, 0, h / 2)),
    ]


def _door() -> list[str]:
    """Of the fridge; the body's origin is the hinge, on the robot's left."""
    size = SIZES[REFRIGERATOR]
    y, h = size.width / 2, size.height
    return [
        _box((0.025, y, h / 2 - 0.03), (0.7, 0.72, 0.76), (0.03, y, h / 2 + 0.02)),
        _box((0.015, 0.015, 0.3), BLACK, (0.08, 2 * y - 0.08, 1.15)),
    ]


def _tv_stand() -> list[str]:
    size = SIZES["TV stand"]
    x, y, h = size.depth / 2, size.width / 2, size.height
    return [
        _box((x, y, 0.02), WHITE, (0, 0, h - 0.02)), _box((x, y, 0.03), WHITE, (0, 0, 0.08)),
        *(_box((x, 0.02, h / 2 - 0.02), WHITE, (0, p, h / 2)) for p in (-y + 0.02, 0, y - 0.02)),
        _box((0.01, y, h / 2), GRAY, (-x + 0.01, 0, h / 2)),
        # The television, on the wall side.
        _box((0.02, 0.55, 0.33), BLACK, (-x - 0.03, 0, h + 0.48)),
        _box((0.005, 0.52, 0.3), (0.12, 0.16, 0.22), (-x - 0.005, 0, h + 0.48)),
        _box((0.02, 0.05, 0.1), BLACK, (-x - 0.03, 0, h + 0.08)),
    ]  # fmt: skip


def _sofa() -> list[str]:
    size, cloth, dark = SIZES["sofa"], (0.3, 0.42, 0.62), (0.22, 0.32, 0.5)
    x, y = size.depth / 2, size.width / 2
    return [
        _box((x, y, 0.14), dark, (0, 0, 0.18)),
        *(
            _box((x - 0.08, y / 2 - 0.1, 0.06), cloth, (0.08, s * (y / 2 - 0.09), 0.36))
            for s in (-1, 1)
        ),
        _box((0.1, y - 0.02, 0.26), dark, (-x + 0.1, 0, 0.56)),
        *(
            _box((0.06, y / 2 - 0.12, 0.19), cloth, (-x + 0.24, s * (y / 2 - 0.09), 0.6))
            for s in (-1, 1)
        ),
        *(_box((x, 0.09, 0.28), dark, (0, s * (y - 0.09), 0.3)) for s in (-1, 1)),
    ]


def _chair() -> list[str]:
    size, red = SIZES["chair"], (0.62, 0.16, 0.12)
    x = size.depth / 2
    return [
        _box((x - 0.04, x - 0.04, 0.03), red, (0.02, 0, 0.43)),
        _box((0.03, x - 0.04, 0.22), red, (-x + 0.06, 0, 0.68)),
        *_legs(size, 0.03, WOOD, 0.42),
    ]


def _table(name: str, color: Sequence[float], leg: Sequence[float]) -> list[str]:
    size = SIZES[name]
    top = (size.depth / 2, size.width / 2, 0.02)
    return [
        _box(top, color, (0, 0, size.height - 0.02)), *_legs(size, 0.04, leg, size.height - 0.04),
        _box((0.02, size.width / 2 - 0.1, 0.04), leg, (size.depth / 2 - 0.06, 0, size.height - 0.08)),
        _box((0.02, size.width / 2 - 0.1, 0.04), leg, (-size.depth / 2 + 0.06, 0, size.height - 0.08)),
    ]  # fmt: skip


DOOR = "door"
FURNITURE = {
    KITCHEN: _kitchen(),
    REFRIGERATOR: _fridge(),
    DOOR: _door(),
    "black table": _table("black table", CHARCOAL, CHARCOAL),
    "brown table": _table("brown table", PINE, (0.5, 0.33, 0.18)),
    "TV stand": _tv_stand(),
    "sofa": _sofa(),
    "chair": _chair(),
    **{handle: _drawer(handle) for handle in CABINETS},
}


def _body(name: str, parts: Sequence[str]) -> str:
    return f'<body name="{name}" mocap="true" pos="0 0 -50">{"".join(parts)}</body>'


def _robot() -> list[str]:
    """The camera, and the gripper below it."""
    up = (math.sin(PITCH), 0.0, math.cos(PITCH))
    camera = (
        f'<camera name="head" pos="0 0 0" xyaxes="0 -1 0 {up[0]:.4f} {up[1]} {up[2]:.4f}" '
        f'fovy="{FIELD}"/>'
    )
    x, y, z = HELD
    return [
        camera,
        *(_box((0.06, 0.01, 0.012), GRAY, (x - 0.03, s * 0.08, z + 0.02)) for s in (-1, 1)),
        _box((0.025, 0.09, 0.02), CHARCOAL, (x - 0.1, 0, z + 0.02)),
    ]


def _wall() -> list[str]:
    return ['<geom type="box" size="0.05 6 1.3" pos="-0.05 0 1.3" rgba="0.86 0.88 0.84 1"/>',
            '<geom type="box" size="0.06 6 0.05" pos="-0.05 0 0.05" rgba="0.95 0.95 0.95 1"/>']  # fmt: skip


@functools.cache
def _xml() -> str:
    bodies = [_body(name, parts) for name, parts in FURNITURE.items()]
    bodies += [_body(f"wall{i}", _wall()) for i in range(4)]
    bodies += [
        _body(f"{kind}_{number}", SHAPES[kind]) for kind in OBJECTS for number in range(INSTANCES)
    ]
    return f"""
<mujoco>
  <compiler angle="degree"/>
  <visual>
    <headlight ambient="0.42 0.42 0.42" diffuse="0.35 0.35 0.35" specular="0 0 0"/>
    <quality numslices="12" numstacks="8" numquads="1"/>
    <map znear="0.005" zfar="0.4"/>
  </visual>
  <default><geom contype="0" conaffinity="0" mass="0.001"/></default>
  <asset>
    <texture type="skybox" builtin="flat" rgb1="0.8 0.82 0.8" rgb2="0.8 0.82 0.8" width="8" height="8"/>
    <texture name="floor" type="2d" builtin="checker" rgb1="0.62 0.5 0.38" rgb2="0.58 0.46 0.34"
      width="64" height="64"/>
    <material name="floor" texture="floor" texrepeat="16 16" specular="0"/>
    {meshes()}
  </asset>
  <worldbody>
    <light directional="true" castshadow="false" dir="0.3 0.2 -1" diffuse="0.45 0.45 0.42" specular="0 0 0"/>
    <geom type="box" size="16 16 0.01" pos="0 0 -0.01" material="floor"/>
    {"".join(bodies)}
    {_body("robot", _robot())}
  </worldbody>
</mujoco>"""


def _quaternion(heading: float) -> tuple[float, float, float, float]:
    return math.cos(heading / 2), 0.0, 0.0, math.sin(heading / 2)


class Scene:
    """Draws the states of one episode after another."""

    def __init__(self, size: int) -> None:
        """Compiles the model, for images of ``size`` x ``size`` pixels."""
        self._mujoco = mujoco = import_mujoco()
        self._model = mujoco.MjModel.from_xml_string(_xml())
        self._data = mujoco.MjData(self._model)
        self._renderer: Renderer = shared_renderer("language_rearrangement", self._model, size)
        self._slots = {
            self._model.body(i).name: self._model.body_mocapid[i]
            for i in range(1, self._model.nbody)
        }
        # Of every geom: the slot of its body, -1 for the floor.
        self._geom_slot = self._model.body_mocapid[self._model.geom_bodyid]
        self._small = np.zeros(self._model.nmocap, bool)
        for kind in OBJECTS:
            for number in range(INSTANCES):
                self._small[self._slots[f"{kind}_{number}"]] = True
        self._bodies: dict[str, str] = {}  # object -> its body
        self._turn: dict[str, float] = {}
        self._layout: Layout | None = None

    def start(self, episode: Episode) -> None:
        """Puts up the room of an episode."""
        self._data.mocap_pos[:] = AWAY
        self._layout = layout = episode.layout
        left, bottom, right, top = layout.room
        middle = ((left + right) / 2, (bottom + top) / 2)
        for number, (x, y, heading) in enumerate((
            (left, middle[1], 0.0), (right, middle[1], math.pi),
            (middle[0], bottom, math.pi / 2), (middle[0], top, -math.pi / 2),
        )):  # fmt: skip
            self._put(f"wall{number}", (x, y, 0.0), heading)
        for name, pose in layout.furniture.items():
            self._put(name, (pose.x, pose.y, 0.0), pose.heading)
        numbers: Counter[str] = Counter()
        self._bodies = {}
        for thing in episode.things:
            self._bodies[thing.name] = f"{thing.kind}_{numbers[thing.kind]}"
            numbers[thing.kind] += 1
            # Objects lie as they happened to be put down, but show the robot their long side.
            crc = zlib.crc32(f"{thing.name} {thing.x} {thing.y}".encode())
            self._turn[thing.name] = math.pi / 2 + TURN * (2 * crc / 2**32 - 1)

    def _put(self, body: str, at: tuple[float, float, float], heading: float) -> None:
        slot = self._slots[body]
        self._data.mocap_pos[slot] = at
        self._data.mocap_quat[slot] = _quaternion(heading)

    def render(self, world: World) -> np.ndarray:
        """Returns the image of a state, uint8[size, size, 3], upright."""
        robot, layout = world.robot, world.layout
        self._put("robot", (robot.x, robot.y, EYE), robot.heading)
        kitchen, fridge = layout.furniture[KITCHEN], layout.furniture[REFRIGERATOR]
        for handle in CABINETS:
            x, y = kitchen.point(PULLED if handle in world.opened else 0.0, 0)
            self._put(handle, (x, y, 0.0), kitchen.heading)
        size = SIZES[REFRIGERATOR]
        x, y = fridge.point(size.depth / 2, -size.width / 2)
        self._put(DOOR, (x, y, 0.0), fridge.heading - (SWUNG if FRIDGE in world.opened else 0.0))
        for name, receptacle in world.receptacle.items():
            self._put_object(world, name, receptacle)
        self._hide_unseen(robot)
        self._mujoco.mj_kinematics(self._model, self._data)
        self._mujoco.mj_camlight(self._model, self._data)
        image = self._renderer.render(self._model, self._data, "head")
        return np.ascontiguousarray(image)

    def _hide_unseen(self, robot: Pose) -> None:
        """Leaves objects out that are not in the view, and what no room has: each takes time to draw."""
        offset = self._data.mocap_pos[:, :2] - (robot.x, robot.y)
        cos, sin = math.cos(robot.heading), math.sin(robot.heading)
        forward, left = offset @ (cos, sin), offset @ (-sin, cos)
        margin = 0.4  # metres, more than an object is long
        seen = ~self._small | (np.abs(left) < forward + margin)
        seen &= self._data.mocap_pos[:, 2] > AWAY[2]
        shown = np.append(seen, True)[self._geom_slot]
        self._model.geom_group[:] = np.where(shown, SHOWN, HIDDEN)

    def _put_object(self, world: World, name: str, receptacle: str) -> None:
        if name == world.held:
            forward, left, up = HELD
            x, y = Pose(world.robot.x, world.robot.y, world.robot.heading).point(forward, left)
            self._put(self._bodies[name], (x, y, EYE + up), world.robot.heading + 1.2)
            return
        x, y = world.position[name]
        surface = SURFACES[receptacle]
        pose = world.layout.furniture[surface.furniture]
        drawer = world.inside(name)
        if drawer in CABINETS:
            inside = pose.local(x, y)
            x, y = pose.point(inside[0] + (PULLED if drawer in world.opened else -0.2), inside[1])
        self._put(self._bodies[name], (x, y, surface.z), pose.heading + self._turn[name])
