"""Checkpoints: arrays and one JSON document per step, written in the background by Orbax. No pickle.

A checkpoint of step n has named items (trees of jax arrays, such as ``model`` and ``optimizer``, each restored by
itself with the requested shardings) and ``meta`` (JSON: everything else the program needs to continue and to act).
Orbax renames the folder of a step into place when it is complete, with the digests of its files, so that every step is
a whole one. Files that differ from their digests are never used.
"""

import json
import os
import platform
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from mllm_act import __version__, parameters
from mllm_act.checkpoints import digests
from mllm_act.checkpoints.paths import LiteralPath
from mllm_act.distributed.exchange import group
from mllm_act.errors import UserError
from mllm_act.provenance import LIBRARIES, git_commit, library_version

KEPT = 2  # how many of the newest steps stay on disk


class Checkpointer:
    """Saves and restores steps under ``workdir/checkpoints``, the newest two. Use as a context manager.

    A failed save, and an ``OSError`` in the block, leave it as a ``UserError`` that names the last good step.
    """

    def __init__(self, workdir: Path) -> None:
        """Opens the folder of a run, and creates it if it is missing."""
        self.workdir = workdir.resolve()
        self.directory = self.workdir / "checkpoints"
        self._saving: int | None = None
        with self._failures():
            self._manager = ocp.CheckpointManager(
                LiteralPath(self.directory),
                options=ocp.CheckpointManagerOptions(
                    max_to_keep=KEPT,
                    enable_async_checkpointing=True,
                    cleanup_tmp_directories=True,
                    lightweight_initialize=True,  # reads no files of earlier steps, which may be damaged
                    temporary_path_class=digests.DigestedPath,
                ),
            )

    @property
    def latest_step(self) -> int | None:
        """The newest whole step, or None."""
        return max(steps(self.workdir), default=None)

    def save(self, step: int, items: dict[str, Any], meta: dict[str, Any]) -> None:
        """Starts writing a step; returns once the arrays are copied to the host. Items may be empty.

        Raises:
          UserError: if the step before could not be written, or this one cannot be begun.
        """
        arrays = {name: ocp.args.StandardSave(tree) for name, tree in items.items() if tree}
        document = ocp.args.JsonSave({**meta, "step": step})
        self.wait()
        self._saving = step
        with self._failures():
            self._manager.save(step, args=ocp.args.Composite(**arrays, meta=document))

    def restore(self, step: int, like: dict[str, Any]) -> dict[str, Any]:
        """Reads items of a step, see ``read_items``; of several processes, the first verifies the files."""
        group.from_first("items", lambda: check_digests(self.workdir, step, like))
        return read_verified(self.workdir, step, like)

    def meta(self, step: int) -> dict[str, Any]:
        """Reads the JSON document of a step, see ``read_meta``."""
        return read_meta(self.workdir, step)

    def wait(self) -> None:
        """Blocks until all saved steps are on disk.

        Raises:
          UserError: if one could not be written.
        """
        with self._failures():
            self._manager.wait_until_finished()
        self._saving = None

    def close(self) -> None:
        """Waits for pending writes and releases the threads."""
        try:
            self.wait()
        finally:
            self._manager.close()

    @contextmanager
    def _failures(self) -> Iterator[None]:
        """Turns errors of Orbax into a UserError, and removes what the failed save has written."""
        try:
            yield
        except Exception as error:  # what it raises where it cannot write is not documented
            expect_others(error)
            step, self._saving = self._saving, None
            if step is not None:
                partial = f"{step}{ocp.path.atomicity.TMP_DIR_SUFFIX}"
                shutil.rmtree(self.directory / partial, ignore_errors=True)
            where = self.directory if step is None else self.directory / str(step)
            raise UserError(
                f"{where}: expected to write a checkpoint, found {reason(error)}; {self.last_good()}"
            ) from error

    def last_good(self) -> str:
        """Returns how to go on after the program could not write."""
        last = self.latest_step
        found = "there is no good step yet" if last is None else f"the last good step is {last}"
        return f"{found}; free space or allow writing there, then run the same command to continue"

    def __enter__(self) -> "Checkpointer":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
        if isinstance(error, OSError):
            where = error.filename or self.workdir
            raise UserError(
                f"{where}: expected to read or write it, found {reason(error)}; {self.last_good()}"
            ) from error


def steps(workdir: Path) -> list[int]:
    """Returns the steps of a run's checkpoints, in no order."""
    folder = workdir / "checkpoints"
    if not folder.is_dir():
        return []
    return [
        int(p.name)
        for p in folder.iterdir()
        if re.fullmatch("0|[1-9][0-9]*", p.name) and p.is_dir()
    ]


