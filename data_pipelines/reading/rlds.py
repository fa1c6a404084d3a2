"""Opens and validates an RLDS dataset written by TFDS.

The layout, as ``data_pipelines.generate`` writes it: episodes of ``steps`` with one or more cameras under
``observation/image/<camera>`` (JPEG), ``observation/proprio``, ``action`` and ``language_instruction``, and
``episode_metadata``. ``metadata.json`` has the names, units and scale of the actions.

Opening checks that every shard exists and has its full length (see ``records``), and that the JSON files are those that
were generated, so that a broken dataset stops a run before it starts. TensorFlow verifies payload checksums when it
reads. The files may be a stranger's: sizes are limited before anything is allocated for them, and paths stay inside the
directory.
"""

import contextlib
import dataclasses
import hashlib
import math
import os
import re
import reprlib
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from data_pipelines.reading.records import FIX, payload_checksums
from mllm_act.errors import UserError, nearest
from mllm_act.files import read_json

RECORD = "generation.json"  # beside the dataset: how it was generated, and the digests of its files
STEPS = "steps/"
ACTION = STEPS + "action"
PROPRIO = STEPS + "observation/proprio"
INSTRUCTION = STEPS + "language_instruction"
IMAGE = STEPS + "observation/image/"  # followed by the name of the camera
EPISODE = "episode_metadata/"
_TEXT = (INSTRUCTION, EPISODE + "task")
_INTEGERS = (EPISODE + "configuration", EPISODE + "episode")
_MOST_CAMERAS = 64
_LONGEST_VECTOR = 1_000_000  # numbers of an action or of proprioception
_LARGEST_IMAGE = 100_000_000  # bytes of pixels; 8K video has 99,532,800
_LONGEST_NAME = 1_000  # characters of a feature's path or a file's name


@dataclasses.dataclass(frozen=True)
class Split:
    """The files of one split."""

    name: str
    files: tuple[Path, ...]
    episodes: tuple[int, ...]  # per file
    fingerprint: str  # changes with the bytes of any record
    num_bytes: int


@dataclasses.dataclass(frozen=True)
class Dataset:
    """The description of an RLDS dataset directory."""

    directory: Path
    name: str
    image_shapes: Mapping[str, tuple[int, int, int]]  # camera -> (height, width, 3)
    action_dim: int
    proprio_dim: int
    metadata: Mapping[str, Any]  # the EnvSpec at recording time, as plain JSON types
    splits: Mapping[str, Split]

    @property
    def cameras(self) -> tuple[str, ...]:
        return tuple(self.image_shapes)

    def split(self, name: str) -> Split:
        """Returns a split by name. Raises ``UserError``, with the closest name, if it does not exist."""
        if name not in self.splits:
            raise UserError(
                f"{self.directory}: expected a split of the dataset, found {name!r}; {nearest(name, self.splits)}"
            )
        return self.splits[name]

    def expect_actions(self, dimensions: int) -> None:
        """Raises ``UserError`` if the actions do not have the expected number of dimensions."""
        if dimensions != self.action_dim:
            raise UserError(
                f"{self.directory / 'features.json'}: {ACTION}: expected {dimensions} dimensions, "
                f"found {self.action_dim}; choose the config of this dataset's environment "
                f"({self.metadata.get('name', self.name)!r})"
            )


def open_dataset(directory: str | Path) -> Dataset:
    """Opens a TFDS dataset directory with the layout above.

    Reads only the JSON files and the record headers: milliseconds for thousands of episodes.

    Raises:
      UserError: the directory is missing or is not a dataset; a feature is missing or has the wrong type; a shard is
        missing, truncated, or does not have the number of episodes stated in ``dataset_info.json``.
    """
    directory = Path(directory)
    info = _read(directory, "dataset_info.json")
    tree = _read(directory, "features.json")
    metadata = _read(directory, "metadata.json")
    _check_digests(directory)
    with _structure(directory / "features.json"):
        features = _flatten(tree)
        _check_features(directory / "features.json", features)
        action_dim = _shape(features[ACTION]["tensor"])[0]
    _check_metadata(directory / "metadata.json", metadata, action_dim)
    with _structure(directory / "dataset_info.json"):
        schema = repr(sorted(features))
        splits = [_open_split(directory, info, split, schema) for split in info["splits"]]
        name = _name(info["name"])
        files = [file for split in splits for file in split.files]
        if len(set(files)) < len(files) or len({split.name for split in splits}) < len(splits):
            raise ValueError("two splits or shards of the same name")
    return Dataset(
        directory=directory,
        name=name,
        image_shapes={
            key.removeprefix(IMAGE): _shape(feature["image"])
            for key, feature in sorted(features.items())
            if key.startswith(IMAGE)
        },
        action_dim=action_dim,
        proprio_dim=_shape(features[PROPRIO]["tensor"])[0],
        metadata=metadata,
        splits={split.name: split for split in splits},
    )


