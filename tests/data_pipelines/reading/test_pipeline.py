"""The pipeline on real TFDS files: complete, disjoint, restorable, and clear about bad input."""

import itertools
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipelines.reading.pipeline import EvalBatches, TrainBatches
from data_pipelines.reading.records import index_records
from data_pipelines.reading.rlds import open_dataset
from data_pipelines.tensorflow_cpu import tf
from mllm_act.errors import UserError
from tests.data_pipelines import tiny_rlds

pytestmark = pytest.mark.slow

LENGTHS = [[4, 1], [7, 3], [5], [2, 8, 6]]  # 4 files; 36 steps
STEPS = sum(map(sum, LENGTHS))


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_rlds.write_lengths(tmp_path_factory.mktemp("rlds") / "tiny", LENGTHS)


def train(directory: Path, **changes: Any) -> TrainBatches:
    settings = {"batch_size": 4, "context": 3, "seed": 0, "shuffle_megabytes": 1, **changes}
    return TrainBatches(open_dataset(directory), "train", **settings)


def steps(batch: dict[str, Any]) -> list[tuple[int, int]]:
    """Returns the (episode, step) of each position in the mask, which tiny_rlds stores in the proprioception."""
    return [tuple(pair) for pair in batch["proprio"][batch["mask"]][:, :2].astype(int).tolist()]


def one_epoch(batches: TrainBatches) -> Counter[tuple[int, int]]:
    """Reads windows one by one (batch_size 1) until the next epoch; counts the steps."""
    counts: Counter[tuple[int, int]] = Counter()
    for batch in batches:
        if batches.epoch > 0:
            return counts
        counts.update(steps(batch))
    raise AssertionError("training ends")


def same(left: dict[str, Any], right: dict[str, Any]) -> bool:
    leaves = tf.nest.map_structure(np.array_equal, left, right)
    return all(tf.nest.flatten(leaves))


@settings(max_examples=5, deadline=None)
@given(
    lengths=st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=3), min_size=1, max_size=3),
    context=st.integers(1, 4),
    seed=st.integers(0, 2**31),
)
def test_every_step_exactly_once_an_epoch(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[list[int]], context: int, seed: int
) -> None:
    directory = tiny_rlds.write_lengths(tmp_path_factory.mktemp("x") / "tiny", lengths, size=8)
    counts = one_epoch(train(directory, batch_size=1, context=context, seed=seed))
    flat = [length for of_file in lengths for length in of_file]
    assert counts == Counter((e, s) for e, length in enumerate(flat) for s in range(length))


def test_batch_is_what_was_stored(directory: Path) -> None:
    batch = next(train(directory))
    assert batch["images"]["corner4"].shape == (4, 3, 16, 16, 3)
    assert batch["images"]["corner4"].dtype == np.uint8
    assert batch["action"].shape == (4, 3, 4) and batch["action"].dtype == np.float32
    assert batch["mask"].dtype == np.bool_
    for row in range(4):
        for position in np.flatnonzero(batch["mask"][row]):
            episode, step = batch["proprio"][row, position, :2].astype(int)
            written = tiny_rlds.episode(episode, 9)["steps"][step]
            np.testing.assert_array_equal(batch["action"][row, position], written["action"])
            image = written["observation"]["image"]["corner4"]
            jpeg = tf.io.decode_jpeg(tf.io.encode_jpeg(image, quality=95))
            np.testing.assert_array_equal(batch["images"]["corner4"][row, position], jpeg)
            assert batch["task"][row] == f"task-{episode % 2}".encode()
            assert batch["instruction"][row] == f"do task {episode % 2}".encode()


def test_padding_is_zero(directory: Path) -> None:
    for batch in EvalBatches(open_dataset(directory), "train", batch_size=4, context=3):
        for values in (batch["action"], batch["proprio"], batch["images"]["corner4"]):
            assert not values[~batch["mask"]].any()


@pytest.mark.parametrize("kind", [TrainBatches, EvalBatches])
def test_packed_images_are_those_that_exist(directory: Path, kind: type) -> None:
    more = {"seed": 0} if kind is TrainBatches else {}
    whole, packed = (
        kind(open_dataset(directory), "train", batch_size=4, context=9, packed=packed, **more)
        for packed in (False, True)
    )
    for batch, one in zip(itertools.islice(whole, 3), packed, strict=False):
        images, existing = (x.pop("images")["corner4"] for x in (batch, one))
        np.testing.assert_array_equal(images[batch["mask"]], existing)
        assert same(batch, one)


