"""SIGINT and SIGTERM end every program within seconds. Real processes."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mllm_act.errors import run

ROOT = Path(__file__).parent.parent
PROGRAM = """
import hashlib, sys, tempfile, time
from mllm_act import errors

errors.GRACE = 0.5

class Slow:
    def __del__(self):
        print("ready", flush=True)
        for _ in range(50):
            time.sleep(0.01)

def main():
    with tempfile.TemporaryDirectory(dir=sys.argv[2]):
        errors.signals.deferred = sys.argv[1] == "deferred"
        if sys.argv[1] == "destructor":  # where Python drops exceptions
            errors.GRACE = 60.0
            Slow()
            time.sleep(60)
        print("ready", flush=True)
        if sys.argv[1] == "python":
            time.sleep(60)
        hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9)  # like the compiler: one long call, without Python's lock

errors.run(main)
"""


def start(doing: str, folder: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", PROGRAM, doing, str(folder)]
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    return process


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("doing", ["python", "destructor", "compiling"])
def test_a_signal_ends_the_program_with_the_status_of_shells(
    doing: str, number: signal.Signals, tmp_path: Path
) -> None:
    process = start(doing, tmp_path)
    process.send_signal(number)
    _, errors = process.communicate(timeout=20)
    assert (process.returncode, errors) == (128 + number, "interrupted\n")
    if doing != "compiling":
        assert list(tmp_path.iterdir()) == []  # it cleaned up


def test_a_second_signal_ends_a_program_that_does_not_answer_the_first(tmp_path: Path) -> None:
    process = start("deferred", tmp_path)
    # Ctrl-C reaches a program and its parent, which may pass it on.
    os.kill(process.pid, signal.SIGINT)
    time.sleep(0.1)
    os.kill(process.pid, signal.SIGTERM)
    time.sleep(1.2)
    assert process.poll() is None
    os.kill(process.pid, signal.SIGTERM)
    _, errors = process.communicate(timeout=20)
    first, second = errors.splitlines()
    assert process.returncode == 128 + signal.SIGTERM
    assert (first, second) == ("SIGINT: stopping; a second signal ends at once", "interrupted")


@pytest.mark.parametrize(
    "error, line",
    [
        (FileNotFoundError(2, "No such file or directory", "/proc/a\nb"), r"/proc/a\nb: expected"),
        (OSError(28, "No space left on device"), "expected to read or write it, found No space"),
    ],
)
def test_files_that_cannot_be_read_or_written_are_one_line(
    error: OSError, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def program() -> None:
        raise error

    with pytest.raises(SystemExit, match="1"):
        run(program)
    found = capsys.readouterr().err
    assert found.startswith(f"error: {line}") and found.count("\n") == 1


def test_a_program_ends_quietly_when_nobody_reads_its_output() -> None:
    code = "from mllm_act.errors import run; run(lambda: print('x' * 1_000_000))"
    process = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None
    process.stdout.close()
    _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (128 + signal.SIGPIPE, b"")
