"""Statistics equal numpy's, are cached by content, and give an exact normalisation."""

import dataclasses
import json
import math
import os
import resource
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from data_pipelines.reading import statistics
from data_pipelines.reading.episodes import read_actions, read_segments
from data_pipelines.reading.rlds import open_dataset
from data_pipelines.reading.statistics import Processes, dataset_statistics, moments
from mllm_act.errors import UserError
from mllm_act.normalization import Statistics
from tests.data_pipelines import tiny_rlds


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return tiny_rlds.write_lengths(tmp_path / "tiny", [[4, 1], [7, 3]])


def statistics_of(action: np.ndarray, proprio: np.ndarray | None = None) -> Statistics:
    proprio = action if proprio is None else proprio
    return Statistics(
        moments(action), moments(proprio), len(action), 1, 1, "train", "x", ("t",), ("i",)
    )


def test_equal_to_numpy_over_what_was_written(directory: Path) -> None:
    written = [
        step
        for index, length in enumerate([4, 1, 7, 3])
        for step in tiny_rlds.episode(index, length)["steps"]
    ]
    action = np.array([step["action"] for step in written])
    proprio = np.array([step["observation"]["proprio"] for step in written])
    np.testing.assert_array_equal(read_actions(open_dataset(directory), "train").action, action)
    episode, steps = read_segments(open_dataset(directory), "train")
    assert (episode.tolist(), steps.tolist()) == ([0, 1, 2, 3], [4, 1, 7, 3])

    result = dataset_statistics(open_dataset(directory))
    assert (result.num_steps, result.num_episodes) == (15, 4)
    for values, moment in ((action, result.action), (proprio, result.proprio)):
        values = values.astype(np.float64)
        np.testing.assert_array_equal(moment.mean, values.mean(0))
        np.testing.assert_array_equal(moment.std, values.std(0))
        np.testing.assert_array_equal(moment.min, values.min(0))
        np.testing.assert_array_equal(moment.max, values.max(0))
        np.testing.assert_array_equal(moment.q01, np.quantile(values, 0.01, axis=0))
        np.testing.assert_array_equal(moment.q99, np.quantile(values, 0.99, axis=0))


def test_cached_in_the_folder_by_content(directory: Path) -> None:
    dataset = open_dataset(directory)
    first = dataset_statistics(dataset)
    for shard in dataset.split("train").files:
        shard.unlink()
    assert dataset_statistics(dataset) == first  # read, not computed again
    tiny_rlds.write_lengths(directory, [[4, 1], [7, 4]])
    again = dataset_statistics(open_dataset(directory))
    assert again.num_steps == 16 and again.fingerprint != first.fingerprint
    assert len(list(directory.glob("*statistics-*"))) == 2


def edited(change: Callable[[dict[str, Any]], object]) -> Callable[[bytes], bytes]:
    """A change of the statistics in a cache whose digest stays."""

    def edit(content: bytes) -> bytes:
        cache = json.loads(content)
        change(cache["statistics"])
        return json.dumps(cache).encode()

    return edit


