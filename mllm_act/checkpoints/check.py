"""Checks the checkpoints of a run: every file against its digest, and whether the parts belong together."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import orbax.checkpoint as ocp

from mllm_act.checkpoints import digests
from mllm_act.checkpoints.checkpoint import find, read_meta, steps
from mllm_act.errors import UserError

SHOWN = 10  # problems of one part that are listed


class Row(NamedTuple):
    """One line of the result: ``status`` is ok, note or fail; ``fix`` may be empty."""

    status: str
    name: str
    text: str
    fix: str = ""


def check_run(path: Path) -> list[Row]:
    """Looks at all steps of a run, of a policy or a tokenizer, and at its frozen arrays.

    Raises:
      UserError: if there is no run with a step in this folder.
    """
    workdir, _ = find(path)
    problems = {step: _of_step(workdir, step) for step in sorted(steps(workdir))}
    good = [step for step, found in problems.items() if not found]
    rows: list[Row] = []
    for step, found in problems.items():
        others = [s for s in good if s != step]
        fix = "restore it from a copy of the run, or train again"
        if others:
            older = [s for s in others if s < step]
            best = max(older or others)
            fix = f"rm -r {workdir}/checkpoints/{step}; step {best} is whole"
        rows += _rows(workdir / "checkpoints" / str(step), f"step {step}", found, fix)
    rows += _of_frozen(workdir, good)
    rows += [
        Row("note", left.name, f"{left} was left by an interrupted save", f"rm -r {left}")
        for folder in (workdir, workdir / "checkpoints")
        for left in sorted(folder.glob(f"*{ocp.path.atomicity.TMP_DIR_SUFFIX}*"))
    ]
    return rows


def _of_step(workdir: Path, step: int) -> list[str]:
    found = digests.problems(workdir / "checkpoints" / str(step))
    if found:
        return found
    try:
        read_meta(workdir, step)
    except UserError as error:
        return [str(error)]
    return []


def _of_frozen(workdir: Path, good: Sequence[int]) -> Iterator[Row]:
    """Yields rows of the frozen arrays, and of whole steps that belong to others."""
    folder = workdir / "frozen"
    marks = {step: read_meta(workdir, step).get("frozen") for step in good}
    if not folder.exists() and not any(marks.values()):
        return  # a tokenizer's run
    found = digests.problems(folder)
    fix = "restore the folder from a copy of the run, or train again; the steps need it"
    yield from _rows(folder, "frozen", found, fix)
    if found:
        return
    own = digests.read_meta(folder).get("mark")
    foreign = [step for step, mark in marks.items() if mark != own]
    for step in foreign:
        text = f"{folder}: expected the mark {marks[step]!r} of step {step}, found {own!r}, of another run"
        alone = len(foreign) == len(marks)
        yield Row("fail", "frozen", text, fix if alone else f"rm -r {workdir}/checkpoints/{step}")


def _rows(folder: Path, name: str, problems: Sequence[str], fix: str) -> Iterator[Row]:
    for problem in problems[:SHOWN]:
        yield Row("fail", name, problem, fix)
    if len(problems) > SHOWN:
        yield Row("fail", name, f"{len(problems) - SHOWN} more files of {folder} differ", fix)
    if not problems:
        yield Row("ok", name, f"{folder}: all files are as they were written")
