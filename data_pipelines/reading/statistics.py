"""Exact statistics of a split's actions and proprioception, computed once and kept in its folder.

Read without decoding an image, all steps at once, in float64 for the quantiles: under
16 (A + P + 1) bytes of host memory a step, so ten million steps of Meta-World take 1.4 GB. The
file's name holds a digest of the bytes of every record and of the names of the statistics:
statistics of other data, or of another version of this program, are never taken for these.
"""

import dataclasses
import hashlib
import json
import os
import tempfile
from pathlib import Path

import numpy as np
from jaxtyping import Float

from data_pipelines.reading.episodes import read_actions
from data_pipelines.reading.rlds import Dataset
from mllm_act.normalization import Moments, Statistics


def statistics(dataset: Dataset, split: str = "train") -> Statistics:
    """Returns the statistics of a split, from the dataset's folder where they are there already.

    A folder that cannot be written to is no error: they are then computed at each start.

    Raises:
      UserError: see ``read_actions``.
    """
    fingerprint = dataset.split(split).fingerprint
    names = [field.name for kind in (Statistics, Moments) for field in dataclasses.fields(kind)]
    digest = hashlib.sha256(" ".join([fingerprint, *names]).encode()).hexdigest()[:16]
    path = dataset.directory / f"statistics-{split}-{digest}.json"
    if path.exists():
        return Statistics.from_dict(json.loads(path.read_text()))
    actions = read_actions(dataset, split)
    result = Statistics(
        action=moments(actions.action),
        proprio=moments(actions.proprio),
        num_steps=len(actions.action),
        num_episodes=len(actions.tasks),
        split=split,
        fingerprint=fingerprint,
        tasks=tuple(sorted(set(actions.tasks))),
        instructions=tuple(sorted(set(actions.instructions))),
    )
    if os.access(dataset.directory, os.W_OK):
        _write(path, json.dumps(result.to_dict(), indent=1))
    return result


def moments(values: Float[np.ndarray, "n D"]) -> Moments:
    """Returns the moments and quantiles of each dimension, in float64."""

    def floats(row: np.ndarray) -> tuple[float, ...]:
        return tuple(float(value) for value in row)

    values = values.astype(np.float64)
    low, high = np.quantile(values, (0.01, 0.99), axis=0)
    return Moments(
        mean=floats(values.mean(axis=0)),
        std=floats(values.std(axis=0)),
        min=floats(values.min(axis=0)),
        max=floats(values.max(axis=0)),
        q01=floats(low),
        q99=floats(high),
    )


def _write(path: Path, text: str) -> None:
    """Writes whole or not at all: several processes may compute the same file at once."""
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=".statistics-")
    with os.fdopen(descriptor, "w") as file:
        file.write(text)
    os.replace(temporary, path)
