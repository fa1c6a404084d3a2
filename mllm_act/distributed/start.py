"""Starts a program as one of several processes, and ends it as one.

What ends one process ends all: a process that fails says why, and the others end with the same line and the same exit
status. Each of them is ended within bounded time where the coordinator, process 0, does not answer.
"""

import atexit
import faulthandler
import os
import socket
import sys
import threading
import time
from collections.abc import Sequence

from mllm_act import errors
from mllm_act.distributed import exchange
from mllm_act.distributed.resolve import FLAGS, Processes, resolve, timeout
from mllm_act.errors import UserError

_failing = threading.Event()  # set once this process fails by itself
_POLL = 1.0  # seconds between two looks at whether another process has failed


def start(argv: Sequence[str]) -> list[str]:
    """Joins the other processes, if there are any, before anything else uses JAX.

    Prints how it was decided. From here on, only process 0 prints to stdout.

    Args:
      argv: the command line.

    Returns:
      The command line without the flags of ``resolve``.

    Raises:
      UserError: it is not clear how to start, or the coordinator does not answer.
    """
    flags, rest = take_flags(argv)
    if "compilation_cache" in flags:
        import jax

        jax.config.update("jax_compilation_cache_dir", flags["compilation_cache"])
    found, seconds = resolve(flags), timeout(flags)
    if found is not None:
        _join(found, seconds)
    return rest


def take_flags(argv: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """Returns the flags of ``resolve`` in a command line, and the rest of it."""
    taken, rest = {}, []
    arguments = iter(argv)
    for argument in arguments:
        name, equals, value = argument.partition("=")
        key = name.lstrip("-")
        if name.startswith("-") and key in FLAGS:
            taken[key] = value if equals else next(arguments, "")
        else:
            rest.append(argument)
    return taken, rest


def _join(found: Processes, seconds: int) -> None:
    import jax

    where = f"{found.coordinator or 'the address that JAX finds'}"
    message = (
        f"processes: expected all {found.count or ''} to meet at {where} within {seconds} s, found that some did not; "
        "look at their output, and whether that address can be reached from every host"
    )
    if found.coordinator is not None and found.process != 0:
        _wait_for(found.coordinator, seconds, message)
    late = threading.Timer(seconds, _give_up, (message,))  # JAX would abort with a stack trace
    late.daemon = True
    late.start()
    jax.config.update(
        "jax_enable_preemption_service", False
    )  # it would replace our SIGTERM handler
    jax.distributed.initialize(
        found.coordinator,
        found.count,
        found.process,
        list(found.devices) if found.devices else None,
        cluster_detection_method=found.method,
        initialization_timeout=seconds + 60,
    )
    late.cancel()
    state = jax._src.distributed.global_state  # the coordinator's store has no public interface
    exchange.group.join(state.client, state.process_id, state.num_processes)
    devices = "all of this host" if not found.devices else ", ".join(map(str, found.devices))
    print(
        f"Processes, decided by {found.source}:\n"
        f"  coordinator  {state.coordinator_address}\n"
        f"  process      {state.process_id} of {state.num_processes}, on {socket.gethostname()}\n"
        f"  devices      {devices}",
        flush=True,
    )
    if not exchange.group.first:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (until the process ends)
    errors.signals.fail_together = _fail
    ended = threading.Event()
    watching = threading.Thread(target=_watch, args=(ended,), daemon=True)
    watching.start()

    def leave() -> None:
        ended.set()
        watching.join()

    atexit.register(leave)  # it runs before JAX disconnects


def _wait_for(address: str, seconds: int, message: str) -> None:
    """Waits until something listens at an address."""
    host, port = address.rsplit(":", 1)
    limit = time.monotonic() + seconds
    while True:
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
            return
        except OSError as error:
            if time.monotonic() > limit:
                raise UserError(f"{message} ({error})") from None
        time.sleep(0.2)


def _give_up(message: str) -> None:
    print(f"error: {message}", file=sys.stderr, flush=True)
    os._exit(1)


def _fail(status: int, message: str, stalled: bool = False) -> None:
    """Tells the other processes why this one fails, and ends it."""
    sys.stdout.flush()
    sys.stderr.flush()
    group = exchange.group
    _failing.set()
    group.tell_failure(status, message, stalled)
    if group.first:
        time.sleep(3 * _POLL)  # the others read it here
    os._exit(status)


def _watch(ended: threading.Event) -> None:
    """Ends this process when another has failed."""
    while not ended.wait(_POLL):
        failure = exchange.group.failure()
        # All may fail alike: then each says so itself.
        if failure is not None and not _failing.wait(_POLL):
            if failure.stalled:
                faulthandler.dump_traceback(2, all_threads=True)  # stderr
            print(f"error: {failure.message}", file=sys.stderr, flush=True)
            os._exit(failure.status)
