"""A trace of a few updates, for TensorBoard's profiler and ui.perfetto.dev."""

from pathlib import Path
from typing import Any

import jax

WARM = 3  # updates of a program before the trace: the first are not like the others


class Profile:
    """Traces ``count`` updates; nothing with a count of 0."""

    def __init__(self, folder: Path, after: int, steps: int, count: int) -> None:
        """Traces into ``folder``, from the first update after ``after`` that is warm, up to the last of ``steps``."""
        self._folder, self._count = folder, count
        self._first = min(after + 1 + WARM, max(after + 1, steps - count + 1))
        self._last = min(self._first + count - 1, steps)

    def before(self, step: int) -> None:
        """Starts the trace where it is time."""
        if self._count and step == self._first:
            jax.profiler.start_trace(str(self._folder), create_perfetto_trace=True)

    def after(self, step: int, results: Any) -> None:
        """Ends the trace where it is time, when the results are there."""
        if self._count and step == self._last:
            jax.block_until_ready(results)
            jax.profiler.stop_trace()
            print(
                f"Traced updates {self._first} to {self._last}: tensorboard --logdir={self._folder}"
            )
