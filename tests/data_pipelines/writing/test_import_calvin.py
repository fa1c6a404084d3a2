"""CALVIN's own files become RLDS that says the same; faults are listed at once; pickles can do no harm."""

from pathlib import Path

import numpy as np
import pytest

from data_pipelines.import_calvin import import_dataset
from data_pipelines.reading.episodes import read_episodes
from data_pipelines.reading.layout import decode_image
from data_pipelines.reading.rlds import RECORD, open_dataset
from data_pipelines.writing import calvin
from mllm_act.errors import UserError
from tests.data_pipelines import tiny_calvin
from tests.data_pipelines.tiny_calvin import RANGES, SENTENCES


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return tiny_calvin.write(tmp_path / "task_ABC_D")


def test_an_imported_dataset_says_the_same(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    record = import_dataset(source, out, workers=2)
    assert record["results"] == {"episodes": 6, "frames": 18}
    dataset = open_dataset(out, "calvin")
    assert {name: len(split) for name, split in dataset.splits.items()} == {"train": 3, "val": 3}
    episodes = [episode for _, episode in read_episodes(dataset, dataset.split("train"))]
    found = {episode["instruction"][0].decode(): episode for episode in episodes}
    assert set(found) == set(SENTENCES)
    for sentence, (first, last) in zip(SENTENCES, RANGES, strict=True):
        frames = [tiny_calvin.frame(number) for number in range(first, last + 1)]
        for key, ours in (("rel_actions", "action"), ("robot_obs", "proprio")):
            expected = np.float32([frame[key] for frame in frames])
            np.testing.assert_array_equal(found[sentence][ours], expected)
        images = found[sentence]["images"]
        assert len(images["static"]) == len(images["gripper"]) == len(frames)
        image = decode_image(images["static"][-1], (24, 24, 3)).numpy().astype(int)
        np.testing.assert_allclose(image, frames[-1]["rgb_static"], atol=4)
    assert found[SENTENCES[2]]["task"] == b"turn_off"
    assert import_dataset(source, out, workers=2) == record
    assert "is complete: nothing to do" in capsys.readouterr().out

    tiny_calvin.save_object(
        source / "training/lang_annotations/auto_lang_ann.npy",
        tiny_calvin.annotations([(4, 6)] * 3),
    )
    with pytest.raises(UserError, match=f"{RECORD}: annotations_sha256: expected .* of the import"):
        import_dataset(source, out, workers=1)


def test_all_faults_are_listed_and_what_is_repaired_is_read_again(
    source: Path, tmp_path: Path
) -> None:
    files = [source / f"training/episode_{number:07d}.npz" for number in (5, 8, 9, 21, 6)]
    files[0].unlink()
    files[1].write_bytes(b"PK")
    np.savez(files[2], **{**tiny_calvin.frame(9), "rel_actions": np.full(7, np.nan)})
    np.savez(files[3], **{**tiny_calvin.frame(21), "robot_obs": np.zeros(14)})
    between = np.append(np.zeros(6), 0.5)
    np.savez(files[4], **{**tiny_calvin.frame(6), "rel_actions": between})
    with pytest.raises(UserError, match="found 5: ") as error:
        import_dataset(source, tmp_path / "out", workers=1)
    for part in (
        "found no episode_0000005.npz", "episode_0000008.npz: expected a frame of training, annotation 1", "with nan",
        "robot_obs of the shape (14,) in place of (15,)", "gripper at 0.5, not -1 or 1",
    ):  # fmt: skip
        assert part in str(error.value)
    for file, number in zip(files, (5, 8, 9, 21, 6), strict=True):
        np.savez(file, **tiny_calvin.frame(number))
    assert import_dataset(source, tmp_path / "out", workers=1)["results"]["episodes"] == 6


def test_annotations_with_faults(source: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="expected a CALVIN dataset, a folder with training/"):
        calvin.open_source(tmp_path / "task_ABC_D" / "training")
    path = source / "training/lang_annotations/auto_lang_ann.npy"
    (source / "validation/ep_start_end_ids.npy").unlink()
    for ranges, message in (
        ([(4, 6), (9, 13), (20, 22)], "annotation 1: .*found 9 to 13; .*annotation 2: .*20 to 22"),
        ([(4, 6)], "a sentence, a task and a range each, found 3, 3 and 1"),
        ("none", "ranges of the shape"),
    ):
        tiny_calvin.save_object(path, tiny_calvin.annotations(ranges))
        with pytest.raises(UserError, match=f"{message}.*validation: .*found no ep_start_end_ids"):
            calvin.open_source(source)


def test_pickles_can_do_no_harm(source: Path) -> None:
    tiny_calvin.save_harmful(source / "training/lang_annotations/auto_lang_ann.npy")
    with pytest.raises(UserError, match=r"found the name posix\.getcwd"):
        calvin.open_source(source)


@pytest.mark.skipif(not tiny_calvin.MINI.exists(), reason=f"no {tiny_calvin.MINI}; set CALVIN_MINI")
def test_the_real_mini_set() -> None:
    source = calvin.open_source(tiny_calvin.MINI)
    assert [episode.scene[-1] for episode in source.episodes] == list("AABBCCDD")
    arrays, faults = calvin.read(source.folder, source.episodes[0])
    assert not faults and arrays["rel_actions"].shape == (23, 7)
    assert arrays["image_shape/rgb_static"].tolist() == [200, 200]