def _read(directory: Path, name: str) -> dict[str, Any]:
    path = directory / name
    try:
        return read_json(path, FIX)
    except FileNotFoundError:
        if not directory.is_dir():
            raise UserError(
                f"{directory}: no such directory; generate a dataset with "
                f"python -m data_pipelines.generate --out={directory}"
            ) from None
        datasets = sorted(file.parent for file in directory.glob(f"**/{name}"))
        fix = f"did you mean {datasets[0]}?" if datasets else FIX
        raise UserError(
            f"{path}: expected this file of a TFDS dataset, found none; {fix}"
        ) from None


@contextlib.contextmanager
def _structure(path: Path) -> Iterator[None]:
    """Turns what is raised where a JSON file has another structure than TFDS writes into a ``UserError``."""
    try:
        yield
    except (AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:
        reason = error if type(error) is ValueError else f"{type(error).__name__} {error}"
        raise UserError(
            f"{path}: expected the structure that TFDS writes, found another ({reason}); {FIX}"
        ) from None


def _check_digests(directory: Path) -> None:
    """Compares the JSON files with the digests that ``data_pipelines.generate`` wrote, if it wrote this dataset."""
    try:
        digests = read_json(directory / RECORD, FIX).get("sha256")
    except FileNotFoundError:
        return
    if not isinstance(digests, dict):
        return
    for name in ("dataset_info.json", "features.json", "metadata.json"):
        found = hashlib.sha256((directory / name).read_bytes()).hexdigest()
        if digests.get(name, found) != found:
            raise UserError(
                f"{directory / name}: expected the SHA-256 in {RECORD}, {reprlib.repr(digests[name])}, found {found}: "
                f"one of the two files was changed; {FIX}"
            )


def _check_metadata(path: Path, metadata: dict[str, Any], action_dim: int) -> None:
    def is_name(value: Any) -> bool:
        return isinstance(value, str)

    def is_scale(value: Any) -> bool:
        return type(value) in (int, float) and 0 < value < math.inf

    for key, kind, check in (
        ("action_names", "text", is_name),
        ("action_units", "text", is_name),
        ("action_scale", "a finite number above 0", is_scale),
    ):
        values = metadata.get(key)
        if not isinstance(values, list) or len(values) != action_dim or not all(map(check, values)):
            raise UserError(
                f"{path}: {key}: expected one entry per action dimension, {action_dim} in all, each {kind}, found "
                f"{reprlib.repr(values)}; {FIX}"
            )
    choices = metadata.get("choices", [])
    if not is_name(metadata.get("name")) or not (
        isinstance(choices, list) and all(map(is_name, choices))
    ):
        raise UserError(
            f"{path}: name, choices: expected a text and a list of texts, found "
            f"{reprlib.repr(metadata.get('name'))}, {reprlib.repr(choices)}; {FIX}"
        )


def _flatten(feature: dict[str, Any], key: str = "") -> dict[str, dict[str, Any]]:
    """Returns the leaves of a TFDS feature tree, keyed by their names in a tf.train.Example."""
    if "sequence" in feature:
        return _flatten(feature["sequence"]["feature"], key)
    if "featuresDict" not in feature:
        return {key: feature}
    leaves = {}
    for name, child in feature["featuresDict"]["features"].items():
        leaves.update(_flatten(child, _name(f"{key}/{name}" if key else name)))
    return leaves


def _check_features(path: Path, features: Mapping[str, dict[str, Any]]) -> None:
    for key in (ACTION, PROPRIO, *_TEXT, *_INTEGERS):
        if key not in features:
            raise UserError(
                f"{path}: {key}: expected this feature, found none; {nearest(key, features)}; "
                "store the dataset in the layout described in data_pipelines/reading/rlds.py"
            )
    for key in (ACTION, PROPRIO):
        tensor = features[key].get("tensor", {})
        dtype, encoding = tensor.get("dtype"), tensor.get("encoding", "none")
        shape = _shape(tensor)
        right = (dtype, encoding, len(shape)) == ("float32", "none", 1)
        if not right or not 1 <= shape[0] <= _LONGEST_VECTOR:
            raise UserError(
                f"{path}: {key}: expected a float32 vector of at most {_LONGEST_VECTOR:,} numbers without encoding, "
                f"found dtype {reprlib.repr(dtype)}, encoding {reprlib.repr(encoding)}, shape {shape}; "
                "convert the dataset"
            )
    cameras = {key: feature for key, feature in features.items() if key.startswith(IMAGE)}
    if not cameras:
        raise UserError(
            f"{path}: {IMAGE}<camera>: expected at least one camera, found none; "
            "store images in the layout described in data_pipelines/reading/rlds.py"
        )
    if len(cameras) > _MOST_CAMERAS:
        raise UserError(
            f"{path}: {IMAGE}<camera>: expected at most {_MOST_CAMERAS} cameras, found {len(cameras)}; {FIX}"
        )
    for key, feature in cameras.items():
        image = feature.get("image", {})
        shape = _shape(image)
        fits = len(shape) == 3 and min(shape) > 0 and shape[2] == 3
        if image.get("encodingFormat") != "jpeg" or not fits or math.prod(shape) > _LARGEST_IMAGE:
            raise UserError(
                f"{path}: {key}: expected a JPEG image of shape (height, width, 3) and at most {_LARGEST_IMAGE:,} "
                f"bytes, found encoding {reprlib.repr(image.get('encodingFormat'))}, shape {shape}; convert the dataset"
            )


def _shape(feature: Mapping[str, Any]) -> tuple[Any, ...]:
    dimensions = feature.get("shape", {}).get("dimensions", ())
    if len(dimensions) > 8:
        raise ValueError(f"a tensor of {len(dimensions)} dimensions")
    return tuple(map(_integer, dimensions))


def _integer(value: Any) -> int:
    """Returns an integer, which protobuf writes as a string in JSON."""
    if type(value) not in (int, str) or not re.fullmatch("-?[0-9]{1,15}", str(value)):
        raise ValueError(f"{reprlib.repr(value)} in place of an integer")
    return int(value)


def _name(value: Any) -> str:
    """Returns a name that is safe to print and to use in a file's name."""
    if not isinstance(value, str) or not value.isprintable() or len(value) > _LONGEST_NAME:
        raise ValueError(f"{reprlib.repr(value)} in place of a name")
    return value


def _open_split(directory: Path, info: dict[str, Any], split: dict[str, Any], schema: str) -> Split:
    file_format = info.get("fileFormat", "tfrecord")
    if file_format != "tfrecord":
        raise UserError(
            f"{directory / 'dataset_info.json'}: fileFormat: expected 'tfrecord', found "
            f"{reprlib.repr(file_format)}; convert it with tfds convert_format"
        )
    name, lengths = _name(split["name"]), split["shardLengths"]
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
    files = []
    for index, expected in enumerate(episodes):
        path = directory / _file_name(_name(template), info["name"], name, index, len(episodes))
        if not os.path.isfile(path):  # False, too, for what cannot be a file's name
            raise UserError(
                f"{path}: missing shard {index + 1} of {len(episodes)} of split {name!r}; {FIX}"
            )
        digest.update(path.name.encode() + payload_checksums(path, expected))
        files.append(path)
    num_bytes = sum(file.stat().st_size for file in files)
    return Split(name, tuple(files), episodes, digest.hexdigest()[:32], num_bytes)


def _file_name(template: str, dataset: str, split: str, index: int, count: int) -> str:
    """Returns a shard's name from TFDS's template. (``str.format`` would obey widths of any number of digits.)"""
    values = {"DATASET": dataset, "SPLIT": split, "FILEFORMAT": "tfrecord"}
    values |= {"SHARD_INDEX": f"{index:05d}", "NUM_SHARDS": f"{count:05d}"}
    values["SHARD_X_OF_Y"] = f"{index:05d}-of-{count:05d}"
    name = re.sub(r"\{([A-Z_]+)\}", lambda match: _name(values[match[1]]), template)
    if name.startswith("/") or ".." in PurePosixPath(name).parts:
        raise ValueError(f"the file {name!r} outside the folder")
    return name
