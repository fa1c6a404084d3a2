"""The TFDS builder of BabyAI demonstrations.

Not for use by hand: ``python -m data_pipelines.generate --env=babyai`` records and calls it.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

from data_pipelines.writing import builder


class Babyai(builder.Demonstrations):
    """Demonstrations of BabyAI's five families by minigrid's bot, successful ones only."""


def write(splits: Mapping[str, Sequence[Path]], folder: Path) -> Path:
    """See `data_pipelines.writing.builder.write`."""
    return builder.write(Babyai, splits, folder)
