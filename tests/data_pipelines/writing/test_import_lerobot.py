"""Imports small LeRobot datasets: both layouts, kills, and every kind of fault."""

import dataclasses
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipelines.import_lerobot import MAPPING, import_dataset, mapping_text
from data_pipelines.mapping import DataMapping, Part, load_mapping
from data_pipelines.reading.layout import decode_image
from data_pipelines.reading.rlds import RECORD, Dataset, open_dataset
from data_pipelines.tensorflow_cpu import tf
from data_pipelines.writing.lerobot import open_source
from data_pipelines.writing.lerobot_episode import nearest
from data_pipelines.writing.lerobot_episode import read as read_episode
from data_pipelines.writing.lerobot_features import read_features
from mllm_act.errors import UserError
from tests.data_pipelines import tiny_lerobot
from tests.data_pipelines.tiny_lerobot import (
    CAMERAS,
    FPS,
    INDICES,
    NAMES,
    SENTENCES,
    colour,
    png,
    rows,
    steps,
    write_rows,
    write_v2,
    write_v3,
    write_video,
)

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def v3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_v3(tmp_path_factory.mktemp("lerobot") / "v3")


@pytest.fixture(scope="module")
def imported(v3: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("imported") / "v3"
    import_dataset(v3, out, workers=1)
    return out


DATA = "data/chunk-000/file-000.parquet"
FRONT, WRIST = (f"videos/{key}/chunk-000/file-000.mp4" for key in CAMERAS)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def read(out: Path, splits: Sequence[str] = ("train", "val")) -> tuple[Dataset, list[Any]]:
    """Opens a dataset with its own mapping; returns the episodes, the short one first."""
    dataset = open_dataset(out, load_mapping(str(out / MAPPING)))
    episodes = [
        dataset.layout.parse(record)
        for name in splits
        for _, record in dataset.split(name).records(tf.range(1, dtype=tf.int64))
    ]
    return dataset, sorted(episodes, key=lambda episode: len(episode["action"]))


@pytest.mark.parametrize("layout", ["v3", "v2"])
def test_an_imported_dataset_opens_with_its_mapping_and_says_the_same(
    layout: str, imported: Path, tmp_path: Path
) -> None:
    out, splits = imported, ("train", "val")  # one of them is held out
    if layout == "v2":
        out, splits = tmp_path / "out", ("train", "test")
        import_dataset(write_v2(tmp_path / "source"), out, workers=1)
    dataset, episodes = read(out, splits)
    assert dataset.image_shapes == {
        "front": (48, 64, 3),
        "wrist": (32, 32, 3),
        "image": (24, 40, 3),
    }
    assert dataset.metadata["name"] == "so101" and dataset.metadata["action_names"] == NAMES
    assert dataset.layout.mapping.rate == FPS
    for number, episode in enumerate(episodes):
        expected = rows(number)
        np.testing.assert_array_equal(episode["action"], np.array(expected["action"]))
        state = np.array(expected["observation.state"]).astype(np.float32)
        np.testing.assert_array_equal(episode["proprio"], state)
        texts = {text.decode() for text in episode["instruction"].numpy().ravel()}
        assert texts == {SENTENCES[1 - number]} == {episode["task"].numpy().decode()}
        for camera, name in enumerate(("front", "wrist", "image")):
            for step, encoded in enumerate(episode["images"][name]):
                picture = decode_image(encoded, dataset.image_shapes[name]).numpy()
                error = np.abs(picture.astype(int) - colour(number, step, camera)).max()
                assert error <= (0 if name == "image" else 6)  # steps differ by 16
        stored = [image["bytes"] for image in expected["observation.image"]]
        assert episode["images"]["image"].numpy().tolist() == stored


def test_other_features_are_kept_under_their_names(imported: Path) -> None:
    import tensorflow_datasets as tfds

    builder = tfds.builder_from_directory(str(imported))
    for episode in builder.as_dataset(split="train"):
        number = int(episode["episode_metadata"]["episode"])
        expected, found = rows(number), list(episode["steps"])
        for step, values in enumerate(found):
            seen = values["observation"]
            assert bool(seen["contact"]) == expected["observation.contact"][step]
            np.testing.assert_array_equal(seen["grid"], expected["observation.grid"][step])
            np.testing.assert_array_equal(values["ticks"], expected["ticks"][step])
            assert values["reward"] == expected["next.reward"][step]
            assert bool(values["is_first"]) == (step == 0)
            assert bool(values["is_last"]) == (step == len(found) - 1)
        assert (
            not {"timestamp", *INDICES} & set(found[0]) and "depth" not in found[0]["observation"]
        )


def test_an_import_that_was_killed_continues_and_gives_the_same_bytes(
    v3: Path,
    imported: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "out"
    flags = [f"--source={v3}", f"--out={out}", "--workers=2"]
    program = subprocess.Popen(
        [sys.executable, "-m", "data_pipelines.import_lerobot", *flags],
        env=os.environ | {"PYTHONHASHSEED": "7"},
        stderr=subprocess.DEVNULL,
    )
    while not list(out.glob(".episodes/0*.npz")):
        assert program.poll() is None
        time.sleep(0.01)
    os.kill(program.pid, signal.SIGKILL)
    program.wait()
    assert not (out / "dataset_info.json").exists()
    monkeypatch.setattr(sys, "argv", ["import_lerobot", *flags])
    monkeypatch.delitem(sys.modules, "data_pipelines.import_lerobot")  # it runs anew, as with -m
    runpy.run_module("data_pipelines.import_lerobot", run_name="__main__", alter_sys=True)
    assert contents(out) == contents(imported)
    import_dataset(v3, out, workers=1)
    assert "nothing to do" in capsys.readouterr().out


def faults(folder: Path) -> list[str]:
    source = open_source(folder)
    return [fault for episode in source.episodes for fault in read_episode(source, episode)[1]]


def info(folder: Path, **changes: Any) -> None:
    tiny_lerobot.write_info(folder, tiny_lerobot.info("v3.0", **changes))


def change(folder: Path, key: str, function: Callable[[Any], Any], *others: int) -> None:
    """Changes a column of episode 1, and of others."""
    columns = [rows(0), rows(1)]
    for episode in (1, *others):
        columns[episode][key] = function(columns[episode][key])
    write_rows(folder / DATA, columns)


def nan(values: list[np.ndarray]) -> list[np.ndarray]:
    values[3][1] = np.nan
    return values


def image(value: Any) -> Callable[[list[Any]], list[Any]]:
    return lambda images: [value, *images[1:]]


def codec(folder: Path) -> None:
    data = (folder / WRIST).read_bytes()
    assert b"avc1" in data
    (folder / WRIST).write_bytes(data.replace(b"avc1", b"zzzz"))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:500])


