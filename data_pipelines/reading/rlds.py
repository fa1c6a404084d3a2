"""Opens and validates RLDS datasets written by TFDS.

What ``data_pipelines.generate`` writes has a ``metadata.json`` with the names, units and scale of the actions, and
needs no mapping: one or more cameras under ``observation/image/<camera>``, ``observation/proprio``, ``action``,
``language_instruction`` and ``episode_metadata``. Any other layout is read with a mapping
(``data_pipelines.mapping``).

Opening checks that every shard exists and has its full length (see ``records``), and that the JSON files are those that
were generated, so that a broken dataset stops a run before it starts. TensorFlow verifies payload checksums when it
reads. The files may be a stranger's: sizes are limited before anything is allocated for them, and paths stay inside the
directory.
"""

import contextlib
import dataclasses
import hashlib
import math
import re
import reprlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from etils import epath
from google.protobuf.json_format import ParseError

from data_pipelines.mapping import DataMapping, Part, load_mapping
from data_pipelines.reading.layout import (
    STEPS,
    Feature,
    Layout,
    image_size,
    make_layout,
    read_features,
    width,
)
from data_pipelines.reading.records import FIX
from data_pipelines.reading.shards import open_split, safe_name
from data_pipelines.reading.splits import Split, hold_out, together
from data_pipelines.tensorflow_cpu import tf
from mllm_act.errors import UserError, nearest
from mllm_act.files import read_json

RECORD = "generation.json"  # beside the dataset: how it was generated, and the digests of its files
IMAGE = STEPS + "observation/image/"  # followed by the name of the camera


@dataclasses.dataclass(frozen=True, eq=False)
class Dataset:
    """An RLDS dataset: one directory, or several as one set."""

    directory: Path  # the first
    name: str
    layout: Layout
    image_shapes: Mapping[str, tuple[int, int, int]]  # camera -> (height, width, 3)
    action_dim: int
    proprio_dim: int
    metadata: Mapping[str, Any]  # name, names and units of actions, ...: as plain JSON types
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
                f"{self.directory / 'features.json'}: {STEPS}action: expected {dimensions} dimensions, "
                f"found {self.action_dim}; choose the config of this dataset's environment "
                f"({self.metadata.get('name', self.name)!r})"
            )


def open_dataset(directory: str | Path, mapping: DataMapping | str | None = None) -> Dataset:
    """Opens TFDS dataset directories.

    Reads only the JSON files and the record headers: milliseconds for thousands of episodes.

    Args:
      directory: a dataset's, local or ``gs://``, or one that contains its versions; several with commas between them
        are opened as one set.
      mapping: what to take from it, or the name of its file; None or "" for what ``data_pipelines.generate`` wrote.

    Raises:
      UserError: a directory is missing or is not a dataset; a feature is missing or has the wrong type; a shard is
        missing, truncated, or does not have the number of episodes stated in ``dataset_info.json``; or the sets do not
        fit together.
    """
    if isinstance(mapping, str):
        mapping = load_mapping(mapping, "config.data.mapping") if mapping else None
    try:
        parts = [_open(folder, mapping) for folder in _directories(str(directory))]
    except tf.errors.OpError as error:  # of a file system that TensorFlow reads, such as gs://
        raise UserError(
            f"{directory}: expected to read it, found {error.message.partition(chr(10))[0]}; check the path, the "
            "network and the credentials"
        ) from None
    first, *others = parts
    problems = [problem for other in others for problem in _differences(first, other)]
    if problems:
        raise UserError(
            f"{first.directory}: expected sets of the same robot, found others: {'; '.join(problems)}; train on them "
            "as a mixture, or give both a mapping that fits"
        )
    names = {name: None for part in parts for name in part.splits}
    splits = {name: together([p.splits[name] for p in parts if name in p.splits]) for name in names}
    named = [name for name in ("validation", "valid") if name in splits]
    if named and "val" not in splits:
        splits["val"] = dataclasses.replace(splits[named[0]], name="val")
    if "train" in splits and "val" not in splits:
        splits |= hold_out(splits["train"], first.layout.mapping.held_out)
    return dataclasses.replace(first, splits=splits)


def _differences(first: Dataset, other: Dataset) -> Iterator[str]:
    """Yields what differs between two sets that are to be one."""
    keys = ("image_shapes", "proprio_dim")
    one, two = ({**x.metadata, **{key: getattr(x, key) for key in keys}} for x in (first, other))
    for key in dict.fromkeys((*one, *two)):
        if one.get(key) != two.get(key):
            yield f"{other.directory}: {key}: expected {one.get(key)!r:.200}, found {two.get(key)!r:.200}"


def features_of(directory: str) -> dict[str, Feature]:
    """Returns the features of a dataset without a mapping, for ``data_pipelines.check``."""
    folder = _directories(directory)[0]
    tree = _read(folder, "features.json")
    with _structure(folder / "features.json"):
        return read_features(folder, tree)


def is_own(directory: str) -> bool:
    """Whether ``data_pipelines.generate`` wrote a dataset, which then needs no mapping."""
    cameras = [path for path in features_of(directory) if path.startswith(IMAGE)]
    return bool(cameras) and (_directories(directory)[0] / "metadata.json").exists()


