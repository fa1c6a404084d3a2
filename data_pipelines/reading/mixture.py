"""Batches of several datasets at once, for one model of several robots.

Each dataset keeps its own shuffle, its own epochs and its own sizes of pictures, proprioception and
action, so a batch of a mixture is a batch of each. Every step holds the same number of windows of
each: what a model sees of a dataset follows its weight, not its size, and small sets are read more
often.
"""

import math
from collections.abc import Iterator, Mapping
from fractions import Fraction
from typing import Any

from data_pipelines.reading.pipeline import Batch, TrainBatches, expect_memory
from mllm_act.errors import UserError


def shares(weights: Mapping[str, float], batch_size: int, multiple: int) -> dict[str, int]:
    """Returns how many of a batch's windows are of each dataset; they sum to ``batch_size``.

    Each is a positive multiple of ``multiple``, the parts that devices split a batch into. They are
    proportional to the weights by largest remainder (equal ones: by name). A dataset whose part
    would be below one multiple gets one; the others share the rest.

    Raises:
      UserError: a weight that is not a finite number above 0, a batch that is no multiple, or one
        too small for all of them.
    """
    for name, weight in weights.items():
        if type(weight) not in (int, float) or not 0 < weight < math.inf:
            raise UserError(
                f"config.mixture.{name}.weight: expected a finite number above 0, found {weight!r}; "
                "pass its part of the batch, or take the dataset out of the mixture"
            )
    units = batch_size // multiple
    if batch_size % multiple or units < max(1, len(weights)):
        raise UserError(
            f"config.data.batch_size: expected a multiple of {multiple}, the parts that devices split "
            f"a batch into, at least {multiple} for each of {len(weights)} dataset(s), found "
            f"{batch_size}; pass {multiple * max(len(weights), -(-batch_size // multiple))}"
        )
    exact = {name: Fraction(str(weight)) for name, weight in weights.items()}  # 0.1 is a tenth
    result = dict.fromkeys(weights, 1)
    while True:
        left, total = units - (len(weights) - len(exact)), sum(exact.values())
        quota = {name: weight * left / total for name, weight in exact.items()}
        if min(quota.values()) >= 1:
            break
        exact = {name: weight for name, weight in exact.items() if quota[name] >= 1}
    result |= {name: math.floor(part) for name, part in quota.items()}
    by_remainder = sorted(quota, key=lambda name: (math.floor(quota[name]) - quota[name], name))
    for name in by_remainder[: units - sum(result.values())]:
        result[name] += 1
    return {name: multiple * count for name, count in result.items()}


class MixedBatches(Iterator[dict[str, Batch]]):
    """The next batch of each of several datasets, by name, without end."""

    def __init__(self, parts: Mapping[str, TrainBatches]) -> None:
        """Takes the parts over: nobody else may read from them.

        Raises:
          UserError: no parts, or together they need more memory than the host has.
        """
        if not parts:
            raise UserError(
                "config.mixture: expected at least one dataset, found none; name one with its "
                "directory and weight"
            )
        self._parts = dict(parts)
        self.host_memory_mb = sum(part.host_memory_mb for part in parts.values())
        expect_memory(f"shuffle_mb of {len(parts)} datasets, batch_size", self.host_memory_mb)

    def __next__(self) -> dict[str, Batch]:
        """Raises ``UserError`` as ``TrainBatches`` does."""
        return {name: next(part) for name, part in self._parts.items()}

    def state(self) -> dict[str, Any]:
        """Returns the position of each after the batches returned last, as plain JSON values."""
        return {name: part.state() for name, part in self._parts.items()}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continues after the batches at which ``state()`` was taken, bit for bit.

        Raises:
          UserError: the state is of other datasets, or of other data or settings of one of them.
        """
        if state.keys() != self._parts.keys():
            raise UserError(
                f"data iterator state: expected the datasets {', '.join(sorted(state))} as when it "
                f"was saved, found {', '.join(sorted(self._parts))}; resume with those of the "
                "checkpoint"
            )
        for name, part in self._parts.items():
            try:
                part.restore(state[name])
            except UserError as error:
                raise UserError(f"{name}: {error}") from None
