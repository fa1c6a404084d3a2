"""A server in a thread of the test's process."""

import asyncio
import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

from mllm_act.policy.slots import Slots
from mllm_act.serving.recording import Recorder
from mllm_act.serving.requests import Checker
from mllm_act.serving.server import Options, Server

Loaded = tuple[Slots, Checker, dict[str, Any]]


class Running:
    """A server, its port, and what ends it."""

    def __init__(
        self, load: Callable[[], Loaded], options: Options, sessions: int, recorder: Recorder | None
    ) -> None:
        self.server = Server(options, sessions, recorder)
        self.port = 0
        self._load, self._stop, self._up = load, threading.Event(), threading.Event()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    @property
    def url(self) -> str:
        return f"ws://127.0.0.1:{self.port}"

    def wait(self) -> None:
        assert self._up.wait(60), "the server does not listen"
        if self._error is not None:
            raise self._error

    def stop(self) -> None:
        self._stop.set()
        self._thread.join(60)
        assert not self._thread.is_alive()
        if self._error is not None:
            raise self._error

    def _listening(self, port: int) -> None:
        self.port = port
        self._up.set()

    def _run(self) -> None:
        try:
            asyncio.run(self.server.run(self._load, self._stop.is_set, self._listening))
        except BaseException as error:
            self._error = error
            self._up.set()


@contextlib.contextmanager
def running(
    loaded: Loaded, sessions: int = 8, recorder: Recorder | None = None, **options: Any
) -> Iterator[Running]:
    """Serves; ``options`` are those of ``Options``. The slots are emptied first."""
    loaded[0].clear()
    server = Running(lambda: loaded, Options(port=0, **options), sessions, recorder)
    server.wait()
    try:
        yield server
    finally:
        server.stop()
