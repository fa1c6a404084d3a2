"""Scripted experts of CALVIN's 34 tasks, which see the whole state.

An expert is a list of moves of the hand, made when they are due, from what the state is then. The hand points down; its
position and its turn about the vertical are what moves set.
"""

import dataclasses
from collections.abc import Iterator

import numpy as np

from mllm_act.envs.base import ExpertFailed
from mllm_act.envs.calvin.tasks import COLORS

OPEN, CLOSED = 1.0, -1.0
NEUTRAL = np.pi / 2  # the turn of the hand at which the joints are far from their limits
SAFE = 0.60  # height of the fingertips at which nothing is in the way, metres
MOST_STEPS = 60  # of one move
SHELF, SHELF_TILT = 0.04, 0.6  # blocks with a larger y lie behind the sliding door; radians
# Blocks with a larger y lie so close to the door that the hand would touch its handle; radians
CLOSE, CLOSE_TILT = -0.09, 0.4
PER_STEP, TURN_PER_STEP = 0.02, 0.05  # of an action of 1: metres, radians


@dataclasses.dataclass(frozen=True)
class Move:
    """Where the fingertips go next."""

    at: np.ndarray  # float64[3], metres
    gripper: float  # OPEN or CLOSED
    yaw: float = NEUTRAL
    tilt: float = 0.0  # of the fingers to the front of the desk, away from the robot, radians
    lean: float = 0.0  # of the fingers to the right
    speed: float = 1.0  # of the fastest
    hold: int = 0  # steps to stay there
    near: float = 0.012  # metres: how close is close enough


class View:
    """The state after the latest step."""

    def __init__(self) -> None:
        self.robot = np.zeros(15)
        self.scene = np.zeros(24)
        self.target = np.zeros(6)
        self.parts = np.zeros((5, 2, 3))

    def block(self, color: str) -> tuple[np.ndarray, float]:
        """Returns a block's middle, float64[3] in metres, and its turn about the vertical in radians."""
        pose = self.scene[6 + 6 * COLORS.index(color) :][:6]
        return pose[:3].copy(), float(pose[5])

    def slider(self) -> np.ndarray:
        """Returns the middle of the door's handle, a bar that leans back."""
        return np.array([self.parts[0, :, 0].mean(), 0.016, 0.569])

    def drawer(self) -> np.ndarray:
        """Returns the middle of the drawer's handle, a bar along x."""
        return np.array([self.parts[1, :, 0].mean(), -0.25 - self.scene[1], 0.36])

    def switch(self) -> np.ndarray:
        """Returns the middle of the switch's bar, which slides up and back."""
        up = self.scene[3]
        return np.array([self.parts[2, :, 0].mean(), 0.019 + 0.5 * up, 0.528 + 0.866 * up])

    def button(self) -> np.ndarray:
        """Returns the middle of the button's upper side."""
        return np.array([self.parts[3, :, 0].mean(), -0.12, 0.485])


class Expert:
    """The expert of one episode."""

    def __init__(self, task: str, view: View) -> None:
        self._view = view
        self._moves = _script(task, view)
        self._move: Move | None = None
        self._steps = self._held = 0

    def act(self) -> np.ndarray:
        """Returns the action for the present state, float64[7].

        Raises:
          ExpertFailed: all moves are made.
        """
        while self._move is None or self._reached(self._move):
            self._move = next(self._moves, None)
            self._steps = self._held = 0
            if self._move is None:
                raise ExpertFailed("all moves of the expert are made")
        self._steps += 1
        target, move = self._view.target, self._move
        shift = (move.at - target[:3]) / PER_STEP
        shift *= min(1.0, move.speed / max(np.abs(shift).max(), 1e-9))
        turn = self._turn(move) / TURN_PER_STEP
        return np.concatenate([shift, np.clip(turn, -1, 1), [move.gripper]])

    def _turn(self, move: Move) -> np.ndarray:
        """Returns what is missing to the orientation of a move, three Euler angles."""
        missing = np.array([np.pi - move.lean, -move.tilt, move.yaw]) - self._view.target[3:]
        missing[:2] = (missing[:2] + np.pi) % (2 * np.pi) - np.pi
        return missing

    def _reached(self, move: Move) -> bool:
        view = self._view
        there = (
            np.abs(view.target[:3] - move.at).max() < 0.003
            and np.abs(self._turn(move)).max() < 0.06
            and np.linalg.norm(view.robot[:3] - move.at) < move.near
        )
        self._held += int(there)
        return self._held > move.hold or self._steps >= MOST_STEPS + move.hold


def over(at: np.ndarray, height: float = SAFE) -> np.ndarray:
    """Returns the point above another at a height, metres."""
    return np.array([at[0], at[1], height])


def backward(yaw: float, tilt: float) -> np.ndarray:
    """Returns the direction from the fingertips to the hand, a unit vector float64[3]."""
    flat = -np.sin(tilt)
    return np.array([flat * np.cos(yaw), flat * np.sin(yaw), np.cos(tilt)])