@pytest.mark.parametrize(
    "damage",
    [
        edited(lambda s: s["action"]["max"].__setitem__(0, 0.5)),
        edited(lambda s: s["action"]["std"].__setitem__(0, math.nan)),
        edited(lambda s: [s["action"].update({k: v[:2]}) for k, v in s["action"].items()]),
        edited(lambda s: s.update(action=None)),
        lambda content: content[: len(content) // 2],
        lambda content: b"",
        lambda content: b"[]",
        lambda content: b"[" * 100_000,
        lambda content: b"\xff" + content,
    ],
)
def test_damaged_cache_is_computed_again_with_a_notice(
    directory: Path, capsys: pytest.CaptureFixture[str], damage: Callable[[bytes], bytes]
) -> None:
    dataset = open_dataset(directory)
    computed = dataset_statistics(dataset)
    (cache,) = directory.glob("statistics-*")
    content = cache.read_bytes()
    cache.write_bytes(damage(content))
    assert dataset_statistics(dataset) == computed
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith(f"notice: {cache} is damaged") and cache.read_bytes() == content


def test_cache_of_other_data_under_this_name_is_computed_again(tmp_path: Path) -> None:
    datasets = [
        open_dataset(tiny_rlds.write_lengths(tmp_path / name, [[length]]))
        for name, length in (("one", 4), ("two", 5))
    ]
    for dataset in datasets:
        dataset_statistics(dataset)
    caches = [next(dataset.directory.glob("statistics-*")) for dataset in datasets]
    caches[1].write_bytes(caches[0].read_bytes())
    assert dataset_statistics(datasets[1]).num_steps == 5


def test_cache_has_the_permissions_of_the_umask(directory: Path) -> None:
    umask = os.umask(0o027)
    try:
        dataset_statistics(open_dataset(directory))
    finally:
        os.umask(umask)
    (cache,) = directory.glob("statistics-*")
    assert cache.stat().st_mode & 0o777 == 0o640


def test_cache_that_cannot_be_written_is_a_notice(
    directory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dataset = open_dataset(directory)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))  # as if the disk were full
    try:
        computed = dataset_statistics(dataset)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("notice: cannot cache statistics")
    assert not list(directory.glob("*statistics-*"))
    assert dataset_statistics(dataset) == computed


def test_bad_data_leaves_nothing_behind(tmp_path: Path) -> None:
    bad = tiny_rlds.episode(0, 3)
    bad["steps"][1]["observation"]["proprio"][0] = np.nan
    directory = tiny_rlds.write(tmp_path / "tiny", {"train": [[bad]]})
    with pytest.raises(UserError, match="proprio"):
        dataset_statistics(open_dataset(directory))
    assert not list(directory.glob("*statistics-*"))


def test_json_round_trip(directory: Path) -> None:
    result = dataset_statistics(open_dataset(directory))
    assert Statistics.from_dict(json.loads(json.dumps(result.to_dict()))) == result
    assert result.tasks == ("task-0", "task-1")
    assert result.instructions == ("do task 0", "do task 1")


def test_json_without_a_key() -> None:
    values = statistics_of(np.zeros((2, 1), np.float32)).to_dict()
    del values["proprio"]["q01"]
    with pytest.raises(UserError, match="statistics: proprio: expected .*q01"):
        Statistics.from_dict(values)


finite = st.floats(-1e3, 1e3, width=32)
arrays = npst.arrays(np.float32, st.tuples(st.integers(2, 30), st.integers(1, 5)), elements=finite)


@settings(deadline=None)
@given(arrays)
def test_normalised_actions_fill_the_box_and_come_back(action: np.ndarray) -> None:
    result = statistics_of(action)
    normal = result.normalize_action(action)
    assert normal.dtype == np.float32
    spread = action.max(0) - action.min(0)
    moving = spread > 1e-2
    np.testing.assert_allclose(normal[:, moving].min(0, initial=-1), -1, atol=1e-4)
    np.testing.assert_allclose(normal[:, moving].max(0, initial=1), 1, atol=1e-4)
    np.testing.assert_allclose(result.unnormalize_action(normal), action, rtol=1e-5, atol=1e-3)
    assert np.isfinite(result.normalize_proprio(action)).all()


def test_identity_where_the_data_fill_the_box() -> None:
    action = np.random.default_rng(0).uniform(-1, 1, (100, 2)).astype(np.float32)
    action[:2] = [[-1, -1], [1, 1]]
    result = statistics_of(action)
    np.testing.assert_array_equal(result.normalize_action(action), action)
    np.testing.assert_array_equal(result.unnormalize_action(action), action)


def test_constant_dimension_is_zero_and_comes_back() -> None:
    action = np.array([[5.0, -1], [5.0, 1]], np.float32)
    result = statistics_of(action)
    np.testing.assert_array_equal(result.normalize_action(action), [[0, -1], [0, 1]])
    np.testing.assert_array_equal(
        result.unnormalize_action(result.normalize_action(action)), action
    )
    np.testing.assert_array_equal(result.normalize_proprio(action)[:, 0], 0)


