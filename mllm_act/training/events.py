"""What happens to a run over all its starts, one JSON line each in ``WORKDIR/events.jsonl``.

Every line has ``time`` (seconds since 1970), ``event`` and, where it is known, ``step`` and ``seconds`` (how long it
took, ending at ``time``):

  start       the program begins; with the number of processes
  init        config, data and network are read and checked
  restore     the parameters are made, or restored from ``step``
  compile     the update is compiled
  first step  the first update of this start is under way
  steps       ``steps`` updates up to ``step``, of which ``wait`` seconds were spent waiting for data
  save        a checkpoint is begun; its writing goes on in the background
  evaluate    the held-out windows are scored
  preempt     a signal ended the loop after ``step``
  end         the run is complete

A start without ``preempt`` or ``end`` was killed, or failed. Of several processes, only the first writes.
"""

import contextlib
import json
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mllm_act.distributed.exchange import group
from mllm_act.goodput import EVENTS


class Events:
    """Appends to a run's events."""

    def __init__(self, workdir: Path) -> None:
        """Writes that the program begins."""
        self._path, self._step = workdir / EVENTS, 0
        self._begun, self._updated = time.monotonic(), False
        if group.first:
            workdir.mkdir(parents=True, exist_ok=True)
        self.write("start", processes=group.count)

    def write(self, event: str, **values: Any) -> None:
        """Writes an event that has happened now."""
        if group.first:
            with self._path.open("a") as file:
                file.write(
                    json.dumps({"time": round(time.time(), 3), "event": event, **values}) + "\n"
                )

    def since_start(self, event: str, **values: Any) -> None:
        """Writes an event that lasted from the event before, or the start, until now."""
        now = time.monotonic()
        self.write(event, seconds=round(now - self._begun, 3), **values)
        self._begun, self._step = now, values.get("step", self._step)

    def updated(self, step: int) -> None:
        """Writes that the first update of this start is under way; later calls write nothing."""
        if not self._updated:
            self._updated = True
            self.write("first step", step=step)

    def steps(self, step: int, times: Mapping[str, float]) -> None:
        """Writes that the updates up to ``step`` are made; ``times`` are the means of ``StepTimer``."""
        steps = step - min(self._step, step - 1)
        spent, wait = (round(steps * times[k] / 1e3, 3) for k in ("step_ms", "data_wait_ms"))
        self.write("steps", step=step, steps=steps, seconds=spent, wait=wait)
        self._step = step

    @contextlib.contextmanager
    def timed(self, event: str, **values: Any) -> Iterator[None]:
        """Writes an event that lasts as long as the block."""
        begun = time.monotonic()
        yield
        self.write(event, seconds=round(time.monotonic() - begun, 3), **values)
