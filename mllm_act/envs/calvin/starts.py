"""Where an episode starts: scene, task, sentence, and the state of robot and scene.

Starts of the split ``test`` are the official ones. All others are drawn: a symbolic state in which the task is
possible, and then the poses of the blocks, anywhere on the surfaces that CALVIN's scene has for them.
"""

import dataclasses
from collections.abc import Mapping

import numpy as np

from mllm_act.envs.calvin import sequences
from mllm_act.envs.calvin.tasks import COLORS, State, outcomes

TRAIN_SCENES, TEST_SCENE = "ABC", "D"
SHELF_MARGIN = 0.03  # metres
APART = 0.11  # metres between the middles of two blocks
STACKED = 0.04  # metres between the middles of two stacked blocks
# The middle of each scene's drawer along x, and where blocks may lie in it when it is open, relative to that.
DRAWER_X = {"A": 0.1, "B": 0.18, "C": 0.1, "D": 0.18}
DRAWER = ((-0.12, -0.32, 0.361), (0.12, -0.25, 0.361))
SLIDER_END = {"C": 0.24}  # where the door ends, if before `sequences.SLIDER_OPEN`

Surfaces = Mapping[str, tuple[tuple[float, ...], tuple[float, ...]]]


@dataclasses.dataclass(frozen=True)
class Start:
    """The start of an episode."""

    scene: str  # A, B, C or D
    task: str
    state: State
    scene_obs: np.ndarray  # float64[24], in CALVIN's layout
    carries: str = ""  # the colour of the block that is lifted before the episode starts


def official(number: int) -> Start:
    """Returns the start of an official sequence and its first task."""
    state, tasks = sequences.load()[number]
    return Start(TEST_SCENE, tasks[0], state, sequences.scene_of(state))


def redrawn(number: int, surfaces: Surfaces, random: np.random.Generator) -> Start:
    """Returns the start of an official sequence with other poses of the blocks."""
    state, tasks = sequences.load()[number]
    return Start(TEST_SCENE, tasks[0], state, place(state, TEST_SCENE, tasks[0], surfaces, random))


def drawn(task: str, scene: str, surfaces: Surfaces, random: np.random.Generator) -> Start:
    """Returns a start in which a task is possible."""
    while True:
        state = draw_state(task, random)
        if outcomes(state, task):
            break
    held = next((color for color in COLORS if state[f"{color}_block"] == "grasped"), "")
    before = state | ({f"{held}_block": "table", "grasped": 0} if held else {})
    return Start(scene, task, state, place(before, scene, task, surfaces, random), held)


def draw_state(task: str, random: np.random.Generator) -> State:
    """Returns a symbolic state; blocks are where the task may need them, at most one at each end of the shelf."""
    places = ["table"] * 3 + ["slider_left", "slider_right"]
    if task.endswith("block_drawer"):
        places.append("drawer")
    state: State = {
        "led": int(random.integers(2)),
        "lightbulb": int(random.integers(2)),
        "slider": str(random.choice(["right", "left"])),
        "drawer": str(random.choice(["closed", "open"])),
        **dict(
            zip((f"{c}_block" for c in COLORS), map(str, random.permutation(places)), strict=False)
        ),
        "grasped": 0,
    }
    some, other = random.permutation(COLORS)[:2]
    if task in ("place_in_slider", "place_in_drawer", "stack_block"):
        state |= {f"{some}_block": "grasped", "grasped": 1}
    if task == "unstack_block":
        state |= {f"{some}_block": "stacked_top", f"{other}_block": "stacked_bottom"}
    return state


def place(
    state: State, scene: str, task: str, surfaces: Surfaces, random: np.random.Generator
) -> np.ndarray:
    """Returns ``scene_obs`` float64[24] of a symbolic state, with the blocks apart from each other.

    A block that is pushed into the drawer lies before it; those on the shelf are turned as in the official starts.
    """
    found = sequences.fixtures(state)
    found[0] = min(found[0], SLIDER_END.get(scene, found[0]))
    poses = {color: found[6 + 6 * i : 12 + 6 * i] for i, color in enumerate(COLORS)}
    middle = np.array([DRAWER_X[scene], 0, 0])
    drawer = tuple(middle + corner for corner in np.array(DRAWER))
    taken: list[np.ndarray] = []
    for color, pose in poses.items():
        lies = str(state[f"{color}_block"]).replace("stacked_bottom", "table")
        if lies == "stacked_top":
            continue
        low, high = map(np.array, drawer if lies == "drawer" else surfaces[lies])
        if lies.startswith("slider"):  # at its ends the hand would touch the frame
            low[0], high[0] = low[0] + SHELF_MARGIN, high[0] - SHELF_MARGIN
        if task == "push_into_drawer" and lies == "table":
            low[0], high[0] = max(low[0], middle[0] - 0.11), min(high[0], middle[0] + 0.11)
        for _ in range(1000):
            at = random.uniform(low, high)
            if all(np.linalg.norm(at - other) >= APART for other in taken):
                break
        taken.append(at)
        pose[:3] = at
        spread = np.pi / 8 if lies.startswith("slider") else np.pi
        pose[5] = np.pi / 2 + random.uniform(-spread, spread)
    for color, pose in poses.items():
        if state[f"{color}_block"] == "stacked_top":
            bottom = next(c for c in COLORS if state[f"{c}_block"] == "stacked_bottom")
            pose[:] = poses[bottom] + [0, 0, STACKED, 0, 0, 0]
    return found
