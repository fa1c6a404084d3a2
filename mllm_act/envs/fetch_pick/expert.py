"""The scripted expert: drives to the target, takes it from above and brings it to rest, base and arm together.

It sees the state: poses of robot and target. Where it stops and how steeply the hand points down are planned at the
start; the arm then follows inverse kinematics (`arm`).
"""

import math

import numpy as np

from mllm_act.envs.fetch_pick.arm import ELBOW_OUT, Arm
from mllm_act.envs.fetch_pick.robot import REST
from mllm_act.envs.fetch_pick.rooms import Episode
from mllm_act.envs.fetch_pick.scene import Scene

CLEAR = 0.38  # metres from the middle of the base to the front edge of the furniture
NEAR = 0.6  # metres: the least distance of the base from a target
FAR = 1.0  # metres: the greatest
UNFOLD = 0.35  # metres before the end of the way, where the arm begins to reach
ABOVE = 0.12  # metres above the target, where the arm waits for the hand to be over it
TOUCH = 0.01  # metres above the target, where the hand goes
CLOSE = 0.03  # metres from the target, where suction is switched on; a policy may be less exact
MISS = 0.015  # metres that a solution for the arm may miss
LIFT = 0.1  # metres that the target is lifted before the arm goes to rest
STOPPED = 0.04  # metres of way left, where the robot stands
ASTRAY = 0.15  # radians from the target, at which a standing robot turns
BACK = 0.25  # metres that the robot then drives back


def _angle(value: float) -> float:
    return (value + math.pi) % (2 * math.pi) - math.pi


def _down(pitch: float) -> np.ndarray:
    return np.array([math.cos(pitch), 0.0, -math.sin(pitch)])


class Expert:
    """The expert of one episode."""

    def __init__(self, scene: Scene, episode: Episode) -> None:
        self._scene, self._arm = scene, Arm()
        target = episode.things[0]
        self._target = target.kind
        self._piece = min(episode.room.pieces, key=lambda piece: piece.distance(target.x, target.y))
        self._plan: tuple[float, float, np.ndarray] | None = None
        self._taken_at: np.ndarray | None = None  # where the cup took the target
        self._lifted = False

    def _planned(self) -> tuple[float, float, np.ndarray]:
        """Returns the distance from the target at which the robot stops on the straight way to it, the hand's pitch,
        and the joints with the cup above the target then.
        """
        if self._plan is not None:
            return self._plan
        goal, least = self._scene.top(self._target), self._nearest()
        steepest = float(np.interp(goal[2], (0.8, 1.2), (1.3, 0.7)))
        for pitch in (steepest, steepest - 0.2, steepest - 0.4):
            for distance in np.arange(least, FAR, 0.08):
                point = np.array([distance, 0, goal[2] + TOUCH + ABOVE])
                above, miss = self._arm.solve(point, _down(pitch), ELBOW_OUT)
                point[2] -= ABOVE
                if miss < MISS and self._arm.solve(point, _down(pitch), above)[1] < MISS:
                    self._plan = float(distance), pitch, above
                    return self._plan
        self._plan = least, steepest, ELBOW_OUT  # out of reach, unless it moves nearer
        return self._plan

    def _nearest(self) -> float:
        """Returns the least distance from the target at which the base is clear of the furniture."""
        x, y, _ = self._scene.base()
        goal = self._scene.top(self._target)
        away = math.hypot(x - goal[0], y - goal[1])
        distance = NEAR
        while distance < FAR:
            share = distance / away
            at = goal[0] + share * (x - goal[0]), goal[1] + share * (y - goal[1])
            if self._piece.distance(*at) >= CLEAR:
                break
            distance += 0.01
        return distance

    def action(self) -> np.ndarray:
        """Returns forward (m/s), turn (rad/s), the offsets of seven joints (rad) and suction (-1 or 1), float64[10].

        They are not yet limited.
        """
        return self._bring() if self._scene.held == self._target else self._fetch()

    def _fetch(self) -> np.ndarray:
        scene = self._scene
        self._taken_at, self._lifted = None, False
        standoff, _, above = self._planned()
        goal, (x, y, heading) = scene.top(self._target), scene.base()
        way = math.hypot(goal[0] - x, goal[1] - y) - standoff
        bearing = _angle(math.atan2(goal[1] - y, goal[0] - x) - heading)
        forward = 8 * way * max(0.0, math.cos(bearing)) ** 4
        if way > UNFOLD or abs(bearing) > 0.6:
            return self._command(forward, bearing, np.array(REST), -1)
        aside = math.hypot(*(scene.cup() - goal)[:2])
        if way > STOPPED or aside > 0.15:
            return self._command(forward, bearing, above, -1)
        height = TOUCH + min(max(6 * (aside - 0.015), 0.0), ABOVE)
        close = scene.distance(self._target) < CLOSE and aside < 0.04
        # What moved the base is corrected, also while the arm reaches; the noise of demonstrations alone is not.
        forward = 8 * way if way < -STOPPED else 0.0
        turn = bearing if abs(bearing) > ASTRAY else 0.0
        return self._command(forward, turn, self._over(goal, height), 1 if close else -1)

    def _over(self, point: np.ndarray, height: float) -> np.ndarray:
        """Returns the joints with the cup this high above a point of the room, float64[7]; out of reach, those with
        which the arm waits for the base.
        """
        x, y, heading = self._scene.base()
        c, s = math.cos(heading), math.sin(heading)
        dx, dy = point[0] - x, point[1] - y
        local = np.array([c * dx + s * dy, -s * dx + c * dy, point[2] + height])
        _, pitch, above = self._planned()
        joints, miss = self._arm.solve(local, _down(pitch), self._scene.arm_goal())
        return joints if miss < 4 * MISS else above

    def _bring(self) -> np.ndarray:
        scene = self._scene
        cup, (x, y, _) = scene.cup(), scene.base()
        if self._taken_at is None:
            self._taken_at = cup
        taken = self._taken_at
        self._lifted = self._lifted or cup[2] - taken[2] > LIFT - 0.03
        if not self._lifted:
            return self._command(0.0, 0.0, self._over(taken, LIFT), 1)
        left = self._planned()[0] + BACK - math.hypot(x - taken[0], y - taken[1])
        return self._command(-8 * max(left, 0.0), 0.0, np.array(REST), 1)

    def _command(self, forward: float, bearing: float, arm: np.ndarray, suction: int) -> np.ndarray:
        offset = arm - self._scene.arm_goal()
        return np.array([forward, 6 * bearing, *offset, suction])
