"""Scalars over steps, written twice: one JSON line a step (``metrics.jsonl``) and TensorBoard.

After a resume the JSON-lines file continues; lines past the restored step are cut, so that the file reads
as one uninterrupted run.
"""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

from tensorboardX import SummaryWriter


class MetricsWriter:
    """Writes scalars of a run. Use as a context manager."""

    def __init__(self, workdir: Path, first_step: int = 0) -> None:
        """Opens ``workdir/metrics.jsonl`` for steps after ``first_step`` and ``workdir/tensorboard``."""
        workdir.mkdir(parents=True, exist_ok=True)
        self.path = workdir / "metrics.jsonl"
        kept = _lines_up_to(self.path, first_step)
        partial = self.path.with_suffix(".partial")
        partial.write_text("".join(kept))
        os.replace(partial, self.path)
        self._file = self.path.open("a", buffering=1)
        self._board = SummaryWriter(str(workdir / "tensorboard"), purge_step=first_step + 1)

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """Writes one line ``{"step": step, name: value, ...}``; values not finite become strings in JSON."""
        plain = {name: float(value) for name, value in scalars.items()}
        json_safe = {k: v if math.isfinite(v) else str(v) for k, v in plain.items()}
        self._file.write(json.dumps({"step": step, **json_safe}) + "\n")
        for name, value in plain.items():
            self._board.add_scalar(name, value, step)

    def close(self) -> None:
        """Flushes and closes both files."""
        self._file.close()
        self._board.close()

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def _lines_up_to(path: Path, step: int) -> list[str]:
    """Returns the whole lines of a metrics file whose step is at most ``step``."""
    kept = []
    if path.exists():
        for line in path.read_text().splitlines(keepends=True):
            try:
                if line.endswith("\n") and json.loads(line)["step"] <= step:
                    kept.append(line)
            except (json.JSONDecodeError, KeyError):
                continue  # the line a killed run was writing
    return kept
