"""Checkpoints: arrays and one JSON document per step, written in the background by Orbax. No pickle.

A checkpoint of step n has named items (trees of jax arrays, such as ``model`` and ``optimizer``, each restored by
itself with the requested shardings) and ``meta`` (JSON: everything else the program needs to continue and to act).
Orbax renames the folder of a step into place when it is complete, so that after a kill the newest step is a whole one.
"""

import json
import os
import platform
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from mllm_act import __version__, parameters
from mllm_act.checkpoints.paths import LiteralPath
from mllm_act.errors import UserError
from mllm_act.provenance import LIBRARIES, git_commit, library_version

KEPT = 2  # how many of the newest steps stay on disk


class Checkpointer:
    """Saves and restores steps under ``workdir/checkpoints``, the newest two. Use as a context manager."""

    def __init__(self, workdir: Path) -> None:
        """Opens the folder of a run, and creates it if it is missing."""
        self.directory = (workdir / "checkpoints").resolve()
        self._manager = ocp.CheckpointManager(
            LiteralPath(self.directory),
            options=ocp.CheckpointManagerOptions(max_to_keep=KEPT, enable_async_checkpointing=True),
        )

    @property
    def latest_step(self) -> int | None:
        """The newest whole step, or None."""
        return self._manager.latest_step()

    def save(self, step: int, items: dict[str, Any], meta: dict[str, Any]) -> None:
        """Starts writing a step; returns once the arrays are copied to the host. Items may be empty."""
        arrays = {name: ocp.args.StandardSave(tree) for name, tree in items.items() if tree}
        self._manager.save(step, args=ocp.args.Composite(**arrays, meta=ocp.args.JsonSave(meta)))

    def restore(self, step: int, like: dict[str, Any]) -> dict[str, Any]:
        """Reads items of a step with the shapes, dtypes and shardings of ``like``.

        Args:
          step: an existing step.
          like: the items to read; trees of arrays or ``jax.ShapeDtypeStruct``. Other items are not read.

        Raises:
          UserError: if the checkpoint's tree, shapes or dtypes differ from ``like``; it names all differences.
        """
        for name, arrays in like.items():
            if arrays:
                check_arrays(self.directory / str(step) / name, arrays)
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        wanted = {name: ocp.args.StandardRestore(tree) for name, tree in abstract.items() if tree}
        try:
            restored = self._manager.restore(step, args=ocp.args.Composite(**wanted))
        except (ValueError, KeyError, FileNotFoundError) as error:
            raise UserError(
                f"{self.directory}/{step}: expected a complete checkpoint, found one that cannot be read "
                f"({str(error).splitlines()[0][:300]}); delete that folder to use the previous step"
            ) from error
        return {name: restored[name] if like[name] else {} for name in like}

    def meta(self, step: int) -> dict[str, Any]:
        """Reads the JSON document of a step.

        Raises:
          UserError: if there is none.
        """
        try:
            wanted = ocp.args.Composite(meta=ocp.args.JsonRestore())
            return self._manager.restore(step, args=wanted)["meta"]
        except (KeyError, FileNotFoundError, ValueError) as error:
            raise UserError(
                f"{self.directory}/{step}: expected the item 'meta' in it, found none that can be read "
                f"({str(error).splitlines()[0][:200]}); delete that folder to use the previous step"
            ) from error

    def wait(self) -> None:
        """Blocks until all saved steps are on disk."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits for pending writes and releases the threads."""
        self._manager.wait_until_finished()
        self._manager.close()

    def __enter__(self) -> "Checkpointer":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def check_arrays(folder: os.PathLike, like: Mapping[str, Any]) -> None:
    """Compares the arrays in a folder written by Orbax with those expected, without reading them.

    Args:
      folder: of one item.
      like: the expected arrays or ``jax.ShapeDtypeStruct`` by path.

    Raises:
      UserError: naming every array that is missing, unexpected, or of another shape or dtype.
    """
    try:
        tree = ocp.StandardCheckpointHandler().metadata(LiteralPath(folder)).tree
    except (FileNotFoundError, ValueError) as error:
        raise UserError(
            f"{folder}: expected arrays, found none that can be read; the checkpoint is incomplete: delete the step to "
            "use the previous one"
        ) from error
    found = {name: _kind(leaf) for name, leaf in parameters.flatten(tree).items()}
    wanted = {name: _kind(leaf) for name, leaf in like.items()}
    wrong = [
        f"{name} (expected {wanted.get(name, 'none')}, found {found.get(name, 'none')})"
        for name in sorted(found.keys() | wanted.keys())
        if found.get(name) != wanted.get(name)
    ]
    if wrong:
        raise UserError(
            f"{folder}: expected the arrays of this network, found {len(wrong)} that differ: {', '.join(wrong)}; "
            "the checkpoint has another architecture or vocabulary: use the config it was trained with, or another "
            "--workdir"
        )


def _kind(leaf: Any) -> str:
    return f"{np.dtype(leaf.dtype).name}{list(leaf.shape)}"


def find(path: Path) -> tuple[Path, int]:
    """Finds a checkpoint from a run's folder, its ``checkpoints`` folder, or one step's folder.

    Returns:
      The run's folder (the parent of ``checkpoints``) and the step (the newest unless ``path`` names one).

    Raises:
      UserError: if there is no whole checkpoint.
    """
    path = path.resolve()
    if path.name.isdigit() and path.parent.name == "checkpoints":
        if not (path / "_CHECKPOINT_METADATA").exists():
            raise UserError(
                f"{path}: expected a whole checkpoint, found none; name another step or the run's folder"
            )
        return path.parent.parent, int(path.name)
    workdir = path.parent if path.name == "checkpoints" else path
    folder = workdir / "checkpoints"
    steps = [
        int(p.parent.name) for p in folder.glob("*/_CHECKPOINT_METADATA") if p.parent.name.isdigit()
    ]
    if not steps:
        raise UserError(
            f"{path}: expected a run's folder with checkpoints/<step>/ in it, found no whole checkpoint"
        )
    return workdir, max(steps)


def provenance() -> dict[str, Any]:
    """Returns what made a checkpoint: versions, the git commit (None if unknown) and the kind of device."""
    return {
        "mllm_act": __version__,
        "python": platform.python_version(),
        "libraries": {name: library_version(name) for name in LIBRARIES},
        "git_commit": git_commit(),
        "devices": str(jax.devices()[0].device_kind),
    }


def canonical(meta: Any) -> Any:
    """Returns ``meta`` as it would come back from JSON (tuples become lists), to compare it with a restored one."""
    return json.loads(json.dumps(meta))
