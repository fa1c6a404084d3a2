"""Language Rearrangement (LLaRP, arXiv 2310.17722): a home robot carries, finds, opens and closes, by 70 skills.

Conventions, the same for demonstrations, reinforcement learning and evaluation:

* The action is an index into `SPEC.choices`, float32[1]. The order is the original's; three names of places have a
  further word there, because the original uses them twice (``entities.FURTHER_WORD``).
* A skill whose precondition does not hold changes nothing. A skill takes one step.
* An episode ends with success, or after 32 steps, which is a terminal state, as in the original. The reward of a step
  is 5 times the gain in progress, and 10 for success.
* The split ``train`` has episodes of our own generator in 60 rooms of our own; ``test`` has 20 other rooms and the same
  kinds of instruction. The other eleven splits are the official episodes, read from the folder ``LANGR_EPISODES``
  (``official``); their objects are where they were, in furniture of our own.
* The image is that of the head camera. Rooms and objects are drawn from simple shapes: ReplicaCAD and YCB, which the
  original shows, are not part of this package.
* There is no proprioception. A constant 0 replaces it, because TensorFlow cannot parse a feature without numbers.
* An episode is determined by (task, configuration, seed). Of official episodes, the seed only draws where the robot
  starts. Configuration c of ``train`` is in room c modulo 60, so that ``range(0, 6000, 60)`` are 100 in one room.
"""

import dataclasses
from typing import TYPE_CHECKING

import numpy as np

from mllm_act.envs.base import EnvObservation, EnvSpec, choice
from mllm_act.envs.language_rearrangement import generator, official
from mllm_act.envs.language_rearrangement.entities import ACTIONS, INDEX, words
from mllm_act.envs.language_rearrangement.expert import Expert
from mllm_act.envs.language_rearrangement.instructions import TEMPLATES
from mllm_act.envs.language_rearrangement.world import Episode, Task
from mllm_act.errors import UserError, nearest

if TYPE_CHECKING:
    from mllm_act.envs.language_rearrangement.scene import Scene

SPEC = EnvSpec(
    name="language_rearrangement",
    action_names=("action",),
    action_units=("index",),
    action_scale=(1.0,),
    action_low=(0.0,),
    action_high=(float(len(ACTIONS) - 1),),
    proprio_names=("none",),
    cameras=("head",),
    image_size=336,
    control_hz=1.0,  # of videos; a skill has no duration
    horizon=32,
    choices=tuple(map(words, ACTIONS)),
    time_limit="terminal",
)
ANY = "rearrange"  # an instruction of any template, and the official episodes
LLARP = "llarp"  # the same in LLaRP's own words, which are read from `LANGR_EPISODES`
INSTRUCTIONS = {
    ANY: "<an instruction of one of the other tasks>",
    LLARP: "<the same in LLaRP's own words>",
    **{
        name: template.wordings[0].replace("{", "<").replace("}", ">")
        for name, template in TEMPLATES.items()
    },
}
GROUPS: dict[str, tuple[str, ...]] = {"all": (ANY,), "templates": tuple(TEMPLATES)}
ROOMS, UNSEEN_ROOMS = 60, 20  # of the splits train and test
SPLITS = {"train": range(0, 150_000), "test": range(150_000, 150_200)}
SPLITS |= {
    split: range(first, first + official.EPISODES)
    for split, first in zip(
        official.SPLITS, range(SPLITS["test"].stop, 1_000_000, official.EPISODES), strict=False
    )
}


def make(render: bool = True) -> "LanguageRearrangementEnv":
    """Returns a simulator."""
    return LanguageRearrangementEnv(SPEC, render)


def episode(task: str, configuration: int, seed: int) -> Episode:
    """Returns the episode of a job.

    Raises:
      UserError: no such task or configuration; an official one and the task is not ``rearrange``, or its file is
        missing or damaged.
    """
    if task not in INSTRUCTIONS:
        raise UserError(f"no task {task!r} in {SPEC.name}: {nearest(task, INSTRUCTIONS)}")
    split = next((name for name, numbers in SPLITS.items() if configuration in numbers), None)
    if split is None:
        last = max(numbers.stop for numbers in SPLITS.values()) - 1
        raise UserError(f"{task}: no configuration {configuration}, expected 0..{last}")
    if split in ("train", "test"):
        room = configuration % ROOMS if split == "train" else ROOMS + configuration % UNSEEN_ROOMS
        wordings = official.wordings() if task == LLARP else None
        return generator.generate(task, room, (seed, configuration), wordings)
    if task not in (ANY, LLARP):
        raise UserError(
            f"--tasks={task}: expected {ANY} or {LLARP}, the tasks of the official split {split}; pass --tasks={ANY}"
        )
    found = official.episode(split, SPLITS[split].index(configuration))
    start = generator.start(np.random.default_rng((seed, configuration)), found.layout)
    return dataclasses.replace(found, start=start)


class LanguageRearrangementEnv:
    """One simulator; ``spec`` is `SPEC` but for name and image size."""

    def __init__(self, spec: EnvSpec, render: bool) -> None:
        self.spec = spec
        self._render = render
        self._where = "before reset"
        self._task: Task | None = None
        self._expert: Expert | None = None
        self._scene: Scene | None = None
        self._steps = 0
        self._over = True

    def reset(self, task: str, configuration: int, seed: int) -> EnvObservation:
        """Starts an episode.

        Raises:
          UserError: see `episode`, or rendering does not work on this machine.
        """
        found = episode(task, configuration, seed)
        self._where = f"{task}, configuration {configuration}, seed {seed}"
        self._task = Task(found)
        self._expert = Expert(self._task)
        self._steps, self._over = 0, False
        if self._render:
            from mllm_act.envs.language_rearrangement.scene import Scene

            if self._scene is None:
                self._scene = Scene(self.spec.image_size)
            self._scene.start(found)
        return self._observe(self._task)

    def step(self, action: np.ndarray) -> tuple[EnvObservation, float, bool]:
        """Executes one skill: float32[1], an index into ``spec.choices``.

        Returns:
          The next observation, the reward, and whether the goal holds.

        Raises:
          UserError: not the index of an action.
          RuntimeError: the environment was not reset, or the episode is over.
        """
        if self._task is None or self._expert is None or self._over:
            raise RuntimeError(f"{self._where}: step {self._steps} without a reset")
        index = choice(self.spec, action, f"{self._where}, step {self._steps}")
        reward, success = self._task.step(ACTIONS[index])
        self._expert.look()
        self._steps += 1
        self._over = success or self._steps == self.spec.horizon
        return self._observe(self._task), reward, success

    def expert_action(self) -> np.ndarray:
        """Returns the expert's action for this state, float32[1]. See ``expert``.

        Raises:
          ExpertFailed: there is no plan to the goal.
        """
        assert self._expert is not None, "reset first"
        return np.array([INDEX[self._expert.advise()]], np.float32)

    def _observe(self, task: Task) -> EnvObservation:
        images = {}
        if self._scene is not None:
            images["head"] = self._scene.render(task.world)
        return {
            "images": images,
            "proprio": np.zeros(1, np.float32),
            "instruction": np.array(task.episode.instruction),
        }

    def close(self) -> None:
        """Frees the simulator; ``reset`` makes a new one."""
        self._task = self._expert = self._scene = None
        self._over = True
