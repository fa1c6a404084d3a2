"""The contract of an environment: what every file in ``envs/`` offers. NumPy only, nothing heavy is
imported.

An environment module has four names: ``SPEC`` (an `EnvSpec`), ``INSTRUCTIONS`` (task name ->
sentence, in a fixed order), ``GROUPS`` (named sets of tasks, usable wherever task names are given)
and ``make(render)`` (an `Env`).
"""

import dataclasses
from typing import NamedTuple, Protocol, TypedDict

import numpy as np

from mllm_act.errors import UserError

# Start/goal configurations of a task: arXiv 2406.07904, appendix on Meta-World: 50, of which 10 are
# held out.
SPLITS: dict[str, range] = {"train": range(0, 40), "test": range(40, 50)}


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


class EnvObservation(TypedDict):
    """One observation; a batched one (`EnvPool`) has a leading axis on every array."""

    images: dict[str, np.ndarray]  # {camera: uint8[H, W, 3]}, upright; empty when not rendering
    proprio: np.ndarray  # float32[P]


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
        box.
        """
        ...

    def close(self) -> None: ...


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
