"""Statistics of a dataset, and the normalisation of actions and proprioception made from them.

Plain numbers in a JSON object, so that a checkpoint can hold them and acting needs no TensorFlow. The functions take
numpy and JAX arrays, traced ones too.

Actions are normalised in one of three ways, ``config.normalization``:

* ``range``: each dimension's minimum and maximum become -1 and 1, as in arXiv 2406.07904.
* ``quantiles``: its 1 % and 99 % quantiles do, so that outliers cost no resolution, as in OpenVLA (``bounds_q99``,
  arXiv 2406.09246, section 3.2) and FAST (arXiv 2501.09747; openpi's ``use_quantiles``). Codes end there, as in
  OpenVLA; regression goes beyond, as in openpi. A dimension keeps its range if it takes two values only, the rarer of
  which may lie beyond the quantiles, or if its quantiles coincide.
* ``meanstd``: mean 0 and standard deviation 1, as in Octo (``normal``, arXiv 2405.12213) and openpi.

However it was normalised, a decoded action is always one that the demonstrations support: see ``valid_action``.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, TypeVar

import numpy as np

from mllm_act.errors import UserError

Array = TypeVar("Array", bound=Any)

NORMALIZATIONS = ("range", "quantiles", "meanstd")


@dataclasses.dataclass(frozen=True)
class Moments:
    """Exact statistics of each dimension over all steps, in the stored units."""

    mean: tuple[float, ...]
    std: tuple[float, ...]  # of the population
    min: tuple[float, ...]
    max: tuple[float, ...]
    q01: tuple[float, ...]
    q99: tuple[float, ...]
    two_valued: tuple[bool, ...]  # whether exactly two values occur; they are min and max


@dataclasses.dataclass(frozen=True)
class Statistics:
    """Statistics of the data a policy was trained on; ``fingerprint`` identifies the bytes of the split."""

    action: Moments
    proprio: Moments
    num_steps: int
    num_episodes: int
    num_segments: int  # steps of one episode under one instruction
    split: str
    fingerprint: str
    tasks: tuple[str, ...]  # each once, sorted
    instructions: tuple[str, ...]  # each once, sorted
    normalization: str = "range"  # of actions; one of NORMALIZATIONS

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
            if not isinstance(found, dict) or set(found) != expected:
                raise UserError(
                    f"{where}: expected the keys {sorted(expected)}, found "
                    f"{sorted(found) if isinstance(found, dict) else found!r}; compute them again from the dataset"
                )
        if values["normalization"] not in NORMALIZATIONS:
            raise UserError(
                f"statistics: normalization: expected one of {', '.join(NORMALIZATIONS)}, found "
                f"{values['normalization']!r}; compute them again from the dataset"
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
        """Maps [..., A] linearly in each dimension, as ``normalization`` says; a constant dimension becomes 0.

        Nothing is clipped. With ``range``, the training split fills [-1, 1], and where it already did, this is exactly
        the identity.
        """
        centre, half = self._action_box()
        return (action - centre) / half

    def unnormalize_action(self, normalized: Array) -> Array:
        """Returns the valid action, in the environment's units, nearest to the inverse of ``normalize_action``."""
        centre, half = self._action_box()
        return self.valid_action(normalized * half + centre)

    def normalize_for_codes(self, action: Array) -> Array:
        """Returns normalised actions as codes are made of them: with ``quantiles`` clipped to [-1, 1]."""
        normalized = self.normalize_action(action)
        return normalized.clip(-1, 1) if self.normalization == "quantiles" else normalized

    def unnormalize_codes(self, normalized: Array) -> Array:
        """Returns the valid action that codes stand for; they say nothing beyond [-1, 1], except with ``meanstd``."""
        if self.normalization != "meanstd":
            normalized = normalized.clip(-1, 1)
        return self.unnormalize_action(normalized)

    def valid_action(self, action: Array) -> Array:
        """Returns the nearest action that the demonstrations support, float32[..., A] in the environment's units.

        Each dimension lies between the demonstrations' minimum and maximum, so a constant one is exactly the constant.
        A two-valued one is exactly one of its values. NaN becomes the middle of the range. ``action`` may also be a
        single action where the statistics are those of chunks.
        """
        count = action.shape[-1]
        low, high = np.array(self.action.min[:count]), np.array(self.action.max[:count])
        middle = ((low + high) / 2).astype(np.float32)
        low, high = low.astype(np.float32), high.astype(np.float32)
        two_valued = np.array(self.action.two_valued[:count], bool)
        xp = action.__array_namespace__()
        action = xp.where(xp.isnan(action), middle, action).clip(low, high)
        nearest = xp.where(action - low < high - action, low, high)
        return xp.where(two_valued, nearest, action)

    def normalize_proprio(self, proprio: Array) -> Array:
        """Maps [..., P] to mean 0 and standard deviation 1; a constant dimension to 0."""
        std = np.array(self.proprio.std)
        std = np.where(_constant(self.proprio), 1.0, std)
        return (proprio - np.array(self.proprio.mean, np.float32)) / std.astype(np.float32)

    def _action_box(self) -> tuple[np.ndarray, np.ndarray]:
        """Returns what becomes 0 in each dimension, and its distance to what becomes 1, as float32[A]."""
        moments = self.action
        low, high = np.array(moments.min), np.array(moments.max)
        if self.normalization == "quantiles":
            keep = np.array(moments.two_valued, bool) | _equal(moments.q01, moments.q99)
            low, high = np.where(keep, low, moments.q01), np.where(keep, high, moments.q99)
        constant = _constant(moments)
        centre = (high + low) / 2
        half = np.where(constant, 1.0, (high - low) / 2)
        if self.normalization == "meanstd":
            centre = np.where(constant, centre, moments.mean)
            half = np.where(constant, 1.0, moments.std)
        return centre.astype(np.float32), half.astype(np.float32)


