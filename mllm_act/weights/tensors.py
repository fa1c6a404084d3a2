"""Tensors that stay in their file until they are read, and the sources they come from."""

import contextlib
import dataclasses
import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from mllm_act.errors import UserError


@dataclasses.dataclass(frozen=True)
class Tensor:
    """One tensor of a file. ``read`` reads it from the file on every call; nothing is cached."""

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray]

    @property
    def bytes(self) -> int:
        """The host memory that the tensor takes once read."""
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize


@dataclasses.dataclass(frozen=True)
class Source:
    """The contents of a folder or file of pretrained weights, in Hugging Face's terms.

    Attributes:
      origin: the folder, file or hub id, for messages.
      tensors: by Hugging Face's name, whatever the file calls them.
      config: as in ``config.json``; a file format that stores less has fewer keys.
      text_tokenizer: the text of a ``tokenizer.json``, or None if there is none.
      revision: the version: the hub's commit or the file's SHA-256; None for a folder.
      text_files: the language model's other text files by name; see ``text_files.NAMES``.
    """

    origin: str
    tensors: dict[str, Tensor]
    config: dict[str, Any]
    text_tokenizer: str | None
    revision: str | None
    text_files: dict[str, str] = dataclasses.field(default_factory=dict)


@contextlib.contextmanager
def parsing(path: Path, kind: str) -> Iterator[None]:
    """Turns any error of a parser into a ``UserError``: what it raises on a damaged file is not documented."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(
            f"{path}: expected {kind}, found one that cannot be read ({reason}); download it again"
        ) from error


def sha256(path: Path) -> str:
    """Returns the SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def not_installed(package: str, user: str) -> UserError:
    """Returns the error for a missing package of the extra ``pretrained``; ``user`` is the file that needs it."""
    return UserError(
        f"{user}: expected the package {package}, found it not installed; pip install 'mllm-act[pretrained]'"
    )
