"""A mobile Fetch robot picks up a named object in a room: a stand-in for Habitat Pick, in MuJoCo. It is not Habitat.

The task is that of Habitat 2.0's Pick skill (arXiv 2106.14405) as in arXiv 2406.07904, with the object's name instead
of its position. Conventions, the same for demonstrations and evaluation:

* The action, float32[10], is relative to `SPEC.action_scale`: forward and turning velocity of the base, offsets of the
  seven joints of the arm for this step, and suction, which is on above 0.
* Success: the named object is held, and the cup is within `REST_DISTANCE` of where it is at rest. The arm starts there.
* Failure: another object was taken, the target was let go of or fell from its furniture, or the robot pushed against
  things for too long (`FORCE_LIMIT`, newtons summed over steps, as in Habitat). A failed episode cannot succeed any
  more: nothing moves until the horizon.
* The image is that of the head camera, which looks down by 32 degrees. Proprioception: the angles of the arm, and
  whether something is held.
* An episode is determined by (task, configuration, seed); the task is the kind of the target. Configuration c of
  ``train`` is in room c modulo 200; the rooms of ``validation`` and ``test`` occur in no other split. Settings are
  chosen on ``validation``.
"""

import numpy as np

from mllm_act.envs.base import EnvObservation, EnvSpec, check_action
from mllm_act.envs.fetch_pick import rooms
from mllm_act.envs.fetch_pick.expert import Expert
from mllm_act.envs.fetch_pick.objects import KINDS, NAMES
from mllm_act.envs.fetch_pick.robot import JOINTS
from mllm_act.envs.fetch_pick.scene import SUCTION, Scene
from mllm_act.envs.mujoco_rendering import Renderer, shared_renderer
from mllm_act.errors import UserError, nearest

SPEC = EnvSpec(
    name="fetch_pick",
    action_names=("forward", "turn", *JOINTS, "suction"),
    action_units=("m/s", "rad/s", *("rad",) * 7, "on"),
    action_scale=(0.5, 1.0, *(0.1,) * 7, 1.0),
    action_low=(-1.0,) * 10,
    action_high=(1.0,) * 10,
    proprio_names=(*JOINTS, "held"),
    cameras=("head",),
    image_size=200,
    control_hz=10.0,
    horizon=300,
)
INSTRUCTIONS = {kind: f"pick up the {name}" for kind, name in NAMES.items()}
GROUPS: dict[str, tuple[str, ...]] = {"all": KINDS}
TRAIN_ROOMS = 200
SPLITS = {"train": range(0, 10_000), "validation": range(10_000, 10_050), "test": range(20_000, 20_050)}  # fmt: skip
REST_DISTANCE = 0.15  # metres
FORCE_LIMIT = 10_000.0  # newtons, summed over steps
FALLEN = 0.15  # metres below its place


def make(render: bool = True) -> "FetchPickEnv":
    """Returns a simulator."""
    return FetchPickEnv(render)


