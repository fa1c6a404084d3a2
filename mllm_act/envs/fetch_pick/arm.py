"""Inverse kinematics of the arm: joints that put the cup at a point with the hand in a direction, elbow to the right.

Damped least squares on a model of the robot alone. Five of the seven joints' freedoms are needed; the other two keep
the arm near `ELBOW_OUT`, in which it leaves the head camera's view of the target free.
"""

import functools
from typing import Any

import numpy as np

from mllm_act.envs.fetch_pick import robot
from mllm_act.envs.mujoco_rendering import import_mujoco

ELBOW_OUT = np.array([-0.8, 0.1, 1.5, 1.4, -1.5, 1.2, 0.0])
ITERATIONS = 60
PRECISE = 0.004  # metres and radians, at which it stops
DAMPING = 0.05
STEP = 0.3  # radians, at most, of a joint in an iteration


class Arm:
    """The robot without a room, standing at the origin."""

    def __init__(self) -> None:
        self._mujoco, self._model = import_mujoco(), _compiled()
        self._data = self._mujoco.MjData(self._model)
        joints = [self._model.joint(name) for name in robot.JOINTS]
        ids = [joint.id for joint in joints]
        self._address = np.array([joint.qposadr[0] for joint in joints])
        self._dofs = np.array([joint.dofadr[0] for joint in joints])
        limited = self._model.jnt_limited[ids].astype(bool)
        low, high = self._model.jnt_range[ids].T
        self._low, self._high = np.where(limited, low + 0.02, -3.0), np.where(limited, high - 0.02, 3.0)  # fmt: skip
        self._cup = self._model.site("cup").id

    def place(self, joints: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns where the cup is, float64[3], and the direction of the hand, float64[3], in the robot's frame."""
        self._data.qpos[self._address] = joints
        self._mujoco.mj_kinematics(self._model, self._data)
        turn = self._data.site_xmat[self._cup].reshape(3, 3)
        return self._data.site_xpos[self._cup].copy(), turn[:, 0].copy()

    def solve(
        self, point: np.ndarray, direction: np.ndarray, start: np.ndarray
    ) -> tuple[np.ndarray, float]:
        """Returns joints, float64[7], and by how much they miss (metres, and radians of direction times 0.3).

        Args:
          point: of the cup, float64[3], in the robot's frame.
          direction: of the hand, a unit vector, float64[3].
          start: joints to begin from.
        """
        joints = start.clip(self._low, self._high)
        place, turning = np.zeros((3, self._model.nv)), np.zeros((3, self._model.nv))
        miss = np.inf
        for _ in range(ITERATIONS):
            at, along = self.place(joints)
            error = np.concatenate([point - at, 0.3 * np.cross(along, direction)])
            miss = float(np.linalg.norm(error))
            if miss < PRECISE:
                break
            self._mujoco.mj_comPos(self._model, self._data)
            self._mujoco.mj_jacSite(self._model, self._data, place, turning, self._cup)
            jacobian = np.concatenate([place, 0.3 * turning])[:, self._dofs]
            inverse = jacobian.T @ np.linalg.inv(jacobian @ jacobian.T + DAMPING**2 * np.eye(6))
            home = 0.1 * (ELBOW_OUT - joints)
            change = inverse @ error + home - inverse @ (jacobian @ home)
            change *= min(1.0, STEP / abs(change).max())
            joints = (joints + change).clip(self._low, self._high)
        return joints, miss


@functools.cache
def _compiled() -> Any:
    return import_mujoco().MjModel.from_xml_string(
        f"<mujoco><asset>{robot.meshes()}</asset><worldbody>{robot.body()}</worldbody></mujoco>"
    )
