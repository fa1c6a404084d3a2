"""The interface of an environment. It imports NumPy only.

An environment is a module with these names, and a line in ``mllm_act.envs.ENVS``:

* ``SPEC``, an `EnvSpec`;
* ``INSTRUCTIONS``, task name -> instruction (or its pattern, where it differs between episodes), in a fixed order;
* ``GROUPS``, group name -> task names, accepted wherever task names are;
* ``SPLITS``, split name -> the configurations of every task; demonstrations are recorded on ``train``;
* ``make(render)``, which returns an `Env`;
* where a task leaves the task to the configuration, ``task_of(job)``, under which its success is counted.

Importing the module should not import the simulator: programs read ``SPEC`` without it.
"""

import dataclasses
from typing import Any, Literal, NamedTuple, Protocol, TypedDict, runtime_checkable

import numpy as np

from mllm_act.errors import UserError


@dataclasses.dataclass(frozen=True)
class EnvSpec:
    """Everything needed to read the environment's data without its simulator. Stored beside every dataset."""

    name: str
    action_names: tuple[str, ...]
    action_units: tuple[str, ...]  # physical units of ``action * action_scale``
    action_scale: tuple[float, ...]
    action_low: tuple[float, ...]  # bounds, before scaling: in the numbers that are stored
    action_high: tuple[float, ...]
    proprio_names: tuple[str, ...]
    cameras: tuple[str, ...]
    image_size: int  # pixels, images are square
    control_hz: float
    horizon: int  # maximum steps per episode
    # Names of discrete actions; empty for continuous ones. A discrete action is an index into these, stored as
    # float32[1], so that datasets and programs treat both kinds alike.
    choices: tuple[str, ...] = ()
    # What the horizon means to reinforcement learning: "bootstrap" if an episode is only cut there and its last
    # observation has a value, "terminal" if nothing comes after it. It is not stored beside datasets.
    time_limit: Literal["bootstrap", "terminal"] = "bootstrap"
    # Of each camera, where they differ; `image_size` is then the largest.
    image_sizes: tuple[int, ...] = ()

    def size_of(self, camera: str) -> int:
        """Returns the pixels of a camera's image along each side."""
        sizes = dict(zip(self.cameras, self.image_sizes, strict=False))
        return sizes.get(camera, self.image_size)


class EnvObservation(TypedDict):
    """One observation. Batched (by `EnvPool`), every array has a leading axis."""

    images: dict[str, np.ndarray]  # {camera: uint8[H, W, 3]}, upright; empty when not rendering
    proprio: np.ndarray  # float32[P]
    instruction: np.ndarray  # str[]: of this episode, the same at every step


class Job(NamedTuple):
    """The episode to start: task, start/goal configuration and seed."""

    task: str
    configuration: int
    seed: int


@runtime_checkable
class Env(Protocol):
    """One simulator. The same job and the same actions always give the same episode."""

    spec: EnvSpec

    def reset(self, task: str, configuration: int, seed: int) -> EnvObservation:
        """Starts an episode. Raises UserError for an unknown task or configuration."""
        ...

    def step(self, action: np.ndarray) -> tuple[EnvObservation, float, bool]:
        """Executes one action, float32[A]. Returns the observation, the reward and whether the task is solved.

        An episode is over at its first success, and at ``spec.horizon`` steps, see ``spec.time_limit``.
        """
        ...

    def expert_action(self) -> np.ndarray:
        """Returns the scripted expert's action for the current state, float32[A], clipped to the bounds.

        The expert may use state that observations do not contain.

        Raises:
          ExpertFailed: the expert has no action for this state.
        """
        ...

    def close(self) -> None:
        """Frees the simulator."""
        ...


class ExpertFailed(Exception):
    """The scripted expert has no action for this state: the episode is not recorded."""


def metadata(spec: EnvSpec) -> dict[str, Any]:
    """Returns ``spec`` as it is stored beside a dataset, without ``choices`` and ``image_sizes`` if they are empty."""
    fields = dataclasses.asdict(spec)
    del fields["time_limit"]
    return {k: v for k, v in fields.items() if v or k not in ("choices", "image_sizes")}


def choice(spec: EnvSpec, action: np.ndarray, where: str) -> int:
    """Returns a discrete action, float32[1], as an index into ``spec.choices``.

    Raises:
      UserError: wrong shape or not an index; ``where`` (task, configuration, step) begins the error.
    """
    action = np.asarray(action, np.float32)
    if action.shape != (1,):
        raise UserError(
            f"{where}: an action of {spec.name} has shape (1,), found {action.shape}; "
            "was the policy trained on another action space?"
        )
    if action[0] not in range(len(spec.choices)):
        names = ", ".join(f"{index} {name}" for index, name in enumerate(spec.choices))
        raise UserError(
            f"{where}: expected the index of an action ({names}), found {action[0]:g}; "
            "was the policy trained on another action space?"
        )
    return int(action[0])


def check_action(spec: EnvSpec, action: np.ndarray, where: str) -> np.ndarray:
    """Returns a continuous action, float32[A], clipped to the bounds of ``spec``.

    Raises:
      UserError: wrong shape or not finite; ``where`` (task, configuration, step) begins the error.
    """
    action = np.asarray(action, np.float32)
    expected = (len(spec.action_names),)
    if action.shape != expected:
        raise UserError(
            f"{where}: an action of {spec.name} has shape {expected}, found {action.shape}; "
            "was the policy trained on another action space?"
        )
    if not np.isfinite(action).all():
        raise UserError(f"{where}: the action is not finite: {action.tolist()}")
    low, high = (np.array(bound, np.float32) for bound in (spec.action_low, spec.action_high))
    return np.clip(action, low, high)
