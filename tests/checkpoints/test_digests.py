"""Files of a checkpoint that changed after it was written are never used; what is right is named."""

import os
import resource
import shutil
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import reliability
from mllm_act import doctor
from mllm_act.checkpoints import checkpoint, digests
from mllm_act.checkpoints.checkpoint import Checkpointer, read_items, read_meta
from mllm_act.checkpoints.frozen import save_frozen
from mllm_act.errors import UserError
from tests.small_disk import small_disk

ROOT = Path(__file__).parents[2]


def write_run(workdir: Path, seed: int = 0) -> Path:
    """A run of steps 4 and 8 with frozen arrays."""
    rng = np.random.default_rng(seed)
    arrays = {
        f"layer{i}/kernel": jnp.asarray(rng.normal(size=(40, 30)), jnp.float32) for i in range(3)
    }
    mark = save_frozen(workdir, arrays)
    with Checkpointer(workdir) as checkpoints:
        for step in (4, 8):
            moved = {name: array + step for name, array in arrays.items()}
            meta = {"frozen": mark, "provenance": {"mllm_act": "0.2", "git_commit": "abc"}}
            checkpoints.save(step, {"trained": moved, "optimizer": moved}, meta)
    return workdir


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("written") / "run")


@pytest.fixture
def run(written: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(written, tmp_path / "run"))


def load(run: Path) -> None:
    """Reads the newest step, as a resumed training does."""
    workdir, step = checkpoint.find(run)
    folders = [workdir / "checkpoints" / str(step), workdir / "frozen"]
    reliability.load(workdir, step, *map(reliability.shapes, folders))


def test_every_flipped_bit_is_refused_or_without_effect(run: Path) -> None:
    ends = reliability.flip_bits(run, 25, seed=1)
    assert set(ends) <= {"refused", "without effect"} and ends["refused"] >= 12


@pytest.mark.parametrize("change", ["cut", "deleted", "added", "pipe", "flipped"])
def test_a_changed_file_is_named_with_the_step_that_is_whole(run: Path, change: str) -> None:
    folder = run / "checkpoints" / "8"
    path = max(folder.glob("trained/**/d/*"), key=lambda path: path.stat().st_size)
    content = path.read_bytes()
    if change == "cut":
        path.write_bytes(content[:-1])
    elif change == "added":
        path = folder / "trained" / "stranger"
        path.touch()
    elif change == "flipped":
        path.write_bytes(content[:-9] + bytes([content[-9] ^ 1]) + content[-8:])
    else:
        path.unlink()
        if change == "pipe":
            os.mkfifo(path)
    found = {"deleted": "found no such file", "pipe": "found something else than a file"}
    with pytest.raises(UserError) as caught:
        read_items(run, 8, {"trained": {}})
    message = str(caught.value)
    assert message.startswith(f"{path}: expected ") and "\n" not in message
    assert found.get(change, "found XXH128") in message
    assert message.endswith(f"step 4 is whole: delete {folder} to use it")
    read_items(run, 8, {"optimizer": {}})  # what is not read may be damaged
    shutil.rmtree(folder)
    load(run)


def test_deleting_is_advised_only_where_it_helps(run: Path) -> None:
    for step in (4, 8):
        (run / "checkpoints" / str(step) / "meta" / "metadata").write_text("{}")
    with pytest.raises(UserError, match="no other step is whole: restore the files from a copy"):
        read_meta(run, 8)
    shutil.rmtree(run / "checkpoints" / "4")
    with pytest.raises(UserError, match="no other step is whole"):
        read_meta(run, 8)


@pytest.mark.parametrize(
    "part", ["checkpoints/8/trained", "frozen/arrays", "frozen", "checkpoints/8"]
)
def test_parts_of_another_run_with_the_same_shapes_are_refused(
    run: Path, tmp_path: Path, part: str
) -> None:
    other = write_run(tmp_path / "other", seed=1)
    shutil.rmtree(run / part)
    shutil.copytree(other / part, run / part)
    right = {
        "checkpoints/8/trained": "step 4 is whole",
        "frozen/arrays": "the steps in checkpoints/ are not concerned: restore",
        "frozen": "of another run; copy the run's whole folder",
        "checkpoints/8": "the frozen arrays are those of step 4",
    }
    with pytest.raises(UserError, match=right[part]):
        load(run)
    with pytest.raises(UserError, match="checks failed"):
        doctor.check_folder(run)


def test_the_list_of_digests_is_protected_too(run: Path) -> None:
    sums = run / "checkpoints" / "8" / digests.SUMS
    text = sums.read_text()
    for damaged in (text.replace("a", "b", 1), text[:-1], "", "\xff"):
        sums.write_text(damaged, encoding="latin-1")
        with pytest.raises(UserError, match=f"{digests.SUMS}: expected the digests of the files"):
            read_meta(run, 8)
    sums.unlink()
    writer = "in a checkpoint written by mllm_act 0.2 .git checkout abc.: .* that version reads it"
    for message in (f"found none, {writer}; step 4 is whole", "found none; step 4 is whole"):
        with pytest.raises(UserError, match=f"{digests.SUMS}: expected the digests .*{message}"):
            read_meta(run, 8)
        (run / "checkpoints" / "8" / digests.META).unlink(missing_ok=True)