class FetchPickEnv:
    """One simulator."""

    spec = SPEC

    def __init__(self, render: bool = True) -> None:
        self._render = render
        self._where = "before reset"
        self._scene: Scene | None = None
        self._expert: Expert | None = None
        self._renderer: Renderer | None = None
        self._task = ""
        self._steps = 0
        self._failure = ""
        self._force = 0.0
        self._floor = 0.0
        self._frozen: EnvObservation | None = None

    def reset(self, task: str, configuration: int, seed: int) -> EnvObservation:
        """Starts an episode.

        Raises:
          UserError: no such task or configuration, the robot's model is not installed, or rendering does not work on
            this machine.
        """
        if task not in INSTRUCTIONS:
            raise UserError(f"no task {task!r} in {SPEC.name}: {nearest(task, INSTRUCTIONS)}")
        if not any(configuration in numbers for numbers in SPLITS.values()):
            known = ", ".join(f"{n.start}..{n.stop - 1} ({name})" for name, n in SPLITS.items())
            raise UserError(f"{task}: no configuration {configuration}, expected {known}")
        if self._scene is None:
            self._scene = Scene()
            if self._render:
                self._renderer = shared_renderer(SPEC.name, self._scene.model, SPEC.image_size)
        in_train = configuration in SPLITS["train"]
        room = configuration % TRAIN_ROOMS if in_train else configuration
        episode = rooms.episode(task, room, (seed, configuration))
        self._scene.start(episode)
        self._expert = Expert(self._scene, episode)
        self._task, self._where = task, f"{task}, configuration {configuration}"
        self._steps, self._failure, self._force, self._frozen = 0, "", 0.0, None
        self._floor = float(self._scene.top(task)[2]) - FALLEN
        return self._observe(self._scene)

    def step(self, action: np.ndarray) -> tuple[EnvObservation, float, bool]:
        """Executes one action, float32[10], clipped to [-1, 1], for 0.1 s.

        Returns:
          The next observation, a reward of 10 for success and 0 otherwise, and whether the task is solved.

        Raises:
          UserError: an action of another shape or not finite.
          RuntimeError: the environment was not reset, or more than ``spec.horizon`` steps ago.
        """
        if self._scene is None or self._steps >= SPEC.horizon:
            raise RuntimeError(f"{self._where}: step {self._steps} without a reset")
        action = check_action(SPEC, action, f"{self._where}, step {self._steps}")
        self._steps += 1
        if self._frozen is not None:
            return self._frozen, 0.0, False
        scene = self._scene
        forward, turn, *arm = (action * SPEC.action_scale)[:-1]
        scene.act(float(forward), float(turn), np.array(arm))
        self._failure = self._suction(scene, bool(action[-1] > 0)) or self._accident(scene)
        observation = self._observe(scene)
        if self._failure:
            self._frozen = observation
        success = not self._failure and scene.held == self._task and self.rest_distance() < REST_DISTANCE  # fmt: skip
        return observation, 10.0 * success, success

    def _suction(self, scene: Scene, on: bool) -> str:
        """Takes the nearest object within reach, or lets go; returns what fails the episode by that, if anything."""
        if not on and scene.held is not None:
            scene.release()
            return f"the {self._task} was dropped"
        if on and scene.held is None:
            distance, kind = min((scene.distance(kind), kind) for kind in KINDS)
            if distance <= SUCTION:
                scene.hold(kind)
                if kind != self._task:
                    return f"the {kind} was taken, not the {self._task}"
        return ""

    def _accident(self, scene: Scene) -> str:
        self._force += scene.force
        if self._force > FORCE_LIMIT:
            return f"the robot pushed too long, {self._force:.0f} N summed over steps"
        if scene.held is None and scene.top(self._task)[2] < self._floor:
            return f"the {self._task} fell"
        return ""

    @property
    def failure(self) -> str:
        """Why the episode cannot succeed any more; empty while it can."""
        return self._failure

    def rest_distance(self) -> float:
        """Returns how far the cup is from where it is at rest, in metres."""
        assert self._scene is not None
        return float(np.linalg.norm(self._scene.cup_in_base() - self._scene.rest_cup))

    def expert_action(self) -> np.ndarray:
        """Returns the scripted expert's action, float32[10]; it stands still in an episode that has failed.

        Raises:
          RuntimeError: the environment was not reset.
        """
        if self._expert is None:
            raise RuntimeError(f"{self._where}: no expert without a reset")
        if self._failure:
            return np.array([*(0.0,) * 9, -1.0], np.float32)
        return limited(self._expert.action())

    def _observe(self, scene: Scene) -> EnvObservation:
        images = {}
        if self._renderer is not None:
            images["head"] = self._renderer.render(scene.model, scene.data, "head").copy()
        return {
            "images": images,
            "proprio": np.array([*scene.arm(), scene.held is not None], np.float32),
            "instruction": np.array(INSTRUCTIONS[self._task]),
        }

    def close(self) -> None:
        """Frees the simulator; ``reset`` makes a new one."""
        self._scene = self._expert = self._renderer = self._frozen = None


def limited(command: np.ndarray) -> np.ndarray:
    """Returns an expert's command in physical units as an action, float32[10]; its joints share one factor."""
    action = command / np.array(SPEC.action_scale)
    action[2:9] /= max(1.0, abs(action[2:9]).max())
    return action.clip(-1, 1).astype(np.float32)