def chunks_written(episode: int, length: int, chunk: int) -> np.ndarray:
    """[length, chunk, A] of an episode as tiny_rlds wrote it, its last action repeated."""
    stored = [step["action"] for step in tiny_rlds.episode(episode, length)["steps"]]
    ahead = stored + [stored[-1]] * chunk
    return np.array([ahead[step : step + chunk] for step in range(length)])


@pytest.mark.parametrize("chunk", [2, 4, 9])  # longer than a window; longer than any episode
def test_chunks_are_the_whole_episodes(directory: Path, chunk: int) -> None:
    """Training cuts windows at random offsets; the chunk of a step does not depend on them."""
    flat = [length for of_file in LENGTHS for length in of_file]
    written = [chunks_written(episode, length, chunk) for episode, length in enumerate(flat)]
    batches = train(directory, chunk=chunk)
    every_step = EvalBatches(open_dataset(directory), "train", batch_size=4, context=3, chunk=chunk)
    for batch in [*(next(batches) for _ in range(12)), *every_step]:
        assert batch["action"].shape == (4, 3, chunk * 4) and batch["action"].dtype == np.float32
        assert not batch["action"][~batch["mask"]].any()
        chunks = batch["action"][batch["mask"]].reshape(-1, chunk, 4)
        for (episode, step), values in zip(steps(batch), chunks, strict=True):
            np.testing.assert_array_equal(values, written[episode][step])


def test_chunks_change_nothing_else(directory: Path) -> None:
    """The first action of a chunk is the step's own, and the order is the same as without chunks."""
    plain, of_one, of_three = (
        train(directory, **more) for more in ({}, {"chunk": 1}, {"chunk": 3})
    )
    for _ in range(12):
        expected, batch = next(plain), next(of_three)
        assert same(expected, next(of_one))
        assert same(expected, {**batch, "action": batch["action"][..., :4]})
    state = of_three.state()
    assert plain.state() == of_one.state() == {**state, "chunk": 1}


def test_chunks_count_as_memory(directory: Path) -> None:
    short, long = train(directory), train(directory, chunk=1000)
    assert long.shuffle_windows < short.shuffle_windows / 10
    assert long.host_memory_megabytes > short.host_memory_megabytes


@pytest.mark.parametrize("kind", [TrainBatches, EvalBatches])
def test_chunk_without_an_action(directory: Path, kind: type) -> None:
    more = {"seed": 0} if kind is TrainBatches else {}
    with pytest.raises(UserError, match="config.chunk: expected at least 1.*found 0"):
        kind(open_dataset(directory), "train", batch_size=4, context=3, chunk=0, **more)


def test_order_follows_the_seed(directory: Path) -> None:
    def first_epoch(seed: int) -> list[tuple[int, int]]:
        batches = train(directory, seed=seed)
        return [step for _ in range(4) for step in steps(next(batches))]

    assert first_epoch(1) == first_epoch(1)
    assert first_epoch(1) != first_epoch(2)


def test_epochs_differ(directory: Path) -> None:
    batches = train(directory, batch_size=1)
    epochs: dict[int, list[tuple[int, int]]] = {0: [], 1: []}
    for batch in batches:
        if batches.epoch > 1:
            break
        epochs[batches.epoch] += steps(batch)
    assert sorted(epochs[0]) == sorted(epochs[1])
    assert epochs[0] != epochs[1]


@pytest.mark.parametrize("count", [2, 3, 4])
def test_processes_read_the_rows_that_one_process_would(directory: Path, count: int) -> None:
    """Disjoint and complete, in the same order, also after a resume in another number of processes."""
    whole = train(directory)
    for _ in range(5):  # more than an epoch is 11
        next(whole)
    parts = [train(directory, process_index=i, process_count=count) for i in range(count)]
    for part in parts:
        part.restore(whole.state())
    for _ in range(12):
        batch, rows = next(whole), [next(part) for part in parts]
        together = tf.nest.map_structure(lambda *x: np.concatenate(x), *rows)
        assert same(batch, together)
        assert all(part.state() == whole.state() for part in parts)
    again = train(directory)
    again.restore(parts[-1].state())
    assert same(next(again), next(whole))