def tilt_for(view: View, at: np.ndarray) -> float:
    """Returns the tilt with which the hand reaches a block: it would touch the sliding door or its handle."""
    if at[1] > SHELF:
        return SHELF_TILT
    close = at[1] > CLOSE and abs(at[0] - view.slider()[0]) < 0.2
    return CLOSE_TILT if close else 0.0


def _script(task: str, view: View) -> Iterator[Move]:
    words = task.split("_")
    match words:
        case ["open", "drawer"]:
            yield from open_drawer(view)
        case ["close", "drawer"]:
            yield from close_drawer(view)
        case ["move", "slider", side]:
            yield from move_slider(view, -1.0 if side == "left" else 1.0)
        case ["turn", "on", "lightbulb"]:
            yield from switch_up(view)
        case ["turn", "off", "lightbulb"]:
            yield from switch_down(view)
        case ["turn", _, "led"]:
            yield from press_button(view)
        case ["lift", color, "block", _]:
            yield from lift(view, color)
        case ["rotate", color, "block", side]:
            yield from rotate(view, color, -1.0 if side == "right" else 1.0)
        case ["push", color, "block", side]:
            yield from push(view, color, 1.0 if side == "right" else -1.0)
        case ["place", "in", where]:
            yield from (place_in_slider if where == "slider" else place_in_drawer)(view)
        case ["stack", "block"]:
            yield from stack(view)
        case ["unstack", "block"]:
            yield from lift(view, max(COLORS, key=lambda color: view.block(color)[0][2]))
        case ["push", "into", "drawer"]:
            yield from push_into_drawer(view)


def rise(view: View, gripper: float, height: float = SAFE) -> Iterator[Move]:
    """Takes the hand up from where it is."""
    if view.target[2] < height - 0.01:
        yield Move(over(view.target, height), gripper, view.target[5], near=0.03)


def open_drawer(view: View) -> Iterator[Move]:
    """Reaches behind the handle from above and pulls."""
    yield from rise(view, CLOSED)
    handle = view.drawer()
    behind = handle + [0, 0.035, -0.005]
    yield Move(over(behind), CLOSED, near=0.03)
    yield Move(behind, CLOSED)
    yield Move(behind + [0, -0.2, 0], CLOSED, speed=0.5)


def close_drawer(view: View) -> Iterator[Move]:
    """Pushes the handle from the front."""
    yield from rise(view, CLOSED)
    handle = view.drawer()
    front = handle + [0, -0.06, 0]
    yield Move(over(front), CLOSED, near=0.03)
    yield Move(front, CLOSED)
    yield Move(front + [0, 0.06 + view.scene[1], 0], CLOSED, speed=0.5)


def move_slider(view: View, direction: float) -> Iterator[Move]:
    """Pushes the bar of the door from its side; ``direction`` is that of the push along x."""
    yield from rise(view, CLOSED, 0.66)
    beside = view.slider() + [-direction * 0.07, -0.02, -0.02]
    yield Move(over(beside, 0.66), CLOSED, near=0.03)
    yield Move(beside, CLOSED)
    yield Move(beside + [direction * 0.35, 0, 0], CLOSED, speed=0.5)


def switch_up(view: View) -> Iterator[Move]:
    """Takes the bar up from below, with tilted fingers."""
    yield from rise(view, CLOSED, 0.66)
    below = view.switch() + [0, -0.05, -0.045]
    yield Move(over(below - [0, 0.06, 0], 0.62), CLOSED, tilt=0.9, near=0.04)
    yield Move(below - [0, 0.04, 0], CLOSED, tilt=0.9, near=0.03)
    yield Move(below + [0, 0.03, 0.0], CLOSED, tilt=0.9, near=0.02)
    yield Move(below + [0, 0.09, 0.14], CLOSED, tilt=0.9, speed=0.5)


def switch_down(view: View) -> Iterator[Move]:
    """Presses the bar down from above."""
    bar = view.switch()
    lean = 0.5 if bar[0] > 0.1 else 0.0  # a far switch is at the end of the arm's reach
    yield from rise(view, CLOSED, 0.70)
    yield Move(bar + [0, 0.03, 0.07], CLOSED, lean=lean, near=0.03)
    yield Move(bar + [0, -0.055, -0.095], CLOSED, lean=lean, speed=0.5)


def press_button(view: View) -> Iterator[Move]:
    """Presses the button with closed fingers."""
    yield from rise(view, CLOSED)
    button = view.button()
    yield Move(over(button, 0.55), CLOSED)
    yield Move(over(button, 0.455), CLOSED, speed=0.5)
    yield Move(over(button, 0.55), CLOSED)


def grasp_yaw(view: View, color: str, near: float = NEUTRAL) -> float:
    """Returns the turn of the hand that takes a block across its shorter side, the one nearest to ``near``."""
    _, yaw = view.block(color)
    period = np.pi / 2 if color == "blue" else np.pi
    return float(near + (yaw - near + period / 2) % period - period / 2)


