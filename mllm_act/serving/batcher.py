"""Observations of many clients, gathered into batches and given to the policy by one thread."""

import asyncio
import dataclasses
import queue
import threading
import time
from collections.abc import Callable

import numpy as np

from mllm_act.policy.slots import Slots
from mllm_act.serving.requests import Observation
from mllm_act.serving.store import Saved, Store


@dataclasses.dataclass
class Answer:
    """What the policy made of an observation; times in milliseconds, taken when the result is on the host."""

    actions: np.ndarray  # float32[H, A], or [1, A] step by step
    batch: int  # how many observations acted together
    queue_ms: float  # until the batch was taken up, its wait included
    infer_ms: float  # of the whole batch


@dataclasses.dataclass
class Work:
    """One observation, with everything that the thread needs to know of its session."""

    observation: Observation
    slot: int
    first: bool
    read: bool  # the instruction is another than that in the slot
    step_by_step: bool
    session: str  # its id
    steps: int  # observations of its episode, this one included
    future: "asyncio.Future[Answer]"
    generation: int = 0
    arrived: float = dataclasses.field(default_factory=time.perf_counter)


@dataclasses.dataclass
class Restoring:
    """A history from the disk, to be put into a slot; the future says whether it fitted."""

    saved: Saved
    prompt: list[int]
    slot: int
    future: "asyncio.Future[bool]"
    generation: int = 0


class Batcher:
    """One thread, which alone uses the slots."""

    def __init__(
        self,
        slots: Slots,
        wait: float,
        expected: Callable[[], int],
        failed: Callable[[Exception], None],
        store: Store | None = None,
    ) -> None:
        """Starts the thread.

        Args:
          slots: of the policy, compiled.
          wait: seconds that an observation may wait for others.
          expected: how many clients are acting; a batch of so many does not wait for more.
          failed: called in the thread when a batch could not be computed, after all slots were cleared.
          store: saves histories, or None.
        """
        self._slots, self._wait, self._expected, self._failed = slots, wait, expected, failed
        self._store = store
        self._queue: queue.SimpleQueue[Work | Restoring | None] = queue.SimpleQueue()
        self._rng = np.random.default_rng()
        # Of the histories; after a failure, what was submitted to the old ones fails too. The loop's and the thread's.
        self._generation = self._valid = 0
        self._thread = threading.Thread(target=self._run, name="inference", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        """How many observations wait."""
        return self._queue.qsize()

    def submit(self, work: Work | Restoring) -> None:
        """Queues an observation or a history; its future gets the answer. Both in the event loop's thread."""
        work.generation = self._generation
        self._queue.put(work)

    def renew(self) -> None:
        """After a failure: what is submitted from now on belongs to new histories."""
        self._generation += 1

    def close(self) -> None:
        """Ends the thread after everything that is queued."""
        self._queue.put(None)
        self._thread.join()

    def _run(self) -> None:
        after: Work | Restoring | None
        while (work := self._queue.get()) is not None:
            while isinstance(work, Work):
                works, ended, after = self._gather(work)
                self._act(works)
                if ended:
                    return
                work = after
            if work is not None:
                self._restore(work)

    def _gather(self, work: Work) -> tuple[list[Work], bool, Restoring | None]:
        """Returns a batch that begins with this observation, whether it is the last one, and what comes after it."""
        works, largest = [work], self._slots.sizes[-1]
        until = work.arrived + self._wait
        while len(works) < largest:
            left = until - time.perf_counter()
            try:
                if left > 0 and len(works) < self._expected():
                    other = self._queue.get(timeout=left)
                else:
                    other = self._queue.get_nowait()
            except queue.Empty:
                return works, False, None
            if other is None:
                return works, True, None
            if isinstance(other, Restoring):
                return works, False, other
            works.append(other)
        return works, False, None

    def _restore(self, restoring: Restoring) -> None:
        fits = restoring.generation == self._valid
        if fits:
            try:
                self._slots.restore(restoring.slot, restoring.saved.arrays, restoring.prompt)
            except ValueError:
                fits = False

        def deliver() -> None:
            if not restoring.future.done():
                restoring.future.set_result(fits)

        restoring.future.get_loop().call_soon_threadsafe(deliver)

    def _act(self, works: list[Work]) -> None:
        _deliver([work for work in works if work.generation < self._valid], None)
        works = [work for work in works if work.generation == self._valid]
        if not works:
            return
        began = time.perf_counter()
        try:
            chunks, actions = self._compute(works)
        except Exception as error:  # of the device or the compiler; checked observations raise none
            self._slots.clear()
            self._valid += 1
            self._failed(error)
            _deliver(works, None)
            return
        infer = 1e3 * (time.perf_counter() - began)
        if self._store is not None:
            for i, work in enumerate(works):
                arrays = self._slots.save(work.slot)
                last = actions[i : i + 1] if work.step_by_step else chunks[i]
                self._store.write(
                    work.session, Saved(arrays, work.steps, work.observation.instruction, last)
                )
        answers = [
            Answer(
                actions[i : i + 1] if work.step_by_step else chunks[i],
                len(works),
                1e3 * (began - work.arrived),
                infer,
            )
            for i, work in enumerate(works)
        ]
        _deliver(works, answers)

    def _compute(self, works: list[Work]) -> tuple[np.ndarray, np.ndarray]:
        for work in works:
            if work.read:
                self._slots.read(work.slot, work.observation.prompt, again=not work.first)
        seen = [work.observation for work in works]
        words = None
        if self._slots.sample:
            drawn = self._rng.integers(0, 2**32, (len(seen), 2), np.uint32)
            words = np.stack([
                drawn[i] if o.random_key is None else o.random_key for i, o in enumerate(seen)
            ])  # fmt: skip
        return self._slots.act(
            [work.slot for work in works],
            {camera: np.stack([o.images[camera] for o in seen]) for camera in seen[0].images},
            np.stack([o.proprio for o in seen]),
            np.array([work.first for work in works]),
            np.array([not work.step_by_step for work in works]),
            words,
            [o.committed for o in seen],
        )


class Lost(Exception):
    """The policy failed on a batch; its clients' histories are gone."""


def _deliver(works: list[Work], answers: list[Answer] | None) -> None:
    """Hands the answers to the event loop, all in one call."""

    if not works:
        return

    def deliver() -> None:
        for i, work in enumerate(works):
            if work.future.done():  # its connection ended
                continue
            if answers is None:
                work.future.set_exception(Lost())
            else:
                work.future.set_result(answers[i])

    try:
        works[0].future.get_loop().call_soon_threadsafe(deliver)
    except RuntimeError:  # the loop ended
        pass
