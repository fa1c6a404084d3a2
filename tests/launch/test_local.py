"""Several processes of one program on this machine: their flags, their end, and when they are started again."""

import sys
from pathlib import Path

import pytest

from launch import local

# Each start leaves a file; the processes of the first starts end as told, the last one's end well.
PROGRAM = """
import os, pathlib, signal, sys, time
folder, ends = pathlib.Path(sys.argv[1]), sys.argv[2].split(",")
flags = dict(flag.lstrip("-").split("=") for flag in sys.argv[3:])
process = int(flags["process_id"])
start = len(list(folder.glob(f"{process}-*")))
(folder / f"{process}-{start}").write_text(f"{flags['processes']} {flags['coordinator']}")
print("hello", start)
end = ends[start] if start < len(ends) else "0"
if process == 1:
    os.kill(os.getpid(), signal.SIGKILL) if end == "kill" else sys.exit(int(end))
if end != "0":
    time.sleep(60)
"""


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local, "FAILING", 0.2)


def launch(folder: Path, ends: str, restarts: int) -> int:
    return local.launch([sys.executable, "-c", PROGRAM, str(folder), ends], 2, restarts=restarts)


@pytest.mark.parametrize(
    ("ends", "restarts", "status", "starts"),
    [
        ("0", 3, 0, 1),
        ("kill,143,75", 3, 0, 4),
        ("kill,kill", 1, 137, 2),
        ("1", 3, 1, 1),  # an error of the user comes again
        ("130", 3, 130, 1),
    ],
)
def test_starts_again_after_failures_that_are_not_the_users(
    ends: str,
    restarts: int,
    status: int,
    starts: int,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert launch(tmp_path, ends, restarts) == status
    found = [sorted(tmp_path.glob(f"{process}-*")) for process in (0, 1)]
    assert [len(files) for files in found] == [starts, starts]
    told = {files[-1].read_text() for files in found}
    assert len(told) == 1 and told.pop().startswith("2 localhost:")
    assert "[1] hello 0\n" in capsys.readouterr().out


def test_each_process_gets_its_part_of_the_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7")
    assert local.environment(1, 2, None)["CUDA_VISIBLE_DEVICES"] == "6,7"
    assert local.environment(1, 8, None)["CUDA_VISIBLE_DEVICES"] == "4,5,6,7"
    assert "device_count=3" in local.environment(0, 2, 3)["XLA_FLAGS"]
