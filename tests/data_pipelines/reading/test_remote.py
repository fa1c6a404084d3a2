"""Datasets in a file system that is not the machine's: TensorFlow's in memory stands for a bucket."""

from pathlib import Path

import pytest
from etils.epath import backend, gpath, register

from data_pipelines.reading.pipeline import TrainBatches
from data_pipelines.reading.rlds import open_dataset
from data_pipelines.reading.statistics import dataset_statistics
from data_pipelines.tensorflow_cpu import tf
from mllm_act.errors import UserError
from tests.data_pipelines import public_layouts


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    """The address of a folder with one dataset; etils knows gs:// and others, but not ram://."""
    monkeypatch.setattr(gpath, "_URI_PREFIXES", (*gpath._URI_PREFIXES, "ram://"))
    monkeypatch.setattr(gpath, "_URI_SCHEMES", gpath._URI_SCHEMES | {"ram"})
    monkeypatch.setitem(gpath._URI_MAP_ROOT, "ram://", "/ram/")
    monkeypatch.setitem(gpath._PREFIX_TO_BACKEND, "ram", backend.tf_backend)
    monkeypatch.setitem(register._URI_PREFIXES_TO_CLS, "ram://", gpath.PosixGPath)
    address = f"ram://bucket{tmp_path}"
    tf.io.gfile.makedirs(f"{address}/1.0.0")
    for file in public_layouts.write_random(tmp_path / "set", "libero").iterdir():
        tf.io.gfile.copy(str(file), f"{address}/1.0.0/{file.name}")
    return address


def test_a_bucket_is_read_as_a_folder(bucket: str, tmp_path: Path) -> None:
    dataset, same = open_dataset(bucket, "libero"), open_dataset(tmp_path / "set", "libero")
    assert str(dataset.directory) == f"{bucket}/1.0.0"
    assert dataset_statistics(dataset) == dataset_statistics(same)
    assert [f for f in tf.io.gfile.listdir(f"{bucket}/1.0.0") if f.startswith("statistics-")]
    assert dataset_statistics(dataset) == dataset_statistics(same)  # from the cache
    batches = TrainBatches(dataset, "train", batch_size=2, context=2, seed=0, shuffle_megabytes=1)
    assert next(batches)["images"]["front"].shape == (2, 2, 16, 16, 3)


def test_errors_of_a_bucket(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=f"{bucket}/none: no such directory"):
        open_dataset(f"{bucket}/none", "libero")
    tf.io.gfile.remove(f"{bucket}/1.0.0/robot-train.tfrecord-00000-of-00001")
    with pytest.raises(UserError, match="missing shard 1 of 1 of split 'train'"):
        open_dataset(bucket, "libero")

    def refuse(self: object) -> bool:
        raise tf.errors.PermissionDeniedError(None, None, "no credentials\nfor you")

    monkeypatch.setattr(gpath.PosixGPath, "exists", refuse)
    with pytest.raises(UserError, match="expected to read it, found no credentials; check"):
        open_dataset(bucket, "libero")
