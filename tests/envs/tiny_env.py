"""An environment in the spaces of ``tests.data_pipelines.tiny_rlds``: a policy trained on that data can act in it."""

import zlib

import numpy as np

from mllm_act.envs.base import EnvObservation, EnvSpec, check_action

SPEC = EnvSpec(
    name="tiny",
    action_names=("dx", "dy", "dz", "gripper"),
    action_units=("m", "m", "m", "effort"),
    action_scale=(0.01, 0.01, 0.01, 1.0),
    action_low=(-1.0,) * 4,
    action_high=(1.0,) * 4,
    proprio_names=("x", "y", "z"),
    cameras=("corner4",),
    image_size=16,
    control_hz=10.0,
    horizon=8,
)
INSTRUCTIONS = {"task-0": "do task 0", "task-1": "do task 1"}
GROUPS = {"all": tuple(INSTRUCTIONS)}
SPLITS = {"train": range(0, 2), "test": range(2, 5)}


def make(render: bool = True) -> "TinyEnv":
    return TinyEnv()


class TinyEnv:
    """The gripper moves, and the image shows where it is. An episode is solved once it has moved far enough."""

    spec = SPEC

    def reset(self, task: str, configuration: int, seed: int) -> EnvObservation:
        self._task = task
        self._image = np.random.default_rng([zlib.crc32(task.encode()), configuration, seed])
        self._position = np.zeros(3, np.float32)
        return self._observe()

    def step(self, action: np.ndarray) -> tuple[EnvObservation, float, bool]:
        self._position = self._position + check_action(SPEC, action, self._task)[:3]
        return self._observe(), 0.0, bool(abs(self._position).max() > 2)

    def expert_action(self) -> np.ndarray:
        return np.ones(4, np.float32)

    def close(self) -> None:
        pass

    def _observe(self) -> EnvObservation:
        image = self._image.integers(0, 200, (16, 16, 3), np.uint8)
        return {
            "images": {"corner4": image + np.uint8(10 * min(abs(self._position).max(), 5))},
            "proprio": self._position,
            "instruction": np.array(INSTRUCTIONS[self._task]),
        }
