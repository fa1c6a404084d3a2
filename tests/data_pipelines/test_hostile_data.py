"""Damaged and forged datasets: one UserError, or equal content; never another exception, a hang or much memory."""

import json
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from data_pipelines.reading.pipeline import EvalBatches, TrainBatches
from data_pipelines.reading.rlds import open_dataset
from data_pipelines.reading.statistics import dataset_statistics
from data_pipelines.tensorflow_cpu import tf
from mllm_act.errors import UserError
from tests.data_pipelines import foreign_imports
from tests.data_pipelines.foreign import FORMATS, IMAGE, SHARD, bomb, dataset, frame
from tests.fuzzing import RIGHT, Format, fuzz

pytestmark = pytest.mark.slow

SIZES = {"batch_size": 2, "context": 3, "shuffle_megabytes": 1}


@pytest.mark.parametrize("kind", FORMATS, ids=lambda kind: kind.name)
def test_mutated_files(tmp_path: Path, kind: Format) -> None:
    counts = fuzz(kind, tmp_path, 40)
    assert counts.keys() <= RIGHT, counts
    assert counts["refused"] + counts["equal"] > 15, counts


@pytest.mark.parametrize("kind", foreign_imports.FORMATS, ids=lambda kind: kind.name)
def test_mutated_files_of_other_projects(tmp_path: Path, kind: Format) -> None:
    counts = fuzz(kind, tmp_path, 60)
    assert counts.keys() <= RIGHT, counts
    assert counts["refused"] > 20, counts


def edit(path: Path, *keys: Any, value: Any) -> None:
    """Sets a value deep in a JSON file."""
    root = part = json.loads(path.read_text())
    for key in keys[:-1]:
        part = part[key]
    part[keys[-1]] = value
    path.write_text(json.dumps(root))


@pytest.mark.parametrize(
    "template",
    [
        "../{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
        "/etc/passwd",
        "{SPLIT:>9999999999}",
        "{SPLIT.__class__}",
        "{SECRET}",
        "x" * 300,
        "a\0b",
        "{SPLIT}" * 1_000_000,
        7,
    ],
)
def test_a_template_of_file_names_that_leaves_the_folder_or_grows(
    tmp_path: Path, template: Any
) -> None:
    path = dataset("dataset_info.json", False, tmp_path / "rlds")
    (tmp_path / SHARD).write_bytes((tmp_path / "rlds" / SHARD).read_bytes())
    edit(path, "splits", 0, "filepathTemplate", value=template)
    with pytest.raises(UserError, match="rlds.*(expected the structure .* found|missing shard)"):
        open_dataset(path.parent)


@pytest.mark.parametrize(
    "lengths",
    [["1000000000"], ["-2"], [2.5], [True], ["2e0"], [], ["0"], ["2"] * 50_000, "2", None],
)
def test_lengths_of_shards_that_cannot_be(tmp_path: Path, lengths: Any) -> None:
    path = dataset("dataset_info.json", False, tmp_path / "rlds")
    edit(path, "splits", 0, "shardLengths", value=lengths)
    with pytest.raises(UserError, match="rlds.*(expected .* found|missing shard)"):
        open_dataset(path.parent)


LEAVES = ("featuresDict", "features", "steps", "sequence", "feature", "featuresDict", "features")
CAMERAS = (*LEAVES, "observation", "featuresDict", "features", "image", "featuresDict", "features")
CAMERA = (*CAMERAS, "corner4", "image", "shape", "dimensions")


@pytest.mark.parametrize(
    ("keys", "value", "found"),
    [
        ((*LEAVES, "action", "tensor", "shape", "dimensions"), ["1000000000"], "shape"),
        ((*LEAVES, "action", "tensor", "shape", "dimensions"), ["9" * 20], "expected the structure"),
        (CAMERA, ["60000", "60000", "3"], "at most 100,000,000 bytes"),
        (CAMERAS, {f"camera{i}": {"image": {}} for i in range(10_000)}, "expected the structure"),
        (CAMERAS, ["as long as a million cameras" * 600_000], "more than 16,000,000"),
        (CAMERAS, {"x" * 5_000: {"image": {}}}, "expected the structure"),
        (CAMERAS, {"a\nb": {"image": {}}}, "expected the structure"),
    ],
)  # fmt: skip
def test_features_that_cannot_be(
    tmp_path: Path, keys: tuple[str, ...], value: Any, found: str
) -> None:
    path = dataset("features.json", False, tmp_path)
    edit(path, *keys, value=value)
    with pytest.raises(UserError) as error:
        open_dataset(tmp_path)
    assert str(error.value).startswith(f"{path}: ") and found in str(error.value)


