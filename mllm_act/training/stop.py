"""How a training loop ends early: at SIGINT or SIGTERM it finishes its update, saves, and the program ends.

    with Stop() as stop, Checkpointer(workdir) as checkpoints:
        for step in ...:
            ...                   # an update
            stop.defer()
            if stop.requested:
                ...               # save this step
                break
    stop.end_if_requested(step, steps, workdir)

Schedulers of clusters send SIGTERM before they take a machine away. A second signal ends the program at once.
"""

from pathlib import Path
from types import TracebackType

from mllm_act.errors import Interrupted, signals


class Stop:
    """What a loop knows of signals. Use as a context manager around the loop and the checkpoints that it saves.

    Before the first update there is nothing to save: a signal ends the program, also while it compiles.
    """

    def __enter__(self) -> "Stop":
        signals.kept = " before the first update: nothing new is saved; run the same command again"
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        signals.deferred, signals.kept = False, ""

    def defer(self) -> None:
        """From now on, signals wait until the loop asks for them."""
        signals.deferred = True

    @property
    def requested(self) -> bool:
        """Whether a signal has arrived."""
        return signals.received is not None

    def end_if_requested(self, step: int, steps: int, workdir: Path) -> None:
        """Raises Interrupted, the last line of a run that stopped early, if a signal has arrived."""
        if signals.received is not None:
            raise Interrupted(
                f"{signals.received.name}: stopped after step {step} of {steps}, saved in "
                f"{workdir}/checkpoints/{step}; run the same command to continue"
            )
