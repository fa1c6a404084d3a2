"""The simulated room: one MuJoCo model for all episodes, in which furniture and objects are put where one has them.

Furniture and walls do not move. An object that is held is welded to the gripper.
"""

import copy
import functools
import math
from typing import Any

import numpy as np

from mllm_act.envs.fetch_pick import furniture, objects, robot
from mllm_act.envs.fetch_pick.objects import FLOOR, FURNITURE, KINDS, ROBOT
from mllm_act.envs.fetch_pick.rooms import SURFACES, Episode, Room
from mllm_act.envs.language_rearrangement import shapes
from mllm_act.envs.mujoco_rendering import import_mujoco

TIMESTEP = 0.005  # seconds
SUBSTEPS = 20  # of an action
WALL_HEIGHT = 2.5
SHOWN, HIDDEN = 0, 5  # groups of geoms; MuJoCo draws the first three
SUCTION = 0.05  # metres from an object's surface at which the cup holds it


def _xml() -> str:
    wall = (
        f'<geom type="box" size="0.05 5 {WALL_HEIGHT / 2}" contype="{FURNITURE}" conaffinity="0"/>'
    )
    walls = "".join(f'<body name="wall{i}" mocap="true">{wall}</body>' for i in range(4))
    welds = "".join(
        f'<weld name="{kind}" body1="gripper_link" body2="{kind}" active="false" solref="0.01 1"/>'
        for kind in KINDS
    )
    return f"""<mujoco model="fetch_pick">
      <compiler angle="radian" inertiafromgeom="auto"/>
      <option timestep="{TIMESTEP}" integrator="implicitfast" cone="pyramidal" iterations="20">
        <flag midphase="disable"/>
      </option>
      <statistic center="0 0 0.8" extent="3"/>
      <visual>
        <headlight ambient="0.35 0.35 0.35" diffuse="0.35 0.35 0.35" specular="0 0 0"/>
        <map znear="0.01" zfar="10"/>
      </visual>
      <default><geom group="0"/></default>
      <asset>
        <texture name="floor" type="2d" builtin="checker" rgb1="1 1 1" rgb2="0.88 0.88 0.88" width="64" height="64"/>
        <material name="floor" texture="floor" texrepeat="2 2" texuniform="true" specular="0"/>
        {shapes.meshes()}{robot.meshes()}
      </asset>
      <worldbody>
        <light directional="true" dir="-0.4 0.3 -1" diffuse="0.45 0.45 0.45" castshadow="false"/>
        <light directional="true" dir="0.6 -0.5 -0.5" diffuse="0.2 0.2 0.2" castshadow="false"/>
        <geom name="floor" type="plane" size="8 8 1" material="floor" contype="{FLOOR}" conaffinity="0"/>
        {walls}{"".join(map(furniture.body, SURFACES))}{robot.body()}{"".join(map(objects.body, KINDS))}
      </worldbody>
      <equality>{welds}</equality>
      <actuator>{robot.actuators()}</actuator>
    </mujoco>"""


@functools.cache
def _compiled() -> Any:
    """Returns the model, compiled once per process (about a second)."""
    return import_mujoco().MjModel.from_xml_string(_xml())


