"""Histories on disk, so that a session goes on after the server was killed and started again.

One ``.npz`` file for each session, replaced after every answer and before it is sent; no pickle. Old ones are deleted.
"""

import dataclasses
import re
import time
import zipfile
from pathlib import Path

import numpy as np

from mllm_act.errors import UserError
from mllm_act.files import whole_file

KEPT = 3600.0  # seconds that a history is kept after its last observation
EVERY = 1000  # files written between two looks for old ones


@dataclasses.dataclass(frozen=True)
class Saved:
    """A history: what ``Slots.save`` returned, and what the server knows of the session."""

    arrays: list[np.ndarray]
    steps: int
    instruction: str
    actions: np.ndarray  # the last answer's


class Store:
    """The histories in a folder."""

    def __init__(self, folder: Path, policy: str) -> None:
        """Makes the folder if it is missing, and deletes old histories.

        Args:
          folder: of this server alone.
          policy: identifies the policy; histories of another are ignored.

        Raises:
          UserError: it cannot be written to.
        """
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"--save-sessions={folder}: expected a folder, found {error}") from None
        self._folder, self._policy, self._written = folder, policy, 0
        self._tidy()

    def write(self, identity: str, saved: Saved) -> None:
        """Saves a session's history."""
        self._written += 1
        if self._written % EVERY == 0:
            self._tidy()
        arrays = {f"array_{i}": array for i, array in enumerate(saved.arrays)}
        try:
            with whole_file(self._folder / f"{identity}.npz") as partial:
                np.savez(
                    partial, allow_pickle=False, policy=self._policy, steps=saved.steps, instruction=saved.instruction,
                    actions=saved.actions, **arrays,
                )  # fmt: skip
        except OSError as error:
            print(f"notice: {self._folder}: {error}; a session's history is not saved")

    def read(self, identity: str) -> Saved | None:
        """Returns a session's history, or None if there is none of this policy."""
        if not re.fullmatch(r"[0-9a-f]{32}", identity):
            return None
        try:
            with np.load(self._folder / f"{identity}.npz", allow_pickle=False) as file:
                if str(file["policy"]) != self._policy:
                    return None
                count = sum(name.startswith("array_") for name in file.files)
                arrays = [file[f"array_{i}"] for i in range(count)]
                return Saved(arrays, int(file["steps"]), str(file["instruction"]), file["actions"])
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
            return None

    def _tidy(self) -> None:
        for path in self._folder.glob("*.npz"):
            try:
                if path.stat().st_mtime < time.time() - KEPT:
                    path.unlink()
            except OSError:  # another server's hand
                pass
