"""Folders with names that mean something to globs and shells, ``~``, and JAX's 64-bit types."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from mllm_act import train, train_tokenizer
from mllm_act.action_tokenizer.checkpoint import load_tokenizer
from mllm_act.config import load_config
from mllm_act.errors import UserError
from mllm_act.files import user_path
from mllm_act.policy import Policy
from tests.data_pipelines import tiny_rlds


def test_home_in_paths_of_programs_without_config(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/some/home")
    assert user_path("~/data") == Path("/some/home/data")
    assert user_path("a~b/~") == Path("a~b/~")
    with pytest.raises(UserError, match="^--source=~nobody-of-that-name/x: expected the home"):
        user_path("~nobody-of-that-name/x", "--source")


@pytest.mark.parametrize("text", ["", "gs://bucket/run", "file:///tmp/run"])
def test_what_is_no_path_is_refused_and_makes_no_folder(text: str) -> None:
    with pytest.raises(UserError, match=f"^--out={text}: expected a path of this machine's file"):
        user_path(text, "--out")
    with pytest.raises(UserError, match="^expected a path of this machine's file"):
        user_path(text)


@pytest.mark.parametrize("program", ["export_hf", "replay"])
def test_a_program_expands_home_in_its_paths(tmp_path: Path, program: str) -> None:
    command = [sys.executable, "-m", f"mllm_act.{program}", "--checkpoint=~/no", "--out=~/out"]
    environment = {**os.environ, "HOME": str(tmp_path), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith(f"error: {tmp_path}/no")


@pytest.mark.slow
def test_runs_in_folders_of_any_name(tmp_path: Path) -> None:
    odd = tmp_path / "a[1]* ?{b}%20~$HOME:é\n#"
    data = tiny_rlds.write_lengths(odd / "data[0]*", [[5, 4, 7], [6, 3]])
    config = load_config("configs/policy/metaworld.py:uniform")
    config.data.directory = str(data)
    config.data.batch_size = 4
    config.steps = 0
    workdir = odd / "run [a-z]*"
    train.main(config, workdir)
    policy = Policy.load(workdir)
    assert policy is not None
    train.main(config, workdir)  # resumes

    config = load_config("configs/tokenizer/metaworld.py:fast,chunk=2")
    config.data.directory, config.replay = str(data), False
    train_tokenizer.main(config, odd / "tokenizer[*]")
    assert load_tokenizer(odd / "tokenizer[*]").config.chunk == 2


@pytest.mark.parametrize("program", ["train", "evaluate"])
def test_64_bit_types_are_one_line(tmp_path: Path, program: str) -> None:
    command = [sys.executable, "-m", f"mllm_act.{program}", f"--workdir={tmp_path / 'run'}"]
    environment = {**os.environ, "JAX_ENABLE_X64": "1", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("error: JAX_ENABLE_X64=1: expected")
    assert "Traceback" not in done.stderr