@pytest.mark.parametrize("chunk", [1, 4])
@pytest.mark.parametrize("taken", [0, 2, 5, 11])  # 11 batches of 4 windows are more than an epoch
def test_restored_iterator_continues_bit_for_bit(directory: Path, taken: int, chunk: int) -> None:
    whole = train(directory, chunk=chunk)
    for _ in range(taken):
        next(whole)
    state = json.loads(json.dumps(whole.state()))
    assert len(json.dumps(state)) < 500
    resumed = train(directory, chunk=chunk)
    resumed.restore(state)
    assert resumed.state() == state
    for _ in range(8):
        assert same(next(whole), next(resumed))
        assert whole.state() == resumed.state()


def test_restore_in_another_process_is_the_same(directory: Path) -> None:
    batches = train(directory)
    next(batches)
    program = (
        "import json, sys; from data_pipelines.reading.pipeline import TrainBatches\n"
        "from data_pipelines.reading.rlds import open_dataset\n"
        "b = TrainBatches(open_dataset(sys.argv[1]), 'train', batch_size=4, context=3, seed=0,"
        " shuffle_megabytes=1)\n"
        "b.restore(json.loads(sys.argv[2]))\n"
        "sys.stdout.buffer.write(b''.join(next(b)['images']['corner4'].tobytes() for _ in 'ab'))"
    )
    command = [sys.executable, "-c", program, str(directory), json.dumps(batches.state())]
    out = subprocess.run(command, capture_output=True, check=True).stdout
    assert out == b"".join(next(batches)["images"]["corner4"].tobytes() for _ in "ab")


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"seed": 1}, "seed"),
        ({"context": 2}, "context"),
        ({"chunk": 2}, "chunk"),
        ({}, "fingerprint"),
    ],
)
def test_restore_rejects_another_order(
    directory: Path, tmp_path: Path, change: dict[str, Any], key: str
) -> None:
    state = train(directory).state()
    other = directory if change else tiny_rlds.write_lengths(tmp_path / "tiny", [[4, 2], [7]])
    with pytest.raises(UserError, match=f"{key}: expected .* found"):
        train(other, **change).restore(state)


def test_a_sample_of_windows_is_spread_over_the_whole_split(directory: Path) -> None:
    """The sample has windows of the whole split, and no more batches than requested."""
    dataset = open_dataset(directory)
    whole = EvalBatches(dataset, "train", batch_size=1, context=1)
    sample = EvalBatches(dataset, "train", batch_size=1, context=1, windows=len(whole) // 3)
    all_steps, sampled = ([tuple(steps(batch)) for batch in b] for b in (whole, sample))
    assert sampled == all_steps[::3] and len(sample) == len(sampled)


@pytest.mark.parametrize("count", [1, 2, 4, 5])
def test_evaluation_is_one_pass_of_equally_many_batches(directory: Path, count: int) -> None:
    counts: Counter[tuple[int, int]] = Counter()
    lengths = set()
    for index in range(count):
        batches = EvalBatches(
            open_dataset(directory),
            "train",
            batch_size=4,
            context=3,
            process_index=index,
            process_count=count,
        )
        once, again = list(batches), list(batches)
        assert len(once) == len(batches) and all(map(same, once, again))
        lengths.add(len(once))
        for batch in once:
            assert batch["mask"].shape == (4, 3)
            counts.update(steps(batch))
    assert len(lengths) == 1
    assert sum(counts.values()) == STEPS and set(counts.values()) == {1}


def test_shuffle_buffer_holds_the_megabytes_stated(directory: Path) -> None:
    small, large = train(directory, shuffle_megabytes=1), train(directory, shuffle_megabytes=50)
    assert large.shuffle_windows == pytest.approx(50 * small.shuffle_windows, rel=0.02)
    growth = large.host_memory_megabytes - small.host_memory_megabytes
    assert growth == pytest.approx(49, abs=0.1)


def test_record_walk_reads_the_stored_checksums(tmp_path: Path) -> None:
    path = tmp_path / "x.tfrecord"
    with tf.io.TFRecordWriter(str(path)) as writer:
        for payload in (b"one", b"", b"three" * 100):
            writer.write(payload)
    records = index_records(path, 3, "tfrecord")
    assert records.size.tolist() == [16 + 3, 16, 16 + 500] and len(records.content) == 3 * 4
    assert records.position.tolist() == [0, 19, 35]
