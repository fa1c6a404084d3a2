"""Statistics of a split's actions and proprioception, cached in the dataset's folder.

All steps are read once, without images, ``BLOCK`` episodes at a time, and in bounded memory (see ``moments``). Several
processes divide the blocks between them; the statistics are the same for any number of processes. The name of the cache
file contains a digest of all records and of the names of the statistics, so that stale statistics are never reused; its
content has a digest too, so that damaged ones are not.
"""

import dataclasses
import hashlib
import io
import itertools
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from data_pipelines.reading.episodes import begins_segment, read_episodes
from data_pipelines.reading.moments import Summary
from data_pipelines.reading.rlds import Dataset
from data_pipelines.reading.segments import Segments, keep_segments
from data_pipelines.reading.splits import Split
from mllm_act.errors import UserError
from mllm_act.files import read_json, write_json
from mllm_act.normalization import Moments, Statistics

BLOCK = 64  # episodes


@dataclasses.dataclass(frozen=True)
class Processes:
    """The processes of a run that read a dataset together.

    Attributes:
      index: of this one.
      count: of all.
      exchange: sends a message to all, itself included, and yields everyone's in order. All must call it, and take
        equally many.
    """

    index: int = 0
    count: int = 1
    exchange: Callable[[bytes], Iterable[bytes]] = lambda message: [message]


ALONE = Processes()


def dataset_statistics(
    dataset: Dataset, split: str = "train", processes: Processes = ALONE
) -> Statistics:
    """Returns the statistics of a split, from the cache if they are in it.

    If the cache is damaged or cannot be read, this prints a notice and computes them again. If it cannot be written (a
    read-only folder, a full disk), this prints a notice, and they are computed again at the next start.

    Raises:
      UserError: see ``read_episodes``; in all processes.
    """
    fingerprint = dataset.split(split).fingerprint
    names = [field.name for kind in (Statistics, Moments) for field in dataclasses.fields(kind)]
    digest = hashlib.sha256(" ".join([fingerprint, *names]).encode()).hexdigest()[:16]
    path = dataset.directory / f"statistics-{split}-{digest}.json"
    cached = _read_cache(path, digest)
    # Processes may see different folders, and each must take part in what follows, or none.
    message = b"" if cached is None else json.dumps(cached.to_dict()).encode()
    for found in list(processes.exchange(message)):
        if found:
            return Statistics.from_dict(json.loads(found))
    if processes.count == 1:
        part = _read(dataset, dataset.split(split), processes)
    else:
        part, *others = map(_Part.parse, processes.exchange(_message(dataset, split, processes)))
        for other in others:
            part.merge(other)
    result = part.statistics(split, fingerprint)
    keep_segments(dataset, split, part.all_segments(), write=not processes.index)
    if processes.index:
        return result
    try:
        values = result.to_dict()
        write_json(path, {"sha256": _sha256(values, digest), "statistics": values})
    except OSError as error:
        print(f"notice: cannot cache statistics, they will be computed at every start: {error}")
    return result


