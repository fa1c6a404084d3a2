"""Errors for users: one line that names the key, what was expected, what was found and how to fix it."""

import difflib
import os
import sys
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path

from absl import logging

TRUE = {"1", "on", "t", "true", "y", "yes"}  # what JAX takes for true in an environment variable


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
    """Runs a program's main. A ``UserError`` ends it with one line on stderr and exit status 1.

    JAX's 64-bit types are refused: parameters and checkpoints are float32.
    """
    logging.set_verbosity(logging.WARNING)  # Orbax and JAX log every step at the level below
    # JAX warns about every fork. The children started here (git, ffmpeg) call exec at once, which is safe.
    warnings.filterwarnings("ignore", message=r"os\.fork\(\) was called", category=RuntimeWarning)
    try:
        if os.environ.get("JAX_ENABLE_X64", "").lower() in TRUE:
            raise UserError(
                f"JAX_ENABLE_X64={os.environ['JAX_ENABLE_X64']}: expected JAX's 32-bit types, found 64-bit types "
                "turned on in the environment; unset it"
            )
        program()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)  # 128 + SIGINT, as shells report it
