"""How programs end: errors for users, which are one line that names the key, what was expected, what was found and how
to fix it; and the signals SIGINT (Ctrl-C) and SIGTERM.
"""

import contextlib
import difflib
import errno
import os
import select
import signal
import sys
import threading
import time
import traceback
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from types import FrameType

from absl import logging

TRUE = {"1", "on", "t", "true", "y", "yes"}  # what JAX takes for true in an environment variable
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)  # errors of writing to an open file
LOST = 75  # exit status of processes that cannot go on and may be started again: EX_TEMPFAIL of sysexits.h
GRACE = 5.0  # seconds that a program has to end itself after a signal
# Files of the standard library whose functions are callbacks of weak references.
WEAK = (weakref.__file__, weakref.WeakSet.__init__.__code__.co_filename)
REPEAT = 1.0  # seconds; a terminal and a parent process may both send the same signal


class UserError(Exception):
    """An error that the user can fix. The message is one complete line; programs print it and exit with status 1."""

    def __str__(self) -> str:
        """The message; a name in it from a stranger's file cannot break the line or steer the terminal."""
        return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in super().__str__())


class Interrupted(UserError):
    """A signal ended the program; the message says what is kept. The exit status is 128 + the signal's number."""


class Signals:
    """What SIGINT and SIGTERM do to a program, see ``handled``.

    Attributes:
      received: the first of them that arrived, or None.
      deferred: the program asks for ``received`` by itself, and must not be interrupted otherwise.
      kept: for the message of an interrupted program: what is kept.
      fail_together: of several processes: tells the others the exit status and the reason, and ends this one.
    """

    received: signal.Signals | None = None
    deferred = False
    kept = ""
    fail_together: Callable[..., None] | None = None
    _limit: threading.Timer | None = None

    @contextlib.contextmanager
    def handled(self) -> Iterator[None]:
        """Within the block, a signal raises KeyboardInterrupt, unless it is ``deferred``.

        A program that has not ended within ``GRACE`` seconds, because it is in the compiler for example, is ended. So
        is any program by a second signal. Only the main thread can do this; elsewhere, nothing changes.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        self.received, self.deferred, self.kept = None, False, ""
        reader, writer = os.pipe()
        os.set_blocking(writer, False)
        # Python calls handlers between two instructions of the main thread, which may be minutes away. The numbers of
        # the signals arrive in the pipe at once.
        descriptor = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        before = {n: signal.signal(n, self._interrupt) for n in (signal.SIGINT, signal.SIGTERM)}
        threading.Thread(target=self._watch, args=(reader,), daemon=True).start()
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
            signal.set_wakeup_fd(descriptor)
            os.close(writer)  # ends the thread
            if self._limit is not None:
                self._limit.cancel()

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        if self.received is None:
            if not self.deferred and _ignores_exceptions(frame):
                main = threading.main_thread().ident  # a system call of another thread would go on
                threading.Timer(0.05, signal.pthread_kill, (main, number)).start()
                return
            self.received = signal.Signals(number)
            if not self.deferred:
                raise KeyboardInterrupt

    def _watch(self, reader: int) -> None:
        first: float | None = None
        while byte := os.read(reader, 1):
            number = byte[0]
            if number not in (signal.SIGINT, signal.SIGTERM):
                continue
            if first is not None:
                if time.monotonic() > first + REPEAT:
                    self._end(number)
                continue
            first = time.monotonic()
            if self.deferred:
                name = signal.Signals(number).name
                print(f"{name}: stopping; a second signal ends at once", file=sys.stderr)
            else:
                self._limit = _after_grace(self._end, number)
        os.close(reader)

    def _end(self, number: int) -> None:
        """Ends the process without further steps of the main thread, which may be in the compiler."""
        sys.stdout.flush()
        message = f"interrupted{self.kept}"
        print(message, file=sys.stderr, flush=True)
        self.fail(128 + number, message)
        os._exit(128 + number)

    def fail(self, status: int, message: str) -> None:
        """Ends the other processes of this program and this one, if there are several."""
        if self.fail_together is not None:
            self.fail_together(status, message)


def _ignores_exceptions(frame: FrameType | None) -> bool:
    """Whether Python would drop an exception: in a destructor, a garbage collector's or a weak reference's callback."""
    while frame is not None:
        code = frame.f_code
        if code.co_name in ("__del__", "_xla_gc_callback") or code.co_filename in WEAK:
            return True
        frame = frame.f_back
    return False


signals = Signals()  # of this process


def _after_grace(function: Callable[[int], None], argument: int) -> threading.Timer:
    timer = threading.Timer(GRACE, function, (argument,))
    timer.daemon = True
    timer.start()
    return timer


def expect_new(out: Path) -> None:
    """Raises UserError if the folder that a program is about to create exists."""
    if out.exists():
        raise UserError(
            f"--out={out}: expected a folder that does not exist yet, found one; remove it or name another"
        )


def expect_values(options: Mapping[str, object]) -> None:
    """Raises UserError for an option that is given as empty, as by ``--split=$SPLIT`` without that variable."""
    for name, value in options.items():
        if value == "":
            raise UserError(
                f"--{name}: expected a value, found an empty one; leave the option out for its default"
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

    So does an ``OSError`` that names a file, or says that a disk is full.

    SIGINT and SIGTERM end it with the exit status that shells report, 128 + the signal's number: 130 and 143. JAX's
    64-bit types are refused: parameters and checkpoints are float32.
    """
    logging.set_verbosity(logging.WARNING)  # Orbax and JAX log every step at the level below
    # Orbax logs the tracebacks of errors that it raises, too.
    logging.get_absl_logger().addFilter(lambda record: "/orbax/" not in record.pathname)
    # JAX warns about every fork. The children started here (git, ffmpeg) call exec at once, which is safe.
    warnings.filterwarnings("ignore", message=r"os\.fork\(\) was called", category=RuntimeWarning)
    try:
        with signals.handled():
            if os.environ.get("JAX_ENABLE_X64", "").lower() in TRUE:
                raise UserError(
                    f"JAX_ENABLE_X64={os.environ['JAX_ENABLE_X64']}: expected JAX's 32-bit types, found 64-bit types "
                    "turned on in the environment; unset it"
                )
            program()
        sys.stdout.flush()
    except (Interrupted, KeyboardInterrupt) as error:
        message = str(error) or f"interrupted{signals.kept}"
        print(message, file=sys.stderr)
        status = 128 + (signals.received or signal.SIGINT)
        if not isinstance(error, Interrupted):  # with it, all processes have agreed to end
            signals.fail(status, message)
        _after_grace(os._exit, status)  # threads of libraries may not end
        sys.exit(status)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        signals.fail(1, str(error))
        sys.exit(1)
    except OSError as error:
        if _nobody_reads():
            os._exit(128 + signal.SIGPIPE)  # as other programs end in `program | head`
        if error.filename is None and error.errno not in NO_ROOM:
            _fail_at(error)
            raise
        where = f"{os.fsdecode(error.filename)}: " if error.filename is not None else ""
        message = str(UserError(f"{where}expected to read or write it, found {error.strerror}"))
        print(f"error: {message}", file=sys.stderr)
        signals.fail(1, message)
        sys.exit(1)
    except Exception as error:
        _fail_at(error)
        raise


def _fail_at(error: Exception) -> None:
    """Ends the other processes and this one, if there are several, where an error is not the user's."""
    if signals.fail_together is not None:
        traceback.print_exc()
        signals.fail(LOST, f"{type(error).__name__}: {error}")  # most likely another died


def _nobody_reads() -> bool:
    """Whether the output is a pipe whose reader has ended."""
    poll = select.poll()
    poll.register(1, 0)
    return any(events & select.POLLERR for _, events in poll.poll(0))
