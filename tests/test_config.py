"""The command line of training programs: config files by name, overrides, help, home directories."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from ml_collections.config_dict import ConfigDict

from mllm_act.config import load_config, shipped_configs
from mllm_act.errors import UserError
from mllm_act.files import locked
from tests.command_line import start

CONFIG = """
from ml_collections.config_dict import ConfigDict, placeholder

def get_config(variant="plain"):
    return ConfigDict({
        "variant": variant, "steps": placeholder(int), "shuffle": False,
        "data": {"directory": "", "batch_size": 32},
    })
"""


class Program:
    """A training program in this process; keeps what its main was called with."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, default: Path) -> None:
        self.monkeypatch, self.default = monkeypatch, default
        self.calls: list[tuple[ConfigDict, Path]] = []

    def run(self, *arguments: str) -> int:
        """Runs the program under a command line; returns its exit status."""

        def main(config: ConfigDict, workdir: Path) -> None:
            self.calls.append((config, workdir))

        return start(self.monkeypatch, main, str(self.default), *arguments)


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Program:
    (tmp_path / "plain.py").write_text(CONFIG)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    return Program(monkeypatch, tmp_path / "plain.py")


def test_shipped_configs_are_found_from_any_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    files = [file for file in shipped_configs().glob("*/*.py") if file.parent.name != "robots"]
    assert len(files) > 5
    for file in files:
        name = f"configs/{file.relative_to(shipped_configs())}"
        variant = ":rvq" if file.name == "common.py" else ""
        assert isinstance(load_config(name + variant), ConfigDict), name


def test_the_current_directory_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "configs" / "policy" / "metaworld.py"
    file.parent.mkdir(parents=True)
    file.write_text(CONFIG)
    monkeypatch.chdir(tmp_path)
    assert load_config("configs/policy/metaworld.py:mine").variant == "mine"


def test_a_missing_config_names_the_nearest_shipped_one(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"did you mean 'configs/policy/metaworld.py'\?$"):
        load_config("configs/policy/metawrld.py:rvq")
    (tmp_path / "empty.py").touch()
    with pytest.raises(UserError, match="expected a function get_config"):
        load_config(f"{tmp_path}/empty.py")
    (tmp_path / "notes.txt").touch()
    with pytest.raises(UserError, match="expected a Python file"):
        load_config(f"{tmp_path}/notes.txt")


def test_overrides_and_the_last_config_count(program: Program, tmp_path: Path) -> None:
    arguments = "--config=plain.py:a --config plain.py:b --config.steps=3 --config.data.batch_size 8".split()
    assert program.run(*arguments, "--config.shuffle", "--workdir=run") == 0
    ((config, workdir),) = program.calls
    assert (config.variant, config.steps, config.data.batch_size, config.shuffle) == (
        "b",
        3,
        8,
        True,
    )
    assert workdir == Path("run")


@pytest.mark.parametrize("flag", ["--help", "-help", "--helpfull", "-h"])
def test_help_prints_every_key(
    program: Program, flag: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert program.run(flag) == 0
    assert "--config.data.batch_size=32" in capsys.readouterr().out and program.calls == []


@pytest.mark.parametrize("arguments", [["--workdir", "help_run"], ["--workdir=help"]])
def test_a_value_that_begins_with_help_is_a_value(program: Program, arguments: list[str]) -> None:
    assert program.run(*arguments) == 0
    assert program.calls[0][1] == Path(arguments[-1].removeprefix("--workdir="))


def test_home_is_expanded_in_paths_and_values(program: Program, tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    (home / "mine.py").write_text(CONFIG)
    assert (
        program.run(
            "--config=~/mine.py:x", "--config.data.directory=~/data", "--workdir=~/runs/one"
        )
        == 0
    )
    ((config, workdir),) = program.calls
    assert config.variant == "x" and workdir == home / "runs" / "one"
    assert config.data.directory == str(home / "data")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--workdir=~nobody-of-that-name/x"], "--workdir=~nobody-of-that-name/x: expected the home"),
        (["--config.data.batchsize=1"], "did you mean 'data.batch_size'?"),
        (["--config.data.batchsize", "1"], "did you mean 'data.batch_size'?"),
        (["plain.py:a"], "expected flags only"),
        (["--config"], "--config: expected a value, found none"),
    ],
)  # fmt: skip
def test_wrong_arguments_are_one_line(
    program: Program, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    workdir = [] if "workdir" in arguments[0] else ["--workdir=run"]
    assert program.run(*workdir, *arguments) == 1
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("error: ") and message in line and program.calls == []


def test_a_folder_that_another_program_holds(
    program: Program, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with locked(tmp_path / "run", "--workdir"):
        assert program.run("--workdir=run") == 1
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("error: --workdir=run: expected a folder that no other program writes")
    assert program.calls == [] and program.run("--workdir=run") == 0


def test_programs_and_versions_in_one_command() -> None:
    def output(*arguments: str) -> str:
        command = [sys.executable, "-m", "mllm_act", *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout

    from mllm_act import __version__

    assert output("--version").startswith(f"mllm_act {__version__}")
    listing = output()
    assert "python -m mllm_act.train " in listing and "python -m data_pipelines.generate" in listing
    assert "processes" not in listing  # a worker's module


def test_commit_of_a_pip_installation(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The repository around a virtual environment is not the package's own."""
    from mllm_act import provenance

    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    site = tmp_path / "venv" / "site-packages"
    info = site / "mllm_act-0.2.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: mllm-act\nVersion: 0.2.0\n")
    monkeypatch.setattr(provenance, "ROOT", site)
    monkeypatch.syspath_prepend(str(site))
    assert provenance.git_commit() is None
    (info / "direct_url.json").write_text(json.dumps({"vcs_info": {"commit_id": "abc123"}}))
    assert provenance.git_commit() == "abc123"
    monkeypatch.setattr(provenance, "ROOT", tmp_path)
    assert provenance.git_commit() is None  # a repository without commits