IMAGE = "observation.image"
OUTSIDE = {"bytes": None, "path": "../a.png"}
METADATA: dict[str, tuple[Callable[[Path], Any], str]] = {
    "version": (
        lambda f: info(f, codebase_version="v1.6"),
        "codebase_version: expected one of v2.0, v2.1, v3.0, found 'v1.6'",
    ),
    "rate": (lambda f: info(f, fps=0), "fps: expected rows per second, found 0"),
    "features": (
        lambda f: info(f, features={"action": {}}),
        "features: action: expected a dtype and a shape, found None, None; .*at least one camera",
    ),
    "template": (
        lambda f: info(f, data_path="../../{chunk_index}.parquet"),
        "episode 1: expected its length and files, found the path '../../0.parquet'",
    ),
    "count": (lambda f: info(f, total_episodes=3), "meta/episodes: expected 3 .*, found 2"),
    "splits": (lambda f: info(f, splits={"train": "80%"}), "splits: .*, found 'train': '80%'"),
    "tasks": (lambda f: cut(f / "meta/tasks.parquet"), "tasks.parquet: expected a parquet file"),
    "none": (lambda f: (f / "meta/info.json").unlink(), "expected this file of a LeRobot dataset"),
}
EPISODES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "frames": (
        lambda f: write_video(f / FRONT, 0, steps(0, 1)[:-2]),
        f"{FRONT}: episode 1: expected a frame for each of its 12 rows, found 10, none for row 10",
    ),
    "file": (lambda f: (f / WRIST).unlink(), f"{WRIST}: expected this file, found none"),
    "codec": (codec, f"{WRIST}: episode 0: .* found a video codec that PyAV .* does not decode"),
    "mp4": (lambda f: cut(f / WRIST), f"{WRIST}: episode 0: .* 7 rows, found .*Invalid data"),
    "nan": (
        lambda f: change(f, "action", nan),
        r"episode 1: action: expected finite numbers of shape \[3\], found nan in row 3",
    ),
    "width": (
        lambda f: change(f, "action", lambda x: [v[:2] for v in x], 0),
        r"episode 0: action: expected .* of shape \[3\], found the shape \[2\]",
    ),
    "task": (
        lambda f: change(f, "task_index", lambda x: x + 9),
        "episode 1: task_index: expected an index in meta/tasks, found 9",
    ),
    "time": (
        lambda f: change(f, "timestamp", lambda x: x[::-1].copy()),
        "episode 1: timestamp: expected rising seconds",
    ),
    "image": (
        lambda f: change(f, IMAGE, image({"bytes": b"no", "path": ""})),
        "episode 1: observation.image: expected images, found cannot identify",
    ),
    "path": (
        lambda f: change(f, IMAGE, image(OUTSIDE)),
        "expected images, found a file outside of the dataset, '../a.png'",
    ),
    "size": (
        lambda f: change(f, IMAGE, image(png((8, 8)))),
        r"observation.image: expected .* of one height and width, found \[\(8, 8\), \(24, 40\)\]",
    ),
    "null": (lambda f: change(f, "ticks", image(None)), "episode 1: ticks: .*, found lists of"),
    "rows": (
        lambda f: write_rows(f / DATA, [rows(0)]),
        "episode 1: expected 12 rows as in meta/episodes, found 0",
    ),
    "parquet": (lambda f: cut(f / DATA), f"{DATA}: expected the rows of a LeRobot dataset, found"),
    "column": (
        lambda f: write_rows(f / DATA, [{"episode_index": np.arange(2)}]),
        f"{DATA}: expected the rows of a LeRobot dataset, found none named action, ",
    ),
}


