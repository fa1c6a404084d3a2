"""Meta-World (arXiv 1910.10897; package ``metaworld`` 3.1.1): 45 training and 5 held-out tasks of a
Sawyer arm.

What was decided, once, for demonstrations and evaluation alike:

* Camera ``corner4`` at 200 x 200. It is mounted upside down (a roll of 180 degrees), so its picture
  is turned by 180 degrees: upright and not mirrored, the robot's base at the left. (Papers with
  mujoco-py flipped it vertically instead, which is upright but mirrored.)
* Goal markers are drawn where the task has its goal. Meta-World's own ``step`` puts them there and
  then loses it for assembly, disassemble, coffee-button, door-lock, door-unlock, pick-out-of-hole
  and sweep, where a policy with nothing but the picture could then not know the goal.
* 50 start/goal configurations a task from ``MT1(task, seed=CONFIG_SEED)``; they fix an episode
  wholly, the seed of ``reset`` changes nothing. (ML45's constructor draws the like for all tasks,
  but takes half a minute.)
* The expert sees the whole state with the goal; a policy sees the picture and the hand: xyz in
  metres and the opening of the gripper, 0 (shut) to 1 (0.1 m).
"""

import functools
import warnings
from typing import Any

import numpy as np

from mllm_act.envs import mujoco_rendering as rendering
from mllm_act.envs.base import EnvObservation, EnvSpec, check_action
from mllm_act.envs.metaworld import tasks
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
    return MetaWorldEnv(render)


@functools.cache
def _import_metaworld() -> Any:
    rendering.import_mujoco()  # metaworld imports it too, but its error would not say what to do
    # The experts warn at nearly every step that their action exceeds the box; it is clipped, so
    # this says nothing.
    warnings.filterwarnings("ignore", "Constant\\(s\\) may be too high")
    import metaworld
    import metaworld.policies

    return metaworld


@functools.cache
def _configurations(task: str) -> list[Any]:
    """The task's 50 configurations, about 0.4 s the first time in a process."""
    return list(_import_metaworld().MT1(task, seed=CONFIG_SEED).train_tasks)


class MetaWorldEnv:
    """One simulator; holds the model of one task at a time (22 MB, about 0.2 s to change it)."""

    spec = SPEC

    def __init__(self, render: bool = True) -> None:
        self._render = render
        self._task = ""
        self._where = "before reset"
        self._simulator: Any = None
        self._expert: Any = None
        self._renderer: rendering.Renderer | None = None
        self._state = np.zeros(39)
        self._steps = 0

    def reset(self, task: str, configuration: int, seed: int) -> EnvObservation:
        """Starts an episode; (task, configuration) fix it, ``seed`` is of no effect here.

        Raises:
          UserError: no such task or configuration, or nothing to render with.
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
            self._renderer = rendering.shared_renderer(task, model, SPEC.image_size)
        self._task = task

    def step(self, action: np.ndarray) -> tuple[EnvObservation, float, bool]:
        """Acts once: float32[4], clipped to [-1, 1], held for 1/80 s.

        Returns:
          The observation after it, Meta-World's shaped reward in [0, 10], and whether its success
          test holds now.

        Raises:
          UserError: an action of another shape or not finite.
          RuntimeError: no reset before, or more than ``spec.horizon`` steps since.
        """
        if self._simulator is None or self._steps >= SPEC.horizon:
            raise RuntimeError(f"{self._where}: step {self._steps} without a reset")
        action = check_action(SPEC, action, f"{self._where}, step {self._steps}")
        self._state, reward, _, _, info = self._simulator.step(action)
        self._steps += 1
        return self._observe(), float(reward), bool(info["success"])

    def expert_action(self) -> np.ndarray:
        """float32[4] of Meta-World's scripted policy for this state (it asks for up to 25; clipped
        to the box).
        """
        action = self._expert.get_action(self._state)
        return check_action(SPEC, action, f"{self._where}, expert at step {self._steps}")

    def _observe(self) -> EnvObservation:
        images = {}
        if self._renderer is not None:
            for site, position in self._goal_markers():
                self._simulator.data.site(site).xpos = position[:3]
            for camera in SPEC.cameras:
                picture = self._renderer.render(self._simulator.model, self._simulator.data, camera)
                images[camera] = np.ascontiguousarray(picture[::-1, ::-1])
        return {
            "images": images,
            "proprio": self._state[:4].astype(np.float32),
            "instruction": np.array(INSTRUCTIONS[self._task]),
        }

    def _goal_markers(self) -> list[tuple[str, np.ndarray]]:
        if self._task == "pick-out-of-hole-v3":  # Meta-World has it at one place for all goals
            return [("goal", self._simulator._target_pos)]
        return list(self._simulator._target_site_config)

    def close(self) -> None:
        """Frees the simulator; ``reset`` makes a new one."""
        if self._simulator is not None:
            self._simulator.close()
        self._simulator = self._expert = self._renderer = None
        self._task = ""
