"""Files that appear whole or not at all: written beside their place, then renamed into it; and locked folders.

A process that is killed leaves a ``.partial-*`` file or folder behind, and never half a file under the real name. What
is published has the permissions of the umask, so that other users of a shared folder can read it.
"""

import contextlib
import csv
import errno
import json
import os
import re
import secrets
import shlex
import shutil
import socket
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from mllm_act.errors import UserError

LOCK = ".lock"  # in a locked folder: names the program that holds it
_NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)
_LARGEST_JSON = 16_000_000  # bytes; parsed, they take at most half a gigabyte


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yields a path to write to; it becomes ``path``, replacing what is there, if the block ends without an error."""
    partial = _partial(path)
    try:
        yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


@contextlib.contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """Yields an empty folder to fill; it becomes ``path``, which must not exist, if the block ends without an error."""
    partial = _partial(path)
    partial.mkdir(parents=True)
    try:
        yield partial
        partial.rename(path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextlib.contextmanager
def locked(folder: Path, flag: str) -> Iterator[None]:
    """Keeps other programs out of the folder that this one writes to; both must ask.

    The folder is created if it is missing, and removed again if the block leaves it empty. The lock is the kernel's, on
    the file ``.lock``, also over NFS: it ends with its process, however that ends, and child processes do not inherit
    it.

    Args:
      folder: to hold while the block runs.
      flag: of the command line that named it, for errors.

    Raises:
      UserError: another process holds the folder, and nothing was changed; or it cannot be written to.
    """
    path = folder / LOCK
    created = [parent for parent in (folder, *folder.parents) if not parent.exists()]
    # Waits for a holder that is just ending. The soft lock of filelock would survive its process.
    lock = FileLock(path, timeout=1, on_acquired=_sign, fallback_to_soft=False)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout:
        holder = "another process"
        with contextlib.suppress(OSError):
            holder = path.read_text(errors="replace").strip()
        raise UserError(
            f"{flag}={folder}: expected a folder that no other program writes to, found one held by {holder}; wait for "
            f"it, end it, or choose another {flag}"
        ) from None
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise UserError(
                f"{flag}={folder}: expected a folder that can be written to, found {error}; choose another {flag}"
            ) from error
        print(
            f"notice: {folder}: this file system has no locks; start no other program in this folder"
        )
    try:
        yield
    finally:
        if lock.is_locked:
            with contextlib.suppress(OSError):
                path.unlink()  # before the release: after it, the file may be another program's
            lock.release()
        for parent in created:
            with contextlib.suppress(OSError):  # it is not empty
                parent.rmdir()


def _sign(descriptor: int) -> None:
    command = " ".join(shlex.join(sys.orig_argv).split())
    command = command if len(command) <= 300 else command[:297] + "..."
    os.ftruncate(descriptor, 0)
    os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}: {command}".encode())


def write_json(path: Path, value: Any) -> None:
    """Writes plain JSON types, indented, whole or not at all."""
    with whole_file(path) as partial:
        partial.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


def read_json(path: Path, fix: str, largest: int = _LARGEST_JSON) -> dict[str, Any]:
    """Returns the object of a JSON file that may be damaged or a stranger's.

    Raises:
      FileNotFoundError: there is no such file.
      UserError: it cannot be read, is larger than ``largest`` bytes or is not a JSON object; the message ends with
        ``fix``.
    """
    try:
        if path.exists() and not path.is_file():  # opening a pipe would wait for ever
            raise ValueError("something else than a file")
        with path.open("rb") as file:
            content = file.read(largest + 1)
        if len(content) > largest:
            raise ValueError(f"more than {largest:,} bytes")
        value = json.loads(content.decode("utf-8"))
        if not isinstance(value, dict):
            raise ValueError(f"a JSON {type(value).__name__}")
        return value
    except FileNotFoundError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: expected a JSON object, found {error}; {fix}") from None


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Writes rows that have the same keys under a header of these, whole or not at all."""
    with whole_file(path) as partial, partial.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def user_path(text: str, flag: str = "") -> Path:
    """Returns a user's path with its leading ``~`` or ``~user`` expanded; argparse takes it as a ``type``.

    Raises:
      UserError: if it is empty, a URL, or there is no such user; it names the flag where it is given.
    """
    if not text or re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", text):
        where = f"{flag}={text}: " if flag else ""
        raise UserError(
            f"{where}expected a path of this machine's file system, found {text or 'an empty one'}; name a folder or "
            "file, and mount a bucket first"
        )
    try:
        return Path(text).expanduser()
    except RuntimeError as error:
        raise UserError(
            f"{flag}{'=' if flag else ''}{text}: expected the home directory of a user after ~, found none ({error}); "
            "give the path in full"
        ) from error


def _partial(path: Path) -> Path:
    # Unique across hosts that share a folder. The suffix is kept: writers choose the format by it.
    return path.with_name(f".partial-{secrets.token_hex(4)}-{path.name}")
