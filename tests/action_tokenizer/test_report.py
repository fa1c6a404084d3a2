"""Precision in physical units."""

import csv
import dataclasses
import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from mllm_act import envs
from mllm_act.action_tokenizer import fast, report
from mllm_act.action_tokenizer.autoencoder import ActionTokenizer
from mllm_act.action_tokenizer.byte_pair import END
from tests.action_tokenizer.conftest import some_actions, statistics

pytestmark = pytest.mark.slow

METADATA = dataclasses.asdict(envs.spec("metaworld"))


def test_precision_is_in_physical_units(model: ActionTokenizer) -> None:
    stats, actions = statistics(bound=0.5), some_actions() / 2
    precision = report.measure_precision(model, stats, METADATA, actions)
    decoded = model.decode(model.encode(jnp.asarray(2 * actions))) / 2
    scale = np.array([0.01, 0.01, 0.01, 1])
    error = np.abs(np.clip(decoded, -1, 1) - actions) * scale
    assert [(row["name"], row["unit"]) for row in precision.rows][:1] == [("dx", "m")]
    for d, row in enumerate(precision.rows):
        assert row["rmse"] == pytest.approx(np.sqrt(np.mean(error[:, d] ** 2)), rel=1e-3)
        assert row["max"] == pytest.approx(error[:, d].max(), rel=1e-3)
        assert row["mean_abs"] <= row["p95"] <= row["max"]
    assert precision.mse == pytest.approx(
        float(np.mean((2 * decoded - 2 * actions) ** 2)), rel=1e-3
    )
    scores = report.score(model, stats, METADATA, actions)
    assert scores["rmse_dx_m"] == precision.rows[0]["rmse"] and 0 < scores["use_1"] <= 1


def test_precision_of_chunks_is_of_their_actions() -> None:
    """FAST counts as one codebook, without padding."""
    stats, chunks = statistics(bound=0.5), some_actions().reshape(50, 16) / 2
    model = fast.fit(2 * chunks, 4, 4, 64, 10.0)
    precision = report.measure_precision(model, stats, METADATA, chunks)
    codes = model.encode(jnp.asarray(2 * chunks))
    decoded = np.clip(model.decode(codes), -1, 1) / 2
    error = np.abs(decoded - chunks).reshape(200, 4) * np.array([0.01, 0.01, 0.01, 1])
    assert [row["name"] for row in precision.rows] == list(METADATA["action_names"])
    for d, row in enumerate(precision.rows):
        assert row["rmse"] == pytest.approx(np.sqrt(np.mean(error[:, d] ** 2)), rel=1e-3)
    assert precision.mse == pytest.approx(
        1 / 12 / 10**2, rel=0.05
    )  # the variance of rounding to tenths
    assert precision.action.shape == precision.decoded.shape == (200, 4)
    full = np.array(model.lengths[...])[codes].sum(-1) == 16
    ends = np.array((codes == END).any(-1)) & ~full
    assert precision.tokens == pytest.approx(np.mean((np.array(codes) != END).sum(-1) + ends))
    assert len(precision.codebooks) == 1 and 1 < precision.codebooks[0]["perplexity"] < 64
    assert f"{precision.tokens:.1f} tokens for 4 actions" in report.as_table(precision)


def test_files_of_the_report(model: ActionTokenizer, tmp_path: Path) -> None:
    precision = report.measure_precision(model, statistics(), METADATA, some_actions())
    report.write_precision(precision, tmp_path / "report")
    assert sorted(file.name for file in (tmp_path / "report").iterdir()) == [
        "precision.csv", "precision.json", "precision.png"]  # fmt: skip
    assert json.loads((tmp_path / "report/precision.json").read_text())["mse"] == precision.mse
    with (tmp_path / "report/precision.csv").open() as file:
        names = tuple(row["name"] for row in csv.DictReader(file))
    assert names == METADATA["action_names"]
    assert "gripper" in report.as_table(precision)
