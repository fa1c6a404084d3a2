"""Requests and answers on disk, without pickle: to see later what a robot saw, and to compare another policy with it.

One ``.npz`` file for at most 64 observations of a session: ``step``, ``reset``, ``step_by_step``, ``prompt``,
``observation/...`` and ``actions``, each stacked along the first axis; ``random_key`` where the server samples.
"""

import queue
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from mllm_act.errors import UserError
from mllm_act.files import whole_file
from mllm_act.serving.metadata import IMAGE, PROMPT, STATE
from mllm_act.serving.requests import Request

EACH, BYTES = 64, 2**23  # of a file, at most; a killed server loses what is not yet written


class Recorder:
    """Writes in a thread of its own."""

    def __init__(self, folder: Path) -> None:
        """Makes the folder if it is missing.

        Raises:
          UserError: it cannot be written to.
        """
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"--record={folder}: expected a folder, found {error}") from None
        self._folder = folder
        self._queue: queue.Queue[tuple[str, dict[str, Any]] | None] = queue.Queue(64)
        self._thread = threading.Thread(target=self._run, name="record", daemon=True)
        self._thread.start()
        self.lost = 0  # observations that came faster than the disk took them

    def add(self, session: str, step: int, request: Request, actions: np.ndarray) -> None:
        """Keeps one observation and its answer."""
        seen = request.observation
        assert seen is not None
        row = {
            "step": step, "reset": step == 0, "step_by_step": request.step_by_step, PROMPT: seen.instruction,
            STATE: seen.proprio, "actions": actions,
            "committed": actions[:0] if seen.committed is None else seen.committed,
            **{IMAGE.format(camera): image for camera, image in seen.images.items()},
        }  # fmt: skip
        if seen.random_key is not None:
            row["random_key"] = seen.random_key
        try:
            self._queue.put_nowait((session, row))
        except queue.Full:
            self.lost += 1

    def close(self) -> None:
        """Writes what is left."""
        self._queue.put(None)
        self._thread.join()

    def _run(self) -> None:
        rows: dict[str, list[dict[str, Any]]] = {}
        self._written: dict[str, int] = {}
        while (item := self._queue.get()) is not None:
            session, row = item
            waiting = rows.setdefault(session, [])
            if waiting and _shapes(waiting[0]) != _shapes(row):
                self._write(session, rows.pop(session))
            waiting = rows.setdefault(session, [])
            waiting.append(row)
            if len(waiting) == EACH or len(waiting) * _bytes(row) > BYTES:
                self._write(session, rows.pop(session))
        for session, waiting in rows.items():
            self._write(session, waiting)

    def _write(self, session: str, rows: list[dict[str, Any]]) -> None:
        number = self._written.get(session, 0)
        self._written[session] = number + 1
        try:
            with whole_file(self._folder / f"{session}-{number:06d}.npz") as partial:
                stacked = {key: np.stack([np.asarray(row[key]) for row in rows]) for key in rows[0]}
                np.savez(partial, allow_pickle=False, **stacked)
        except OSError as error:
            print(f"notice: {self._folder}: {error}; {len(rows)} requests are not recorded")


def _shapes(row: dict[str, Any]) -> tuple[int, ...]:
    """Returns what may differ between requests, but not within a file."""
    return *row["actions"].shape, len(row["committed"])


def _bytes(row: dict[str, Any]) -> int:
    return sum(value.nbytes for value in row.values() if isinstance(value, np.ndarray))


def read(folder: Path) -> Iterator[tuple[str, dict[str, np.ndarray]]]:
    """Yields (session, arrays) of each file in order.

    Raises:
      UserError: the folder has none, or one is damaged.
    """
    paths = sorted(folder.glob("*-*.npz"))
    if not paths:
        raise UserError(
            f"--replay={folder}: expected recorded requests, found none; use --record first"
        )
    for path in paths:
        try:
            with np.load(path, allow_pickle=False) as file:
                yield path.stem.rpartition("-")[0], {key: file[key] for key in file.files}
        except (OSError, ValueError, KeyError, EOFError) as error:
            raise UserError(
                f"{path}: expected recorded requests, found {error}; delete it"
            ) from None
