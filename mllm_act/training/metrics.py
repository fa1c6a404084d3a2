"""Scalars over steps, written as JSON lines (``metrics.jsonl``, one line per step) and for TensorBoard.

After a resume the JSON-lines file continues. Lines past the restored step are cut, so that the file reads as one
uninterrupted run.
"""

import contextlib
import hashlib
import json
import math
import os
import socket
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter

from mllm_act.distributed.exchange import group
from mllm_act.errors import UserError
from mllm_act.files import whole_file
from mllm_act.training import chips

FLUSH = 60.0  # seconds between two writes of TensorBoard's file


class MetricsWriter:
    """Writes scalars of a run. Use as a context manager."""

    def __init__(self, workdir: Path, first_step: int = 0, wandb_project: str = "") -> None:
        """Opens ``workdir/metrics.jsonl`` for steps after ``first_step`` and ``workdir/tensorboard``.

        Of several processes, only the first writes. With a project, scalars also go to Weights & Biases, to a run that
        a resumed one continues.

        Raises:
          UserError: if there is a project, and wandb is not installed.
        """
        self.path = workdir / "metrics.jsonl"
        self._kept: list[dict[str, Any]] = []
        if not group.first:
            return
        self._wandb = _wandb_run(workdir, wandb_project) if wandb_project else None
        workdir.mkdir(parents=True, exist_ok=True)
        kept = _lines_up_to(self.path, first_step)
        self._kept = [json.loads(line) for line in kept]
        with whole_file(self.path) as partial:
            partial.write_text("".join(kept))
        self._file = self.path.open("a", buffering=1)
        self._board = Board(workdir / "tensorboard", first_step)

    def has(self, step: int, prefix: str) -> bool:
        """Returns whether the file had a line of a step, with names that begin so, when it was opened."""
        return group.from_first("metrics", lambda: any(
            line["step"] == step and any(n.startswith(prefix) for n in line) for line in self._kept
        ))  # fmt: skip

    def write(self, step: int, scalars: Mapping[str, Any]) -> None:
        """Writes scalars, arrays or numbers, as one line ``{"step": step, name: value, ...}``.

        Non-finite values become strings in JSON.
        """
        if not group.first:
            return
        plain = {name: float(value) for name, value in scalars.items()}
        json_safe = {k: v if math.isfinite(v) else str(v) for k, v in plain.items()}
        self._file.write(json.dumps({"step": step, **json_safe}) + "\n")
        self._board.write(step, plain)
        if self._wandb is not None:
            self._wandb.log(plain, step=step)

    def close(self) -> None:
        """Flushes and closes all."""
        if not group.first:
            return
        self._file.close()
        self._board.close()
        if self._wandb is not None:
            self._wandb.finish()

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


class Board:
    """Scalars for TensorBoard.

    TensorBoard's ``EventFileWriter`` hands them to a thread, and so does tensorboardX's, which imports PyTorch besides,
    4 s where it is installed. Here an error of writing, such as a full disk, is raised.
    """

    def __init__(self, folder: Path, first_step: int) -> None:
        """Opens a file in ``folder``; TensorBoard hides what earlier files have after ``first_step``."""
        folder.mkdir(parents=True, exist_ok=True)
        name = f"events.out.tfevents.{time.time():.0f}.{socket.gethostname()}.{os.getpid()}"
        self._events = RecordWriter((folder / name).open("wb"))
        self._add(Event(file_version="brain.Event:2"))
        self._add(Event(step=first_step + 1, session_log=SessionLog(status=SessionLog.START)))
        self._flushed = time.monotonic()

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """Writes the scalars of a step."""
        values = [Summary.Value(tag=tag, simple_value=value) for tag, value in scalars.items()]
        self._add(Event(step=step, summary=Summary(value=values)))
        if time.monotonic() > self._flushed + FLUSH:
            self._events.flush()
            self._flushed = time.monotonic()

    def close(self) -> None:
        """Flushes and closes the file."""
        self._events.close()

    def _add(self, event: Any) -> None:
        event.wall_time = time.time()
        self._events.write(event.SerializeToString())


def _wandb_run(workdir: Path, project: str) -> Any:
    try:
        import wandb
    except ImportError as error:
        raise UserError(
            f"config.wandb={project}: expected the package wandb, found none; pip install 'mllm-act[wandb]', or leave "
            "config.wandb empty"
        ) from error
    name = str(workdir.resolve())
    identity = hashlib.sha256(name.encode()).hexdigest()[:16]
    return wandb.init(
        project=project, name=workdir.name, id=identity, resume="allow", dir=str(workdir)
    )


class StepTimer:
    """Wall time per step, and how much of it was spent waiting for data."""

    def __init__(self, step: int, operations: float = 0.0) -> None:
        """Starts after ``step``; ``operations`` are those of a step on one device, by formula (``mllm_act.flops``)."""
        self.restart(step)
        self._compiled = 0.0
        self._operations = operations
        self._chip = chips.named(jax.local_devices()[0].device_kind)

    def restart(self, step: int) -> None:
        """Starts again after ``step``."""
        self._step, self._waited, self._start = step, 0.0, time.perf_counter()

    @contextlib.contextmanager
    def compiling(self) -> Iterator[None]:
        """Times the block, and leaves it out of the steps."""
        before = time.perf_counter()
        yield
        self._compiled += time.perf_counter() - before
        self._start += time.perf_counter() - before

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Counts the time of the block as waiting."""
        before = time.perf_counter()
        yield
        self._waited += time.perf_counter() - before

    def lap(self, step: int, batch_size: int, actions: float = 0.0) -> dict[str, float]:
        """Returns the means over the steps since the last lap, up to ``step``, and starts the next.

        Args:
          step: the last one.
          batch_size: windows of a step.
          actions: how many a step supervises, one per step of a window that exists, whatever the chunk.

        Returns:
          ``step_ms``, ``data_wait_ms``, ``samples_per_second``, ``actions_per_second``; ``tflops``, the model's
          operations a second on one device; on known chips ``utilisation``, which is ``tflops`` over the chip's peak
          in bfloat16; ``compile_seconds`` of the update; and ``peak_gib``, the most memory in use so far on a device,
          where it says so.
        """
        now, steps = time.perf_counter(), step - self._step
        seconds, waited = (now - self._start) / steps, self._waited / steps
        self.restart(step)
        scalars = {
            "step_ms": 1e3 * seconds,
            "data_wait_ms": 1e3 * waited,
            "samples_per_second": batch_size / seconds,
            "actions_per_second": actions / seconds,
            "tflops": self._operations / seconds / 1e12,
            "compile_seconds": self._compiled,
        }
        if self._chip is not None:
            scalars["utilisation"] = self._operations / seconds / self._chip.flops
        peaks = [
            (device.memory_stats() or {}).get("peak_bytes_in_use", 0)
            for device in jax.local_devices()
        ]
        if any(peaks):
            scalars["peak_gib"] = max(peaks) / 2**30
        return scalars


def _lines_up_to(path: Path, step: int) -> list[str]:
    """Returns the whole lines of a metrics file whose step is at most ``step``; names a file with damaged lines."""
    kept, damaged = [], 0
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    for number, line in enumerate(lines, 1):
        try:
            if json.loads(line)["step"] <= step and line.endswith(b"\n"):
                kept.append(line.decode())
        except (ValueError, KeyError, TypeError, RecursionError):
            damaged += number < len(lines)  # the last may be the one that a killed run was writing
    if damaged:
        print(f"notice: {path}: {damaged} damaged lines are left out")
    return kept
