"""BabyAI (arXiv 1810.08272; package ``minigrid`` 3.2): the five families of arXiv 2406.07904.

Conventions, the same for demonstrations and evaluation:

* The action is an index into `SPEC.choices`, stored as float32[1] like any other action. A number that is not an index
  is an error; nothing is rounded or clipped.
* The image shows the agent's room from above, 8 x 8 cells of 25 pixels, fully lit. In ``open`` the locked door is in a
  wall of that room; the empty room behind it is not shown, because the episode ends when the door opens.
* Every episode has its own instruction, in minigrid's wording. The split ``synonyms`` has the layouts of ``test`` in
  other words (`levels.SYNONYMS`). Missions without a word to replace (``open the door``) are unchanged.
* An episode is determined by (task, configuration, seed). The configurations of the splits are disjoint, so
  demonstrations and evaluation share no episode, whatever their seeds.
* An episode ends with success at step t; the reward is then 1 - 0.9 t / 50, and 0 before.
* There is no proprioception. A constant 0 replaces it, because TensorFlow cannot parse a feature without numbers.
"""

import zlib
from typing import TYPE_CHECKING

import numpy as np

from mllm_act.envs.base import EnvObservation, EnvSpec, choice
from mllm_act.errors import UserError, nearest

if TYPE_CHECKING:
    from mllm_act.envs.babyai.expert import Expert
    from mllm_act.envs.babyai.levels import Level

SPEC = EnvSpec(
    name="babyai",
    action_names=("action",),
    action_units=("index",),
    action_scale=(1.0,),
    action_low=(0.0,),
    action_high=(5.0,),
    proprio_names=("none",),
    cameras=("top",),
    image_size=200,
    control_hz=5.0,  # of videos; the world has no clock
    horizon=50,
    choices=("left", "right", "forward", "pick", "drop", "toggle"),
    time_limit="terminal",
)
INSTRUCTIONS = {
    "goto": "go to the <object>",
    "pickup": "pick up the <object>",
    "putnext": "put the <object> next to the <object>",
    "pickup-goto": "pick up the <object>, then go to the <object>",
    "open": "open the <color> door",
}
GROUPS: dict[str, tuple[str, ...]] = {"all": tuple(INSTRUCTIONS)}
EVALUATION = 200  # episodes per task, as in the paper
SPLITS = {
    "train": range(0, 1000),
    "test": range(1000, 1000 + EVALUATION),
    "synonyms": range(1000 + EVALUATION, 1000 + 2 * EVALUATION),
}
CELL = SPEC.image_size // 8  # pixels


def make(render: bool = True) -> "BabyAIEnv":
    """Returns a simulator."""
    return BabyAIEnv(render)


def layout_seed(task: str, configuration: int, seed: int) -> int:
    """Returns the seed of the layout, a function of the arguments only. ``synonyms`` has the layouts of ``test``."""
    if configuration in SPLITS["synonyms"]:
        configuration -= EVALUATION
    entropy = np.random.SeedSequence([seed, zlib.crc32(task.encode()), configuration])
    return int(entropy.generate_state(1, np.uint64)[0])


class BabyAIEnv:
    """One simulator. The expert plays its own copy of the episode, which is made when it is first asked."""

    spec = SPEC

    def __init__(self, render: bool = True) -> None:
        self._render = render
        self._where = "before reset"
        self._level: Level | None = None
        self._expert: Expert | None = None
        self._task, self._seed = "", 0
        self._instruction = np.array("")
        self._taken: list[int] = []
        self._over = True

    def reset(self, task: str, configuration: int, seed: int) -> EnvObservation:
        """Starts an episode.

        Raises:
          UserError: no such task or configuration, or minigrid is not installed.
        """
        if task not in INSTRUCTIONS:
            raise UserError(f"no task {task!r} in babyai: {nearest(task, INSTRUCTIONS)}")
        configurations = sum(map(len, SPLITS.values()))
        if not 0 <= configuration < configurations:
            raise UserError(
                f"{task}: no configuration {configuration}, expected 0..{configurations - 1}"
            )
        try:
            from mllm_act.envs.babyai import levels
        except ModuleNotFoundError as error:
            raise UserError(f"{error}; run `make setup`") from error
        self._where = f"{task}, configuration {configuration}, seed {seed}"
        if self._level is None or task != self._task:
            self._level = levels.Level(task, SPEC.horizon)
        self._task, self._seed = task, layout_seed(task, configuration, seed)
        self._level.start(self._seed)
        mission = self._level.mission
        if configuration in SPLITS["synonyms"]:
            mission = levels.with_synonyms(mission)
        self._instruction = np.array(mission)
        self._expert = None
        self._taken, self._over = [], False
        return self._observe(self._level)

    def step(self, action: np.ndarray) -> tuple[EnvObservation, float, bool]:
        """Executes one action: float32[1], an index into ``spec.choices``.

        Returns:
          The next observation, the reward, and whether the mission is accomplished.

        Raises:
          UserError: not the index of an action.
          RuntimeError: the environment was not reset, or the episode is over.
        """
        if self._level is None or self._over:
            raise RuntimeError(f"{self._where}: step {len(self._taken)} without a reset")
        index = choice(SPEC, action, f"{self._where}, step {len(self._taken)}")
        _, reward, success, late, _ = self._level.step(index)
        self._taken.append(index)
        self._over = success or late
        return self._observe(self._level), float(reward), bool(success)

    def expert_action(self) -> np.ndarray:
        """Returns the action of minigrid's BabyAI bot for this state, float32[1].

        Raises:
          ExpertFailed: the bot has no action, or reached its planning limit.
        """
        from mllm_act.envs.babyai import expert, levels

        if self._expert is None:
            level = levels.Level(self._task, SPEC.horizon)
            level.start(self._seed)
            self._expert = expert.Expert(level, len(SPEC.choices))
        return np.array([self._expert.advise(self._taken)], np.float32)

    def _observe(self, level: "Level") -> EnvObservation:
        images = {}
        if self._render:
            x, y = level.agent_pos
            image = level.grid.render(CELL, (x, y), level.agent_dir)
            left = level.left * CELL
            images["top"] = np.ascontiguousarray(image[:, left : left + SPEC.image_size])
        return {
            "images": images,
            "proprio": np.zeros(1, np.float32),
            "instruction": self._instruction,
        }

    def close(self) -> None:
        """Frees the simulator; ``reset`` makes a new one."""
        self._level = self._expert = None
        self._over = True