def test_the_list_has_the_digests_of_xxh128sum(run: Path) -> None:
    folder = run / "checkpoints" / "8"
    # printf abc | xxh128sum
    (folder / "meta" / "abc").write_text("abc")
    digests.write(folder)
    assert "06b05ab6733a618578af5f94892f3950  meta/abc" in (folder / digests.SUMS).read_text()


def test_a_renamed_step_is_refused(run: Path) -> None:
    (run / "checkpoints" / "8").rename(run / "checkpoints" / "12")
    with pytest.raises(UserError, match="expected the checkpoint of step 12, found that of step 8"):
        load(run)


@pytest.mark.parametrize("text", ["\xff", "[" * 100_000, "", "[]", '{"a": NaN', "0" * 5000])
def test_a_document_that_is_no_json_object_is_one_line(run: Path, text: str) -> None:
    folder = run / "checkpoints" / "8"
    (folder / digests.META).write_text(text, encoding="latin-1")
    digests.write(folder)
    with pytest.raises(UserError, match="expected a JSON object, found") as caught:
        read_meta(run, 8)
    assert "\n" not in str(caught.value)


def test_the_doctor_lists_what_is_damaged_and_how_to_go_on(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["doctor", str(run)])
    doctor.main()
    assert capsys.readouterr().out.count("all files are as they were written") == 3
    (run / "checkpoints" / "12.orbax-checkpoint-tmp").mkdir()
    shutil.rmtree(run / "checkpoints" / "8" / "optimizer")
    next((run / "frozen").glob("arrays/manifest*")).unlink()
    with pytest.raises(UserError, match=r"\d+ checks failed; fixes are suggested above"):
        doctor.main()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" ")[0] for line in lines if "step 4 " in line[:20]] == ["ok"]
    fix = f"fix: rm -r {run}/checkpoints/8; step 4 is whole"
    assert any(line.startswith("fail  step 8") and line.endswith(fix) for line in lines)
    assert any(line.startswith("fail  frozen") and "restore the folder" in line for line in lines)
    assert any(line.startswith("note") and "interrupted save" in line for line in lines)


@pytest.mark.parametrize("content", [b"\xff", b"[]", b'{"init_timestamp_nsecs": "x"}'])
def test_files_that_nothing_reads_do_not_matter(run: Path, content: bytes) -> None:
    """Orbax's notes of times, and what else is in the folder."""
    folder = run / "checkpoints"
    (folder / "8" / "_CHECKPOINT_METADATA").write_bytes(content)
    (folder / "99").touch()
    (folder / "12.orbax-checkpoint-tmp").mkdir()
    load(run)
    with Checkpointer(run) as checkpoints:
        assert checkpoints.latest_step == 8
        checkpoints.save(12, {"trained": {"a": jnp.ones(2)}}, {})
    assert {path.name for path in folder.iterdir()} == {"8", "12", "99"}


def check_a_failing_save(workdir: Path, reason: str) -> None:
    """Saves larger and larger steps: the last good one is named and usable, and nothing is left of the failed one."""
    with pytest.raises(UserError) as caught, Checkpointer(workdir) as checkpoints:
        for step in range(1, 9):
            array = np.random.default_rng(step).normal(size=(step, 100_000)).astype(np.float32)
            checkpoints.save(step, {"trained": {"a": jnp.asarray(array)}}, {})
    workdir, step = checkpoint.find(workdir)
    assert str(caught.value) == (
        f"{workdir}/checkpoints/{step + 1}: expected to write a checkpoint, found {reason}; the last good step is "
        f"{step}; free space or allow writing there, then run the same command to continue"
    )
    like = reliability.shapes(workdir / "checkpoints" / str(step))
    assert read_items(workdir, step, like)["trained"]["a"].shape == (step, 100_000)
    names = {path.name for path in (workdir / "checkpoints").iterdir()}
    assert names == {str(step - 1), str(step)}


def test_a_save_that_fails_leaves_the_last_good_step(tmp_path: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_300_000, before[1]))
    try:
        check_a_failing_save(tmp_path, "File too large")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_leaves_the_last_good_step(tmp_path: Path) -> None:
    with small_disk(tmp_path, "5m"):
        check_a_failing_save(tmp_path / "run", "No space left on device")


def test_an_error_of_reading_or_writing_in_the_loop_names_the_last_good_step(
    tmp_path: Path,
) -> None:
    message = (
        r"/nowhere/shard: expected to read or write it, found No such file.*last good step is 3;"
    )
    with pytest.raises(UserError, match=message), Checkpointer(tmp_path) as checkpoints:
        checkpoints.save(3, {"trained": {"a": jnp.ones(2)}}, {})
        open("/nowhere/shard")
