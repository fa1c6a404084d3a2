"""Opens the files of a split: which they are, by the rules of TFDS, and which records are in them."""

import hashlib
import re
import reprlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from data_pipelines.reading.records import FIX, FORMATS, Records, index_records
from data_pipelines.reading.splits import Split
from mllm_act.errors import UserError

_LONGEST_NAME = 1_000  # characters of a feature's path or a file's name
_AT_ONCE = 16  # files


def _integer(value: Any) -> int:
    """Returns an integer, which protobuf writes as a string in JSON."""
    if type(value) not in (int, str) or not re.fullmatch("-?[0-9]{1,15}", str(value)):
        raise ValueError(f"{reprlib.repr(value)} in place of an integer")
    return int(value)


def safe_name(value: Any) -> str:
    """Returns a name that is safe to print and to use in a file's name."""
    if not isinstance(value, str) or not value.isprintable() or len(value) > _LONGEST_NAME:
        raise ValueError(f"{reprlib.repr(value)} in place of a name")
    return value


def open_split(directory: Path, info: dict[str, Any], split: dict[str, Any], schema: str) -> Split:
    """Returns the episodes of a split.

    Args:
      directory: of the dataset.
      info: its ``dataset_info.json``.
      split: the split's part of it.
      schema: what else identifies the data; part of the fingerprint.

    Raises:
      UserError: a file is missing or broken, or has another number of records than the split's part says.
      ValueError: that part has another structure than TFDS writes.
    """
    file_format = info.get("fileFormat", "tfrecord")
    if file_format not in FORMATS:
        raise UserError(
            f"{directory / 'dataset_info.json'}: fileFormat: expected one of {', '.join(FORMATS)}, found "
            f"{reprlib.repr(file_format)}; convert it with tfds convert_format"
        )
    name, lengths = safe_name(split["name"]), split["shardLengths"]
    if "/" in name or not isinstance(lengths, list):  # files are named after splits
        raise ValueError(f"the split {name!r} with shardLengths {reprlib.repr(lengths)}")
    episodes = tuple(map(_integer, lengths))
    if min(episodes, default=0) < 0 or not sum(episodes):
        raise UserError(
            f"{directory / 'dataset_info.json'}: shardLengths: expected at least one episode in split {name!r}, found "
            f"{reprlib.repr(list(episodes))}; {FIX}"
        )
    template = split.get("filepathTemplate", "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}")
    digest = hashlib.sha256(schema.encode())
    values = {"DATASET": info["name"], "SPLIT": name, "FILEFORMAT": file_format}
    files = [
        directory / _file_name(safe_name(template), values, index, len(episodes))
        for index in range(len(episodes))
    ]

    def index(number: int) -> Records:
        if not _is_file(files[number]):
            raise UserError(
                f"{files[number]}: missing shard {number + 1} of {len(files)} of split {name!r}; {FIX}"
            )
        return index_records(files[number], episodes[number], file_format)

    with ThreadPoolExecutor(_AT_ONCE) as pool:  # over a network, each answer takes its time
        found = list(pool.map(index, range(len(files))))
    for path, records in zip(files, found, strict=True):
        digest.update(path.name.encode() + records.content)
    return Split(
        name,
        tuple(files),
        np.repeat(np.arange(len(files), dtype=np.int32), episodes),
        np.concatenate([np.arange(n, dtype=np.int32) for n in episodes]),
        np.concatenate([records.position for records in found]),
        np.concatenate([records.size for records in found]),
        file_format,
        digest.hexdigest()[:32],
    )


def _is_file(path: Path) -> bool:
    """Whether there is such a file; False, too, for what cannot be a file's name."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


def _file_name(template: str, values: dict[str, str], index: int, count: int) -> str:
    """Returns a shard's name from TFDS's template. (``str.format`` would obey widths of any number of digits.)"""
    values = values | {"SHARD_INDEX": f"{index:05d}", "NUM_SHARDS": f"{count:05d}"}
    values["SHARD_X_OF_Y"] = f"{index:05d}-of-{count:05d}"
    name = re.sub(r"\{([A-Z_]+)\}", lambda match: safe_name(values[match[1]]), template)
    if name.startswith("/") or ".." in PurePosixPath(name).parts:
        raise ValueError(f"the file {name!r} outside the folder")
    return name
