"""The lengths of a split's segments, from which the number of windows follows without reading the episodes again.

They are found in one pass over the actions, and cached in the dataset's folder beside the statistics.
"""

import contextlib
import dataclasses
import hashlib
import io
import zipfile
from pathlib import Path

import numpy as np
from jaxtyping import Int

from data_pipelines.reading.episodes import read_segments
from data_pipelines.reading.rlds import Dataset
from mllm_act.files import whole_file


@dataclasses.dataclass(frozen=True)
class Segments:
    """The S segments of E episodes, in file order.

    Attributes:
      length: steps of each segment, int32[S].
      first: the first segment of each episode, int64[E].
    """

    length: Int[np.ndarray, " S"]
    first: Int[np.ndarray, " E"]

    @classmethod
    def of_counts(cls, length: Int[np.ndarray, " S"], count: Int[np.ndarray, " E"]) -> "Segments":
        """Makes one from the number of segments of each episode."""
        return cls(length.astype(np.int32), np.cumsum(count, dtype=np.int64) - count)

    @property
    def count(self) -> Int[np.ndarray, " E"]:
        """The number of segments of each episode."""
        return np.diff(self.first, append=len(self.length))

    def windows(
        self, context: int, offset: Int[np.ndarray, " E"] | int = 0
    ) -> Int[np.ndarray, " E"]:
        """Returns how many windows of ``context`` steps each episode is cut into, see ``windows.window_index``."""
        if not isinstance(offset, int):
            offset = np.repeat(offset, self.count)
        rest = np.maximum(self.length - offset, 0)
        return np.add.reduceat(-(-rest // context) + (offset > 0), self.first)


def segments_of(dataset: Dataset, split: str) -> Segments:
    """Returns the segments of a split, from the cache if they are in it; otherwise all episodes are read.

    Raises:
      UserError: see ``read_episodes``.
    """
    fingerprint = dataset.split(split).fingerprint
    if fingerprint not in _known:
        path = _cache(dataset, split)
        try:
            _known[fingerprint] = _unpack(path.read_bytes(), fingerprint, len(dataset.split(split)))
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            if not isinstance(error, FileNotFoundError):
                print(f"notice: {path} is damaged or cannot be read: it is made again")
            episode, steps = read_segments(dataset, split)
            found = Segments.of_counts(steps, np.bincount(episode))
            keep_segments(dataset, split, found, write=True)
    return _known[fingerprint]


def keep_segments(dataset: Dataset, split: str, found: Segments, write: bool) -> None:
    """Keeps the segments of a split for ``segments_of``, in this process and, with ``write``, in the cache.

    A cache that cannot be written is no error: where it matters, it is the statistics' too, which say so.
    """
    fingerprint = dataset.split(split).fingerprint
    _known[fingerprint] = found
    if write:
        with contextlib.suppress(OSError), whole_file(_cache(dataset, split)) as partial:
            partial.write_bytes(_pack(found, fingerprint))


def _cache(dataset: Dataset, split: str) -> Path:
    fingerprint = dataset.split(split).fingerprint
    digest = hashlib.sha256(f"segments {fingerprint}".encode()).hexdigest()[:16]
    return dataset.directory / f"segments-{split}-{digest}.npz"


_known: dict[str, Segments] = {}  # by fingerprint: training and validation ask more than once


def _pack(segments: Segments, fingerprint: str) -> bytes:
    buffer = io.BytesIO()
    digest = np.frombuffer(_digest(segments, fingerprint), np.uint8)
    np.savez_compressed(buffer, length=segments.length, count=segments.count, digest=digest)
    return buffer.getvalue()


def _unpack(content: bytes, fingerprint: str, episodes: int) -> Segments:
    with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
        length, count = arrays["length"], arrays["count"]
        segments = Segments.of_counts(length, count)
        if len(count) != episodes or arrays["digest"].tobytes() != _digest(segments, fingerprint):
            raise ValueError("another digest")
        return segments


def _digest(segments: Segments, fingerprint: str) -> bytes:
    parts = (fingerprint.encode(), segments.length.tobytes(), segments.first.tobytes())
    return hashlib.sha256(b"".join(parts)).digest()
