"""From a foreign dataset to an acting policy, without a simulator: the five commands of README in process."""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mllm_act import evaluate, train, train_tokenizer
from mllm_act.config import load_config
from mllm_act.policy import Policy
from tests.data_pipelines import public_layouts

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]


def configure(file: str, data: Path, **overrides: Any) -> Any:
    config = load_config(f"{ROOT}/configs/{file}")
    config.update_from_flattened_dict({
        "data.directory": str(data), "data.mapping": "libero", "data.batch_size": 4, "steps": 2, "log_every": 2,
        "checkpoint_every": 2, **overrides,
    })  # fmt: skip
    return config


def test_a_foreign_dataset_trains_is_evaluated_and_acts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data = public_layouts.write_random(tmp_path / "data", "libero", (6, 5, 7))
    small = {"tokenizer.hidden": 16, "tokenizer.width": 8, "tokenizer.codes": 8}
    tokenizer = tmp_path / "tokenizer"
    train_tokenizer.main(configure("tokenizer/robot.py:rvq", data, **small), tokenizer)
    printed = capsys.readouterr().out
    assert "--config=configs/policy/robot.py:rvq" in printed and "data.mapping=libero" in printed

    run = tmp_path / "run"
    config = configure(
        "policy/robot.py:rvq", data, tokenizer=str(tokenizer), validate_every=2, validation_windows=4, fit="pad",
    )  # fmt: skip
    train.main(config, run)
    assert f"evaluate --checkpoint={run} --data={data} --split=val" in capsys.readouterr().out

    flags = [f"--checkpoint={run}", f"--data={data}", "--split=val"]
    monkeypatch.setattr(sys, "argv", ["evaluate", *flags])
    evaluate.main()
    assert "success" in capsys.readouterr().out

    policy = Policy.load(run)
    assert policy.name == "libero"
    images = {
        "front": np.zeros((1, 16, 16, 3), np.uint8),
        "wrist": np.zeros((1, 12, 12, 3), np.uint8),
    }
    proprio, first = np.zeros((1, 8), np.float32), np.array([True])
    action, _ = policy.act(images, proprio, ["push"], first, policy.start(1))
    assert action.shape == (1, 7) and np.isfinite(action).all()
    mapping = policy.meta["dataset"]["libero"]["mapping"]
    assert mapping["cameras"] == {"front": "observation/image", "wrist": "observation/wrist_image"}
