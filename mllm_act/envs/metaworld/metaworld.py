"""Meta-World (arXiv 1910.10897; package ``metaworld`` 3.1.1): 45 training and 5 held-out tasks of a Sawyer arm.

Conventions, the same for demonstrations and evaluation:

* The camera is ``corner4`` at 200 x 200. It is mounted upside down, so its image is rotated by 180 degrees: upright
  and not mirrored, with the robot's base at the left. (Papers with mujoco-py flipped it vertically instead, which is
  upright but mirrored.)
* Goal markers are drawn at the goal of the task. Meta-World's own ``step`` puts them there and then loses them for
  assembly, disassemble, coffee-button, door-lock, door-unlock, pick-out-of-hole and sweep, so that a policy that only
  sees the image could not know the goal.
* Each task has the 50 start/goal configurations of ``MT1(task, seed=CONFIG_SEED)``. They determine the episode
  completely; the seed of ``reset`` has no effect. (ML45's constructor samples similar ones for all tasks, but takes
  half a minute.)
* The expert sees the whole state and the goal; a policy sees the image and the hand: xyz in metres and the opening of
  the gripper, from 0 (closed) to 1 (0.1 m).
"""

import functools
import warnings
from typing import Any

import numpy as np

from mllm_act.envs.base import EnvObservation, EnvSpec, check_action
from mllm_act.envs.metaworld import tasks
from mllm_act.envs.mujoco_rendering import Renderer, import_mujoco, shared_renderer
from mllm_act.errors import UserError, nearest

SPEC = EnvSpec(
    name="metaworld",
    action_names=("dx", "dy", "dz", "gripper"),
    action_units=("m", "m", "m", "effort"),
    action_scale=(0.01, 0.01, 0.01, 1.0),
    action_low=(-1.0, -1.0, -1.0, -1.0),
    action_high=(1.0, 1.0, 1.0, 1.0),
    proprio_names=("hand_x", "hand_y", "hand_z", "gripper_opening"),
    cameras=("corner4",),
    image_size=200,
    control_hz=80.0,
    horizon=500,
)
INSTRUCTIONS = tasks.TRAIN | tasks.TEST
GROUPS: dict[str, tuple[str, ...]] = {
    "ml45": tuple(tasks.TRAIN),
    "ml5": tuple(tasks.TEST),
}
# arXiv 2406.07904, appendix on Meta-World: 50 start/goal configurations, of which 10 are held out.
SPLITS = {"train": range(0, 40), "test": range(40, 50)}
CONFIGURATIONS = 50
CONFIG_SEED = 0


def make(render: bool = True) -> "MetaWorldEnv":
    """Returns a simulator."""
    return MetaWorldEnv(render)


@functools.cache
def _import_metaworld() -> Any:
    import_mujoco()  # metaworld imports it too, but without an error that states the fix
    # The experts warn at nearly every step that their action exceeds the bounds; it is clipped anyway.
    warnings.filterwarnings("ignore", "Constant\\(s\\) may be too high")
    import metaworld
    import metaworld.policies

    return metaworld


@functools.cache
def _configurations(task: str) -> list[Any]:
    """Returns the task's 50 configurations; takes about 0.4 s the first time in a process."""
    return list(_import_metaworld().MT1(task, seed=CONFIG_SEED).train_tasks)


class MetaWorldEnv:
    """One simulator, with the model of one task at a time (22 MB; changing it takes about 0.2 s)."""

    spec = SPEC

    def __init__(self, render: bool = True) -> None:
        self._render = render
        self._task = ""
        self._where = "before reset"
        self._simulator: Any = None
        self._expert: Any = None
        self._renderer: Renderer | None = None
        self._state = np.zeros(39)
        self._steps = 0

    def reset(self, task: str, configuration: int, seed: int) -> EnvObservation:
        """Starts an episode, determined by the task and configuration; ``seed`` has no effect.

        Raises:
          UserError: no such task or configuration, or rendering does not work on this machine.
        """
        if task not in INSTRUCTIONS:
            raise UserError(f"no task {task!r} in metaworld: {nearest(task, INSTRUCTIONS)}")
        if not 0 <= configuration < CONFIGURATIONS:
            raise UserError(
                f"{task}: no configuration {configuration}, expected 0..{CONFIGURATIONS - 1}"
            )
        if task != self._task:
            self._load(task)
        self._where = f"{task}, configuration {configuration}"
        self._simulator.set_task(_configurations(task)[configuration])
        self._state, _ = self._simulator.reset()
        self._steps = 0
        return self._observe()

    def _load(self, task: str) -> None:
        self.close()
        metaworld = _import_metaworld()
        self._simulator = metaworld.env_dict.ALL_V3_ENVIRONMENTS[task]()
        self._expert = metaworld.policies.ENV_POLICY_MAP[task]()
        if self._render:
            model = self._simulator.model
            self._renderer = shared_renderer(task, model, SPEC.image_size)
        self._task = task

    def step(self, action: np.ndarray) -> tuple[EnvObservation, float, bool]:
        """Executes one action, float32[4], clipped to [-1, 1], for 1/80 s.

        Returns:
          The next observation, Meta-World's shaped reward in [0, 10], and whether the task is solved at this step.

        Raises:
          UserError: an action of another shape or not finite.
          RuntimeError: the environment was not reset, or more than ``spec.horizon`` steps ago.
        """
        if self._simulator is None or self._steps >= SPEC.horizon:
            raise RuntimeError(f"{self._where}: step {self._steps} without a reset")
        action = check_action(SPEC, action, f"{self._where}, step {self._steps}")
        self._state, reward, _, _, info = self._simulator.step(action)
        self._steps += 1
        return self._observe(), float(reward), bool(info["success"])

    def expert_action(self) -> np.ndarray:
        """Returns the action of Meta-World's scripted policy for this state: float32[4], clipped to the bounds.

        Before clipping, components reach 25.
        """
        action = self._expert.get_action(self._state)
        return check_action(SPEC, action, f"{self._where}, expert at step {self._steps}")

    def _observe(self) -> EnvObservation:
        images = {}
        if self._renderer is not None:
            for site, position in self._goal_markers():
                self._simulator.data.site(site).xpos = position[:3]
            for camera in SPEC.cameras:
                image = self._renderer.render(self._simulator.model, self._simulator.data, camera)
                images[camera] = np.ascontiguousarray(image[::-1, ::-1])
        return {
            "images": images,
            "proprio": self._state[:4].astype(np.float32),
            "instruction": np.array(INSTRUCTIONS[self._task]),
        }

    def _goal_markers(self) -> list[tuple[str, np.ndarray]]:
        if self._task == "pick-out-of-hole-v3":  # Meta-World draws it at one position for all goals
            return [("goal", self._simulator._target_pos)]
        return list(self._simulator._target_site_config)

    def close(self) -> None:
        """Frees the simulator; ``reset`` makes a new one."""
        if self._simulator is not None:
            self._simulator.close()
        self._simulator = self._expert = self._renderer = None
        self._task = ""
