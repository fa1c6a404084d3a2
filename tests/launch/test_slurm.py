"""Two tasks on a Slurm cluster: preempted, queued again, finished. Runs where ``sbatch`` reaches a cluster."""

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.data_pipelines import tiny_rlds
from tests.test_train import command

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]


def slurm(*arguments: str) -> str:
    return subprocess.run(arguments, capture_output=True, text=True, check=True, cwd=ROOT).stdout


def test_a_preempted_job_is_queued_again_and_finishes(tmp_path: Path) -> None:
    if shutil.which("sbatch") is None or subprocess.run(["sinfo"], capture_output=True).returncode:
        pytest.skip("no Slurm cluster")
    data = tiny_rlds.write_lengths(tmp_path / "data", [[5, 4, 7], [6, 3]])
    run, log = tmp_path / "run", tmp_path / "job.log"
    training = command(
        data,
        run,
        **{"steps": 60, "checkpoint_every": 60, "validate_every": 60, "data.batch_size": 4},
    )
    job = slurm(
        "sbatch", "--parsable", "--nodes=2", f"--output={log}", "launch/slurm.sbatch", *training
    ).strip()
    try:
        while (
            not (run / "metrics.jsonl").exists() or len((run / "metrics.jsonl").read_text()) < 100
        ):
            assert slurm("squeue", "-h", "-j", job), log.read_text()
            time.sleep(0.2)
        slurm("scancel", "--signal=TERM", job)
        while slurm("squeue", "-h", "-j", job):
            time.sleep(1)
    finally:
        subprocess.run(["scancel", job], capture_output=True)
    text = log.read_text(errors="replace")  # lines of the tasks, cut where they meet
    assert "exit status 143 on start 1" in text and "exit status 0 on start 2" in text, text
    events = [json.loads(line)["event"] for line in (run / "events.jsonl").read_text().splitlines()]
    assert (events.count("start"), events.count("preempt"), events[-1]) == (2, 1, "end")
    assert sys.executable in training[0]
