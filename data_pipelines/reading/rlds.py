"""Opens and validates an RLDS dataset written by TFDS.

The layout, as ``data_pipelines.generate`` writes it: episodes of ``steps`` with one or more cameras under
``observation/image/<camera>`` (JPEG), ``observation/proprio``, ``action`` and ``language_instruction``, and
``episode_metadata``. ``metadata.json`` has the names, units and scale of the actions.

Opening checks that every shard exists and has its full length (see ``records``), so that a broken dataset stops a run
before it starts. TensorFlow verifies payload checksums when it reads.
"""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from data_pipelines.reading.records import FIX, payload_checksums
from mllm_act.errors import UserError, nearest

STEPS = "steps/"
ACTION = STEPS + "action"
PROPRIO = STEPS + "observation/proprio"
INSTRUCTION = STEPS + "language_instruction"
IMAGE = STEPS + "observation/image/"  # followed by the name of the camera
EPISODE = "episode_metadata/"
_TEXT = (INSTRUCTION, EPISODE + "task")
_INTEGERS = (EPISODE + "configuration", EPISODE + "episode")


@dataclasses.dataclass(frozen=True)
class Split:
    """The files of one split."""

    name: str
    files: tuple[Path, ...]
    episodes: tuple[int, ...]  # per file
    fingerprint: str  # changes with the bytes of any record

    @property
    def num_bytes(self) -> int:
        return sum(file.stat().st_size for file in self.files)


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
    info = _read_json(directory, "dataset_info.json")
    features = _flatten(_read_json(directory, "features.json"))
    metadata = _read_json(directory, "metadata.json")
    _check_features(directory / "features.json", features)
    action_dim = _shape(features[ACTION]["tensor"])[0]
    for key in ("action_names", "action_units", "action_scale"):
        if len(metadata.get(key, ())) != action_dim:
            raise UserError(
                f"{directory / 'metadata.json'}: {key}: expected one entry per action dimension, "
                f"{action_dim} in all, found {metadata.get(key)}; {FIX}"
            )
    return Dataset(
        directory=directory,
        name=info["name"],
        image_shapes={
            key.removeprefix(IMAGE): _shape(feature["image"])
            for key, feature in sorted(features.items())
            if key.startswith(IMAGE)
        },
        action_dim=action_dim,
        proprio_dim=_shape(features[PROPRIO]["tensor"])[0],
        metadata=metadata,
        splits={
            split["name"]: _open_split(directory, info, split, repr(sorted(features)))
            for split in info["splits"]
        },
    )


def _read_json(directory: Path, name: str) -> dict[str, Any]:
    path = directory / name
    try:
        return json.loads(path.read_text())
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
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: expected JSON, found {error}; {FIX}") from None


def _flatten(feature: dict[str, Any], key: str = "") -> dict[str, dict[str, Any]]:
    """Returns the leaves of a TFDS feature tree, keyed by their names in a tf.train.Example."""
    if "sequence" in feature:
        return _flatten(feature["sequence"]["feature"], key)
    if "featuresDict" not in feature:
        return {key: feature}
    leaves = {}
    for name, child in feature["featuresDict"]["features"].items():
        leaves.update(_flatten(child, f"{key}/{name}" if key else name))
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
        rank = len(_shape(tensor))
        if (dtype, encoding, rank) != ("float32", "none", 1):
            raise UserError(
                f"{path}: {key}: expected a float32 vector without encoding, found dtype {dtype}, "
                f"encoding {encoding}, rank {rank}; convert the dataset"
            )
    cameras = {key: feature for key, feature in features.items() if key.startswith(IMAGE)}
    if not cameras:
        raise UserError(
            f"{path}: {IMAGE}<camera>: expected at least one camera, found none; "
            "store images in the layout described in data_pipelines/reading/rlds.py"
        )
    for key, feature in cameras.items():
        image = feature.get("image", {})
        shape = _shape(image)
        if image.get("encodingFormat") != "jpeg" or len(shape) != 3 or shape[2] != 3:
            raise UserError(
                f"{path}: {key}: expected a JPEG image of shape (height, width, 3), found encoding "
                f"{image.get('encodingFormat')!r}, shape {shape}; convert the dataset"
            )


def _shape(feature: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(int(n) for n in feature.get("shape", {}).get("dimensions", ()))


def _open_split(directory: Path, info: dict[str, Any], split: dict[str, Any], schema: str) -> Split:
    file_format = info.get("fileFormat", "tfrecord")
    if file_format != "tfrecord":
        raise UserError(
            f"{directory / 'dataset_info.json'}: fileFormat: expected 'tfrecord', found "
            f"{file_format!r}; convert it with tfds convert_format"
        )
    episodes = tuple(int(n) for n in split["shardLengths"])
    template = split.get("filepathTemplate", "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}")
    digest = hashlib.sha256(schema.encode())
    files = []
    for index, expected in enumerate(episodes):
        path = directory / template.format(
            DATASET=info["name"],
            SPLIT=split["name"],
            FILEFORMAT=file_format,
            SHARD_INDEX=f"{index:05d}",
            SHARD_X_OF_Y=f"{index:05d}-of-{len(episodes):05d}",
        )
        if not path.is_file():
            raise UserError(
                f"{path}: missing shard {index + 1} of {len(episodes)} of split {split['name']!r}; {FIX}"
            )
        checksums = payload_checksums(path)
        if len(checksums) != expected:
            raise UserError(
                f"{path}: expected {expected} episodes (dataset_info.json), found {len(checksums)}; {FIX}"
            )
        digest.update(b"".join([path.name.encode(), *checksums]))
        files.append(path)
    if not sum(episodes):
        raise UserError(f"{directory}: split {split['name']!r} has no episodes; {FIX}")
    return Split(split["name"], tuple(files), episodes, digest.hexdigest()[:32])
