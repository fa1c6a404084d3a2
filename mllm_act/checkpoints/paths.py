"""Paths for Orbax that are taken literally."""

from collections.abc import Iterator
from pathlib import Path
from typing import Self

from etils import epath


class LiteralPath(type(epath.Path())):  # type: ignore[misc]  # the class for this operating system
    """A path whose own characters mean nothing to ``glob``.

    Orbax finds its parts with ``folder.glob(pattern)``. epath's own method treats ``folder`` as part of the pattern, so
    that a step in ``runs/a[1]`` was written and could not be read.
    """

    def glob(self, pattern: str) -> Iterator[Self]:
        """Yields the files and folders in this folder that match; pathlib takes only ``pattern`` for a pattern."""
        return (self._new(path) for path in Path(self).glob(pattern))
