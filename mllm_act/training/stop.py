"""How a training loop ends early: at SIGINT or SIGTERM it finishes its update, saves, and the program ends.

    with Stop() as stop, Checkpointer(workdir) as checkpoints:
        for step in ...:
            ...                   # an update
            stop.defer()
            if stop.requested():
                ...               # save this step
                break
    stop.end_if_requested(step, steps, workdir)

Schedulers of clusters send SIGTERM before they take a machine away, often to one process of many. All processes then
stop at the same request: each tells the others how many it has made, and the greatest number and one more is where all
stop. A second signal ends the program at once.
"""

import json
import os
import signal
import sys
import threading
from pathlib import Path
from types import TracebackType

from mllm_act.distributed.exchange import group
from mllm_act.errors import Interrupted, UserError, signals
from mllm_act.training.watchdog import Watchdog

STALL_MINUTES = 60.0  # compiling included
_LOOK = 0.5  # seconds between two looks at whether another process has a signal
_PATIENCE = 60.0  # seconds for all processes to tell their numbers
_FINISHED = -1  # told in place of a number of requests by a process that has left its loop
_NOT_BEGUN = -2  # ... that has made no update


class Stop:
    """What a loop knows of signals. Use as a context manager around the loop and the checkpoints that it saves.

    Before the first update there is nothing to save: a signal ends the program, also while it compiles.
    """

    def __init__(self, stall_minutes: float = STALL_MINUTES) -> None:
        """Nothing is watched before ``__enter__``; then the program is ended if it stands still for some minutes."""
        self._stall_minutes = stall_minutes
        self._watchdog: Watchdog | None = None
        self._lock = threading.Lock()  # held while the processes agree
        self._requests = 0
        self._last: int | None = None  # the request at which all processes stop
        self._left = threading.Event()
        self._told = False
        self._watching: threading.Thread | None = None

    def __enter__(self) -> "Stop":
        signals.kept = " before the first update: nothing new is saved; run the same command again"
        self._watchdog = Watchdog(self._stall_minutes)
        if group.count > 1:
            self._watching = threading.Thread(target=self._watch, daemon=True)
            self._watching.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        signals.deferred, signals.kept = False, ""
        if self._watchdog is not None:
            self._watchdog.close()
        self._left.set()
        if self._watching is not None:
            self._watching.join()
            self._tell(_FINISHED)

    def defer(self) -> None:
        """From now on, signals wait until the loop asks for them."""
        signals.deferred = True

    def requested(self) -> bool:
        """Whether the loop is to stop here; all processes must ask equally often, and get the same answer."""
        if self._watchdog is not None:
            self._watchdog.alive()
        if group.count == 1:
            return signals.received is not None
        with self._lock:
            self._requests += 1
            return self._last is not None and self._requests >= self._last

    @property
    def stopped(self) -> bool:
        """Whether the loop has ended, or is to end, because of a signal."""
        return signals.received is not None and (group.count == 1 or self._last is not None)

    def end_if_requested(self, step: int, steps: int, workdir: Path) -> None:
        """Raises Interrupted, the last line of a run that stopped early, if a signal has arrived."""
        if self.stopped:
            assert signals.received is not None
            raise Interrupted(
                f"{signals.received.name}: stopped after step {step} of {steps}, saved in "
                f"{workdir}/checkpoints/{step}; run the same command to continue"
            )

    def _tell(self, requests: int) -> None:
        if not self._told:
            self._told = True
            group.tell(f"stop/{group.process}", json.dumps(requests))

    def _watch(self) -> None:
        while not self._left.wait(_LOOK):
            if signals.received is not None:
                group.tell("stop", signals.received.name)
            name = group.told("stop")
            if name is not None:
                with self._lock:
                    self._agree(signal.Signals[name])
                return

    def _agree(self, received: signal.Signals) -> None:
        self._tell(self._requests if signals.deferred else _NOT_BEGUN)
        try:
            numbers = [
                int(group.wait_for(f"stop/{process}", _PATIENCE)) for process in range(group.count)
            ]
        except UserError:  # a process has failed; all will be ended
            return
        if _NOT_BEGUN in numbers:
            print(f"{received.name}: interrupted{signals.kept}", file=sys.stderr, flush=True)
            os._exit(128 + received)
        if _FINISHED not in numbers:
            signals.received = received
            self._last = max(numbers) + 1
