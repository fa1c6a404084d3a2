"""A worker process that answers requests over a pipe, one at a time, with a function given by its import path.

Why not ``multiprocessing.Process``: spawn imports the program's main module in every child (JAX and TensorFlow, which
cost seconds and hundreds of MB and which a simulator does not need), fork is unsafe once JAX has started threads, and
the workers of a pool outlive a parent that is killed. Here a child is ``python -m mllm_act.envs.processes``. On Linux
the kernel kills it with its parent, whatever it is doing; elsewhere it exits when it next reads its closed pipe.

Ctrl-C, and SIGTERM from a scheduler that ends a whole job, reach the parent and its workers alike. The workers ignore
them, so that what ends is the parent, with its own message and status, and they with it.
"""

import contextlib
import ctypes
import importlib
import multiprocessing
import os
import signal
import subprocess
import sys
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from typing import Any

from mllm_act.errors import UserError

# One thread per process: the workers occupy all cores, so threads of libraries would only compete with them.
ONE_THREAD = dict.fromkeys(
    ("LP_NUM_THREADS", "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1"
)
TIMEOUT = 300.0  # seconds; the first answer includes the simulator's imports
LONGEST_TIMEOUT = 1e6  # seconds; the poll system call takes no more than 24 days
GRACE = 5.0  # seconds, see `Worker.receive`
IN_FLIGHT = 32  # requests; many more fill the pipe, and then both sides wait for the other to read


class DeadWorker(UserError):
    """A worker has ended instead of answering."""


class StalledWorker(DeadWorker):
    """A worker gave no answer within its time limit and was killed."""


def check_timeout(timeout: float) -> None:
    """Raises UserError unless ``timeout`` is a time limit that a `Worker` can have."""
    if not 0 < timeout <= LONGEST_TIMEOUT:
        raise UserError(
            f"--timeout: expected seconds, more than 0 and at most {LONGEST_TIMEOUT:.0f}, found {timeout:g}"
        )


class Worker:
    """A child process that calls ``handler = factory(**arguments)`` and then answers each `send` with
    ``handler(request)``.

    Arguments, requests and replies are pickled. ``connection`` can be passed to ``multiprocessing.connection.wait``.
    On Linux the process is killed when the thread that made it ends: make workers in a thread that outlives them.
    """

    def __init__(self, factory: str, *, timeout: float = TIMEOUT, **arguments: Any) -> None:
        """Starts the process without waiting for it; `receive` raises the errors of the factory.

        Args:
          factory: import path, ``'package.module:function'``.
          timeout: seconds that each answer may take.
          **arguments: of the factory.

        Raises:
          UserError: the time limit is not above 0, or is too long.
        """
        check_timeout(timeout)
        self.timeout = timeout
        self._waiting: deque[Any] = deque()  # requests that are not sent yet
        self._in_flight = 0
        self._started = time.monotonic()  # when the oldest unanswered request was begun
        self.connection, child = multiprocessing.Pipe()
        environment = os.environ | ONE_THREAD | {"PYTHONPATH": os.pathsep.join(sys.path)}
        # The child inherits this, so that it ignores them from its first moment.
        with _blocked(signal.SIGINT, signal.SIGTERM):
            self._process = subprocess.Popen(
                # -P: modules come from the parent's path, and not first from the working directory.
                [sys.executable, "-P", "-m", "mllm_act.envs.processes"]
                + [str(child.fileno()), str(os.getpid())],
                pass_fds=[child.fileno()],
                env=environment,
            )
        child.close()
        self._write((factory, arguments))

    @property
    def pid(self) -> int:
        """The id of the process."""
        return self._process.pid

    def send(self, request: Any) -> None:
        """Sends a request. If the worker has died, `receive` raises the error."""
        if not self._in_flight:
            self._started = time.monotonic()
        self._waiting.append(request)
        self._fill()

    def _fill(self) -> None:
        while self._waiting and self._in_flight < IN_FLIGHT:
            self._write(self._waiting.popleft())
            self._in_flight += 1

    def _write(self, message: Any) -> None:
        with contextlib.suppress(OSError):  # the worker has died
            self.connection.send(message)

    @property
    def time_left(self) -> float:
        """Seconds until the answer to the oldest unanswered request is due; 0 if it is overdue."""
        return max(0.0, self._started + self.timeout - time.monotonic())

    def receive(self, doing: str) -> Any:
        """Waits for the reply to the oldest unanswered request.

        Args:
          doing: description of the request, for errors.

        Raises:
          StalledWorker: there was no reply within the time limit. The worker has been killed.
          DeadWorker: the worker died.
          UserError: raised by the worker.
          RuntimeError: any other exception in the worker, with its traceback.
        """
        try:
            # The second wait is for a worker that was suspended with this process (Ctrl-Z) and has just woken up.
            grace = min(GRACE, self.timeout)
            if not self.connection.poll(self.time_left) and not self.connection.poll(grace):
                self.close()
                raise StalledWorker(
                    f"a worker process gave no answer within {self.timeout:g} s and was killed during: {doing}; "
                    "if the simulator is only slow, raise --timeout"
                )
            kind, reply = self.connection.recv()
        except (EOFError, OSError):
            status = self._process.wait()
            if status < 0:
                end = f"was killed by {signal.Signals(-status).name}"
                hint = "; out of memory? try fewer workers" if status == -signal.SIGKILL else ""
            else:
                end, hint = f"exited with status {status}", ""
            raise DeadWorker(f"a worker process {end} during: {doing}{hint}") from None
        self._started = time.monotonic()
        self._in_flight -= 1
        self._fill()
        if kind == "user error":
            raise UserError(reply)
        if kind == "error":
            raise RuntimeError(f"in a worker process, during {doing}:\n{reply}")
        return reply

    def close(self) -> None:
        """Kills the process, whatever it is doing. SIGTERM would not end one that is stopped."""
        self.connection.close()
        self._process.kill()
        with contextlib.suppress(
            subprocess.TimeoutExpired
        ):  # stuck in the kernel: it ends when it can
            self._process.wait(5)


@contextlib.contextmanager
def _blocked(*signals: signal.Signals) -> Iterator[None]:
    """Keeps signals from this thread in the block: they wait, or another thread takes them."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _die_with_parent(parent: int) -> None:
    """Has the kernel kill this process when its parent, which has the id ``parent``, ends."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # 1 is PR_SET_PDEATHSIG
    if os.getppid() != parent:  # it ended before
        sys.exit()


def _serve(connection: Connection) -> None:
    with contextlib.suppress(EOFError, OSError):  # the parent has exited or closed the connection
        path, arguments = connection.recv()
        module, _, function = path.partition(":")
        kind, handler = _try(
            lambda: getattr(importlib.import_module(module), function)(**arguments)
        )
        while True:
            request = connection.recv()
            # If the factory failed, every request is answered with its error.
            answer = _try(handler, request) if kind == "reply" else (kind, handler)
            connection.send(answer)


def _try(function: Callable[..., Any], *arguments: Any) -> tuple[str, Any]:
    try:
        return "reply", function(*arguments)
    except UserError as error:
        return "user error", str(error)
    except Exception:
        return "error", traceback.format_exc()


if __name__ == "__main__":
    _die_with_parent(int(sys.argv[2]))
    _serve(Connection(int(sys.argv[1])))
