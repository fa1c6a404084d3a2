"""What the programs that write a dataset share: an interrupted one continues when the same command is started again.

Until the dataset is complete, its episodes are kept in OUT/.episodes, a file each. ``generation.json`` says what is
being written, and at the end its results and the digests of all files.
"""

import contextlib
import hashlib
import os
import shutil
from collections.abc import Callable, Collection, Iterable, Iterator
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, TypeVar

from data_pipelines.reading.rlds import RECORD
from data_pipelines.writing import recording
from mllm_act.envs.processes import Worker
from mllm_act.errors import Interrupted, UserError
from mllm_act.files import LOCK, locked, read_json, write_json

EPISODES = ".episodes"  # in the dataset's folder, until it is complete
PARTIAL = ".partial-*"  # what a killed process leaves, see ``mllm_act.files``
WRITTEN_LAST = "dataset_info.json"  # readers reject a folder without it

_Job = TypeVar("_Job")


@contextlib.contextmanager
def writing(out: Path, episodes: Collection[Path]) -> Iterator[None]:
    """Holds a folder while the block writes a dataset to it, ``episodes`` first.

    Raises:
      UserError: another program holds the folder, or it cannot be written to.
      Interrupted: by Ctrl-C or SIGTERM; the message says how much is kept.
    """
    try:
        with locked(out, "--out"):
            yield
    except OSError as error:
        raise UserError(
            f"{out}: expected to write the dataset to it, found {error}; free space or allow it, then run the "
            "same command to continue"
        ) from None
    except KeyboardInterrupt:
        kept = sum(file.exists() for file in episodes)
        raise Interrupted(
            f"interrupted: {kept} of {len(episodes)} episodes are kept in {out / EPISODES}; "
            "run the same command to continue"
        ) from None


def open_record(out: Path, record: dict[str, dict[str, Any]], of: str) -> dict[str, Any]:
    """Returns the content of ``generation.json``, which is written if there is none.

    Args:
      out: the dataset's folder.
      record: what is about to be written, by groups of keys.
      of: where these values come from, for errors.

    Raises:
      UserError: ``out`` was made with other values, or is a folder of something else.
    """
    path = out / RECORD
    if path.exists():
        fix = f"choose another --out, or delete {out}"
        saved = read_json(path, fix)
        for part, values in record.items():
            found = saved.get(part)
            found = found if isinstance(found, dict) else {}
            for key, value in values.items():
                if found.get(key) != value:
                    raise UserError(
                        f"{path}: {key}: expected {_short(value)} of {of}, found {_short(found.get(key))}; {fix}"
                    )
        return saved
    if any(file.name != LOCK and not file.match(PARTIAL) for file in out.iterdir()):
        raise UserError(
            f"{out}: expected a new or empty folder, or one with {RECORD}, found other files; choose another --out"
        )
    write_json(path, record)
    return record


def _short(value: Any) -> str:
    text = ",".join(map(str, value)) if isinstance(value, list) else str(value)
    text = " ".join(text.split())
    return text if len(text) <= 60 else text[:57] + "..."


def kept(file: Path) -> bool:
    """Returns whether an episode is there already; says so if its file is damaged."""
    if not file.exists():
        return False
    try:
        recording.load(file)
    except UserError:
        print(f"notice: {file} is damaged: the episode is written again")
        return False
    return True


def in_workers(
    factory: str,
    jobs: Iterable[_Job],
    workers: int,
    timeout: float,
    request: Callable[[_Job], Any],
    doing: Callable[[_Job], str],
    **arguments: Any,
) -> Iterator[tuple[_Job, Any]]:
    """Yields jobs and the answers of workers to them, in any order. The worker processes end with the iteration.

    Args:
      factory: of the workers' handler, with its ``arguments``; see ``mllm_act.envs.processes``.
      jobs: what to do.
      workers: how many.
      timeout: seconds that an answer may take.
      request: of a job.
      doing: description of a job, for errors.
    """
    pool = [Worker(factory, timeout=timeout, **arguments) for _ in range(workers)]
    waiting = iter(jobs)
    busy: dict[Any, tuple[Worker, _Job]] = {}

    def start(worker: Worker) -> None:
        for job in waiting:
            worker.send(request(job))
            busy[worker.connection] = (worker, job)
            return

    try:
        for worker in pool:
            start(worker)
        while busy:
            ready = wait(list(busy), min(worker.time_left for worker, _ in busy.values()))
            # `receive` raises the error of a worker that is overdue.
            overdue = [c for c, (worker, _) in busy.items() if not worker.time_left]
            for connection in ready or overdue:
                worker, job = busy.pop(connection)
                answer = worker.receive(f"{doing(job)} (run the same command to continue)")
                yield job, answer
                start(worker)
    finally:
        for worker in pool:
            worker.close()


def staging(out: Path) -> Path:
    """Returns the folder in which TFDS may write the dataset; what an earlier attempt left in it is deleted."""
    folder = out / EPISODES / "rlds"
    shutil.rmtree(folder, ignore_errors=True)
    return folder


def publish(dataset: Path, out: Path) -> dict[str, str]:
    """Moves the files of a dataset to ``out``; returns their SHA-256."""
    digests = {}
    for file in sorted(dataset.iterdir(), key=lambda file: (file.name == WRITTEN_LAST, file.name)):
        with file.open("rb") as content:
            digests[file.name] = hashlib.file_digest(content, "sha256").hexdigest()
        os.replace(file, out / file.name)
    return digests


def finish(out: Path, record: dict[str, Any]) -> None:
    """Writes the complete ``generation.json``, and deletes what is no longer needed."""
    write_json(out / RECORD, record)
    shutil.rmtree(out / EPISODES)
    for left_by_a_kill in out.glob(PARTIAL):
        left_by_a_kill.unlink()
