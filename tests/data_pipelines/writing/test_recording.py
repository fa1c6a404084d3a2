"""Recorded episodes: whole and undamaged, or recorded again."""

import resource
from pathlib import Path

import numpy as np
import pytest

from data_pipelines.writing import recording
from mllm_act.errors import UserError

ARRAYS = {"reward": np.zeros(1000, np.float32), "success": np.bool_(True)}


def test_an_episode_comes_back_and_is_the_same_bytes_each_time(tmp_path: Path) -> None:
    for name in ("a", "b"):
        recording.save(tmp_path / name, ARRAYS)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    for key, value in recording.load(tmp_path / "a").items():
        np.testing.assert_array_equal(value, ARRAYS[key])


@pytest.mark.parametrize("kept", [0, 10, 32, 2000, -1])
def test_a_cut_episode_is_one_line(tmp_path: Path, kept: int) -> None:
    path = tmp_path / "a.npz"
    recording.save(path, ARRAYS)
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(UserError, match=f"{path}: expected a recorded episode, found .*again"):
        recording.load(path)


def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))  # as if the disk were full
    try:
        with pytest.raises(UserError, match="expected to write an episode, found File too large"):
            recording.save(tmp_path / "a.npz", ARRAYS)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list(tmp_path.iterdir())