def read_meta(workdir: Path, step: int) -> dict[str, Any]:
    """Reads the JSON document of a step.

    Raises:
      UserError: if there is none, it is damaged, or it is of another step.
    """
    check_digests(workdir, step, ["meta"])
    folder = workdir / "checkpoints" / str(step)
    meta = digests.read_meta(folder)
    if meta.get("step", step) != step:
        raise UserError(
            f"{folder}: expected the checkpoint of step {step}, found that of step {meta['step']}; give the folder its "
            "own step's name"
        )
    return meta


@contextmanager
def parsing(meta: Mapping[str, Any], where: str) -> Iterator[None]:
    """Turns errors of a block that reads values from a JSON document into a UserError that names who wrote it."""
    try:
        yield
    except UserError as error:
        text = str(error)
        raise error if text.startswith(where) else UserError(f"{where}: {text}") from error
    except Exception as error:  # a key too few or too many, or a value of another type
        found = f"no {error}" if isinstance(error, KeyError) else reason(error)
        raise UserError(
            f"{where}: expected a checkpoint that mllm_act {__version__} can read, found another ({found}), written by "
            f"{digests.writer(meta)}; use that version, or train again"
        ) from error


def read_items(workdir: Path, step: int, like: dict[str, Any]) -> dict[str, Any]:
    """Reads items of a step with the shapes, dtypes and shardings of ``like``.

    Args:
      workdir: the run's folder.
      step: an existing step.
      like: the items to read; arrays or ``jax.ShapeDtypeStruct`` by path. Other items are not read.

    Raises:
      UserError: if a file is damaged, or the checkpoint's arrays, shapes or dtypes differ from ``like``; it names all
        differences.
    """
    check_digests(workdir, step, like)
    return read_verified(workdir, step, like)


def read_verified(workdir: Path, step: int, like: dict[str, Any]) -> dict[str, Any]:
    """Reads items of a step whose files have been verified, see ``read_items``."""
    folder = workdir / "checkpoints" / str(step)
    return {name: read_arrays(folder / name, tree) if tree else {} for name, tree in like.items()}


def check_digests(workdir: Path, step: int, items: Iterable[str]) -> None:
    """Raises UserError if files of a step differ from their digests; it names a step that is whole, if there is one."""
    folder = workdir / "checkpoints" / str(step)
    found = digests.problems(folder, list(items))
    if found:
        more = f" (and {len(found) - 1} more files)" if len(found) > 1 else ""
        raise UserError(f"{found[0]}{more}; {advice(workdir, step)}")


def advice(workdir: Path, step: int) -> str:
    """Returns what to do about a damaged step: go on from another one, where one is whole."""
    folder = workdir / "checkpoints"
    whole = [s for s in steps(workdir) if s != step and not digests.problems(folder / str(s))]
    if any(s < step for s in whole):
        good = max(s for s in whole if s < step)
        return f"step {good} is whole: delete {folder / str(step)} to use it"
    if whole:
        return f"step {max(whole)} is whole: use it"
    return "no other step is whole: restore the files from a copy of the run, or train again"


def read_arrays(folder: Path, like: Mapping[str, Any]) -> dict[str, jax.Array]:
    """Reads arrays from a folder written by Orbax, unverified, with the shapes, dtypes and shardings of ``like``.

    Raises:
      UserError: if they differ from ``like``, or cannot be read.
    """
    check_arrays(folder, like)
    abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, dict(like))
    try:
        with ocp.Checkpointer(ocp.StandardCheckpointHandler()) as reader:
            return reader.restore(LiteralPath(folder), args=ocp.args.StandardRestore(abstract))
    except Exception as error:  # what it raises is not documented
        expect_others(error)
        raise UserError(
            f"{folder}: expected arrays, found some that cannot be read ({reason(error)}); if there is enough memory, "
            "the checkpoint is damaged or from another version of Orbax"
        ) from error


def expect_others(error: Exception) -> None:
    """Raises an error of JAX again where another process may have caused it: it is not the user's."""
    if group.count > 1 and isinstance(error, jax.errors.JaxRuntimeError):
        raise error


def reason(error: BaseException) -> str:
    """Returns what an error says, on one line."""
    text = " ".join(str(error).split())
    code = re.search(r"os_error_code='(\d+)'", text)  # of TensorStore, at the end of a long message
    number = int(code[1]) if code else getattr(error, "errno", None)
    return os.strerror(number) if number else text[:300] or type(error).__name__


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
    except Exception as error:  # what it raises is not documented
        raise UserError(
            f"{folder}: expected arrays, found none that can be read ({reason(error)}); the checkpoint is incomplete"
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
        workdir = path.parent.parent
        if int(path.name) not in steps(workdir):
            known = ", ".join(map(str, sorted(steps(workdir)))) or "none"
            raise UserError(
                f"{path}: expected a step of the run, found none; its steps are: {known}"
            )
        return workdir, int(path.name)
    workdir = path.parent if path.name == "checkpoints" else path
    if not steps(workdir):
        raise UserError(
            f"{path}: expected a run's folder with checkpoints/<step>/ in it, found no whole checkpoint"
        )
    return workdir, max(steps(workdir))


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
