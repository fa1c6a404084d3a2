"""A worker process that answers requests over a pipe, one at a time, with a function given by its import path.

Why not ``multiprocessing.Process``: spawn imports the program's main module in every child (JAX and TensorFlow, which
cost seconds and hundreds of MB and which a simulator does not need), fork is unsafe once JAX has started threads, and
the workers of a pool outlive a parent that is killed. Here a child is ``python -m mllm_act.envs.processes``, and it
exits when its pipe is closed.
"""

import importlib
import multiprocessing
import os
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

from mllm_act.errors import UserError

# One thread per process: the workers occupy all cores, so threads of libraries would only compete with them.
ONE_THREAD = dict.fromkeys(
    ("LP_NUM_THREADS", "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1"
)


class Worker:
    """A child process that calls ``handler = factory(**arguments)`` and then answers each `send` with
    ``handler(request)``.

    Arguments, requests and replies are pickled. ``connection`` can be passed to ``multiprocessing.connection.wait``.
    """

    def __init__(self, factory: str, **arguments: Any) -> None:
        """Starts the process without waiting for it; `receive` raises the errors of the factory.

        Args:
          factory: import path, ``'package.module:function'``.
          **arguments: of the factory.
        """
        self.connection, child = multiprocessing.Pipe()
        environment = os.environ | ONE_THREAD | {"PYTHONPATH": os.pathsep.join(sys.path)}
        self._process = subprocess.Popen(
            # -P: modules come from the parent's path, and not first from the working directory.
            [sys.executable, "-P", "-m", "mllm_act.envs.processes", str(child.fileno())],
            pass_fds=[child.fileno()],
            env=environment,
        )
        child.close()
        self.send((factory, arguments))

    @property
    def pid(self) -> int:
        """The id of the process."""
        return self._process.pid

    def send(self, request: Any) -> None:
        """Sends a request. If the worker has died, `receive` raises the error."""
        try:
            self.connection.send(request)
        except OSError:
            pass

    def receive(self, doing: str) -> Any:
        """Waits for the reply to the oldest unanswered request.

        Args:
          doing: description of the request, for errors.

        Raises:
          UserError: raised by the worker, or the worker died.
          RuntimeError: any other exception in the worker, with its traceback.
        """
        try:
            kind, reply = self.connection.recv()
        except (EOFError, OSError):
            status = self._process.wait()
            if status < 0:
                end = f"was killed by {signal.Signals(-status).name}"
                hint = "; out of memory? try fewer workers" if status == -signal.SIGKILL else ""
            else:
                end, hint = f"exited with status {status}", ""
            raise UserError(f"a worker process {end} during: {doing}{hint}") from None
        if kind == "user error":
            raise UserError(reply)
        if kind == "error":
            raise RuntimeError(f"in a worker process, during {doing}:\n{reply}")
        return reply

    def close(self) -> None:
        """Terminates the process, whatever it is doing."""
        self.connection.close()
        self._process.terminate()
        self._process.wait()


def _serve(connection: Connection) -> None:
    path, arguments = connection.recv()
    module, _, function = path.partition(":")
    kind, handler = _try(lambda: getattr(importlib.import_module(module), function)(**arguments))
    while True:
        try:
            request = connection.recv()
            # If the factory failed, every request is answered with its error.
            answer = _try(handler, request) if kind == "reply" else (kind, handler)
            connection.send(answer)
        except (EOFError, OSError):
            return  # the parent has exited or closed the connection


def _try(function: Callable[..., Any], *arguments: Any) -> tuple[str, Any]:
    try:
        return "reply", function(*arguments)
    except UserError as error:
        return "user error", str(error)
    except Exception:
        return "error", traceback.format_exc()


if __name__ == "__main__":
    # Ctrl-C reaches the parent too, which then closes its workers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _serve(Connection(int(sys.argv[1])))
