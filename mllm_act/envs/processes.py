"""A worker process: answers requests over a pipe, one at a time, with a function named by import
path.

Why not ``multiprocessing.Process``: spawn imports the program's main module again in each child
(JAX and TensorFlow, seconds and hundreds of MB that a simulator has no use for), fork is unsafe
once JAX has threads, and a pool's workers outlive a killed parent. Here a child is ``python -m
mllm_act.envs.processes``, and ends when its pipe does.
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

# One thread a process: the workers fill the cores, and libraries with threads of their own only get
# in their way.
ONE_THREAD = dict.fromkeys(
    ("LP_NUM_THREADS", "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1"
)


class Worker:
    """A child process that runs ``handler = factory(**arguments)``, then answers
    ``handler(request)`` for each `send`.

    Arguments, requests and replies are pickled. ``connection`` may be given to
    ``multiprocessing.connection.wait``.
    """

    def __init__(self, factory: str, **arguments: Any) -> None:
        """``factory`` is ``'package.module:function'``. Returns at once; errors of the factory come
        with `receive`.
        """
        self.connection, child = multiprocessing.Pipe()
        environment = os.environ | ONE_THREAD | {"PYTHONPATH": os.pathsep.join(sys.path)}
        self._process = subprocess.Popen(
            # -P: modules come from the parent's path, not first from the folder it stands in.
            [sys.executable, "-P", "-m", "mllm_act.envs.processes", str(child.fileno())],
            pass_fds=[child.fileno()],
            env=environment,
        )
        child.close()
        self.send((factory, arguments))

    @property
    def pid(self) -> int:
        return self._process.pid

    def send(self, request: Any) -> None:
        """Hands over a request. A dead worker is noticed by `receive`."""
        try:
            self.connection.send(request)
        except OSError:
            pass

    def receive(self, doing: str) -> Any:
        """Waits for the oldest unanswered request's reply.

        Raises:
          UserError: the worker's own; or it died, then ``doing`` (what it was asked for) and its
          end are named. RuntimeError: any other exception in the worker, with its traceback.
        """
        try:
            kind, reply = self.connection.recv()
        except (EOFError, OSError):
            status = self._process.wait()
            if status < 0:
                how = f"was killed by {signal.Signals(-status).name}"
                mend = "; out of memory? try fewer workers" if status == -signal.SIGKILL else ""
            else:
                how, mend = f"ended with status {status}", ""
            raise UserError(f"a worker process {how} at: {doing}{mend}") from None
        if kind == "user error":
            raise UserError(reply)
        if kind == "error":
            raise RuntimeError(f"in a worker process, at {doing}:\n{reply}")
        return reply

    def close(self) -> None:
        """Ends the process, whatever it is doing."""
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
            # Without a handler, every request is answered with the reason.
            answer = _try(handler, request) if kind == "reply" else (kind, handler)
            connection.send(answer)
        except (EOFError, OSError):
            return  # the parent has gone, or closed us


def _try(function: Callable[..., Any], *arguments: Any) -> tuple[str, Any]:
    try:
        return "reply", function(*arguments)
    except UserError as error:
        return "user error", str(error)
    except Exception:
        return "error", traceback.format_exc()


if __name__ == "__main__":
    signal.signal(
        signal.SIGINT, signal.SIG_IGN
    )  # Ctrl-C is the parent's to handle; it then closes us
    _serve(Connection(int(sys.argv[1])))
