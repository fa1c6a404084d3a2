"""Precision in physical units."""

import csv
import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from mllm_act import envs
from mllm_act.tokenizer import report
from mllm_act.tokenizer.autoencoder import ActionTokenizer
from tests.tokenizer.conftest import some_actions, statistics

METADATA = dataclasses.asdict(envs.spec("metaworld"))


def test_precision_is_in_physical_units(model: ActionTokenizer) -> None:
    stats, actions = statistics(bound=0.5), some_actions() / 2
    found = report.precision(model, stats, METADATA, actions)
    decoded = model.decode(model.encode(2 * actions)) / 2
    scale = np.array([0.01, 0.01, 0.01, 1])
    error = np.abs(np.clip(decoded, -1, 1) - actions) * scale
    assert [(row["name"], row["unit"]) for row in found.rows][:1] == [("dx", "m")]
    for d, row in enumerate(found.rows):
        assert row["rmse"] == pytest.approx(np.sqrt(np.mean(error[:, d] ** 2)), rel=1e-3)
        assert row["max"] == pytest.approx(error[:, d].max(), rel=1e-3)
        assert row["mean_abs"] <= row["p95"] <= row["max"]
    assert found.mse == pytest.approx(float(np.mean((2 * decoded - 2 * actions) ** 2)), rel=1e-3)
    scores = report.score(model, stats, METADATA, actions)
    assert scores["rmse_dx_m"] == found.rows[0]["rmse"] and 0 < scores["use_1"] <= 1


def test_files_of_the_report(model: ActionTokenizer, tmp_path: Path) -> None:
    found = report.precision(model, statistics(), METADATA, some_actions())
    report.write_precision(found, tmp_path / "report")
    assert sorted(file.name for file in (tmp_path / "report").iterdir()) == [
        "precision.csv", "precision.json", "precision.png"]  # fmt: skip
    assert json.loads((tmp_path / "report/precision.json").read_text())["mse"] == found.mse
    with (tmp_path / "report/precision.csv").open() as file:
        names = tuple(row["name"] for row in csv.DictReader(file))
    assert names == METADATA["action_names"]
    assert "gripper" in report.as_table(found)
