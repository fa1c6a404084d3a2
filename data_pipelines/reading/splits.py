"""The episodes of a split: which record of which file each is, in one order, whatever the files."""

import dataclasses
import hashlib
from pathlib import PurePath

import numpy as np
from jaxtyping import Int

from data_pipelines.reading.records import read_record
from data_pipelines.tensorflow_cpu import as_written, tf
from mllm_act.errors import UserError

HELD_OUT_SEED = 0


@dataclasses.dataclass(frozen=True, eq=False)
class Split:
    """The E episodes of one split, in file order, one record each."""

    name: str
    files: tuple[PurePath, ...]  # local, or of etils.epath
    file: Int[np.ndarray, " E"]  # int32, index of each episode's file
    record: Int[np.ndarray, " E"]  # int32, number of its record in the file, for errors
    position: Int[np.ndarray, " E"]  # int64, where the record is read, see ``Records``
    size: Int[np.ndarray, " E"]  # int64, its bytes
    file_format: str
    fingerprint: str  # changes with the bytes of any record, and with the mapping

    def __len__(self) -> int:
        return len(self.file)

    @property
    def num_bytes(self) -> int:
        return int(self.size.sum())

    def take(self, episodes: Int[np.ndarray, " e"], name: str) -> "Split":
        """Returns a split of some of the episodes."""
        digest = hashlib.sha256(self.fingerprint.encode() + episodes.astype(np.int64).tobytes())
        parts = {
            key: getattr(self, key)[episodes] for key in ("file", "record", "position", "size")
        }
        return dataclasses.replace(self, name=name, fingerprint=digest.hexdigest()[:32], **parts)

    def records(self, order: tf.Tensor, at_once: int = 1) -> tf.data.Dataset:
        """Returns (episode, record) for each of ``order``, int64[n]; ``at_once`` are read at the same time."""
        names = [str(file) for file in self.files]
        file, position = (tf.constant(x, tf.int64) for x in (self.file, self.position))

        @as_written
        def read(episode: tf.Tensor) -> tf.data.Dataset:
            where = (tf.gather(x, episode) for x in (file, position))
            return read_record(names, self.file_format, *where).map(
                lambda record: (episode, record)
            )

        return tf.data.Dataset.from_tensor_slices(order).interleave(
            read, cycle_length=at_once, num_parallel_calls=at_once if at_once > 1 else None
        )

    def location(self, episode: int) -> str:
        """Returns the file and the record of an episode, for error messages."""
        return f"{self.files[self.file[episode]]}: record {self.record[episode]}"


def together(parts: list[Split]) -> Split:
    """Returns several splits of one name as one."""
    first, *others = parts
    if not others:
        return first
    if {part.file_format for part in parts} != {first.file_format}:
        raise UserError(
            f"{first.files[0].parent}: expected sets of one file format, found "
            f"{', '.join(sorted({part.file_format for part in parts}))}; convert one with tfds convert_format"
        )
    shifts = np.cumsum([0, *(len(part.files) for part in parts)])
    digest = hashlib.sha256("".join(part.fingerprint for part in parts).encode()).hexdigest()[:32]
    return dataclasses.replace(
        first,
        files=tuple(file for part in parts for file in part.files),
        file=np.concatenate(
            [part.file + shift for part, shift in zip(parts, shifts, strict=False)]
        ),
        record=np.concatenate([part.record for part in parts]),
        position=np.concatenate([part.position for part in parts]),
        size=np.concatenate([part.size for part in parts]),
        fingerprint=digest,
    )


def hold_out(train: Split, share: float) -> dict[str, Split]:
    """Returns ``train`` and ``val`` of a dataset that has no ``val``."""
    count = len(train)
    if count == 1:
        print("notice: the dataset has one episode, which is trained on and validated on")
        return {"val": dataclasses.replace(train, name="val")}
    if not share:
        return {}
    order = np.random.default_rng(HELD_OUT_SEED).permutation(count)
    held_out = min(count - 1, max(1, round(count * share)))
    return {
        "train": train.take(np.sort(order[held_out:]), "train"),
        "val": train.take(np.sort(order[:held_out]), "val"),
    }
