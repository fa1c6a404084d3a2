"""The server: connections, and what happens to a message.

A connection gets the metadata at once. Its messages are answered one after another, in their order. The event loop only
moves bytes and checks messages; images are decoded and the policy runs in other threads, so that pings are answered
however long that takes.
"""

import asyncio
import dataclasses
import logging
import ssl
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from websockets.asyncio.server import ServerConnection, serve
from websockets.exceptions import ConnectionClosed

from mllm_act.errors import UserError
from mllm_act.policy.slots import Slots
from mllm_act.serving import wire
from mllm_act.serving.batcher import Answer, Batcher, Lost, Restoring, Work
from mllm_act.serving.gate import Gate, Rate
from mllm_act.serving.metrics import Metrics
from mllm_act.serving.recording import Recorder
from mllm_act.serving.requests import Checker, Request
from mllm_act.serving.sessions import Session, Sessions
from mllm_act.serving.store import Store

CLIENT = "Mllm-Act-Client"  # header of a client that understands errors in binary frames
DRAIN = 30.0  # seconds for what is in work when the server stops
ACTIVE = 1.0  # seconds since its last observation in which a client counts as acting
PIPELINE = 16  # messages of a client that wait; the rest waits in its own buffers

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Options:
    """Of a server.

    Attributes:
      host, port: where it listens; port 0 takes a free one.
      wait: seconds that an observation may wait for those of other clients.
      largest: bytes of a message, at most.
      rate: messages per second of one connection, at most.
      ping: seconds between pings, and until an unanswered one ends a connection.
      key: that clients must send, or None.
      tls: or None for plain connections.
      histories: the folder where they are saved, or None.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    wait: float = 0.002
    largest: int = 32 * 2**20
    rate: float = 1000.0
    ping: float = 20.0
    key: str | None = None
    tls: ssl.SSLContext | None = None
    histories: Path | None = None


Loaded = tuple[Slots, Checker, dict[str, Any]]


class Server:
    """Serves one policy."""

    def __init__(self, options: Options, sessions: int, recorder: Recorder | None = None) -> None:
        """Makes one; ``run`` starts it.

        Args:
          options: where and how.
          sessions: how many histories it holds, and how many clients it lets in.
          recorder: keeps requests and answers, or None.
        """
        self._options, self._recorder = options, recorder
        self._sessions, self.metrics = Sessions(sessions), Metrics()
        self._connections: set[ServerConnection] = set()
        self._acting: dict[ServerConnection, float] = {}  # when each sent its last observation
        self._working = 0
        self._store: Store | None = None
        self.gate = Gate(options.key, sessions, lambda: len(self._connections), self.metrics)
        self._decoders = ThreadPoolExecutor(4, "decode")

    async def run(
        self,
        load: Callable[[], Loaded],
        stop: Callable[[], bool],
        listening: Callable[[int], None],
    ) -> None:
        """Listens until ``stop``, then answers what is in work and closes all connections.

        Args:
          load: makes compiled slots, the checker of messages, and the metadata; runs in a thread, while health checks
            and handshakes are answered with status 503.
          stop: polled; whether to end.
          listening: called with the port once clients are let in.
        """
        options = self._options
        quiet = logging.getLogger("mllm_act.serving.websockets")
        quiet.setLevel(logging.CRITICAL)  # what peers do wrong is counted, not logged
        async with serve(
            self._serve, options.host, options.port, process_request=self.gate, ssl=options.tls, compression=None,
            max_size=options.largest, ping_interval=options.ping, ping_timeout=options.ping, open_timeout=10,
            close_timeout=5, max_queue=4, server_header=None, logger=quiet,
        ) as listener:  # fmt: skip
            slots, self._checker, self._metadata = await asyncio.to_thread(load)
            self._loop = asyncio.get_running_loop()
            if options.histories is not None:
                keys = ("statistics", "step", "provenance", "embodiment")
                policy = repr([self._metadata[key] for key in keys])
                self._store = Store(options.histories, policy)
            batcher = self._batcher = Batcher(
                slots, options.wait, self._clients, self._fail, self._store
            )
            self.gate.ready = True
            listening(next(iter(listener.sockets)).getsockname()[1])
            while not stop():
                await asyncio.sleep(0.05)
            self.gate.ready, self.gate.why = False, "stopping"
            until = time.monotonic() + DRAIN
            while self._working and time.monotonic() < until:
                await asyncio.sleep(0.01)
        await asyncio.to_thread(batcher.close)
        self._decoders.shutdown(cancel_futures=True)
        if self._recorder is not None:
            self._recorder.close()

    def _clients(self) -> int:
        """How many clients are acting; called by the inference thread."""
        since = time.monotonic() - ACTIVE
        return sum(last > since for last in list(self._acting.values()))

    def _fail(self, error: Exception) -> None:
        log.error("inference failed; all histories are cleared", exc_info=error)

        def forget() -> None:
            self._sessions.forget_all()
            self._batcher.renew()

        self._loop.call_soon_threadsafe(forget)

    async def _serve(self, connection: ServerConnection) -> None:
        """Answers a connection's messages until it ends."""
        self._connections.add(connection)
        self.metrics.connections.set(len(self._connections))
        peer = Peer(connection, self._sessions.open(connection), self._options.rate)
        reader = asyncio.create_task(peer.receive())
        try:
            await connection.send(wire.pack({**self._metadata, "session": peer.session.id}))
            while (message := await peer.messages.get()) is not None:
                await self._answer(peer, *message)
        except ConnectionClosed:
            pass
        finally:
            reader.cancel()
            self._connections.discard(connection)
            self._acting.pop(connection, None)
            if peer.session.owner is connection:
                self._sessions.leave(peer.session)
            self.metrics.connections.set(len(self._connections))
            self.metrics.sessions.set(self._sessions.held)

    async def _answer(self, peer: "Peer", data: bytes | str, arrived: float) -> None:
        echo: dict[str, Any] = {}
        self._working += 1
        try:
            if not self.gate.ready:
                raise UserError("server: expected to go on, found it stopping; connect again later")
            if not peer.rate.take():
                raise UserError(
                    f"rate: expected at most {self._options.rate:g} messages per second, found more; send fewer"
                )
            message = self._checker.read(data)
            echo = {k: message[k] for k in ("obs_id",) if isinstance(message.get(k), int | str)}
            if any(isinstance(value, bytes) for value in message.values()):
                request = await asyncio.get_running_loop().run_in_executor(
                    self._decoders, self._checker.check, message
                )
            else:
                request = self._checker.check(message)
            answer = await self._handle(peer, request, arrived)
            if (
                self._recorder is not None
                and request.observation is not None
                and "actions" in answer
            ):
                self._recorder.add(peer.session.id, answer["step"], request, answer["actions"])
            sent = wire.pack(answer)
        except UserError as error:
            self.metrics.errors.labels("request").inc()
            await peer.refuse(str(error), echo)
        except Lost:
            self.metrics.errors.labels("inference").inc()
            text = "server: inference failed, and the session's history is lost; the server's log says why"
            await peer.refuse(text, echo)
        else:
            await peer.connection.send(sent)
            peer.total = 1e3 * (time.perf_counter() - arrived)
            self.metrics.total.observe(peer.total / 1e3)
        finally:
            self._working -= 1

    async def _handle(self, peer: "Peer", request: Request, arrived: float) -> dict[str, Any]:
        if request.resume is not None:
            return {**request.echo, **await self._resume(peer, request.resume)}
        session = peer.session
        if request.observation is None:
            async with session.busy:
                session.steps = 0
            return {**request.echo, "reset": True, "session": session.id}
        if request.latest and not peer.messages.empty():
            if request.reset:
                async with session.busy:
                    session.steps = 0
            peer.dropped += 1
            self.metrics.dropped.inc()
            return {**request.echo, "dropped": True, "session": session.id}
        async with session.busy:
            if session.owner is not peer.connection:
                raise UserError("session: expected this connection's, found it resumed by another")
            if request.reset:
                session.steps = 0
            answer = await self._act(session, request)
            session.last = {"actions": answer.actions, "step": session.steps - 1, **request.echo}
        now = time.monotonic()
        self._acting[peer.connection] = now
        self.metrics.answers.inc()
        self.metrics.batch.observe(answer.batch)
        self.metrics.queue.observe(answer.queue_ms / 1e3)
        self.metrics.infer.observe(answer.infer_ms / 1e3)
        self.metrics.waiting.set(self._batcher.waiting)
        timing = {"infer_ms": answer.infer_ms, "queue_ms": answer.queue_ms, "batch": answer.batch}
        timing["total_ms"] = 1e3 * (time.perf_counter() - arrived)
        if peer.total is not None:
            timing["prev_total_ms"] = peer.total
        return {
            **request.echo, "actions": answer.actions, "session": session.id, "step": session.steps - 1,
            "dropped": peer.dropped, "policy_timing": {"infer_ms": answer.infer_ms}, "server_timing": timing,
        }  # fmt: skip

    async def _act(self, session: Session, request: Request) -> Answer:
        observation = request.observation
        assert observation is not None
        slot, first = self._sessions.use(session), session.steps == 0
        self.metrics.sessions.set(self._sessions.held)
        future: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        read = session.instruction != observation.instruction
        session.instruction = observation.instruction
        session.steps += 1
        self._batcher.submit(
            Work(
                observation, slot, first, read, request.step_by_step, session.id, session.steps, future
            )
        )  # fmt: skip
        return await future

    async def _saved(self, identity: str) -> Session | None:
        """Returns a session from the disk, in a slot, or None."""
        if (
            self._store is None
            or (saved := await asyncio.to_thread(self._store.read, identity)) is None
        ):
            return None
        if (found := self._sessions.find(identity)) is not None:  # another connection was faster
            return found
        session = Session()
        session.id = identity
        slot = self._sessions.use(session)
        future: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        async with session.busy:
            prompt = self._checker.prompt(saved.instruction)
            self._batcher.submit(Restoring(saved, prompt, slot, future))
            if not await future:
                return None
            session.steps, session.instruction = saved.steps, saved.instruction
            session.last = {"actions": saved.actions, "step": saved.steps - 1}
        return session

    async def _resume(self, peer: "Peer", identity: str) -> dict[str, Any]:
        found = self._sessions.find(identity) or await self._saved(identity)
        if found is None or found.steps == 0:
            return {"resumed": False, "session": peer.session.id, "step": peer.session.steps}
        if found is not peer.session:
            old, found.owner = found.owner, peer.connection
            self._sessions.leave(peer.session)
            peer.session = found
            if old is not None:
                await old.close(1008, "its session was resumed by another connection")
        self.metrics.resumed.inc()
        async with found.busy:  # what the old connection asked for is in its history
            return {"resumed": True, "session": found.id, "step": found.steps, "last": found.last}


class Peer:
    """A connection, its messages that wait, and what the server knows of it."""

    def __init__(self, connection: ServerConnection, session: Session, rate: float) -> None:
        self.connection, self.session, self.rate = connection, session, Rate(rate)
        self.messages: asyncio.Queue[tuple[bytes | str, float] | None] = asyncio.Queue(PIPELINE)
        self.dropped = 0
        self.total: float | None = None  # milliseconds of the last answer
        assert connection.request is not None
        self._ours = CLIENT in connection.request.headers

    async def receive(self) -> None:
        """Queues messages, and None at the end."""
        try:
            async for data in self.connection:
                await self.messages.put((data, time.perf_counter()))
        except ConnectionClosed:
            pass
        await self.messages.put(None)

    async def refuse(self, text: str, echo: dict[str, Any]) -> None:
        """Answers an error: openpi's clients take any text frame for one."""
        await self.connection.send(wire.pack({**echo, "error": text}) if self._ours else text)
