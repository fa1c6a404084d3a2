"""Several processes write the files of a dataset: the same bytes as one."""

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_pipelines import shards
from data_pipelines.reading.episodes import read_episodes
from data_pipelines.reading.rlds import open_dataset
from data_pipelines.writing import recording
from mllm_act.envs import spec

pytestmark = pytest.mark.slow

BABYAI = spec("babyai")


def record(file: Path, length: int, seed: int) -> Path:
    """Records an episode of noise, as a simulator's worker does."""
    rng = np.random.default_rng(seed)
    size = (BABYAI.image_size, BABYAI.image_size, 3)
    jpegs = []
    for _ in range(length):
        buffer = io.BytesIO()
        Image.fromarray(rng.integers(0, 255, size, np.uint8)).save(buffer, "jpeg")
        jpegs.append(buffer.getvalue())
    [camera] = BABYAI.cameras
    file.parent.mkdir(parents=True, exist_ok=True)
    recording.save(file, {
        "proprio": np.zeros((length, len(BABYAI.proprio_names)), np.float32),
        "action": np.full((length, 1), seed, np.float32), "executed_action": np.zeros((length, 1), np.float32),
        "reward": np.zeros(length, np.float32), "instruction": np.str_("go"), "configuration": np.int32(seed),
        "seed": np.int64(seed), "success": np.bool_(True), f"jpeg/{camera}": np.frombuffer(b"".join(jpegs), np.uint8),
        f"jpeg_sizes/{camera}": np.array([len(jpeg) for jpeg in jpegs]),
    })  # fmt: skip
    return file


def test_two_processes_write_what_one_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = [record(tmp_path / f"task{i % 2}" / f"{i:06d}.npz", 1 + i % 3, i) for i in range(9)]
    monkeypatch.setattr(shards, "SHARD_BYTES", sum(file.stat().st_size for file in files) / 3)
    splits = {"train": files[:8], "val": files[8:]}
    one, two = (
        shards.write("babyai", splits, tmp_path / str(workers), workers, timeout=300)
        for workers in (1, 2)
    )
    contents = [
        {file.name: file.read_bytes() for file in folder.iterdir()} for folder in (one, two)
    ]
    assert contents[0] == contents[1]
    assert len([name for name in contents[0] if "train.tfrecord" in name]) == 3
    dataset = open_dataset(two)
    read = [int(e["action"][0, 0]) for _, e in read_episodes(dataset, dataset.split("train"))]
    assert sorted(read) == list(range(8)) and read != list(range(8))


def test_a_file_larger_than_a_shard_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = [
        record(tmp_path / "task" / f"{i:06d}.npz", length, i) for i, length in enumerate([1, 9])
    ]
    monkeypatch.setattr(shards, "SHARD_BYTES", files[0].stat().st_size // 4)
    assert sorted(len(part) for part in shards.divide(files)) == [1, 1]