class Scene:
    """One simulation. ``model`` and ``data`` are MuJoCo's, of this simulation alone."""

    def __init__(self) -> None:
        self._mujoco = mujoco = import_mujoco()
        self.model = model = copy.deepcopy(_compiled())
        self.data = mujoco.MjData(model)
        self.held: str | None = None
        self.force = 0.0  # newtons, on the robot in the latest step, a mean over its substeps
        joints = [model.joint(name) for name in robot.JOINTS]
        self._arm = np.array([joint.qposadr[0] for joint in joints])
        low, high = model.jnt_range[[joint.id for joint in joints]].T
        limited = model.jnt_limited[[joint.id for joint in joints]].astype(bool)
        self._low, self._high = np.where(limited, low, -np.inf), np.where(limited, high, np.inf)
        self._cup = model.site("cup").id
        self._base = model.body("base_link").id
        self._gripper = model.body("gripper_link").id
        self._is_robot = (model.geom_contype & ROBOT).astype(bool)
        names = [model.geom(i).name.split("/") for i in range(model.ngeom)]
        self._parts = {
            (kind, color): [i for i, name in enumerate(names) if name[:2] == [kind, color]]
            for kind in SURFACES
            for color in (furniture.MAIN, furniture.TRIM)
        }
        # What an episode may lack: the geoms of each that are drawn.
        self._drawn = {
            name: [i for i in self._geoms(name) if model.geom_group[i] == SHOWN]
            for name in (*SURFACES, *KINDS)
        }
        self._walls = [model.body(f"wall{i}").mocapid[0] for i in range(4)]
        self._goal = np.zeros(len(robot.JOINTS))
        # Where the cup is in the base's frame when the arm rests, float64[3].
        self._pose_robot((0.0, 0.0, 0.0), np.array(robot.REST))
        mujoco.mj_kinematics(model, self.data)
        self.rest_cup = self.cup_in_base()

    def _geoms(self, body: str) -> range:
        first = int(self.model.body(body).geomadr[0])
        return range(first, first + int(self.model.body(body).geomnum[0]))

    def start(self, episode: Episode) -> None:
        """Puts everything where the episode has it."""
        model, mujoco = self.model, self._mujoco
        mujoco.mj_resetData(model, self.data)
        if self.held is not None:
            self._touches_robot(self.held, True)
        self.held, self.force = None, 0.0
        for geoms in self._drawn.values():
            model.geom_group[geoms] = HIDDEN
        for name in (*(p.kind for p in episode.room.pieces), *(t.kind for t in episode.things)):
            model.geom_group[self._drawn[name]] = SHOWN
        self._furnish(episode.room)
        model.body_gravcomp[[model.body(kind).id for kind in KINDS]] = 1.0
        for thing in episode.things:
            address = model.joint(thing.kind).qposadr[0]
            half = thing.turn / 2
            self.data.qpos[address : address + 7] = (
                thing.x, thing.y, thing.z + 0.001, math.cos(half), 0, 0, math.sin(half),
            )  # fmt: skip
            model.body_gravcomp[model.body(thing.kind).id] = 0.0
        self._pose_robot(episode.start, np.array(robot.REST) + episode.arm)
        mujoco.mj_forward(model, self.data)

    def _furnish(self, room: Room) -> None:
        model, data = self.model, self.data
        for piece in room.pieces:
            slot = model.body(piece.kind).mocapid[0]
            sunk = piece.height - SURFACES[piece.kind].heights[1]
            data.mocap_pos[slot] = piece.x, piece.y, sunk
            data.mocap_quat[slot] = math.cos(piece.turn / 2), 0, 0, math.sin(piece.turn / 2)
            model.geom_rgba[self._parts[piece.kind, furniture.MAIN], :3] = piece.main
            model.geom_rgba[self._parts[piece.kind, furniture.TRIM], :3] = piece.trim
        for side, slot in enumerate(self._walls):
            angle = side * math.pi / 2
            out = room.half + 0.05
            data.mocap_pos[slot] = math.cos(angle) * out, math.sin(angle) * out, WALL_HEIGHT / 2
            data.mocap_quat[slot] = math.cos(angle / 2), 0, 0, math.sin(angle / 2)
            shade = (1.0, 0.93, 0.97, 0.9)[side]  # so that corners are seen
            wall = model.body(f"wall{side}").geomadr[0]
            model.geom_rgba[wall, :3] = np.array(room.wall) * shade
        model.geom_rgba[model.geom("floor").id, :3] = room.floor

    def _pose_robot(self, base: tuple[float, float, float], arm: np.ndarray) -> None:
        self.data.qpos[:3] = base
        self.data.qpos[self._arm] = self._goal[:] = arm

    # What is known about the state: metres, radians, in the room's frame.

    def base(self) -> tuple[float, float, float]:
        """Returns x, y and heading of the robot."""
        x, y, turn = self.data.qpos[:3]
        return float(x), float(y), float(turn)

    def arm(self) -> np.ndarray:
        """Returns the angles of the joints, float64[7]."""
        return self.data.qpos[self._arm].copy()

    def arm_goal(self) -> np.ndarray:
        """Returns the angles that the controllers hold, float64[7]."""
        return self._goal.copy()

    def cup(self) -> np.ndarray:
        """Returns the end of the suction cup, float64[3]."""
        return self.data.site_xpos[self._cup].copy()

    def cup_in_base(self) -> np.ndarray:
        """Returns the end of the suction cup in the robot's frame, float64[3]."""
        turn = self.data.xmat[self._base].reshape(3, 3)
        return turn.T @ (self.cup() - self.data.xpos[self._base])

    def top(self, kind: str) -> np.ndarray:
        """Returns the middle of the upper side of an object's box, float64[3]."""
        geom = self.model.geom(kind).id
        turn = self.data.geom_xmat[geom].reshape(3, 3)
        up = int(abs(turn[2]).argmax())  # the axis of the box that points up or down
        offset = turn[:, up] * self.model.geom_size[geom, up] * np.sign(turn[2, up])
        return self.data.geom_xpos[geom] + offset

    def distance(self, kind: str) -> float:
        """Returns how far the cup is from the surface of an object's box, 0 inside."""
        geom = self.model.geom(kind).id
        turn = self.data.geom_xmat[geom].reshape(3, 3)
        local = turn.T @ (self.cup() - self.data.geom_xpos[geom])
        outside = np.maximum(abs(local) - self.model.geom_size[geom], 0.0)
        return float(np.linalg.norm(outside))

    # What changes the state.

    def act(self, forward: float, turn: float, arm: np.ndarray) -> None:
        """Drives for the time of a step (m/s, rad/s) while the joints go to new angles, their offsets in radians."""
        data, model = self.data, self.model
        goal = np.clip(self._goal + arm, self._low, self._high)
        self._goal = np.clip(
            goal, self.arm() - 0.3, self.arm() + 0.3
        )  # do not wind up at obstacles
        data.ctrl[3:] = self._goal
        total = 0.0
        for _ in range(SUBSTEPS):
            heading = data.qpos[2]
            data.ctrl[:3] = forward * math.cos(heading), forward * math.sin(heading), turn
            self._mujoco.mj_step(model, data)
            total += self._contact_force()
        self._mujoco.mj_kinematics(model, data)  # mj_step leaves poses one substep behind
        self.force = total / SUBSTEPS

    def _contact_force(self) -> float:
        """Returns the sum of the normal forces on the robot, in newtons."""
        if not self.data.ncon:
            return 0.0
        touching = np.flatnonzero(self._is_robot[self.data.contact.geom].any(1))
        total, force = 0.0, np.zeros(6)
        for contact in touching:
            self._mujoco.mj_contactForce(self.model, self.data, contact, force)
            total += force[0]
        return total

    def hold(self, kind: str) -> None:
        """Welds an object to the gripper as it is now."""
        data = self.data
        turn = data.xmat[self._gripper].reshape(3, 3)
        body = self.model.body(kind).id
        inverse, relative = np.zeros(4), np.zeros(4)
        self._mujoco.mju_negQuat(inverse, data.xquat[self._gripper])
        self._mujoco.mju_mulQuat(relative, inverse, data.xquat[body])
        weld = self.model.equality(kind).id
        self.model.eq_data[weld, :3] = 0
        self.model.eq_data[weld, 3:6] = turn.T @ (data.xpos[body] - data.xpos[self._gripper])
        self.model.eq_data[weld, 6:10] = relative
        data.eq_active[weld] = 1
        self._touches_robot(kind, False)
        self.held = kind

    def release(self) -> None:
        """Lets go of what is held."""
        if self.held is not None:
            self.data.eq_active[self.model.equality(self.held).id] = 0
            self._touches_robot(self.held, True)
        self.held = None

    def _touches_robot(self, kind: str, touches: bool) -> None:
        geom = self.model.geom(kind).id
        bits = self.model.geom_conaffinity[geom]
        self.model.geom_conaffinity[geom] = bits | ROBOT if touches else bits & ~ROBOT