def grasp(view: View, color: str, near: float = NEUTRAL) -> Iterator[Move]:
    """Takes a block from above; tries again if the fingers have closed on nothing."""
    for _ in range(3):
        at, yaw = view.block(color)[0], grasp_yaw(view, color, near)
        tilt = tilt_for(view, at)
        back = backward(yaw, tilt)
        yield from rise(view, OPEN, max(SAFE, at[2] + 0.1))
        yield Move(at + 0.15 * back, OPEN, yaw, tilt, near=0.03)
        at = view.block(color)[0]
        yield Move(at, OPEN, yaw, tilt)
        yield Move(at, CLOSED, yaw, tilt, hold=6)
        if view.robot[6] > 0.02:
            return


def lift(view: View, color: str) -> Iterator[Move]:
    """Takes a block and raises it."""
    yield from grasp(view, color)
    yaw, tilt = view.target[5], -view.target[4]
    yield Move(view.target[:3] + 0.15 * backward(yaw, tilt), CLOSED, yaw, tilt)


def rotate(view: View, color: str, direction: float) -> Iterator[Move]:
    """Takes a block and turns it where it lies; ``direction`` is 1 for anticlockwise."""
    turn = direction * 1.45  # 83 degrees
    yield from grasp(view, color, NEUTRAL - turn / 2)
    at, tilt = view.target[:3].copy(), -view.target[4]
    yaw = view.target[5] + turn
    yield Move(at, CLOSED, yaw, tilt)
    yield Move(at, OPEN, yaw, tilt, hold=10)


def push(view: View, color: str, direction: float) -> Iterator[Move]:
    """Pushes a block along x from its side; again if it has slipped away."""
    first = view.block(color)[0][0]
    for _ in range(3):
        at = view.block(color)[0]
        left = 0.13 - direction * (at[0] - first)
        if left < 0.02:
            return
        yield from rise(view, CLOSED)
        tilt = tilt_for(view, at)
        lean = 0.4 if at[0] > 0.15 else 0.0
        beside = at + [-direction * 0.075, 0, -0.002]
        end = at + [direction * left, 0, -0.002]
        yield Move(over(beside), CLOSED, tilt=tilt, lean=lean, near=0.03)
        yield Move(beside, CLOSED, tilt=tilt, lean=lean)
        yield Move(end, CLOSED, tilt=tilt, lean=lean, speed=0.5)


def held(view: View) -> str:
    """Returns the colour of the block in the hand."""
    return min(COLORS, key=lambda color: np.linalg.norm(view.block(color)[0] - view.robot[:3]))


def carry(
    view: View, color: str, to: np.ndarray, yaw: float, tilt: float, above: float
) -> Iterator[Move]:
    """Takes the held block to a place, by a point above it, and opens the hand there."""
    back = backward(yaw, tilt)
    yield from rise(view, CLOSED, SAFE)
    yield Move(to + above * back, CLOSED, yaw, tilt, near=0.03)
    to = to - (view.block(color)[0] - view.robot[:3])
    yield Move(to + above * back, CLOSED, yaw, tilt)
    yield Move(to, CLOSED, yaw, tilt, speed=0.5)
    yield Move(to, OPEN, yaw, tilt, hold=5)
    yield Move(to + 0.15 * back, OPEN, yaw, tilt, hold=10)


def place_in_slider(view: View) -> Iterator[Move]:
    """Puts the held block where the door is not."""
    middle = view.parts[4, :, 0].mean()
    side = -1.0 if view.slider()[0] > middle else 1.0
    to = np.array([middle + side * 0.13, 0.085, 0.475])
    yield from carry(view, held(view), to, NEUTRAL, SHELF_TILT, 0.16)


def place_in_drawer(view: View) -> Iterator[Move]:
    """Puts the held block into the drawer."""
    to = np.array([view.drawer()[0], -0.06 - view.scene[1], 0.385])
    yield from carry(view, held(view), to, NEUTRAL, 0.0, 0.16)


def stack(view: View) -> Iterator[Move]:
    """Puts the held block on the nearest other one that lies on the table."""
    color = held(view)
    others = [view.block(other) for other in COLORS if other != color]
    on_table = [block for block in others if -0.2 < block[0][1] < SHELF]
    if not on_table:
        return
    below, _ = min(on_table, key=lambda block: np.linalg.norm(block[0] - view.robot[:3]))
    tilt = tilt_for(view, below)
    yield from carry(view, color, below + [0, 0, 0.043], view.target[5], tilt, 0.1)


def push_into_drawer(view: View) -> Iterator[Move]:
    """Pushes the block that lies on the table over its edge."""
    on_table = [color for color in COLORS if -0.2 < view.block(color)[0][1] < SHELF]
    if not on_table:
        return
    color = on_table[0]
    yield from rise(view, CLOSED)
    at = view.block(color)[0]
    behind = at + [0, 0.06, 0]
    yield Move(over(behind + [0, -0.04, 0]), CLOSED, tilt=CLOSE_TILT, near=0.03)
    yield Move(behind, CLOSED, tilt=CLOSE_TILT)
    end = np.array([at[0], -0.23, at[2]])
    yield Move(end, CLOSED, tilt=CLOSE_TILT, speed=0.5)
    yield Move(over(end), CLOSED, hold=15)
