"""The parameters that a run does not train, written once for all its steps: ``WORKDIR/frozen``.

A step in ``WORKDIR/checkpoints`` contains what changes; a frozen base of gigabytes does not change. Both carry the same
mark, so that the frozen arrays of one run are never combined with a step of another.
"""

import secrets
from collections.abc import Mapping
from pathlib import Path

import jax
import orbax.checkpoint as ocp

from mllm_act.checkpoints import digests
from mllm_act.checkpoints.checkpoint import read_arrays, reason, steps
from mllm_act.checkpoints.paths import LiteralPath
from mllm_act.distributed.exchange import group
from mllm_act.errors import UserError


def save_frozen(workdir: Path, arrays: Mapping[str, jax.Array]) -> str:
    """Writes a run's frozen arrays (there may be none), replacing those of an earlier run.

    The folder is renamed into place when it is complete.

    Returns:
      The mark that the run's steps carry.

    Raises:
      UserError: if it cannot be written.
    """
    mark = group.from_first("mark", lambda: secrets.token_hex(8))
    items = {"arrays": ocp.args.StandardSave(dict(arrays))} if arrays else {}
    meta = ocp.args.JsonSave({"mark": mark})
    folder = _folder(workdir)
    try:
        with ocp.Checkpointer(
            ocp.CompositeCheckpointHandler(), temporary_path_class=digests.DigestedPath
        ) as checkpointer:
            checkpointer.save(
                LiteralPath(folder), args=ocp.args.Composite(**items, meta=meta), force=True
            )
    except Exception as error:  # what it raises where it cannot write is not documented
        raise UserError(
            f"{folder}: expected to write the frozen parameters, found {reason(error)}; free space or allow writing "
            "there, then run the same command"
        ) from error
    return mark


def load_frozen(
    workdir: Path, like: Mapping[str, jax.ShapeDtypeStruct], mark: str
) -> dict[str, jax.Array]:
    """Reads a run's frozen arrays with the shapes, dtypes and shardings of ``like``.

    Raises:
      UserError: if they are missing or damaged, belong to another run, or differ from ``like``.
    """
    group.from_first("frozen", lambda: check_frozen(workdir, mark))
    return read_frozen(workdir, like)


def read_frozen(workdir: Path, like: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
    """Reads a run's frozen arrays unverified; see ``load_frozen``."""
    folder = _folder(workdir) / "arrays"
    return read_arrays(folder, like) if like or folder.exists() else {}


def check_frozen(workdir: Path, mark: str) -> None:
    """Raises UserError if a run's frozen arrays are missing, damaged, or not those of the steps with this mark."""
    folder = _folder(workdir)
    if not (folder / "meta").exists():
        raise UserError(
            f"{folder}: expected the frozen parameters of the run, found none; copy the run's whole folder, "
            "checkpoints/ and frozen/ together"
        )
    found = digests.problems(folder)
    if found:
        more = f" (and {len(found) - 1} more files)" if len(found) > 1 else ""
        raise UserError(
            f"{found[0]}{more}; the steps in checkpoints/ are not concerned: restore {folder} from a copy of the run, "
            "or train again"
        )
    own = digests.read_meta(folder).get("mark")
    if own != mark:
        raise UserError(
            f"{folder}: expected the mark {mark!r} of the checkpoint beside it, found {own!r}, of another run; "
            + _side(workdir, own)
        )


def _side(workdir: Path, mark: object) -> str:
    """Returns what to do where a step and the frozen arrays have different marks."""
    own = [s for s in steps(workdir) if _mark(workdir, s) == mark]
    if own:
        return (
            f"the frozen arrays are those of step {max(own)}: move the steps of the other run away"
        )
    return "copy the run's whole folder, checkpoints/ and frozen/ together"


def _mark(workdir: Path, step: int) -> object:
    try:
        return digests.read_meta(workdir / "checkpoints" / str(step)).get("frozen")
    except UserError:
        return None


def _folder(workdir: Path) -> Path:
    return workdir.resolve() / "frozen"
