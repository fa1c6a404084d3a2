"""The TFDS builder of Meta-World demonstrations.

Not for use by hand: ``python -m data_pipelines.generate --env=metaworld`` records and calls it.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

from data_pipelines.writing import builder


class Metaworld(builder.Demonstrations):
    """Demonstrations of Meta-World's scripted experts, with action noise, successful ones only."""


def write(splits: Mapping[str, Sequence[Path]], folder: Path) -> Path:
    """See `data_pipelines.writing.builder.write`."""
    return builder.write(Metaworld, splits, folder)
