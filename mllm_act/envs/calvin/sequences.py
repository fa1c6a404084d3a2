"""The 1,000 sequences of five tasks of CALVIN's evaluation, and the states that they start in.

    python -m mllm_act.envs.calvin.sequences

draws the sequences again (two minutes) and writes sequences.json. This follows the published protocol to the random
number: the same generators, seeds and order of draws, so that the sequences are the official ones.
"""

import functools
import itertools
import json
from pathlib import Path

import numpy as np

from mllm_act.envs.calvin.tasks import COLORS, KIND, TASKS, State, outcomes

FILE = Path(__file__).with_name("sequences.json")
SEQUENCES, LENGTH = 1000, 5
# Where the official evaluation puts blocks, metres.
SLIDER_LEFT = (-2.40851662e-01, 9.24044687e-02, 4.60990009e-01)
SLIDER_RIGHT = (7.03416330e-02, 9.24044687e-02, 4.60990009e-01)
TABLE = (
    (5.00000896e-02, -1.20000177e-01, 4.59990009e-01),
    (2.29995412e-01, -1.19995140e-01, 4.59990010e-01),
)
# Position and Euler angles of the hand, opening of the gripper, seven joints, last gripper command.
ROBOT = (
    0.02586889, -0.2313129, 0.5712808, 3.09045411, -0.02908596, 1.50013585, 0.07999963,
    -1.21779124, 1.03987629, 2.11978254, -2.34205014, -0.87015899, 1.64119093, 0.55344928, 1.0,
)  # fmt: skip
SLIDER_OPEN, DRAWER_OPEN, SWITCH_ON = 0.28, 0.22, 0.088  # joints, metres and radians


def initial_states() -> list[State]:
    """Returns the symbolic states that sequences start in: one or two blocks on the table, none two at one place."""
    places = ("table", "slider_right", "slider_left")
    values = itertools.product(
        (0, 1), (0, 1), ("right", "left"), ("closed", "open"), places, places, places, (0,)
    )
    keys = (
        "led",
        "lightbulb",
        "slider",
        "drawer",
        *(f"{color}_block" for color in COLORS),
        "grasped",
    )
    return [
        dict(zip(keys, row, strict=True))
        for row in values
        if row.count("table") in (1, 2)
        and row.count("slider_right") < 2
        and row.count("slider_left") < 2
    ]


def draw_of_state(number: int, state: State, count: int) -> list[tuple[str, ...]]:
    """Returns the first ``count`` possible sequences that the generator with the seed ``number`` draws."""
    random = np.random.RandomState(number)
    drawn: list[tuple[str, ...]] = []
    while len(drawn) < count:
        names = tuple(TASKS[i] for i in random.permutation(len(TASKS))[:LENGTH])
        if len({KIND[name] for name in names}) == LENGTH and possible(state, names):
            drawn.append(names)
    return drawn


def possible(state: State, names: tuple[str, ...]) -> bool:
    """Returns whether each task is possible after the ones before it, with exactly one outcome."""
    for name in names:
        found = outcomes(state, name)
        if len(found) != 1:
            return False
        (state,) = found
    return True


def draw() -> list[tuple[State, tuple[str, ...]]]:
    """Returns the official sequences; takes about two minutes."""
    states = initial_states()
    counts = [len(part) for part in np.array_split(np.arange(SEQUENCES), len(states))]
    drawn = [
        (state, names)
        for number, (state, count) in enumerate(zip(states, counts, strict=True))
        for names in draw_of_state(number, state, count)
    ]
    order = np.arange(len(drawn))
    np.random.RandomState(0).shuffle(order)  # shuffles any sequence of this length alike
    return [drawn[i] for i in order]


@functools.cache
def load() -> list[tuple[State, tuple[str, ...]]]:
    """Returns the official sequences from sequences.json."""
    states = initial_states()
    rows = json.loads(FILE.read_text())
    return [(states[number], tuple(TASKS[i] for i in tasks)) for number, *tasks in rows]


def fnv1(text: str) -> int:
    """Returns the 32-bit FNV-1 hash of a text in UTF-16 that starts from 0, as CALVIN's evaluation computes it."""
    value = 0
    for byte in text.encode("utf-16-le"):
        value = (value * 16777619 & 0xFFFFFFFF) ^ byte
    return value


def scene_of(state: State) -> np.ndarray:
    """Returns the official ``scene_obs`` float64[24] of a symbolic state."""
    random = np.random.RandomState(fnv1(f"dict_values({list(state.values())})"))
    table = np.array(TABLE)
    random.shuffle(table)
    scene = fixtures(state)
    for i, color in enumerate(COLORS):
        place = state[f"{color}_block"]
        first = color == "red" or (color == "blue" and state["red_block"] != "table")
        at = {"slider_left": SLIDER_LEFT, "slider_right": SLIDER_RIGHT}
        scene[6 + 6 * i : 9 + 6 * i] = at.get(str(place), table[0] if first else table[1])
        scene[11 + 6 * i] = random.uniform(np.pi / 2 - np.pi / 8, np.pi / 2 + np.pi / 8)
    return scene


def fixtures(state: State) -> np.ndarray:
    """Returns ``scene_obs`` float64[24] with door, drawer, switch and lights of a state, and no blocks yet."""
    scene = np.zeros(24)
    scene[0] = SLIDER_OPEN * (state["slider"] == "left")
    scene[1] = DRAWER_OPEN * (state["drawer"] == "open")
    scene[3] = SWITCH_ON * (state["lightbulb"] == 1)
    scene[4:6] = state["lightbulb"], state["led"]
    return scene


def main() -> None:
    """Writes sequences.json: of each sequence the number of its initial state and those of its tasks."""
    states = initial_states()
    rows = [[states.index(s), *(TASKS.index(name) for name in names)] for s, names in draw()]
    FILE.write_text("[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n")


if __name__ == "__main__":
    main()
