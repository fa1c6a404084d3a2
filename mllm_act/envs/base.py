"""The contract of an environment: what every file in ``envs/`` offers. NumPy only, nothing heavy is
imported.

An environment module has five names: ``SPEC`` (an `EnvSpec`), ``INSTRUCTIONS`` (task name ->
sentence, or its pattern where it differs between episodes; in a fixed order), ``GROUPS`` (named
sets of tasks, usable wherever task names are given), ``SPLITS`` (split name -> the configurations
of each task in it; ``train`` is the one that demonstrations show) and ``make(render)`` (an `Env`).
"""

import dataclasses
from typing import Any, NamedTuple, Protocol, TypedDict

import numpy as np

from mllm_act.errors import UserError


@dataclasses.dataclass(frozen=True)
class EnvSpec:
    """What a reader of the data must know, without importing the simulator. Stored beside every
    dataset.
    """

    name: str
    action_names: tuple[str, ...]
    action_units: tuple[str, ...]  # physical units of ``action * action_scale``
    action_scale: tuple[float, ...]
    action_low: tuple[float, ...]  # the legal box, in the environment's own (stored) numbers
    action_high: tuple[float, ...]
    proprio_names: tuple[str, ...]
    cameras: tuple[str, ...]
    image_size: int  # pixels, images are square
    control_hz: float
    horizon: int  # most steps of an episode
    # Names of the actions where they are discrete: the action is then one number, an index into
    # these, held as float32[1] so that datasets and programs are the same for both kinds.
    choices: tuple[str, ...] = ()


class EnvObservation(TypedDict):
    """One observation; a batched one (`EnvPool`) has a leading axis on every array."""

    images: dict[str, np.ndarray]  # {camera: uint8[H, W, 3]}, upright; empty when not rendering
    proprio: np.ndarray  # float32[P]
    instruction: np.ndarray  # str[]: the sentence of this episode, the same at each of its steps


class Job(NamedTuple):
    """One episode to start: which task, which start/goal configuration, which seed."""

    task: str
    configuration: int
    seed: int


class Env(Protocol):
    """One simulator. ``reset`` with the same job always gives the same episode for the same
    actions.
    """

    spec: EnvSpec

    def reset(self, task: str, configuration: int, seed: int) -> EnvObservation:
        """Starts an episode. Raises UserError for an unknown task or configuration."""
        ...

    def step(self, action: np.ndarray) -> tuple[EnvObservation, float, bool]:
        """Acts once: float32[A] -> (observation, reward, success by the environment's own test)."""
        ...

    def expert_action(self) -> np.ndarray:
        """The scripted expert's float32[A] for the present state (privileged), clipped to the legal
        box. Raises ExpertFailed where it has none.
        """
        ...

    def close(self) -> None: ...


class ExpertFailed(Exception):
    """The scripted expert has no action for this state: the episode cannot be a demonstration."""


def metadata(spec: EnvSpec) -> dict[str, Any]:
    """What is stored beside a dataset: all of ``spec``, ``choices`` only where there are any."""
    fields = dataclasses.asdict(spec)
    return fields if spec.choices else {k: v for k, v in fields.items() if k != "choices"}


def choice(spec: EnvSpec, action: np.ndarray, where: str) -> int:
    """Returns the index that float32[1] holds, an action of ``spec.choices``.

    Raises:
      UserError: wrong shape, or no index of an action; ``where`` is named.
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
    """Returns float32[A] clipped to the legal box of ``spec``.

    Raises:
      UserError: wrong shape or not finite; ``where`` (task, configuration, step) is named.
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
