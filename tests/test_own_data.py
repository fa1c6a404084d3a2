"""From foreign datasets to acting policies, without a simulator: the commands of README in process.

One run trains them all, and a simulator's demonstrations with them: each has its own cameras, actions and instructions.
"""

import csv
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_pipelines.import_calvin import import_dataset as import_calvin
from data_pipelines.import_lerobot import import_dataset as import_lerobot
from mllm_act import evaluate, train, train_tokenizer
from mllm_act.config import load_config
from mllm_act.policy import Policy
from tests.data_pipelines import public_layouts, tiny_calvin, tiny_lerobot

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
# An adapter for each; one with a tokenizer, and the simulator's. tests/data_pipelines/reading reads the other layouts:
# what another robot adds here is a minute of compilation, not another way through the program.
ROBOTS = {
    "libero": "rvq", "aloha": "uniform", "calvin": "regression", "robot_lerobot": "uniform",
    "robot_tensors": "regression",
}  # fmt: skip
EVALUATED = ("libero", "robot_tensors")  # what a robot adds to the others' time is compilation
SENTENCES = ("räume den Tisch ab 🧹", "把杯子放在桌子上", "ضع الكوب على الطاولة")
HEADER = "from data_pipelines.mapping import DataMapping, Part\nMAPPING = DataMapping("
FILES = {
    "robot_tensors": "'tensors', {'front': 'observation/camera'}, (Part('closed', ('closed',)), Part('command', "
    "('x', 'y'))), (Part('observation/pose/arm', ('i', 'j', 'k')),))",
}


def translate(episode: dict[str, Any]) -> None:
    for step in episode["steps"]:
        step["language_instruction"] = SENTENCES[len(episode["steps"]) % 3]


def write(home: Path, name: str) -> tuple[Path, str]:
    """Writes a small set; returns its folder and its mapping."""
    folder, layout = home / name, name.removeprefix("robot_")
    if layout == "lerobot":
        import_lerobot(tiny_lerobot.write_v3(home / "source"), folder, workers=1)
        return folder, str(folder / "mapping.py")
    if layout == "calvin":
        mini = tiny_calvin.MINI
        source = mini if mini.exists() else tiny_calvin.write(home / "calvin_source")
        import_calvin(source, folder, workers=1)
        return folder, name
    public_layouts.write_random(
        folder, layout, (6, 5, 7), translate if layout == "libero" else lambda episode: None,
        file_format="array_record" if layout == "aloha" else "tfrecord",
    )  # fmt: skip
    if name in FILES:
        (home / f"{layout}.py").write_text(HEADER + FILES[name])
        return folder, str(home / f"{layout}.py")
    return folder, name


def tokenizer(home: Path, name: str, data: Path) -> Path:
    config = load_config(f"{ROOT}/configs/tokenizer/robot.py:rvq")
    config.update_from_flattened_dict({
        "data.directory": str(data), "data.mapping": name, "data.batch_size": 4, "steps": 2, "log_every": 2,
        "checkpoint_every": 2, "tokenizer.hidden": 16, "tokenizer.width": 8, "tokenizer.codes": 8,
    })  # fmt: skip
    train_tokenizer.main(config, home / f"tokenizer_{name}")
    return home / f"tokenizer_{name}"


def test_foreign_datasets_and_a_simulator_train_in_one_run_are_evaluated_and_act(
    metaworld: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:  # fmt: skip
    parts = ",".join(f"{name}={adapter}" for name, adapter in ROBOTS.items())
    config = load_config(f"{ROOT}/configs/policy/mixture.py:{parts},metaworld=rvq")
    settings: dict[str, Any] = {
        "mixture.metaworld.data.directory": str(metaworld / "data"),
        "mixture.metaworld.tokenizer": str(metaworld / "tokenizer"),
        "mixture.metaworld.data.context": 1,
    }
    data = {}
    for name, adapter in ROBOTS.items():
        data[name], mapping = write(tmp_path, name)
        part = {"data.directory": str(data[name]), "data.mapping": mapping, "data.context": 1}
        if adapter == "rvq":
            part["tokenizer"] = str(tokenizer(tmp_path, name, data[name]))
            printed = capsys.readouterr().out
            assert "configs/policy/robot.py:rvq" in printed and f"data.mapping={name}" in printed
        settings |= {f"mixture.{name}.{key}": value for key, value in part.items()}
    config.update_from_flattened_dict({
        **settings, "steps": 2, "log_every": 2, "checkpoint_every": 2, "validate_every": 2, "validation_windows": 1,
        "data.batch_size": len(ROBOTS) + 1, "data.shuffle_megabytes": 1, "fit": "pad",
    })  # fmt: skip
    run = tmp_path / "run"
    train.main(config, run)
    printed = capsys.readouterr().out
    assert f"--data={data['libero']} --split=val --embodiment=libero" in printed
    assert "--env=metaworld --split=test" in printed

    for name in EVALUATED:
        flags = [f"--checkpoint={run}", f"--data={data[name]}", "--split=val", "--episodes=1"]
        embodiment = name.removeprefix("robot_")
        monkeypatch.setattr(sys, "argv", ["evaluate", *flags, f"--embodiment={embodiment}"])
        evaluate.main()
        assert "success" in capsys.readouterr().out
    with (run / "offline/libero/val/episodes.csv").open(encoding="utf-8") as file:
        assert next(csv.DictReader(file))["instruction"] in SENTENCES

    policy = Policy.load(run, embodiment="libero")
    images = {
        "front": np.zeros((1, 16, 16, 3), np.uint8),
        "wrist": np.zeros((1, 12, 12, 3), np.uint8),
    }
    proprio, first = np.zeros((1, 8), np.float32), np.array([True])
    action, _ = policy.act(images, proprio, [SENTENCES[1]], first, policy.start(1))
    assert action.shape == (1, 7) and np.isfinite(action).all()
    mapping = policy.meta["dataset"]["libero"]["mapping"]
    assert mapping["cameras"] == {"front": "observation/image", "wrist": "observation/wrist_image"}
