"""Bad data: the error is one line with file, key, expected, found and fix."""

import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from data_pipelines.reading.episodes import read_actions
from data_pipelines.reading.rlds import IMAGE, open_dataset
from data_pipelines.reading.statistics import dataset_statistics
from data_pipelines.tensorflow_cpu import tf
from mllm_act.errors import UserError
from tests.data_pipelines import tiny_rlds
from tests.data_pipelines.reading.test_pipeline import LENGTHS, train


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_rlds.write_lengths(tmp_path_factory.mktemp("rlds") / "tiny", LENGTHS)


def shard(directory: Path, number: int = 1) -> Path:
    return sorted(directory.glob("tiny-train.tfrecord-*"))[number]


def fail(work: Callable[[], object], *words: str) -> None:
    with pytest.raises(UserError) as caught:
        work()
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message, message


@pytest.fixture
def broken(tmp_path: Path) -> Path:
    return tiny_rlds.write_lengths(tmp_path / "tiny", [[4, 1], [7, 3]])


def test_missing_directory(tmp_path: Path) -> None:
    fail(lambda: open_dataset(tmp_path / "no"), "no such directory", "data_pipelines.generate")


def test_directory_above_the_dataset(directory: Path) -> None:
    fail(lambda: open_dataset(directory.parent), "dataset_info.json", f"did you mean {directory}")


def test_missing_shard(broken: Path) -> None:
    path = shard(broken)
    path.unlink()
    fail(lambda: open_dataset(broken), str(path), "missing shard 2 of 2", "generate")


@pytest.mark.parametrize("kept", [0.2, 0.999])
def test_truncated_shard(broken: Path, kept: float) -> None:
    path = shard(broken)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * kept)])
    fail(lambda: open_dataset(broken), str(path), "truncated", "expected", "found", "record")


def test_shard_cut_between_records(broken: Path) -> None:
    path = shard(broken)
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    path.write_bytes(content[: length + 16])
    fail(lambda: open_dataset(broken), str(path), "expected 2 episodes", "found 1")


def test_corrupt_length(broken: Path) -> None:
    path = shard(broken)
    content = bytearray(path.read_bytes())
    content[0] ^= 1
    path.write_bytes(content)
    fail(lambda: open_dataset(broken), str(path), "record 0", "corrupt")


def test_corrupt_payload_names_file_and_record(broken: Path) -> None:
    path = shard(broken)
    content = bytearray(path.read_bytes())
    content[-100] ^= 1
    path.write_bytes(content)
    expected = (str(path), "record 1", "corrupt", "generate")
    fail(lambda: read_actions(open_dataset(broken), "train"), *expected)
    fail(lambda: [next(batches) for batches in [train(broken)] for _ in range(9)], *expected)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_action_that_is_not_finite(tmp_path: Path, value: float) -> None:
    bad = tiny_rlds.episode(1, 6)
    bad["steps"][4]["action"][2] = value
    directory = tiny_rlds.write(tmp_path / "tiny", {"train": [[tiny_rlds.episode(0, 3), bad]]})
    expected = ("'task-1'", "step 4", "action[2]", str(value), "record 1")
    fail(lambda: read_actions(open_dataset(directory), "train"), *expected)
    fail(lambda: [next(batches) for batches in [train(directory)] for _ in range(9)], *expected)


def test_all_faults_of_a_split_are_in_one_error(tmp_path: Path) -> None:
    episodes = [tiny_rlds.episode(index, 3) for index in range(30)]
    for number, episode in enumerate(episodes[:24]):
        episode["steps"][1]["action"][number % 4] = np.nan
    directory = tiny_rlds.write(tmp_path / "tiny", {"train": [episodes[20:], episodes[:20]]})
    expected = (  # two of the 24 are held out
        "record 0 (task 'task-0'), step 1: action[0]",
        "record 3",
        "action[3]",
        "and 2 more",
    )
    fail(lambda: dataset_statistics(open_dataset(directory)), *expected)


def test_steps_missing_from_one_key(tmp_path: Path) -> None:
    """An episode with one image fewer than actions, as a broken converter might write it."""
    directory = tiny_rlds.write_lengths(tmp_path / "tiny", [[4]])
    path = shard(directory, 0)
    example = tf.train.Example.FromString(next(iter(tf.data.TFRecordDataset(str(path)))).numpy())
    del example.features.feature[IMAGE + "corner4"].bytes_list.value[-1]
    with tf.io.TFRecordWriter(str(path)) as writer:
        writer.write(example.SerializeToString())
    fail(lambda: next(train(directory)), str(path), "record 0", "corner4 3", "action 4")


def test_image_of_another_size(tmp_path: Path) -> None:
    directory = tiny_rlds.write_lengths(tmp_path / "tiny", [[4]], size=16)
    features = directory / "features.json"
    features.write_text(features.read_text().replace('"16"', '"20"'))
    expected = ("camera corner4", "(20, 20, 3)", "found (16, 16, 3)", "step 0")
    fail(lambda: next(train(directory)), *expected)


def test_another_action_dimension_than_the_config(directory: Path) -> None:
    dataset = open_dataset(directory)
    dataset.expect_actions(4)
    fail(
        lambda: dataset.expect_actions(7),
        "features.json",
        "steps/action",
        "expected 7",
        "found 4",
        "tiny",
    )


def test_record_of_another_action_dimension_than_features_say(tmp_path: Path) -> None:
    directory = tiny_rlds.write_lengths(tmp_path / "tiny", [[3]])
    path = shard(directory, 0)
    example = tf.train.Example.FromString(next(iter(tf.data.TFRecordDataset(str(path)))).numpy())
    del example.features.feature["steps/action"].float_list.value[-1]
    with tf.io.TFRecordWriter(str(path)) as writer:
        writer.write(example.SerializeToString())
    fail(
        lambda: read_actions(open_dataset(directory), "train"),
        str(path),
        "record 0",
        "steps/action",
    )


def test_feature_that_is_not_there(broken: Path) -> None:
    path = broken / "features.json"
    path.write_text(path.read_text().replace('"action"', '"actions"'))
    fail(lambda: open_dataset(broken), str(path), "steps/action", "did you mean 'steps/actions'?")


def test_split_that_is_not_there(directory: Path) -> None:
    fail(lambda: open_dataset(directory).split("trian"), "'trian'", "did you mean 'train'?")


def test_fewer_episodes_than_processes(directory: Path) -> None:
    work = lambda: train(directory, process_count=9)  # noqa: E731
    fail(work, "config.data.batch_size: expected a window for each of 9 processes, found 4")


def test_more_memory_than_the_host_has(directory: Path) -> None:
    fail(lambda: train(directory, shuffle_megabytes=10**9), "shuffle_megabytes=1000000000", "lower")
