"""Files and folders appear whole or not at all."""

import os
from pathlib import Path

import pytest

from mllm_act.files import whole_file, whole_folder, write_csv, write_json


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
