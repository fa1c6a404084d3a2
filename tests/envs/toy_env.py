"""A whole environment in one file: a position on a line that has to reach the goal, without a simulator."""

import numpy as np

from mllm_act.envs.base import EnvObservation, EnvSpec, check_action

SPEC = EnvSpec(
    name="toy",
    action_names=("dx",),
    action_units=("m",),
    action_scale=(1.0,),
    action_low=(-1.0,),
    action_high=(1.0,),
    proprio_names=("x",),
    cameras=("front",),
    image_size=8,
    control_hz=10.0,
    horizon=20,
)
INSTRUCTIONS = {"left": "go left", "right": "go right"}
GROUPS = {"both": ("left", "right")}
SPLITS = {"train": range(0, 3), "test": range(3, 5)}


def make(render: bool = True) -> "ToyEnv":
    return ToyEnv(render)


class ToyEnv:
    """Starts at 0; the goal is ``configuration + 1`` metres to the left or to the right."""

    spec = SPEC

    def __init__(self, render: bool) -> None:
        self._render = render

    def reset(self, task: str, configuration: int, seed: int) -> EnvObservation:
        self._task, self._x = task, 0.0
        self._goal = (configuration + 1) * (-1.0 if task == "left" else 1.0)
        return self._observe()

    def step(self, action: np.ndarray) -> tuple[EnvObservation, float, bool]:
        self._x += float(check_action(SPEC, action, self._task)[0])
        success = abs(self._x - self._goal) < 0.1
        return self._observe(), float(success), success

    def expert_action(self) -> np.ndarray:
        return check_action(SPEC, np.array([self._goal - self._x]), self._task)

    def close(self) -> None:
        pass

    def _observe(self) -> EnvObservation:
        image = np.full((8, 8, 3), round(abs(self._x)), np.uint8)
        return {
            "images": {"front": image} if self._render else {},
            "proprio": np.array([self._x], np.float32),
            "instruction": np.array(INSTRUCTIONS[self._task]),
        }
