"""One training in several real processes: the same as in one, stopped by a signal to one of them, resumed in others."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from benchmarks import reliability
from mllm_act.checkpoints import checkpoint
from tests.data_pipelines import tiny_rlds
from tests.test_train import command, losses, run

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
SETTINGS: dict[str, Any] = {
    "steps": 6, "checkpoint_every": 6, "validate_every": 2, "data.batch_size": 4, "validation_windows": 3,
}  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_rlds.write_lengths(tmp_path_factory.mktemp("data"), [[5, 4, 7], [6, 3]])


def lines(workdir: Path) -> dict[tuple[int, str], float]:
    """Every loss in the log by step and name; each is written once."""
    found = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    result = {(x["step"], k): x[k] for x in found for k in ("train/loss", "val/loss") if k in x}
    assert len(result) == len(found)
    return result


def trained(workdir: Path) -> dict[str, jax.Array]:
    like = reliability.shapes(workdir / "checkpoints" / "6")
    return checkpoint.read_items(workdir, 6, like)["trained"]


def launch(processes: int, *arguments: str) -> list[str]:
    return [sys.executable, "-m", "launch.local", f"--processes={processes}", "--", *arguments]


def test_four_processes_then_two_then_one_train_as_one_does(data: Path, tmp_path: Path) -> None:
    """A SIGTERM to one of four makes all save the same step; others of another mesh go on from it."""
    alone, shared = tmp_path / "alone", tmp_path / "shared"
    run(data, alone, **SETTINGS)
    (shared / "checkpoints").mkdir(parents=True)
    first = command(data, shared, **SETTINGS, **{"mesh.data": 1, "mesh.fsdp": 2, "mesh.tensor": 2})
    process = subprocess.Popen(launch(4, *first), cwd=ROOT, stdout=subprocess.PIPE, text=True)
    while not (shared / "metrics.jsonl").exists() or not losses(shared):
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.02)
    children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True)
    os.kill(int(children.stdout.split()[-1]), signal.SIGTERM)
    output, _ = process.communicate()
    assert process.returncode == 128 + signal.SIGTERM, output
    assert "SIGTERM: stopped after step" in output
    stopped = checkpoint.find(shared)[1]
    assert 0 < stopped < 6

    two = command(data, shared, **SETTINGS, **{"mesh.data": 2, "mesh.fsdp": 1})
    done = subprocess.run(launch(2, *two), cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert f"Resuming from step {stopped} of 6" in done.stdout and "[1] Resuming" not in done.stdout
    found, right = lines(shared), lines(alone)
    assert found.keys() == right.keys()
    for key, loss in right.items():
        np.testing.assert_allclose(found[key], loss, rtol=1e-3, err_msg=str(key))
    run(data, shared, **SETTINGS)  # one process reads what several have written
    for path, array in trained(alone).items():
        np.testing.assert_allclose(trained(shared)[path], array, atol=1e-3, err_msg=path)


def test_processes_that_are_started_differently_are_told_by_name(
    data: Path, tmp_path: Path
) -> None:
    port = subprocess.run(
        [sys.executable, "-c", "from launch.local import free_port; print(free_port())"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout.strip()  # fmt: skip
    started = [
        subprocess.Popen(
            [*command(data, tmp_path / "run", **{**SETTINGS, "seed": i}), f"--coordinator=localhost:{port}",
             "--processes=2", f"--process_id={i}"],
            cwd=ROOT, stderr=subprocess.PIPE, text=True,
        )
        for i in range(2)
    ]  # fmt: skip
    for process in started:
        _, errors = process.communicate()
        assert process.returncode == 1
        [line] = [line for line in errors.splitlines() if "error:" in line]
        assert "config.seed: expected the same in all 2 processes, found 0 in process 0 on" in line
        assert "1 in process 1" in line
    assert not (tmp_path / "run" / "checkpoints").exists()
