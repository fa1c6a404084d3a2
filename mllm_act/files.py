"""Files that appear whole or not at all: written beside their place, then renamed into it.

A process that is killed leaves a ``.partial-*`` file or folder behind, and never half a file under the real name. What
is published has the permissions of the umask, so that other users of a shared folder can read it.
"""

import contextlib
import csv
import json
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mllm_act.errors import UserError


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yields a path to write to; it becomes ``path``, replacing what is there, if the block ends without an error."""
    partial = _partial(path)
    try:
        yield partial
        os.replace(partial, path)
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


def write_json(path: Path, value: Any) -> None:
    """Writes plain JSON types, indented, whole or not at all."""
    with whole_file(path) as partial:
        partial.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Writes rows that have the same keys under a header of these, whole or not at all."""
    with whole_file(path) as partial, partial.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def user_path(text: str, flag: str = "") -> Path:
    """Returns a user's path with its leading ``~`` or ``~user`` expanded; argparse takes it as a ``type``.

    Raises:
      UserError: if there is no such user; it names the flag where it is given.
    """
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
