"""Errors for users: one line that names the key, what was expected, what was found and how to fix it."""

import difflib
import sys
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path

from absl import logging


class UserError(Exception):
    """An error that the user can fix. The message is one complete line; programs print it and exit with status 1."""


def expect_new(out: Path) -> None:
    """Raises UserError if the folder that a program is about to create exists."""
    if out.exists():
        raise UserError(
            f"--out={out}: expected a folder that does not exist yet, found one; remove it or name another"
        )


def nearest(name: str, known: Iterable[str]) -> str:
    """Returns a hint such as ``"did you mean 'reach-v3'?"``, or the known names if none is close."""
    known = sorted(known)
    match = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    if match:
        return f"did you mean {match[0]!r}?"
    shown = ", ".join(known[:8]) + (", ..." if len(known) > 8 else "")
    return f"known: {shown}"


def run(program: Callable[[], None]) -> None:
    """Runs a program's main. A ``UserError`` ends it with one line on stderr and exit status 1."""
    logging.set_verbosity(logging.WARNING)  # Orbax and JAX log every step at the level below
    # JAX warns about every fork. The children started here (git, ffmpeg) call exec at once, which is safe.
    warnings.filterwarnings("ignore", message=r"os\.fork\(\) was called", category=RuntimeWarning)
    try:
        program()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
