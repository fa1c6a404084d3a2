"""Ends a program that stands still: one process that is alive but stuck lets all others wait for ever."""

import faulthandler
import os
import sys
import threading
import time

from mllm_act.errors import LOST, signals


class Watchdog:
    """Ends all processes, with the stacks of their threads on stderr, if nobody calls ``alive`` for some minutes."""

    def __init__(self, minutes: float) -> None:
        """Begins at once; ``minutes`` must be enough for compiling."""
        self._seconds, self._alive, self._left = 60 * minutes, time.monotonic(), threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def alive(self) -> None:
        """Says that the program goes on."""
        self._alive = time.monotonic()

    def close(self) -> None:
        """Ends the watch."""
        self._left.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._left.wait(min(1.0, self._seconds / 10)):
            if time.monotonic() - self._alive > self._seconds:
                faulthandler.dump_traceback(2, all_threads=True)  # stderr
                message = (
                    f"expected a step, a validation batch or a save within {self._seconds / 60:g} minutes "
                    "(config.stall_minutes), found none; the stacks of all threads are above"
                )
                print(f"error: {message}", file=sys.stderr, flush=True)
                if signals.fail_together is not None:
                    signals.fail_together(LOST, message, stalled=True)
                os._exit(LOST)
