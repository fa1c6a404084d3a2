"""The data benchmark runs on a real dataset and prints one JSON line at the end."""

import json
from pathlib import Path

import pytest

from mllm_act.bench import data
from tests.data_pipelines import tiny_rlds


def test_prints_both_rates_and_their_ratio(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = tiny_rlds.write_lengths(tmp_path / "tiny", [[40, 30], [50]])
    data.main([f"--data={directory}", "--repeats=1"])
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["frames"] == 120
    ratio = result["pipeline_frames_per_s"] / result["bare_frames_per_s"]
    assert result["ratio"] == pytest.approx(ratio, abs=1e-2)
