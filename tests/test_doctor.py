"""The doctor on a working and on a broken machine: real child processes, EGL and lock file."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from mllm_act import doctor
from mllm_act.errors import UserError

pytestmark = pytest.mark.slow


def run_doctor(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "mllm_act.doctor", *arguments],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )


def test_a_working_machine_passes_with_one_line_per_check() -> None:
    result = run_doctor()
    assert result.returncode == 0, result.stdout + result.stderr
    *lines, closing = result.stdout.splitlines()
    assert [line.split()[1] for line in lines] == list(doctor.CHECKS)
    assert {line.split()[0] for line in lines} <= {"ok", "note"}
    assert "make demo" in closing


def test_help_says_what_it_does() -> None:
    result = run_doctor("--help")
    assert result.returncode == 0 and "Checks this machine, or the checkpoints" in result.stdout


@pytest.mark.skipif(sys.platform != "linux", reason="EGL is Linux's")
def test_no_egl_driver_fails_and_names_the_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("__EGL_VENDOR_LIBRARY_FILENAMES", "/nonexistent")
    monkeypatch.setenv("MUJOCO_GL", "egl")
    finding = doctor.rendering()
    assert finding.status == "fail" and "EGL" in finding.text
    assert "\n" not in finding.text and "libegl1" in finding.fix


def test_a_check_whose_process_aborts_is_a_failure() -> None:
    finding = doctor.child("import os; os.abort()", "the fix")
    assert finding == doctor.Finding("fail", "the process was killed by signal 6", "the fix")


def test_a_failure_ends_the_program(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JAX_PLATFORMS", "no_such_platform")
    monkeypatch.setattr(sys, "argv", ["doctor"])
    monkeypatch.setattr(doctor, "CHECKS", {"python": doctor.python, "jax": doctor.jax})
    with pytest.raises(
        UserError, match=r"^1 of 2 checks failed \(jax\); fixes are suggested above$"
    ):
        doctor.main()


def test_packages_distinguishes_missing_from_different(tmp_path: Path) -> None:
    lock = tmp_path / "lock.txt"
    lock.write_text("# pins\nnumpy==0.0.1\npip==0 ; sys_platform == 'no-such'\n")
    finding = doctor.packages(lock)
    assert finding.status == "note" and "numpy" in finding.text and "pip" not in finding.text
    lock.write_text("numpy==0.0.1\nno-such-package-here==1\n")
    finding = doctor.packages(lock)
    assert finding.status == "fail" and "no-such-package-here" in finding.text
    assert finding.fix == "make setup"
    assert doctor.packages(tmp_path / "none").status == "note"
