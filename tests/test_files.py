"""Files and folders appear whole or not at all; a locked folder has one program."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from mllm_act.errors import UserError
from mllm_act.files import locked, whole_file, whole_folder, write_csv, write_json

HOLDING = """
import os, sys, time
from pathlib import Path
from mllm_act.files import locked

with locked(Path(sys.argv[1]), "--out"):
    if not os.fork():  # a child that outlives its parent
        time.sleep(20)
        os._exit(0)
    print("holding", flush=True)
    time.sleep(20)
"""


def test_a_file_is_replaced_only_when_the_new_one_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "table.csv"
    write_csv(path, [{"a": 1, "b": "x, y"}])
    assert path.read_text().splitlines() == ["a,b", '1,"x, y"']
    with pytest.raises(KeyboardInterrupt), whole_file(path) as partial:
        partial.write_text("half of it")
        raise KeyboardInterrupt
    assert [p.name for p in tmp_path.iterdir()] == ["table.csv"]
    assert path.read_text().startswith("a,b")


def test_a_folder_appears_when_the_block_has_ended(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out"
    with pytest.raises(ValueError), whole_folder(out) as partial:
        (partial / "file").write_text("half")
        raise ValueError
    assert not out.exists() and list(out.parent.iterdir()) == []
    with whole_folder(out) as partial:
        (partial / "file").write_text("whole")
        assert not out.exists()
    assert (out / "file").read_text() == "whole"


def test_what_is_published_has_the_permissions_of_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        write_json(tmp_path / "file.json", {"a": 1})
    finally:
        os.umask(before)
    assert (tmp_path / "file.json").stat().st_mode & 0o777 == 0o644


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another program, which holds the folder ``run``."""
    command = [sys.executable, "-c", HOLDING, str(tmp_path / "run")]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
        cwd=Path(__file__).parents[1],
    )
    assert process.stdout is not None and process.stdout.readline() == "holding\n"
    yield process
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


def test_a_second_program_names_the_first_and_touches_nothing(
    tmp_path: Path, holder: subprocess.Popen[str]
) -> None:
    def content() -> dict[str, tuple[int, bytes]]:
        files = (tmp_path / "run").iterdir()
        return {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in files}

    before = content()
    with pytest.raises(UserError) as caught, locked(tmp_path / "run", "--out"):
        pass
    message = str(caught.value)
    assert f"found one held by process {holder.pid} on " in message and "\n" not in message
    assert (
        f"{tmp_path}/run" in message and "python" in message and message.endswith("another --out")
    )
    assert content() == before


def test_the_lock_of_a_killed_program_is_taken_over(
    tmp_path: Path, holder: subprocess.Popen[str]
) -> None:
    """Its child runs on, and so do the workers of a killed generation for a moment."""
    holder.kill()
    holder.wait()
    assert (tmp_path / "run" / ".lock").exists()
    start = time.monotonic()
    with locked(tmp_path / "run", "--out"):
        assert f"process {os.getpid()} on " in (tmp_path / "run" / ".lock").read_text()
    assert time.monotonic() - start < 5
    assert list((tmp_path / "run").iterdir()) == []


def test_a_folder_that_stays_empty_is_removed_again(tmp_path: Path) -> None:
    with pytest.raises(ValueError), locked(tmp_path / "deep" / "run", "--workdir"):
        with pytest.raises(UserError, match="expected a folder that no other program writes to"):
            with locked(tmp_path / "deep" / "run", "--workdir"):
                pass
        raise ValueError
    assert list(tmp_path.iterdir()) == []
    with locked(tmp_path / "deep" / "run", "--workdir"):
        (tmp_path / "deep" / "run" / "file").touch()
    assert [path.name for path in (tmp_path / "deep" / "run").iterdir()] == ["file"]


def test_a_folder_that_cannot_be_written_to(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file" / "run", Path("/proc/run")):
        with pytest.raises(UserError, match=f"--out={path}: expected a folder that can be written"):
            with locked(path, "--out"):
                pass