@settings(deadline=None)
@given(arrays, st.integers(1, 5))
def test_chunks_are_normalised_action_by_action(action: np.ndarray, chunk: int) -> None:
    result = statistics_of(action, action[:, :1])
    of_chunks = result.chunked(chunk)
    assert Statistics.from_dict(json.loads(json.dumps(of_chunks.to_dict()))) == of_chunks
    assert dataclasses.replace(of_chunks, action=result.action) == result
    for name in ("normalize_action", "unnormalize_action"):
        expected = getattr(result, name)(action)
        chunks = getattr(of_chunks, name)(np.tile(action, chunk))
        np.testing.assert_array_equal(chunks, np.tile(expected, chunk))


def test_chunk_of_one_is_the_action(directory: Path) -> None:
    dataset = open_dataset(directory)
    assert dataset_statistics(dataset).chunked(1) == dataset_statistics(dataset)
    actions = read_actions(dataset, "train")
    np.testing.assert_array_equal(actions.chunked(1), actions.action)


@pytest.mark.parametrize("chunk", [2, 3, 9])  # 9 is longer than any episode
def test_chunks_hold_what_follows_in_the_episode(directory: Path, chunk: int) -> None:
    expected = []
    for index, length in enumerate([4, 1, 7, 3]):
        stored = [step["action"] for step in tiny_rlds.episode(index, length)["steps"]]
        ahead = stored + [stored[-1]] * chunk
        expected += [ahead[step : step + chunk] for step in range(length)]
    chunks = read_actions(open_dataset(directory), "train").chunked(chunk)
    assert chunks.dtype == np.float32 and chunks.shape == (15, chunk * 4)
    np.testing.assert_array_equal(chunks.reshape(15, chunk, 4), expected)


@pytest.mark.parametrize("chunk", [0, -1])
def test_chunk_without_an_action(directory: Path, chunk: int) -> None:
    dataset = open_dataset(directory)
    for part in (dataset_statistics(dataset), read_actions(dataset, "train")):
        with pytest.raises(UserError, match=f"config.chunk: expected at least 1.*found {chunk}"):
            part.chunked(chunk)


def test_under_jit_equal_to_numpy() -> None:
    action = np.random.default_rng(0).normal(size=(50, 4)).astype(np.float32)
    result = statistics_of(action)
    for function in (result.normalize_action, result.unnormalize_action, result.normalize_proprio):
        traced = jax.jit(function)(action)
        np.testing.assert_allclose(traced, function(action), rtol=1e-5, atol=1e-6)


def test_normalisation_imports_neither_tensorflow_nor_jax() -> None:
    program = "import sys, mllm_act.normalization\n"
    program += "assert not {'tensorflow', 'jax'} & {*sys.modules}"
    subprocess.run([sys.executable, "-c", program], check=True)


@pytest.mark.parametrize("count", [2, 3])
def test_processes_that_read_together_agree_with_one(
    directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    """Threads stand for the processes; with three, one has nothing to read."""
    monkeypatch.setattr(statistics, "BLOCK", 2)

    def read(folder: Path) -> list[Any]:
        dataset = open_dataset(folder)
        barrier, sent = threading.Barrier(count, timeout=60), [b""] * count

        def run(index: int) -> Any:
            def exchange(message: bytes) -> list[bytes]:
                sent[index] = message
                barrier.wait()
                received = list(sent)
                barrier.wait()
                return received

            try:
                return dataset_statistics(dataset, "train", Processes(index, count, exchange))
            except UserError as error:
                return str(error)

        with ThreadPoolExecutor(count) as pool:
            return list(pool.map(run, range(count)))

    shutil.copytree(directory, tmp_path / "copy")
    expected = dataset_statistics(open_dataset(directory))
    assert read(tmp_path / "copy") == [expected] * count
    assert len(list((tmp_path / "copy").glob("statistics-*"))) == 1
    assert read(tmp_path / "copy") == [expected] * count  # from the cache

    bad = [tiny_rlds.episode(index, 3) for index in range(3)]
    bad[1]["steps"][0]["action"][1] = np.nan
    found = read(tiny_rlds.write(tmp_path / "bad", {"train": [bad]}))
    assert len(set(found)) == 1 and "action[1]: expected a finite number, found nan" in found[0]
