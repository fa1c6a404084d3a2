"""The parameters that a run does not train, written once for all its steps: ``WORKDIR/frozen``.

A step in ``WORKDIR/checkpoints`` contains what changes; a frozen base of gigabytes does not change. Both carry the same
mark, so that the frozen arrays of one run are never combined with a step of another.
"""

import secrets
from collections.abc import Mapping
from pathlib import Path

import jax
import orbax.checkpoint as ocp

from mllm_act.checkpoints.checkpoint import check_arrays
from mllm_act.checkpoints.paths import LiteralPath
from mllm_act.errors import UserError


def save_frozen(workdir: Path, arrays: Mapping[str, jax.Array]) -> str:
    """Writes a run's frozen arrays (there may be none), replacing those of an earlier run.

    The folder is renamed into place when it is complete.

    Returns:
      The mark that the run's steps carry.
    """
    mark = secrets.token_hex(8)
    items = {"arrays": ocp.args.StandardSave(dict(arrays))} if arrays else {}
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
        checkpointer.save(
            _folder(workdir),
            args=ocp.args.Composite(**items, meta=ocp.args.JsonSave({"mark": mark})),
            force=True,
        )
    return mark


def load_frozen(
    workdir: Path, like: Mapping[str, jax.ShapeDtypeStruct], mark: str
) -> dict[str, jax.Array]:
    """Reads a run's frozen arrays with the shapes, dtypes and shardings of ``like``.

    Raises:
      UserError: if they are missing, belong to another run, or differ from ``like``.
    """
    folder = _folder(workdir)
    fix = "copy the run's whole folder, checkpoints/ and frozen/ together"
    if not (folder / "meta").exists():
        raise UserError(f"{folder}: expected the frozen parameters of the run, found none; {fix}")
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
        wanted = ocp.args.Composite(meta=ocp.args.JsonRestore())
        own = checkpointer.restore(folder, args=wanted)["meta"]["mark"]
        if own != mark:
            raise UserError(
                f"{folder}: expected the mark {mark!r} of the checkpoint beside it, found {own!r}, of another run; "
                + fix
            )
        if not like and not (folder / "arrays").exists():
            return {}
        check_arrays(folder / "arrays", like)
        arrays = ocp.args.Composite(arrays=ocp.args.StandardRestore(dict(like)))
        return checkpointer.restore(folder, args=arrays)["arrays"]


def _folder(workdir: Path) -> LiteralPath:
    return LiteralPath(workdir.resolve() / "frozen")
