"""What a user sees of a dataset before training: its features, a draft of the mapping, and all there is to know."""

from pathlib import Path

import pytest
from PIL import Image

from data_pipelines import check
from data_pipelines.mapping import load_mapping
from data_pipelines.reading.rlds import open_dataset
from mllm_act.errors import UserError
from tests.data_pipelines import public_layouts, tiny_rlds


@pytest.mark.parametrize(
    ("layout", "cameras", "action", "proprio", "instruction"),
    [
        ("bridge", {"image_0", "image_1"}, 7, 7, ("language_instruction",)),
        ("rt1", {"image"}, 9, 8, ("observation/natural_language_instruction",)),
        (
            "droid",
            {"exterior_image_1_left", "exterior_image_2_left", "wrist_image_left"},
            7,
            8,
            ("language_instruction", "language_instruction_2", "language_instruction_3"),
        ),
        ("libero", {"image", "wrist_image"}, 7, 8, ("language_instruction",)),
        ("aloha", {"image", "left_wrist_image", "right_wrist_image"}, 14, 14, ("language_instruction",)),
    ],
)  # fmt: skip
def test_the_draft_of_a_usual_layout_opens_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    layout: str, cameras: set[str], action: int, proprio: int, instruction: tuple[str, ...],
) -> None:  # fmt: skip
    folder = public_layouts.write_random(tmp_path / "set", layout)
    monkeypatch.chdir(tmp_path)
    check.main([str(folder)])
    printed = capsys.readouterr().out
    assert "steps/is_last" in printed and "Next: python -m data_pipelines.check" in printed
    mapping = load_mapping("my_robot.py")
    assert set(mapping.cameras) == cameras and mapping.instruction == instruction
    dataset = open_dataset(folder, mapping)
    assert (dataset.action_dim, dataset.proprio_dim) == (action, proprio)
    check.main([str(folder)])
    assert "my_robot.py exists and was left as it is" in capsys.readouterr().out


def test_with_a_mapping_it_says_what_there_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def change(episode: dict) -> None:
        for step in episode["steps"]:
            step["action"][6] = step["action"][6] > 0
            step["action"][5] = 0.25
            step["observation"]["image"] = episode["steps"][0]["observation"]["image"]

    folder = public_layouts.write_random(tmp_path / "set", "libero", (5, 9, 4), change)
    check.main([str(folder), "--mapping=libero", f"--out={tmp_path / 'out'}", "--context=2"])
    printed = capsys.readouterr().out
    for part in (
        "train: 2 episodes of", "val: 1 episodes of", "camera wrist: 12 x 12 pixels", "constant      0.25",
        "two-valued    0 or 1", "not used: episode_metadata/file_path", "instructions: 2 different",
        "windows of 2 steps", "camera front: 100.0% of the frames repeat", "camera wrist: 0.0%",
        "--config.data.mapping=libero",
    ):  # fmt: skip
        assert part in printed
    for name in ("frames.png", "actions.png"):
        assert min(Image.open(tmp_path / "out" / name).size) > 200


def test_own_demonstrations_need_no_mapping(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tiny_rlds.write_lengths(tmp_path / "tiny", [[4, 3]])
    check.main([str(folder), f"--out={tmp_path / 'out'}"])
    assert "Actions of tiny: 4 dimensions" in capsys.readouterr().out


def test_errors_of_the_command_line(tmp_path: Path) -> None:
    folder = public_layouts.write_random(tmp_path / "set", "libero", (2,))
    for flags, message in (
        (["--mapping=libro"], "did you mean 'libero'"),
        (["--mapping=libero", "--context=0"], "--context: expected at least 1, found 0"),
        (["--mapping=libero", "--tokenizer=none.json"], "expected a tokenizer.json, found none"),
        (["--mapping=aloha"], "proprio: observation/state: expected at least 14 numbers"),
    ):
        with pytest.raises(UserError, match=message):
            check.main([str(folder), f"--out={tmp_path / 'out'}", *flags])


def test_the_faults_of_all_splits_are_in_one_error(tmp_path: Path) -> None:
    episodes = [tiny_rlds.episode(index, 3) for index in range(2)]
    for episode in episodes:
        episode["steps"][2]["action"][0] = float("nan")
    folder = tiny_rlds.write(tmp_path / "tiny", {"train": [episodes[:1]], "val": [episodes[1:]]})
    with pytest.raises(UserError, match="tiny-train.*action.*nan.*tiny-val.*action.*nan"):
        check.main([str(folder), f"--out={tmp_path / 'out'}"])
