"""Small RLDS folders, and our own files beside them, as foreign files: how the programs read them."""

import functools
import hashlib
import json
import random
import struct
from pathlib import Path
from typing import Any

import numpy as np

from data_pipelines import generate
from data_pipelines.reading.episodes import explain, read_actions, read_episodes
from data_pipelines.reading.records import masked_crc32c
from data_pipelines.reading.rlds import IMAGE, RECORD, open_dataset
from data_pipelines.reading.statistics import dataset_statistics
from data_pipelines.tensorflow_cpu import tf
from data_pipelines.writing import recording
from tests.data_pipelines import tiny_rlds
from tests.fuzzing import Format, mutated, mutated_json

JSON = ("dataset_info.json", "features.json", "metadata.json")
SHARD = "tiny-train.tfrecord-00000-of-00001"
GENERATION = {"env": "babyai", "tasks": ["goto"], "episodes": 2, "seed": 0}

Content = tuple[Any, str]


def dataset(name: str, digests: bool, folder: Path) -> Path:
    """Writes a dataset of two episodes, with or without the digests of its files; returns the file of a name."""
    episodes = [tiny_rlds.episode(index, 3) for index in range(2)]
    tiny_rlds.write(folder, {"train": [episodes]})
    if digests:
        sums = {file: hashlib.sha256((folder / file).read_bytes()).hexdigest() for file in JSON}
        (folder / RECORD).write_text(json.dumps({"sha256": sums}))
    return folder / name


def read(path: Path) -> Content:
    """Reads a dataset as training does, images included, and checks what is promised of it."""
    opened, episodes = open_dataset(path.parent), []
    for name, split in opened.splits.items():
        actions = read_actions(opened, name)
        assert actions.action.shape[1] == opened.action_dim
        assert np.isfinite(actions.action).all()
        reason = explain(opened, split, ValueError("nothing"))
        if "a second read found no error" not in str(reason):
            raise reason
        episodes += [episode for _, episode in read_episodes(opened, split)]
    prints = {name: split.fingerprint for name, split in opened.splits.items()}
    return (opened.metadata, opened.image_shapes, prints), repr(episodes)


def same_records(found: Content, expected: Content) -> str:
    """JSON files without digests may say something else of the same records."""
    if found[1] != expected[1]:
        return "wrong"
    return "equal" if found[0] == expected[0] else "other"


def any_records(found: Content, expected: Content) -> str:
    """Records with right checksums are other records."""
    return "equal" if found[1] == expected[1] else "other"


def forged(data: bytes, draw: random.Random) -> bytes:
    """A shard with one record changed, and right checksums."""
    records = []
    while data:
        (length,) = struct.unpack("<Q", data[:8])
        records.append(data[12 : 12 + length])
        data = data[16 + length :]
    number = draw.randrange(len(records))
    change = mutated if draw.random() < 0.4 else changed_feature
    records[number] = change(records[number], draw)
    return b"".join(frame(record) for record in records)


def frame(record: bytes) -> bytes:
    """A record as TFRecord files hold it."""
    length = struct.pack("<Q", len(record))
    sums = [struct.pack("<I", masked_crc32c(part)) for part in (length, record)]
    return length + sums[0] + record + sums[1]


def changed_feature(record: bytes, draw: random.Random) -> bytes:
    """A record with one feature that is gone, of another type, longer or shorter, or holds something odd."""
    example = tf.train.Example.FromString(record)
    features = example.features.feature
    name = draw.choice(sorted(features))
    kind = features[name].WhichOneof("kind")
    values = getattr(features[name], kind).value
    change = draw.randrange(5)
    if change == 0:
        del features[name]
    elif change == 1:
        features[name].ClearField(kind)
        features[name].int64_list.value.extend([2**62, -1])
    elif change == 2:
        values.append(values[-1])
    elif change == 3:
        del values[-1]
    elif kind == "bytes_list" and name.startswith(IMAGE):
        values[-1] = bomb(values[-1], draw.choice([1, 17, 13_000, 65_500]))
    else:
        odd = {"bytes_list": b"\xff\n\x1b[2J", "float_list": np.nan, "int64_list": -(2**63)}
        values[draw.randrange(len(values))] = odd[kind]
    return example.SerializeToString(deterministic=True)


def bomb(jpeg: bytes, side: int) -> bytes:
    """A JPEG whose header says another height and width."""
    start = jpeg.index(b"\xff\xc0") + 5  # after marker, length and precision (ITU T.81, B.2.2)
    return jpeg[:start] + struct.pack(">HH", side, side) + jpeg[start + 4 :]


def statistics_cache(folder: Path) -> Path:
    dataset(SHARD, False, folder)
    dataset_statistics(open_dataset(folder))
    return next(folder.glob("statistics-*"))


def record_of_a_generation(folder: Path) -> Path:
    generate._open(folder, GENERATION)
    return folder / RECORD


def recorded_episode(folder: Path) -> Path:
    path = folder / "000000.npz"
    recording.save(path, {"reward": np.zeros(3, np.float32), "success": np.bool_(True)})
    return path


def _dataset(name: str, digests: bool = False) -> functools.partial[Path]:
    return functools.partial(dataset, name, digests)


FORMATS = (
    *(Format(name, _dataset(name), read, mutated_json, same_records) for name in JSON),
    *(Format(f"{name}, digest", _dataset(name, True), read, mutated_json) for name in JSON),
    Format("tfrecord", _dataset(SHARD), read, mutated),
    Format("tfrecord, right checksums", _dataset(SHARD), read, forged, any_records),
    Format(
        "statistics",
        statistics_cache,
        lambda path: dataset_statistics(open_dataset(path.parent)),
        mutated_json,
    ),
    Format(
        "generation.json",
        record_of_a_generation,
        lambda path: generate._open(path.parent, GENERATION),
        mutated_json,
        lambda found, expected: "equal" if found == expected else "other",
    ),
    Format(
        "recorded episode",
        recorded_episode,
        lambda path: {key: value.tolist() for key, value in recording.load(path).items()},
        mutated,
    ),
)
