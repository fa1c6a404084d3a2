"""Batches from several datasets at once, to train one model for several robots.

A batch of a mixture holds one batch per dataset, because datasets differ in the sizes of their images, proprioception
and actions. Each dataset has its own shuffle buffer and its own epochs. Its share of a batch follows from its weight
alone: small datasets are repeated more often, and the number of devices changes nothing.
"""

import math
from collections.abc import Iterator, Mapping
from fractions import Fraction
from typing import Any

from data_pipelines.reading.pipeline import TrainBatches, expect_memory
from data_pipelines.reading.windows import Arrays
from mllm_act.errors import UserError


def fractions(weights: Mapping[str, float]) -> dict[str, Fraction]:
    """Returns each dataset's part of the sum of the weights.

    Raises:
      UserError: a weight is not a finite number above 0.
    """
    for name, weight in weights.items():
        if type(weight) not in (int, float) or not 0 < weight < math.inf:
            raise UserError(
                f"config.mixture.{name}.weight: expected a finite number above 0, found {weight!r}; "
                "set its weight, or remove the dataset from the mixture"
            )
    exact = {name: Fraction(str(weight)) for name, weight in weights.items()}  # 0.1 is a tenth
    total = sum(exact.values())
    return {name: weight / total for name, weight in exact.items()}


def shares(weights: Mapping[str, float], batch_size: int) -> dict[str, int]:
    """Returns the number of windows of each dataset in a batch; they sum to ``batch_size``.

    Shares are proportional to the weights, rounded by largest remainder (ties: by name). A dataset that would get less
    than one window gets one, and the others divide the rest.

    Raises:
      UserError: a weight is not a finite number above 0, or ``batch_size`` is too small.
    """
    exact = fractions(weights)
    if batch_size < max(1, len(weights)):
        raise UserError(
            f"config.data.batch_size: expected at least one window for each of {len(weights)} dataset(s), found "
            f"{batch_size}; pass {max(1, len(weights))} or more"
        )
    result = dict.fromkeys(weights, 1)
    while True:
        remaining, total = batch_size - (len(weights) - len(exact)), sum(exact.values())
        quota = {name: weight * remaining / total for name, weight in exact.items()}
        if min(quota.values()) >= 1:
            break
        exact = {name: weight for name, weight in exact.items() if quota[name] >= 1}
    result |= {name: math.floor(share) for name, share in quota.items()}
    by_remainder = sorted(quota, key=lambda name: (math.floor(quota[name]) - quota[name], name))
    for name in by_remainder[: batch_size - sum(result.values())]:
        result[name] += 1
    return result


class MixedBatches(Iterator[dict[str, Arrays]]):
    """An endless iterator over ``{dataset: batch}``, with the next batch of every dataset."""

    def __init__(self, parts: Mapping[str, TrainBatches]) -> None:
        """Takes ownership of ``parts``, the batches of each dataset: nothing else may read from them.

        Raises:
          UserError: there are no parts, or together they need more memory than the host has.
        """
        if not parts:
            raise UserError(
                "config.mixture: expected at least one dataset, found none; add one with its "
                "directory and weight"
            )
        self._parts = dict(parts)
        self.host_memory_megabytes = sum(part.host_memory_megabytes for part in parts.values())
        expect_memory(
            f"shuffle_megabytes of {len(parts)} datasets, batch_size", self.host_memory_megabytes
        )

    def __next__(self) -> dict[str, Arrays]:
        """Raises ``UserError`` as ``TrainBatches`` does."""
        return {name: next(part) for name, part in self._parts.items()}

    def state(self) -> dict[str, Any]:
        """Returns the position of each dataset after the last batch returned, as plain JSON types."""
        return {name: part.state() for name, part in self._parts.items()}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continues bit for bit after the batch at which ``state()`` was called.

        Raises:
          UserError: the state has other datasets, or is of other data or settings of one of them.
        """
        if state.keys() != self._parts.keys():
            raise UserError(
                f"data iterator state: expected the datasets {', '.join(sorted(state))} that it was saved with, "
                f"found {', '.join(sorted(self._parts))}; resume with the datasets of the checkpoint"
            )
        for name, part in self._parts.items():
            try:
                part.restore(state[name])
            except UserError as error:
                raise UserError(f"{name}: {error}") from None
