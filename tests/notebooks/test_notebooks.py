"""Every notebook runs from its first cell to its last, on small real data."""

import csv
import json
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pytest

from tests.data_pipelines import tiny_rlds
from tests.serving.conftest import workdir  # noqa: F401 (a fixture)

NOTEBOOKS = Path(__file__).parents[2] / "notebooks"
pytestmark = pytest.mark.slow


def execute(name: str, monkeypatch: pytest.MonkeyPatch, **settings: Any) -> dict[str, Any]:
    """Runs the cells in order; ``settings`` replace those of the first cell. Returns the notebook's variables."""
    monkeypatch.setattr(plt, "show", lambda: plt.close("all"))
    document = json.loads((NOTEBOOKS / f"{name}.ipynb").read_text())
    cells = [cell for cell in document["cells"] if cell["cell_type"] == "code"]
    assert all(cell["outputs"] == [] for cell in cells), "clear the outputs before committing"
    scope: dict[str, Any] = {"__name__": "__main__"}
    for i, cell in enumerate(cells):
        exec(compile("".join(cell["source"]), f"{name}, code cell {i}", "exec"), scope)
        if i == 0:
            assert set(settings) <= set(scope)
            scope.update(settings)
    return scope


def test_tokenizer_precision(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tiny_rlds.write_lengths(tmp_path / "data", [[30, 30], [20]])
    settings = {
        "steps": 4,
        "log_every": 4,
        "data.batch_size": 16,
        "tokenizer.hidden": 16,
        "tokenizer.width": 8,
    }
    found = execute(
        "tokenizer_precision", monkeypatch,
        DATA=str(data), OUT=str(tmp_path / "out"), CODEBOOKS=(2,), CODES=(8,), SETTINGS=settings,
    )  # fmt: skip
    assert len(found["found"][2, 8].codebooks) == 2
    output = capsys.readouterr().out
    assert "8 bins" in output and "FAST, chunks of 8" in output and "codebook 1:" in output


def test_adapter_comparison(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rng = np.random.default_rng(0)
    for name, rate in (("good", 0.9), ("bad", 0.2)):
        (tmp_path / name).mkdir()
        with (tmp_path / name / "episodes.csv").open("w") as file:
            rows = csv.writer(file)
            rows.writerow(["task", "configuration", "seed", "success", "steps"])
            for task in ("reach-v3", "push-v3", "door-open-v3"):
                for i in range(20):
                    rows.writerow([task, i, 0, int(rng.random() < rate), 10])
    found = execute(
        "adapter_comparison", monkeypatch,
        EVALUATIONS={"good": str(tmp_path / "good"), "bad": str(tmp_path / "bad")}, GROUPS_OF="metaworld",
    )  # fmt: skip
    mean, low, high = found["differences"]["good", "bad"]
    assert 0.4 < low <= mean <= high and found["corrected"]["good", "bad"] < 1e-6
    first = np.array([True] * 5 + [False])
    assert found["mcnemar"](first, ~first) == (5, 1, pytest.approx(2 * 7 / 64))
    output = capsys.readouterr().out
    assert "60 episodes of 3 tasks" in output and "push" in output


def test_one_decision(
    workdir: Path,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    execute(
        "one_decision", monkeypatch, RUN=str(workdir), DATA=str(workdir.parent / "data"), SQUARES=2
    )
    output = capsys.readouterr().out
    assert "token 15: 16 of 16 allowed" in output and "without 'task'" in output