def _directories(text: str) -> list[Path]:
    """Returns the folders that a text names: one, or several with commas between them."""
    if _path(text).exists():
        return [_version(_path(text))]
    return [_version(_path(part.strip())) for part in text.split(",")]


def _path(text: str) -> Path:
    return epath.Path(text) if "://" in text else Path(text)


def _version(folder: Path) -> Path:
    """Returns the dataset in a folder; of several versions of one dataset the newest."""
    if (folder / "dataset_info.json").exists() or not folder.is_dir():
        return folder
    found = [
        file.parent
        for pattern in ("*", "*/*")
        for file in folder.glob(f"{pattern}/dataset_info.json")
    ]
    parents = {version.parent for version in found}
    numbers = [re.fullmatch(r"(\d+)\.(\d+)\.(\d+)", version.name) for version in found]
    if len(parents) == 1 and all(numbers):
        newest = max(found, key=lambda version: tuple(map(int, version.name.split("."))))
        print(f"{folder}: reading {newest}")
        return newest
    return folder


def _open(directory: Path, mapping: DataMapping | None) -> Dataset:
    info = _read(directory, "dataset_info.json")
    tree = _read(directory, "features.json")
    path = directory / "features.json"
    metadata = _read(directory, "metadata.json") if mapping is None else mapping.metadata()
    _check_digests(directory)
    with _structure(path):
        features = read_features(directory, tree)
        for name in features:
            safe_name(name)
        if mapping is None:
            mapping = _own_mapping(directory, features, metadata)
    layout = make_layout(path, features, mapping)
    action_dim = sum(len(part.names) for part in mapping.action)
    _check_metadata(directory / "metadata.json", metadata, action_dim)
    with _structure(directory / "dataset_info.json"):
        schema = repr((sorted(features), dataclasses.replace(mapping, step=None)))
        splits = [open_split(directory, info, split, schema) for split in info["splits"]]
        splits = [split for split in splits if len(split)]
        name = safe_name(info["name"])
        files = [file for split in splits for file in split.files]
        if len(set(files)) < len(files) or len({split.name for split in splits}) < len(splits):
            raise ValueError("two splits or shards of the same name")
        if not splits:
            raise ValueError("no split with an episode")
    return Dataset(
        directory=directory,
        name=name,
        layout=layout,
        image_shapes=_image_shapes(layout, splits[0]),
        action_dim=action_dim,
        proprio_dim=sum(len(part.names) for part in mapping.proprio),
        metadata=metadata,
        splits={split.name: split for split in splits},
    )


def _own_mapping(
    directory: Path, features: Mapping[str, Feature], metadata: dict[str, Any]
) -> DataMapping:
    """Returns the mapping of what ``data_pipelines.generate`` wrote."""
    cameras = {
        path.removeprefix(IMAGE): path.removeprefix(STEPS)
        for path in features
        if path.startswith(IMAGE)
    }
    if not cameras:
        raise UserError(
            f"{directory / 'features.json'}: {IMAGE}<camera>: expected at least one camera, found none; describe the "
            f"dataset in a mapping: python -m data_pipelines.check {directory} writes a draft"
        )

    def parts(key: str) -> tuple[Part, ...]:
        wrong, numbers = width(features, key)
        return (
            Part(key, ("",) if wrong else tuple(map(str, range(numbers)))),
        )  # make_layout reports it

    return DataMapping(
        name=str(metadata.get("name")),
        cameras=cameras,
        action=parts("action"),
        proprio=parts("observation/proprio"),
        instruction=("language_instruction",),
        task="episode_metadata/task",
    )


def _image_shapes(layout: Layout, split: Split) -> dict[str, tuple[int, int, int]]:
    """Returns the shape of each camera's images; that of its first image where ``features.json`` leaves it open."""
    shapes = {camera: shape for camera, shape in layout.image_shapes.items() if shape is not None}
    unknown = [camera for camera in layout.image_shapes if camera not in shapes]
    if unknown:
        [(_, record)] = split.records(tf.constant([0], tf.int64))
        images = layout.parse(record)["images"]
        for camera in unknown:
            rows, columns = image_size(images[camera][0]).numpy().tolist()
            shapes[camera] = (rows, columns, 3)
    return dict(sorted(shapes.items()))


def _read(directory: Path, name: str) -> dict[str, Any]:
    path = directory / name
    try:
        return read_json(path, FIX)
    except FileNotFoundError:
        if not directory.is_dir():
            raise UserError(
                f"{directory}: no such directory; correct the path, or generate demonstrations with "
                f"python -m data_pipelines.generate --out={directory}"
            ) from None
        if name == "metadata.json":
            raise UserError(
                f"{path}: expected this file of what data_pipelines.generate writes, found none; describe the dataset "
                f"in a mapping (--config.data.mapping): python -m data_pipelines.check {directory} writes a draft"
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
    except (
        AttributeError,
        LookupError,
        ParseError,
        RecursionError,
        TypeError,
        ValueError,
    ) as error:
        reason = str(error) if type(error) is ValueError else f"{type(error).__name__} {error}"
        reason = " ".join(reason.split())[:300]
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
        if not (directory / name).is_file():  # whoever needs it says that it is missing
            continue
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