@pytest.mark.parametrize("name", ["dataset_info.json", "features.json", "metadata.json"])
@pytest.mark.parametrize("content", [b"[" * 100_000, b'{"a":' * 100_000, b"\xff{}", b"3", b""])
def test_json_that_is_deep_or_none(tmp_path: Path, name: str, content: bytes) -> None:
    path = dataset(name, False, tmp_path)
    path.write_bytes(content)
    with pytest.raises(UserError, match=f"{name}: expected a JSON object, found "):
        open_dataset(tmp_path)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("action_scale", [0.01, float("nan"), 0.01, 1.0]),
        ("action_scale", [0.01, 0.01, 0.01, 1e999]),
        ("action_scale", [0.01, 0.01, 0.01]),
        ("action_scale", [0.01, 0.01, 0.01, "1"]),
        ("action_names", "abcd"),
        ("name", None),
        ("choices", "abc"),
    ],
)
def test_metadata_that_cannot_be(tmp_path: Path, key: str, value: Any) -> None:
    path = dataset("metadata.json", False, tmp_path)
    edit(path, key, value=value)
    with pytest.raises(UserError, match=f"metadata.json: .*{key}.*: expected .*, found "):
        open_dataset(tmp_path)


def test_a_json_file_that_changed_since_it_was_generated(tmp_path: Path) -> None:
    path = dataset("metadata.json", True, tmp_path)
    assert open_dataset(tmp_path).metadata["action_scale"][0] == 0.01
    edit(path, "action_scale", 0, value=0.02)
    with pytest.raises(UserError, match="metadata.json: expected the SHA-256 in generation.json"):
        open_dataset(tmp_path)


def first_batches(folder: Path) -> list[Callable[[], Any]]:
    """All ways in which a dataset is read."""
    opened = open_dataset(folder)
    return [
        lambda: dataset_statistics(opened),
        lambda: next(TrainBatches(opened, "train", seed=0, **SIZES)),
        lambda: list(EvalBatches(opened, "train", batch_size=2, context=3)),
    ]


def changed(folder: Path, change: Callable[[Any], object]) -> Path:
    """A dataset whose last record is changed, with right checksums; returns the shard."""
    path = dataset(SHARD, False, folder)
    records = [record.numpy() for record in tf.data.TFRecordDataset(str(path))]
    example = tf.train.Example.FromString(records[-1])
    change(example.features.feature)
    path.write_bytes(b"".join(map(frame, (records[0], example.SerializeToString()))))
    return path


@pytest.mark.parametrize(
    ("key", "name"),
    [("steps/language_instruction", "instruction"), ("episode_metadata/task", "task")],
)
def test_a_text_that_is_not_utf8(tmp_path: Path, key: str, name: str) -> None:
    path = changed(
        tmp_path, lambda features: features[key].bytes_list.value.__setitem__(-1, b"\xff\n\x1b")
    )
    with pytest.raises(UserError) as error:
        dataset_statistics(open_dataset(tmp_path))
    message = str(error.value)
    assert f"{path}: record 1" in message and f"{name}: expected UTF-8, found" in message
    assert message.isprintable()


def test_a_record_that_is_no_message(tmp_path: Path) -> None:
    path = dataset(SHARD, False, tmp_path)
    path.write_bytes(frame(b"\xff\xfe\n" * 50) * 2)
    for read in first_batches(tmp_path):
        with pytest.raises(UserError, match=rf"{SHARD}: record \d: expected the features of"):
            read()


def test_a_shard_deleted_or_replaced_while_training(tmp_path: Path) -> None:
    path = dataset(SHARD, False, tmp_path)
    reads = first_batches(tmp_path)
    path.unlink()
    for read in reads:
        with pytest.raises(UserError, match=rf"{SHARD}: record \d: expected to read it, found"):
            read()
    path.mkdir()
    for read in reads:
        with pytest.raises(UserError, match=rf"{SHARD}: record \d: expected to read it, found"):
            read()


def test_jpegs_that_decode_to_half_a_gigabyte_each(tmp_path: Path) -> None:
    def change(features: Any) -> None:
        values = features[f"{IMAGE}corner4"].bytes_list.value
        values[:] = [bomb(value, 13_000) for value in values]

    changed(tmp_path, change)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for read in first_batches(tmp_path)[1:]:
        with pytest.raises(
            UserError, match=r"corner4: expected an image .* \(16, 16, 3\), found \(13000"
        ):
            read()
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 400_000  # kilobytes; one of the images takes 507,000
