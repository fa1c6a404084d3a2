"""A training that cannot write ends in one line with the last good step."""

import resource
from pathlib import Path

import pytest

from mllm_act import train
from mllm_act.checkpoints import checkpoint
from mllm_act.training.metrics import Board, MetricsWriter
from tests.command_line import start
from tests.data_pipelines import tiny_rlds
from tests.small_disk import small_disk


@pytest.mark.slow
def test_training_on_a_full_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tiny_rlds.write_lengths(tmp_path / "data", [[5, 4, 7], [6, 3]])
    workdir = tmp_path / "disk" / "run"
    flags = (
        f"--workdir={workdir}", f"--config.data.directory={data}", "--config.data.batch_size=2",
        "--config.adapter.bins=16", "--config.steps=3", "--config.checkpoint_every=1", "--config.log_every=1",
    )  # fmt: skip
    workdir.parent.mkdir()
    with small_disk(workdir.parent, "40m"):  # two steps fit, and a third beside them does not
        assert start(monkeypatch, train.main, "configs/policy/metaworld.py:uniform", *flags) == 1
        error = capsys.readouterr().err.splitlines()[-1]
        assert error == (
            f"error: {workdir}/checkpoints/3: expected to write a checkpoint, found No space left on device; the last "
            "good step is 2; free space or allow writing there, then run the same command to continue"
        )
        assert checkpoint.find(workdir)[1] == 2


def test_metrics_that_cannot_be_written_are_an_error_and_no_hang(tmp_path: Path) -> None:
    board = Board(tmp_path / "board", 0)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            for step in range(10_000):
                board.write(step, {"loss": 0.5})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_damaged_lines_of_metrics_are_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(
        b'{"step": 1}\n\xff\n[]\n{"step": "2"}\n{"other": 2}\n{"step": 2}\n{"step": 3}\n{"st'
    )
    with MetricsWriter(tmp_path, first_step=2):
        assert capsys.readouterr().out == f"notice: {path}: 4 damaged lines are left out\n"
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'
