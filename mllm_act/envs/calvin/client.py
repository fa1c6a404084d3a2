"""Starts CALVIN's simulator in its own process and asks it; see ``server``."""

import os
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mllm_act.envs.calvin import server
from mllm_act.errors import UserError

CHECKOUT = "CALVIN_ENV"  # environment variables
PYTHON = "CALVIN_PYTHON"
FIX = (
    "git clone --recurse-submodules https://github.com/mees/calvin, then "
    f"export {CHECKOUT}=$PWD/calvin/calvin_env (its submodule, github.com/mees/calvin_env)"
)
ROOT = Path(__file__).parents[3]


def checkout() -> Path:
    """Returns the user's checkout of calvin_env. Raises UserError if there is none, or its history is missing."""
    named = os.environ.get(CHECKOUT, "")
    if not named:
        raise UserError(f"{CHECKOUT}: expected a checkout of CALVIN's simulator, not set; {FIX}")
    folder = Path(named).expanduser().absolute()
    for part in ("conf/config_data_collection.yaml", "data/calvin_table_D", "calvin_env", ".git"):
        if not (folder / part).exists():
            raise UserError(
                f"{CHECKOUT}={named}: expected a checkout of CALVIN's simulator, found no {part} in it; {FIX}"
            )
    return folder


def interpreter() -> Path:
    """Returns the Python that has the simulator's packages. Raises UserError if there is none."""
    named = os.environ.get(PYTHON, "")
    python = Path(named).expanduser().absolute() if named else ROOT / ".venv-calvin/bin/python"
    if not python.exists():
        raise UserError(
            f"{PYTHON}: expected a Python with the packages of requirements/calvin.txt, found no {python}; "
            "run `make calvin`, or name another"
        )
    return python


class Client:
    """One simulator in its own process, which ends with this one."""

    def __init__(self, cameras: Sequence[str]) -> None:
        """Starts it; observations have these cameras.

        Raises:
          UserError: the checkout or the interpreter is missing.
        """
        folder = checkout()
        command = [str(interpreter()), "-I", server.__file__, str(folder), ",".join(cameras)]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )

    def ask(self, method: str, where: str, **arguments: Any) -> dict[str, Any]:
        """Returns the answer of a method of ``server.Simulator``.

        Raises:
          UserError: it failed or died; ``where`` begins the error.
        """
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            server.send(self._process.stdin, {"method": method, **arguments})
            answer = server.receive(self._process.stdout)
        except (OSError, EOFError):
            status = self._process.wait()
            raise UserError(
                f"{where}: expected an answer of CALVIN's simulator to {method}, found that it ended with status "
                f"{status}; run `python -m mllm_act.doctor`"
            ) from None
        if "error" in answer:
            raise UserError(
                f"{where}: CALVIN's simulator expected to {method}, found {answer['error']}; "
                "run `python -m mllm_act.doctor`"
            )
        return answer

    def close(self) -> None:
        """Ends the process."""
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                stream.close()