@pytest.mark.parametrize("name", METADATA)
def test_faults_of_the_metadata(name: str, v3: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(v3, tmp_path / "source"))
    break_it, message = METADATA[name]
    break_it(folder)
    with pytest.raises(UserError, match=message) as error:
        import_dataset(folder, tmp_path / "out", workers=1)
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", EPISODES)
def test_faults_of_an_episode(name: str, v3: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(v3, tmp_path / "source"))
    break_it, message = EPISODES[name]
    break_it(folder)
    found = faults(folder)
    assert any(re.search(message, fault) for fault in found), found
    assert not any("\n" in fault for fault in found)


def test_all_faults_of_a_dataset_are_listed_at_once_and_what_is_repaired_is_read_again(
    v3: Path, tmp_path: Path
) -> None:
    folder, out = Path(shutil.copytree(v3, tmp_path / "source")), tmp_path / "out"
    write_video(folder / FRONT, 0, steps(0, 1)[:-2])
    change(folder, "action", nan)
    with pytest.raises(UserError, match=r"found 2: .*found nan in row 3; .*found 10, none for"):
        import_dataset(folder, out, workers=1)
    assert len(list(out.glob(".episodes/0*.npz"))) == 1
    write_video(folder / FRONT, 0, [(1, 0)] * len(steps(0)) + steps(1))
    change(folder, "action", lambda x: x)
    import_dataset(folder, out, workers=1)
    [first, _] = read(out)[1]  # its file was replaced, too
    picture = decode_image(first["images"]["front"][3], (48, 64, 3)).numpy()
    assert np.abs(picture.astype(int) - colour(1, 0, 0)).max() <= 6


def test_cameras_of_changing_size_are_a_fault(tmp_path: Path) -> None:
    source = write_v2(tmp_path / "source")
    path = "videos/chunk-000/observation.images.front/episode_000001.mp4"
    write_video(source / path, 0, steps(1), (32, 64))
    message = r"images.front: .*found 32 x 64 in 1 episodes, 48 x 64 in 1 episodes"
    with pytest.raises(UserError, match=message):
        import_dataset(source, tmp_path / "out", workers=1)


def test_a_folder_of_something_else_is_left_alone(v3: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="expected a new or empty folder"):
        import_dataset(v3, tmp_path, workers=1)
    (tmp_path / "notes.txt").unlink()
    (tmp_path / RECORD).write_text('{"arguments": {"env": "metaworld"}}')
    with pytest.raises(UserError, match=f"program: expected import_lerobot of the import of {v3}"):
        import_dataset(v3, tmp_path, workers=1)
    assert [file.name for file in tmp_path.iterdir()] == [RECORD]


seconds = st.lists(st.integers(0, 40).map(lambda n: n / 8), unique=True).map(sorted)


@settings(max_examples=50)
@given(seconds, seconds)
def test_each_time_gets_the_nearest_frame_once(frames: list[float], times: list[float]) -> None:
    found = list(nearest(((t, t) for t in frames), times, 0.25))
    assert len(found) == len(times)
    used = [frame for frame in found if frame is not None]
    assert used == sorted(set(used))
    for wanted, frame in zip(times, found, strict=True):
        distance = min((abs(f - wanted) for f in frames), default=np.inf)
        if frame is not None:
            assert abs(frame - wanted) == distance <= 0.25
        else:
            closest = {f for f in frames if abs(f - wanted) == distance}
            assert distance > 0.25 or closest & set(used)


@settings(max_examples=10)
@given(st.text(min_size=1), st.lists(st.text(min_size=1), min_size=2, max_size=3, unique=True))
def test_a_mapping_with_any_names_loads_as_it_was_written(
    tmp_path_factory: pytest.TempPathFactory, name: str, names: list[str]
) -> None:
    mapping = DataMapping(
        name,
        cameras={camera: f"observation/{camera}" for camera in names},
        action=(Part("action", tuple(names)),),
        rate=29.97,
    )
    path = tmp_path_factory.mktemp("mapping") / "mapping.py"
    path.write_text(mapping_text(mapping), encoding="utf-8")
    assert dataclasses.replace(load_mapping(str(path)), digest="") == mapping


@pytest.mark.parametrize(
    "names",
    [["x", "y"], [["x", "y"]], {"motors": ["x", "y"]}, {"left": ["x"], "right": "y"}, {"y": 1, "x": 0}],
)  # fmt: skip
def test_names_of_numbers_in_every_form_that_datasets_have(names: Any) -> None:
    action = {"dtype": "float32", "shape": [2], "names": names}
    [feature], _ = read_features({"action": action}, [])
    assert feature.names == ("x", "y")
