"""A corridor of cells: the sentence says at which end the goal is. Solved in ``GOAL`` steps, or not at all.

With the goal one step away and a horizon of 1, it is a contextual bandit.
"""

import os

import numpy as np

from mllm_act.envs.base import EnvObservation, EnvSpec, choice

GOAL, HORIZON = 2, 5
SPEC = EnvSpec(
    name="corridor",
    action_names=("action",),
    action_units=("index",),
    action_scale=(1.0,),
    action_low=(0.0,),
    action_high=(2.0,),
    proprio_names=("x",),
    cameras=("front",),
    image_size=8,
    control_hz=1.0,
    horizon=HORIZON,
    choices=("walk left", "walk right", "wait"),
    time_limit="terminal",
)
INSTRUCTIONS = {"left": "go left", "right": "go right"}
GROUPS = {"both": ("left", "right")}
SPLITS = {"train": range(0, 4), "test": range(4, 6)}


def make(render: bool = True) -> "Corridor":
    return Corridor()


class Corridor:
    """Reward 1 at the goal. What goes wrong on demand is named by environment variables."""

    spec = SPEC

    def reset(self, task: str, configuration: int, seed: int) -> EnvObservation:
        away = int(os.environ.get("CORRIDOR_GOAL", GOAL))
        self._task, self._x, self._goal = task, 0, away * (-1 if task == "left" else 1)
        return self._observe()

    def step(self, action: np.ndarray) -> tuple[EnvObservation, float, bool]:
        kill = os.environ.get("CORRIDOR_KILLS")  # a file: whoever removes it ends its process
        if kill and os.path.exists(kill):
            os.unlink(kill)
            os._exit(7)
        self._x += (-1, 1, 0)[choice(SPEC, action, self._task)]
        success = self._x == self._goal
        reward = float(os.environ.get("CORRIDOR_REWARD", success))
        return self._observe(), reward, success

    def expert_action(self) -> np.ndarray:
        return np.array([float(self._goal > 0)], np.float32)

    def close(self) -> None:
        pass

    def _observe(self) -> EnvObservation:
        image = np.zeros((8, 8, 3), np.uint8)
        image[:, np.clip(4 + self._x, 0, 7)] = 255
        return {
            "images": {"front": image},
            "proprio": np.array([self._x], np.float32),
            "instruction": np.array(INSTRUCTIONS[self._task]),
        }