@dataclasses.dataclass
class _Part:
    """What one process read."""

    action: Summary
    proprio: Summary
    # By block: the number of segments of each episode, and the steps of each segment.
    counts: dict[int, np.ndarray] = dataclasses.field(default_factory=dict)
    lengths: dict[int, np.ndarray] = dataclasses.field(default_factory=dict)
    tasks: set[str] = dataclasses.field(default_factory=set)
    instructions: set[str] = dataclasses.field(default_factory=set)

    def merge(self, other: "_Part") -> None:
        self.action.merge(other.action)
        self.proprio.merge(other.proprio)
        self.counts |= other.counts
        self.lengths |= other.lengths
        self.tasks |= other.tasks
        self.instructions |= other.instructions

    def all_segments(self) -> Segments:
        return Segments.of_counts(*(
            np.concatenate([x[block] for block in sorted(x)]) for x in (self.lengths, self.counts)
        ))  # fmt: skip

    def statistics(self, split: str, fingerprint: str) -> Statistics:
        return Statistics(
            action=self.action.moments(),
            proprio=self.proprio.moments(),
            num_steps=self.action.steps,
            num_episodes=sum(map(len, self.counts.values())),
            num_segments=sum(map(len, self.lengths.values())),
            split=split,
            fingerprint=fingerprint,
            tasks=tuple(sorted(self.tasks)),
            instructions=tuple(sorted(self.instructions)),
        )

    def message(self) -> bytes:
        buffer = io.BytesIO()
        rest = {key: sorted(getattr(self, key)) for key in ("tasks", "instructions")}
        arrays = {
            f"{key}/{block}": array
            for key in ("counts", "lengths")
            for block, array in getattr(self, key).items()
        }
        arrays |= {
            f"{key}/{name}": array
            for key in ("action", "proprio")
            for name, array in getattr(self, key).arrays().items()
        }
        np.savez(buffer, rest=np.frombuffer(json.dumps(rest).encode(), np.uint8), **arrays)
        return buffer.getvalue()

    @classmethod
    def parse(cls, message: bytes) -> "_Part":
        """Inverse of ``message``. Raises ``UserError`` if the message is that of one."""
        if message.startswith(b"error"):
            raise UserError(message.removeprefix(b"error").decode())
        with np.load(io.BytesIO(message)) as file:
            arrays = dict(file)
        rest = json.loads(arrays.pop("rest").tobytes())
        action, proprio = (
            Summary.of_arrays({
                key.partition("/")[2]: x for key, x in arrays.items() if key.startswith(name)
            })
            for name in ("action/", "proprio/")
        )  # fmt: skip
        counts, lengths = (
            {int(key.partition("/")[2]): x for key, x in arrays.items() if key.startswith(name)}
            for name in ("counts/", "lengths/")
        )
        tasks, instructions = (set(rest[key]) for key in ("tasks", "instructions"))
        return cls(action, proprio, counts, lengths, tasks, instructions)


def _message(dataset: Dataset, split: str, processes: Processes) -> bytes:
    """Returns what this process read, or the error, as a message to all."""
    try:
        return _read(dataset, dataset.split(split), processes).message()
    except UserError as error:
        return b"error" + str(error).encode()


def _read(dataset: Dataset, split: Split, processes: Processes) -> _Part:
    part = _Part(Summary(dataset.action_dim), Summary(dataset.proprio_dim))
    mine = np.arange(len(split))
    mine = mine[mine // BLOCK % processes.count == processes.index]
    if not len(mine):
        return part
    episodes = read_episodes(dataset, split.take(mine, split.name), images=False)
    for block in np.unique(mine // BLOCK).tolist():
        numbers: dict[str, list[np.ndarray]] = {"action": [], "proprio": []}
        lengths = []
        for _, episode in itertools.islice(episodes, int((mine // BLOCK == block).sum())):
            for key, values in numbers.items():
                values.append(episode[key])
            begins = np.flatnonzero(begins_segment(episode["texts"]))
            lengths.append(np.diff(begins, append=len(episode["action"])).astype(np.int32))
            part.tasks.add(episode["task"].decode())
            part.instructions.update(text.decode() for text in set(episode["texts"].flat or [b""]))
        part.counts[block] = np.array([len(x) for x in lengths])
        part.lengths[block] = np.concatenate(lengths)
        part.action.add(block, np.concatenate(numbers["action"]))
        part.proprio.add(block, np.concatenate(numbers["proprio"]))
    return part


def _read_cache(path: Path, made_from: str) -> Statistics | None:
    try:
        cached = read_json(path, "")
        if cached["sha256"] != _sha256(cached["statistics"], made_from):
            raise ValueError("another digest")
        return Statistics.from_dict(cached["statistics"])
    except FileNotFoundError:
        return None
    except (UserError, KeyError, RecursionError, ValueError):
        print(f"notice: {path} is damaged or cannot be read: the statistics are computed again")
        return None


def _sha256(values: Any, made_from: str) -> str:
    content = json.dumps([made_from, values], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()


def moments(values: Float[np.ndarray, "n D"]) -> Moments:
    """Returns the moments and quantiles of each dimension of float32 numbers.

    Quantiles between two values are interpolated linearly, as in OpenVLA and Octo.
    """
    summary = Summary(values.shape[1])
    summary.add(0, values)
    return summary.moments()
