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
APART = 0.11  # metres between the middles of two blocks
STACKED = 0.045  # metres between the middles of two stacked blocks
# The part of the open drawer that the hand reaches, relative to the middle of the table's surface.
DRAWER = ((-0.08, -0.25, 0.40), (0.08, -0.2, 0.40))

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
    return Start(TEST_SCENE, tasks[0], state, place(state, surfaces, random))


def drawn(task: str, scene: str, surfaces: Surfaces, random: np.random.Generator) -> Start:
    """Returns a start in which a task is possible."""
    while True:
        state = draw_state(task, random)
        if outcomes(state, task):
            break
    held = next((color for color in COLORS if state[f"{color}_block"] == "grasped"), "")
    before = state | ({f"{held}_block": "table", "grasped": 0} if held else {})
    return Start(scene, task, state, place(before, surfaces, random), held)


def draw_state(task: str, random: np.random.Generator) -> State:
    """Returns a symbolic state; blocks are where the task may need them."""
    places = ["table", "table", "slider_left", "slider_right"]
    if task.endswith("block_drawer"):
        places.append("drawer")
    state: State = {
        "led": int(random.integers(2)),
        "lightbulb": int(random.integers(2)),
        "slider": str(random.choice(["right", "left"])),
        "drawer": str(random.choice(["closed", "open"])),
        **{f"{color}_block": str(random.choice(places)) for color in COLORS},
        "grasped": 0,
    }
    some, other = random.permutation(COLORS)[:2]
    if task in ("place_in_slider", "place_in_drawer", "stack_block"):
        state |= {f"{some}_block": "grasped", "grasped": 1}
    if task == "unstack_block":
        state |= {f"{some}_block": "stacked_top", f"{other}_block": "stacked_bottom"}
    return state


def place(state: State, surfaces: Surfaces, random: np.random.Generator) -> np.ndarray:
    """Returns ``scene_obs`` float64[24] of a symbolic state, with the blocks apart from each other."""
    scene = sequences.fixtures(state)
    taken: list[np.ndarray] = []
    for i, color in sorted(
        enumerate(COLORS), key=lambda item: state[f"{item[1]}_block"] == "stacked_top"
    ):
        lies = str(state[f"{color}_block"])
        if lies == "stacked_top":
            bottom = next(c for c in COLORS if state[f"{c}_block"] == "stacked_bottom")
            below = scene[6 + 6 * COLORS.index(bottom) :][:6]
            scene[6 + 6 * i : 12 + 6 * i] = below + [0, 0, STACKED, 0, 0, 0]
            continue
        where = "table" if lies == "stacked_bottom" else lies
        low, high = map(np.array, DRAWER if where == "drawer" else surfaces[where])
        for _ in range(1000):
            at = random.uniform(low, high)
            if all(np.linalg.norm(at - other) >= APART for other in taken):
                break
        taken.append(at)
        scene[6 + 6 * i : 9 + 6 * i] = at
        scene[11 + 6 * i] = random.uniform(-np.pi, np.pi)
    return scene
