"""Datasets in the layouts of others: opened with a mapping, read as stored, and refused with all faults at once."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_pipelines.mapping import DataMapping, Part, load_mapping
from data_pipelines.reading.episodes import read_actions, read_segments
from data_pipelines.reading.pipeline import EvalBatches, TrainBatches
from data_pipelines.reading.rlds import open_dataset
from data_pipelines.reading.statistics import dataset_statistics
from mllm_act.errors import UserError
from tests.data_pipelines import public_layouts

TEMPLATE = DataMapping(
    name="template",
    cameras={"front": "observation/image", "wrist": "observation/wrist_image"},
    action=(Part("action", tuple("abcdefghij")),),
)
TENSORS = DataMapping(
    name="tensors",
    cameras={"front": "observation/camera"},
    action=(Part("closed", ("closed",)), Part("command", ("x", "y"), "m", 0.5, start=2)),
    proprio=(Part("observation/pose/arm", ("i", "j", "k")),),
)
MAPPINGS: dict[str, DataMapping | str] = {
    **{name: name for name in ("bridge", "rt1", "droid", "libero", "aloha")},
    "template": TEMPLATE,
    "tensors": TENSORS,
}


@pytest.mark.parametrize("layout", MAPPINGS)
def test_public_layouts_open_and_read(tmp_path: Path, layout: str) -> None:
    file_format = "array_record" if layout == "aloha" else "tfrecord"
    folder = public_layouts.write_random(tmp_path / "set", layout, file_format=file_format)
    dataset = open_dataset(folder, MAPPINGS[layout])
    assert {name: len(split) for name, split in dataset.splits.items()} == {"train": 2, "val": 1}
    assert len(dataset.metadata["action_names"]) == dataset.action_dim
    statistics = dataset_statistics(dataset)
    assert len(statistics.action.mean) == dataset.action_dim
    assert len(statistics.proprio.mean) == dataset.proprio_dim
    batch = next(
        TrainBatches(dataset, "train", batch_size=2, context=2, seed=0, shuffle_megabytes=1)
    )
    for camera, shape in dataset.image_shapes.items():
        assert batch["images"][camera].shape == (2, 2, *shape)
    assert batch["action"].shape == (2, 2, dataset.action_dim)
    assert batch["proprio"].shape == (2, 2, dataset.proprio_dim)
    texts = set(batch["instruction"])
    assert texts <= ({b"push", b"pull"} if dataset.layout.mapping.instruction else {b""})


def test_numbers_and_images_are_those_stored(tmp_path: Path) -> None:
    """Integers, booleans, doubles, encoded matrices and raw images, in the order of the mapping."""
    written = public_layouts.random_episode(public_layouts.LAYOUTS["tensors"], 4, 0)
    folder = public_layouts.write_random(tmp_path / "set", "tensors", lengths=(4,))
    [batch] = EvalBatches(open_dataset(folder, TENSORS), "train", batch_size=1, context=4)
    for t, step in enumerate(written["steps"]):
        expected = [float(step["closed"]), *step["command"].ravel()[2:]]
        np.testing.assert_array_equal(batch["action"][0, t], np.float32(expected))
        np.testing.assert_array_equal(batch["proprio"][0, t], step["observation"]["pose"]["arm"])
        np.testing.assert_array_equal(batch["images"]["front"][0, t], step["observation"]["camera"])


def test_png_images_are_those_stored(tmp_path: Path) -> None:
    written = public_layouts.random_episode(public_layouts.LAYOUTS["template"], 2, 0)
    folder = public_layouts.write_random(tmp_path / "set", "template", lengths=(2,))
    [batch] = EvalBatches(open_dataset(folder, TEMPLATE), "val", batch_size=1, context=2)
    for t, step in enumerate(written["steps"]):
        np.testing.assert_array_equal(batch["images"]["front"][0, t], step["observation"]["image"])


def test_one_of_several_instructions_is_drawn_for_each_epoch(tmp_path: Path) -> None:
    def name(episode: dict[str, Any]) -> None:
        for step in episode["steps"]:
            keys = ("language_instruction", "language_instruction_2", "language_instruction_3")
            step |= dict(zip(keys, ("", "second", "third"), strict=True))

    folder = public_layouts.write_random(tmp_path / "set", "droid", lengths=(3,), change=name)
    dataset = open_dataset(folder, "droid")
    batches = TrainBatches(dataset, "train", batch_size=1, context=3, seed=0, shuffle_megabytes=1)
    drawn = [next(batches)["instruction"][0] for _ in range(12)]
    assert set(drawn) == {b"second", b"third"}
    [batch] = EvalBatches(dataset, "val", batch_size=1, context=3)
    assert batch["instruction"][0] == b"second"
    assert set(dataset_statistics(dataset).instructions) == {"", "second", "third"}


def test_step_makes_actions_of_the_next_state(tmp_path: Path) -> None:
    file = tmp_path / "robot.py"
    file.write_text(
        "from data_pipelines.mapping import DataMapping, Part\n"
        "import tensorflow as tf\n"
        "def step(features):\n"
        "    state = features['observation/state']\n"
        "    return {'delta': tf.concat([state[1:], state[-1:]], 0) - state}\n"
        "MAPPING = DataMapping('arm', {'front': 'observation/image'}, (Part('delta', ('x', 'y')),), step=step)\n"
    )
    folder = public_layouts.write_random(tmp_path / "set", "bridge", lengths=(4,))
    # bridge's first camera
    file.write_text(file.read_text().replace("observation/image'", "observation/image_0'"))
    actions = read_actions(open_dataset(folder, str(file)), "train").action
    written = public_layouts.random_episode(public_layouts.LAYOUTS["bridge"], 4, 0)["steps"]
    state = np.array([step["observation"]["state"][:2] for step in written])
    np.testing.assert_allclose(actions, np.diff(state, axis=0, append=state[-1:]), atol=1e-6)


def test_held_out_episodes_do_not_depend_on_the_rest(tmp_path: Path) -> None:
    folder = public_layouts.write_random(tmp_path / "set", "libero", lengths=(2,) * 21)
    dataset = open_dataset(folder, "libero")
    train, val = (set(dataset.split(name).position.tolist()) for name in ("train", "val"))
    assert len(train) == 20 and len(val) == 1 and not train & val
    one = open_dataset(public_layouts.write_random(tmp_path / "one", "libero", (3,)), "libero")
    assert len(one.split("train")) == len(one.split("val")) == 1


def test_folders_with_versions_and_several_folders_are_one_set(tmp_path: Path) -> None:
    for version in ("1.0.0", "1.10.0", "1.9.0"):
        public_layouts.write_random(tmp_path / "a" / version, "libero", (2, 1 + int(version[2])))
    other = public_layouts.write_random(tmp_path / "b", "libero", (4, 5, 6))
    newest = open_dataset(tmp_path / "a", "libero")
    assert newest.directory.name == "1.10.0"
    both = open_dataset(f"{tmp_path / 'a' / '1.0.0'}, {other}", "libero")
    assert {name: len(split) for name, split in both.splits.items()} == {"train": 4, "val": 1}
    lengths = [n for name in ("train", "val") for n in np.bincount(*read_segments(both, name))]
    assert sorted(lengths) == [1, 2, 4, 5, 6]


def test_sets_whose_actions_differ_are_not_one(tmp_path: Path) -> None:
    from tests.data_pipelines import tiny_rlds

    a = tiny_rlds.write_lengths(tmp_path / "a", [[3]])
    b = tiny_rlds.write_lengths(tmp_path / "b", [[3]], size=20)
    path = b / "metadata.json"
    path.write_text(path.read_text().replace('"m"', '"cm"'))
    units = r"b: action_units: expected \['m', .*, found \['cm', .*; .*b: image_shapes: expected"
    with pytest.raises(UserError, match=f"a: expected sets of the same robot, .*{units}"):
        open_dataset(f"{a},{b}")


def test_all_faults_are_in_one_error(tmp_path: Path) -> None:
    folder = public_layouts.write_random(tmp_path / "set", "libero", lengths=(2,))
    mapping = DataMapping(
        name="wrong",
        cameras={"front": "observation/imag", "state": "observation/state"},
        action=(Part("action", tuple("abcdefgh")), Part("actoin", ("x",))),
        proprio=(Part("language_instruction", ("y",)),),
        instruction=("observation/state",),
        task="task",
    )
    with pytest.raises(UserError) as caught:
        open_dataset(folder, mapping)
    for part in (
        "features.json", "did you mean 'steps/observation/image'?", "state: steps/observation/state: expected JPEG",
        "action: expected at least 8 numbers", "found 7", "did you mean 'steps/action'?",
        "steps/language_instruction: expected numbers", "steps/observation/state: expected a text",
        "steps/task: expected a text",
    ):  # fmt: skip
        assert part in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("MAPPING = 3", "MAPPING: expected a DataMapping, found int"),
        ("cameras = {'a': 'x', 'a': 'y'}\nMAPPING = 3", "MAPPING: expected"),
        ("raise ValueError('no')", "found ValueError: no"),
        ("MAPPING = (", "expected Python"),
        (
            "from data_pipelines.mapping import *\n"
            "MAPPING = DataMapping('', {'a': 'x', 'a': 'y'}, (Part('k', ('u', 'u'), scale=0.0, start=-1),),"
            " held_out=1.0, rate=-1.0, choices=('l', 'r'))",
            "name: .*'a' is given twice|'a' is given twice.*name: expected",
        ),
    ],
)
def test_errors_of_a_mapping_file(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "robot.py"
    file.write_text(text)
    with pytest.raises(UserError, match=message) as caught:
        load_mapping(str(file))
    if "held_out" in text:
        for part in ("u twice", "scale", "start", "held_out", "rate", "choices"):
            assert part in str(caught.value)


def test_values_of_another_type_are_listed_with_their_keys(tmp_path: Path) -> None:
    """Above all those of a user who leaves out the comma after the only element of a tuple."""
    file = tmp_path / "robot.py"
    file.write_text(
        "from data_pipelines.mapping import *\n"
        "MAPPING = DataMapping('arm', ['image'], (Part('action', ('x'), scale='cm', start=0.5)), "
        "(Part('state', ('y'), scale='cm', start=0.5),), 'text', rate='5', held_out=None, step=3)\n"
    )
    with pytest.raises(UserError) as caught:
        load_mapping(str(file))
    for part in (
        "cameras: expected a dictionary of texts, found ['image']", "action: expected a tuple of Parts, found Part(",
        "proprio state: names: expected a tuple of texts, found 'y'", "scale: expected a number, found 'cm'",
        "start: expected an integer", "instruction: expected a tuple of texts, found 'text'", "rate: expected a number",
        "held_out: expected a number, found None", "step: expected a function",
    ):  # fmt: skip
        assert part in str(caught.value)


def test_a_split_called_validation_is_held_out_data(tmp_path: Path) -> None:
    folder = public_layouts.write_random(tmp_path / "set", "libero", lengths=(2, 3))
    for name in ("dataset_info.json", "robot-train.tfrecord-00000-of-00001"):
        path = folder / name
        content = path.read_bytes().replace(b'"name": "train"', b'"name": "validation"')
        path.with_name(name.replace("train", "validation")).write_bytes(content)
    dataset = open_dataset(folder, "libero")
    assert {name: len(split) for name, split in dataset.splits.items()} == {
        "validation": 2,
        "val": 2,
    }


def test_a_name_that_is_not_shipped() -> None:
    with pytest.raises(UserError, match="did you mean 'bridge'"):
        load_mapping("brigde", "config.data.mapping")


def test_classes_of_strangers_are_not_imported(tmp_path: Path) -> None:
    folder = public_layouts.write_random(tmp_path / "set", "libero", lengths=(2,))
    path = folder / "features.json"
    path.write_text(
        path.read_text().replace(
            "tensorflow_datasets.core.features.text_feature.Text", "antigravity.Text"
        )
    )
    with pytest.raises(UserError, match="antigravity"):
        open_dataset(folder, "libero")