def choose(
    key: str, wanted: str, adapter: str, fits: Sequence[str], of_tokenizer: str | None
) -> str:
    """Returns the normalisation of a policy's actions.

    Args:
      key: of the part of the config, for errors.
      wanted: what the config says; empty for the tokenizer's, or ``range`` where there is none.
      adapter: the name of the adapter.
      fits: the normalisations that it works with.
      of_tokenizer: that of the tokenizer of stage one, if there is one.

    Raises:
      UserError: if the adapter does not work with it, or the tokenizer was trained with another.
    """
    if of_tokenizer is not None and wanted not in ("", of_tokenizer):
        raise UserError(
            f"{key}.normalization: expected {of_tokenizer!r}, with which the tokenizer was trained, found {wanted!r}; "
            f"leave it out, or train a tokenizer with --config.normalization={wanted}"
        )
    chosen = wanted or of_tokenizer or "range"
    if chosen not in fits:
        raise UserError(
            f"{key}.normalization: expected {' or '.join(fits)} with the adapter {adapter!r}, found {chosen!r}; choose "
            "another of the two"
        )
    return chosen


def table(key: str, env: str, names: Sequence[str], statistics: Statistics) -> str:
    """Returns a line about the actions of a dataset, and one for each dimension that is worth a look.

    These are the constant and the two-valued ones, and those whose range is ten times the span of their quantiles.
    ``key`` is that of the part of the config. ``statistics`` are those of single actions.
    """
    kind, moments = statistics.normalization, statistics.action
    lines = [f"Actions of {env}: {len(names)} dimensions, normalised by {kind}"]
    constant, same = _constant(moments), _equal(moments.q01, moments.q99)
    for d, name in enumerate(names):
        low, high = moments.min[d], moments.max[d]
        between = f"{moments.q01[d]:g} to {moments.q99[d]:g}"
        if constant[d]:
            found = f"constant      {low:g}"
        elif moments.two_valued[d]:
            found = f"two-valued    {low:g} or {high:g}"
        elif high - low >= 10 * (moments.q99[d] - moments.q01[d]):
            found = f"heavy-tailed  {low:g} to {high:g}, 98 % within {between}"
            if kind != "quantiles" and not same[d]:
                found += f"; try --{key}.normalization=quantiles"
        else:
            continue
        lines.append(f"  {name:<12} {found}")
    return "\n".join(lines)


def expect_chunk(chunk: int) -> None:
    """Raises ``UserError`` if a decision would have no action."""
    if chunk < 1:
        raise UserError(
            f"config.chunk: expected at least 1, the actions of one decision, found {chunk}; "
            "pass 1 to decide every action separately"
        )


def _constant(moments: Moments) -> np.ndarray:
    return _equal(moments.min, moments.max)


def _equal(low: Sequence[float], high: Sequence[float]) -> np.ndarray:
    """Whether two numbers of each dimension differ by no more than rounding, which dividing by it would amplify."""
    below, above = np.array(low), np.array(high)
    return above - below <= 1e-6 * np.maximum(1.0, np.maximum(abs(below), abs(above)))
