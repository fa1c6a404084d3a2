"""Digests of a checkpoint's files: written with them, verified before they are used.

``FOLDER/XXH128SUMS`` has the digests of all files in the folders of ``FOLDER``, the items of a checkpoint, in the
format of ``xxh128sum``, so that ``xxh128sum -c XXH128SUMS`` checks them too. Its first line is the digest of the other
lines: it tells a damaged list from a damaged file. A checkpoint without the list is refused.

XXH3 with 128 bits takes a tenth of SHA-256's time. It is no protection from somebody who forges a file: who can write
the files can write the list, too.
"""

import asyncio
import os
import re
import stat
from collections.abc import Callable, Collection, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import orbax.checkpoint as ocp
import xxhash

from mllm_act.errors import UserError
from mllm_act.files import read_json

META = "meta/metadata"  # where Orbax writes the JSON document
LARGEST_META = (
    200_000_000  # bytes; a text tokenizer of 256,000 tokens has 35,000,000, and each robot a copy
)
SUMS = "XXH128SUMS"
EXPECTED = "expected the digests of the files beside it, as they were written"

Result = TypeVar("Result")


class DigestedPath(ocp.path.atomicity.AtomicRenameTemporaryPath):
    """The folder of a checkpoint while Orbax writes it; gets its digests before it is renamed into place."""

    async def finalize(self) -> None:
        """Writes the digests, then renames the folder."""
        # Orbax uses this class for each item too, inside the unfinished folder of the checkpoint.
        if ocp.path.atomicity.TMP_DIR_SUFFIX not in self._final_path.parent.name:
            await asyncio.to_thread(write, Path(self.get()))
        await super().finalize()


def write(folder: Path) -> None:
    """Writes the digests of all files in the folders of ``folder``."""
    names = sorted(_files(folder))
    digests = _in_threads(_digest, [folder / name for name in names])
    lines = "".join(f"{digest}  {name}\n" for digest, name in zip(digests, names, strict=True))
    (folder / SUMS).write_text(f"# {_of_text(lines)}\n{lines}", encoding="utf-8")


def problems(folder: Path, items: Collection[str] | None = None) -> list[str]:
    """Compares the files of a checkpoint with their digests.

    Args:
      folder: of a step, or of frozen arrays.
      items: the folders in it to look at; by default all.

    Returns:
      ``PATH: expected ..., found ...`` for each file that has changed, is missing or was added. If the digests are
      missing or have changed, only this.
    """
    path = folder / SUMS
    try:
        first, _, lines = path.read_text(encoding="utf-8").partition("\n")
        if first != f"# {_of_text(lines)}":
            raise ValueError("a list that has changed")
        pairs = (line.split("  ", 1) for line in lines.splitlines())
        expected = {name: digest for digest, name in pairs}
        if any(".." in Path(name).parts or Path(name).is_absolute() for name in expected):
            raise ValueError("paths outside of the folder")
    except FileNotFoundError:
        return [f"{path}: {EXPECTED}, found none{_writer(folder)}"]
    except (OSError, ValueError) as error:
        return [f"{path}: {EXPECTED}, found {error}"]
    names = sorted(
        name
        for name in _files(folder) | expected.keys()
        if items is None or name.partition("/")[0] in items
    )
    found = _in_threads(_digest_or_error, [folder / name for name in names])
    return [
        f"{folder / name}: expected {_shown(expected.get(name))}, found {_shown(digest)}"
        for name, digest in zip(names, found, strict=True)
        if digest != expected.get(name)
    ]


def while_checking(check: Callable[[], None], work: Callable[[], Result]) -> Result:
    """Returns what ``work`` returns, while ``check`` runs in another thread; an error of ``check`` comes first."""
    with ThreadPoolExecutor(1) as pool:
        checked = pool.submit(check)
        try:
            return work()
        finally:
            checked.result()


def read_meta(folder: Path) -> dict[str, Any]:
    """Reads the JSON document of a checkpoint, unverified.

    Raises:
      UserError: if there is none, or it cannot be read.
    """
    try:
        return read_json(folder / META, "it is damaged", LARGEST_META)
    except FileNotFoundError:
        raise UserError(f"{folder / META}: expected a JSON document, found none") from None


def writer(meta: Mapping[str, Any]) -> str:
    """Returns the version of mllm_act that wrote a checkpoint, with the git commit if it is known."""
    made_by = meta.get("provenance")
    made_by = made_by if isinstance(made_by, dict) else {}
    commit = made_by.get("git_commit")
    at = f" (git checkout {commit})" if commit else ""
    return f"mllm_act {made_by.get('mllm_act', '0.1.0')}{at}"


def _writer(folder: Path) -> str:
    try:
        meta = read_meta(folder)
    except UserError:
        return ""
    if "provenance" not in meta:
        return ""
    return f", in a checkpoint written by {writer(meta)}: if no list was deleted, that version reads it"


def _files(folder: Path) -> set[str]:
    """Returns the paths of all files in the folders of ``folder``, relative to it."""
    return {
        (Path(parent) / name).relative_to(folder).as_posix()
        for parent, _, names in os.walk(folder)
        for name in names
        if Path(parent) != folder
    }


def _in_threads(function: Callable[[Path], str], paths: Iterable[Path]) -> list[str]:
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # hashing releases Python's lock
        return list(pool.map(function, paths))


def _digest(path: Path) -> str:
    # A megabyte at a time: the 256 KiB of hashlib.file_digest take a quarter longer.
    digest, part = xxhash.xxh3_128(), memoryview(bytearray(1 << 20))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(part):
            digest.update(part[:count])
    return digest.hexdigest()


def _digest_or_error(path: Path) -> str:
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # opening a pipe would wait for ever
            return "something else than a file"
        return _digest(path)
    except FileNotFoundError:
        return "no such file"
    except OSError as error:
        return str(error)


def _shown(found: str | None) -> str:
    if found is None:
        return "no such file"
    return f"XXH128 {found[:12]}..." if re.fullmatch("[0-9a-f]{32}", found) else found


def _of_text(text: str) -> str:
    return xxhash.xxh3_128_hexdigest(text.encode())
