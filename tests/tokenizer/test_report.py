"""Precision in physical units, and replay in the real simulator."""

import csv
import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mllm_act import envs
from mllm_act.envs.workers import EnvPool
from mllm_act.errors import UserError
from mllm_act.normalization import Moments, Statistics
from mllm_act.tokenizer import quantizer, report
from mllm_act.tokenizer.autoencoder import ActionTokenizer, TokenizerConfig

METADATA = dataclasses.asdict(envs.spec("metaworld"))


def statistics(bound: float = 1.0) -> Statistics:
    four = {name: (0.0,) * 4 for name in ("mean", "std", "q01", "q99")}
    moments = Moments(**four, min=(-bound,) * 4, max=(bound,) * 4)
    return Statistics(moments, moments, 1, 1, "train", "0", ("reach-v3",), ("reach",))


@pytest.fixture(scope="module")
def model() -> ActionTokenizer:
    model = ActionTokenizer(TokenizerConfig(4, codes=16, width=8, hidden=16), rngs=nnx.Rngs(0))
    latents = model.encoder(jnp.array(some_actions()))
    model.set_quantizer_state(quantizer.initialise(jax.random.key(0), latents, 2, 16, 64))
    return model


def some_actions() -> np.ndarray:
    return np.random.default_rng(0).uniform(-1, 1, (200, 4)).astype(np.float32)


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


def test_replay_of_the_expert(model: ActionTokenizer, tmp_path: Path) -> None:
    """Alone it succeeds, on two configurations of two tasks; with no action at all it does not."""
    chosen = report.jobs("metaworld", ["reach-v3", "drawer-close-v3"], "test", 0)
    chosen = [job for job in chosen if job.configuration < 42]
    with EnvPool("metaworld", 3, 1, render=False) as pool:
        alone = report.replay(pool, chosen, 150, None)
        again = report.replay(pool, chosen, 150, lambda action: action)
        still = report.replay(pool, chosen, 20, np.zeros_like)
    assert alone == again == [True] * 4 and still == [False] * 4
    rows = report.replay_rows(chosen, still, alone)
    assert [row["task"] for row in rows] == ["reach-v3", "drawer-close-v3", "all"]
    assert rows[-1]["replay"] == 0 and rows[-1]["expert"] == 1 and rows[-1]["episodes"] == 4
    assert rows[0]["expert_low"] < 1 < rows[0]["episodes"]
    assert "drawer-close-v3" in report.replay_table(rows)


def test_through_the_tokenizer_is_encode_then_decode(model: ActionTokenizer) -> None:
    through = report.through_tokenizer(model, statistics(), batch=8)
    actions = some_actions()[:5]
    expected = model.decode(model.encode(actions))
    np.testing.assert_allclose(through(actions), expected, atol=1e-6)


def test_a_split_that_does_not_exist() -> None:
    with pytest.raises(UserError, match="tset"):
        report.jobs("metaworld", ["reach-v3"], "tset", 0)
