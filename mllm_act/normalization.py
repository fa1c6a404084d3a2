"""Statistics of a dataset, and the normalisation of actions and proprioception made from them.

Plain numbers in a JSON object, so that a checkpoint can hold them and acting needs no TensorFlow. The functions use
only arithmetic: they take numpy and JAX arrays, traced ones too.
"""

import dataclasses
from typing import Any, TypeVar

import numpy as np

from mllm_act.errors import UserError

Array = TypeVar("Array", bound=Any)


@dataclasses.dataclass(frozen=True)
class Moments:
    """Exact statistics of each dimension over all steps, in the stored units."""

    mean: tuple[float, ...]
    std: tuple[float, ...]  # of the population
    min: tuple[float, ...]
    max: tuple[float, ...]
    q01: tuple[float, ...]
    q99: tuple[float, ...]


@dataclasses.dataclass(frozen=True)
class Statistics:
    """Statistics of the data a policy was trained on; ``fingerprint`` identifies the bytes of the split."""

    action: Moments
    proprio: Moments
    num_steps: int
    num_episodes: int
    split: str
    fingerprint: str
    tasks: tuple[str, ...]  # each once, sorted
    instructions: tuple[str, ...]  # each once, sorted

    def to_dict(self) -> dict[str, Any]:
        """Returns plain JSON types."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Statistics":
        """Inverse of ``to_dict``, through JSON or not; ``UserError`` names keys that do not fit."""
        for kind, found, where in (
            (cls, values, "statistics"),
            (Moments, values.get("action", {}), "statistics: action"),
            (Moments, values.get("proprio", {}), "statistics: proprio"),
        ):
            expected = {field.name for field in dataclasses.fields(kind)}
            if set(found) != expected:
                raise UserError(
                    f"{where}: expected the keys {sorted(expected)}, found {sorted(found)}; "
                    "compute them again from the dataset"
                )
        moments = {
            key: Moments(**{name: tuple(numbers) for name, numbers in values[key].items()})
            for key in ("action", "proprio")
        }
        names = {key: tuple(values[key]) for key in ("tasks", "instructions")}
        return cls(**{**values, **moments, **names})

    def chunked(self, chunk: int) -> "Statistics":
        """Returns the statistics of vectors of ``chunk`` consecutive actions: those of one action, repeated.

        Raises:
          UserError: if ``chunk`` is below 1.
        """
        expect_chunk(chunk)
        repeated = {
            field.name: getattr(self.action, field.name) * chunk
            for field in dataclasses.fields(Moments)
        }
        return dataclasses.replace(self, action=Moments(**repeated))

    def normalize_action(self, action: Array) -> Array:
        """Maps [..., A] linearly so that the training split fills [-1, 1] in each dimension.

        Where it already does, this is exactly the identity. A constant dimension becomes 0. Actions beyond the range of
        the training split exceed [-1, 1]: nothing is clipped here.
        """
        centre, half = self._action_box()
        return (action - centre) / half

    def unnormalize_action(self, action: Array) -> Array:
        """Inverse of ``normalize_action``: back to the environment's units."""
        centre, half = self._action_box()
        return action * half + centre

    def normalize_proprio(self, proprio: Array) -> Array:
        """Maps [..., P] to mean 0 and standard deviation 1; a constant dimension to 0."""
        std = np.array(self.proprio.std)
        std = np.where(_constant(self.proprio), 1.0, std)
        return (proprio - np.array(self.proprio.mean, np.float32)) / std.astype(np.float32)

    def _action_box(self) -> tuple[np.ndarray, np.ndarray]:
        low, high = np.array(self.action.min), np.array(self.action.max)
        constant = _constant(self.action)
        centre = (high + low) / 2
        half = np.where(constant, 1.0, (high - low) / 2)
        return centre.astype(np.float32), half.astype(np.float32)


def expect_chunk(chunk: int) -> None:
    """Raises ``UserError`` if a decision would have no action."""
    if chunk < 1:
        raise UserError(
            f"config.chunk: expected at least 1, the actions of one decision, found {chunk}; "
            "pass 1 to decide every action separately"
        )


def _constant(moments: Moments) -> np.ndarray:
    """Which dimensions vary by no more than rounding, which dividing by their range would amplify."""
    low, high = np.array(moments.min), np.array(moments.max)
    return high - low <= 1e-6 * np.maximum(1.0, np.maximum(abs(low), abs(high)))
