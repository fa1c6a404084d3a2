"""CALVIN (arXiv 2112.03227): 34 tasks of a Franka arm at a desk, trained in the scenes A, B and C, tested in D.

The simulator is the real one, github.com/mees/calvin_env, from the user's own checkout (``CALVIN_ENV``). It runs
unmodified in its own Python environment (``make calvin``) and its own process; see ``client`` and ``server``.

Conventions, the same for demonstrations and evaluation:

* The action is CALVIN's ``rel_actions``: changes of the pose of the hand, of which 1 is 2 cm or 0.05 rad, and the
  gripper, 1 to open and -1 to close. The simulator takes no other value for the gripper, so its sign decides here.
  Changes add up to a target, which the hand follows.
* Proprioception is CALVIN's ``robot_obs``; images are those of its static camera, 200 x 200, and of the gripper's,
  84 x 84. Names are those of configs/robots/calvin.py, so that imported and generated data are alike.
* An episode ends when CALVIN's own predicate of the task holds between its start and now, or after 360 steps.
* The task ``any`` is the one that the configuration names. The split ``test`` has the 1,000 official starts and the
  first task of each sequence, with the sentence of CALVIN's validation; ``redrawn`` has the same with other poses of
  the blocks. ``train`` has drawn starts and CALVIN's training sentences: configuration c is in scene A, B or C
  by c modulo 3.
* The task ``next`` continues where the last episode of this simulator ended, with the next task of the same sequence:
  the official chains of five.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from mllm_act.envs.base import EnvObservation, EnvSpec, ExpertFailed, Job, check_action
from mllm_act.envs.calvin import sequences, starts
from mllm_act.envs.calvin.client import Client
from mllm_act.envs.calvin.expert import Expert, View
from mllm_act.envs.calvin.phrasings import phrasings
from mllm_act.envs.calvin.starts import Start
from mllm_act.envs.calvin.tasks import SENTENCES, TASKS
from mllm_act.errors import UserError, nearest

SPEC = EnvSpec(
    name="calvin",
    action_names=("dx", "dy", "dz", "droll", "dpitch", "dyaw", "gripper"),
    action_units=("m", "m", "m", "rad", "rad", "rad", ""),
    action_scale=(0.02, 0.02, 0.02, 0.05, 0.05, 0.05, 1.0),
    action_low=(-1.0,) * 7,
    action_high=(1.0,) * 7,
    proprio_names=(
        "x", "y", "z", "roll", "pitch", "yaw", "gripper_width", *(f"joint_{i}" for i in range(7)), "gripper",
    ),
    cameras=("static", "gripper"),
    image_size=200,
    image_sizes=(200, 84),
    control_hz=30.0,
    horizon=360,
)  # fmt: skip
ANY, NEXT = "any", "next"
INSTRUCTIONS = {
    ANY: "<the sentence of the configuration's task>",
    **SENTENCES,
    NEXT: "<the sentence of the next task of the sequence>",
}
# The tasks that the first place of an official sequence can have, of which the paper has a table.
FIRST = tuple(
    task
    for task in TASKS
    if not task.endswith(("block_drawer", "_in_slider", "_in_drawer", "stack_block"))
)
GROUPS: dict[str, tuple[str, ...]] = {"all": (ANY,), "first": FIRST, "tasks": TASKS}
SPLITS = {
    "train": range(0, 100_000),
    "test": range(100_000, 101_000),
    "redrawn": range(101_000, 102_000),
}
START_ATTEMPTS = 20


def make(render: bool = True) -> "CalvinEnv":
    """Returns a simulator."""
    return CalvinEnv(SPEC, render)


def task_of(job: Job) -> str:
    """Returns the task of an episode: of ``any``, that of its configuration."""
    if job.task != ANY:
        return job.task
    split = next(name for name, numbers in SPLITS.items() if job.configuration in numbers)
    return _named(split, SPLITS[split].index(job.configuration))


def _named(split: str, number: int) -> str:
    """Returns the task that a configuration names."""
    return TASKS[number // 3 % len(TASKS)] if split == "train" else sequences.load()[number][1][0]


class CalvinEnv:
    """One simulator; its process starts at the first `reset`. ``spec`` is `SPEC` but for name and cameras."""

    def __init__(self, spec: EnvSpec, render: bool) -> None:
        self.spec = spec
        self._render = render
        self._cameras = spec.cameras if render else ()
        self._where = "before reset"
        self._client: Client | None = None
        self._surfaces: dict[str, starts.Surfaces] = {}
        self._latest: dict[str, Any] = {}
        self._view = View()
        self._expert: Expert | None = None
        self._configuration, self._place = -1, 0  # in the official sequences
        self._sentence = ""
        self._steps, self._over = 0, True

    def reset(self, task: str, configuration: int, seed: int) -> EnvObservation:
        """Starts an episode, see the module.

        Raises:
          UserError: no such task or configuration, ``next`` without an official sequence, or the simulator is missing.
        """
        if task not in INSTRUCTIONS:
            raise UserError(f"no task {task!r} in {SPEC.name}: {nearest(task, INSTRUCTIONS)}")
        split = next((name for name, numbers in SPLITS.items() if configuration in numbers), None)
        if split is None:
            last = SPLITS["redrawn"].stop - 1
            raise UserError(f"{task}: no configuration {configuration}, expected 0..{last}")
        self._where = f"{task}, configuration {configuration}, seed {seed}"
        if task == NEXT:
            return self._continue(configuration)
        if split == "test" and task != ANY:
            raise UserError(
                f"--tasks={task}: expected {ANY}, the task of the official split test; pass --tasks={ANY}"
            )
        number = SPLITS[split].index(configuration)
        random = np.random.default_rng((seed, configuration))
        for _ in range(START_ATTEMPTS):
            start = self._start(split, task, number, random)
            if self._set_up(start):
                break
        else:
            raise UserError(f"{self._where}: expected to take a block before the start, found none")
        self._configuration, self._place = configuration, 0
        sentence = SENTENCES[start.task]
        if split == "train":
            sentence = str(random.choice(phrasings()[start.task]))
        return self._begin(start.task, sentence)

    def _start(self, split: str, task: str, number: int, random: np.random.Generator) -> Start:
        if split == "test":
            return starts.official(number)
        scene = starts.TEST_SCENE if split == "redrawn" else starts.TRAIN_SCENES[number % 3]
        surfaces = self._surfaces_of(scene)
        if split == "redrawn" and task == ANY:
            return starts.redrawn(number, surfaces, random)
        chosen = _named(split, number) if task == ANY else task
        return starts.drawn(chosen, scene, surfaces, random)

    def _set_up(self, start: Start) -> bool:
        """Makes the start of an episode; returns whether that succeeded. The expert lifts a block that is held."""
        self._ask(
            "reset",
            scene=start.scene,
            robot_obs=np.array(sequences.ROBOT),
            scene_obs=start.scene_obs,
        )
        if not start.carries:
            return True
        lift = f"lift_{start.carries}_block_table"
        self._see(self._ask("begin", task=lift, draw=False))
        expert = Expert(lift, self._view)
        for _ in range(SPEC.horizon):
            try:
                self._see(self._ask("step", action=expert.act()))
            except ExpertFailed:
                return False
            if self._latest["success"]:
                return True
        return False

    def _surfaces_of(self, scene: str) -> starts.Surfaces:
        if scene not in self._surfaces:
            self._surfaces[scene] = self._ask("surfaces", scene=scene)
        return self._surfaces[scene]

    def _continue(self, configuration: int) -> EnvObservation:
        official = any(configuration in SPLITS[split] for split in ("test", "redrawn"))
        if not official or configuration != self._configuration:
            raise UserError(
                f"{self._where}: expected to follow an episode of this configuration in this simulator, "
                f"found configuration {self._configuration}; start with the task {ANY}"
            )
        _, tasks = sequences.load()[configuration % sequences.SEQUENCES]
        self._place += 1
        if self._place == len(tasks):
            raise UserError(f"{self._where}: expected {len(tasks)} tasks in a sequence, found more")
        return self._begin(tasks[self._place], SENTENCES[tasks[self._place]])

    def _begin(self, task: str, sentence: str) -> EnvObservation:
        self._see(self._ask("begin", task=task, draw=self._render))
        self._sentence = sentence
        self._expert = Expert(task, self._view)
        self._steps, self._over = 0, False
        return self._observe()

    def step(self, action: np.ndarray) -> tuple[EnvObservation, float, bool]:
        """Executes one action, float32[7], clipped to [-1, 1], for 1/30 s.

        Returns:
          The next observation, the reward (1 for success, else 0), and whether the task is solved.

        Raises:
          UserError: an action of another shape or not finite, or the simulator died.
          RuntimeError: the environment was not reset, or more than ``spec.horizon`` steps ago.
        """
        if self._over or self._steps >= SPEC.horizon:
            raise RuntimeError(f"{self._where}: step {self._steps} without a reset")
        wanted = check_action(SPEC, action, f"{self._where}, step {self._steps}").astype(np.float64)
        wanted[6] = 1.0 if wanted[6] > 0 else -1.0
        self._see(self._ask("step", action=wanted))
        self._steps += 1
        success = bool(self._latest["success"])
        return self._observe(), float(success), success

    def expert_action(self) -> np.ndarray:
        """Returns the expert's action for this state, float32[7]. See ``expert``.

        Raises:
          ExpertFailed: all its moves are made, or it has none from this state.
        """
        assert self._expert is not None, "reset first"
        return check_action(SPEC, self._expert.act(), f"{self._where}, expert at {self._steps}")

    def _see(self, found: dict[str, Any]) -> None:
        """Keeps what the simulator answered, for the observation and the expert."""
        self._latest, view = found, self._view
        view.robot, view.scene = found["robot_obs"], found["scene_obs"]
        view.target, view.parts = found["target"], found["parts"]

    def _observe(self) -> EnvObservation:
        found: Mapping[str, Any] = self._latest
        return {
            "images": {camera: found[camera] for camera in self._cameras},
            "proprio": found["robot_obs"].astype(np.float32),
            "instruction": np.array(self._sentence),
        }

    def _ask(self, method: str, **arguments: Any) -> dict[str, Any]:
        if self._client is None:
            self._client = Client(self._cameras)
        return self._client.ask(method, self._where, **arguments)

    def close(self) -> None:
        """Ends the simulator's process; ``reset`` starts a new one."""
        if self._client is not None:
            self._client.close()
        self._client, self._over = None, True
