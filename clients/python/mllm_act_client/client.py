"""A connection to a policy server that waits for it, times out, comes back, and goes on with its session."""

import threading
import time

from websockets.exceptions import ConnectionClosed, InvalidHandshake, InvalidURI
from websockets.sync.client import connect

from mllm_act_client import wire

FIRST_PAUSE, LONGEST_PAUSE = 0.1, 5.0  # seconds between attempts to connect; each is twice the last


class BadRequest(ValueError):
    """The server refused a message; the connection goes on. The text says what it expected."""


class Disconnected(ConnectionError):
    """The server could not be reached in time, or gave no answer in time."""


class SessionLost(RuntimeError):
    """The connection is there again, but the server no longer has this episode's history.

    The observation was not acted on. Sent again, it begins an episode with an empty history.
    """


class Client:
    """One session with a server. Methods may be called by several threads; they take turns."""

    def __init__(self, url, api_key=None, wait=60.0, timeout=30.0, ssl=None):
        """Connects.

        Args:
          url: such as ``ws://127.0.0.1:8000``.
          api_key: of the server, if it asks for one.
          wait: seconds to wait for the server, now and whenever the connection is lost.
          timeout: seconds to wait for an answer.
          ssl: an ``ssl.SSLContext`` for ``wss://``; None for the system's authorities.

        Raises:
          Disconnected: no server within ``wait``.
          BadRequest: the address or the key is wrong.
        """
        self._url, self._wait, self._timeout = url, wait, timeout
        self._headers = {"Mllm-Act-Client": "1"}
        if api_key is not None:
            self._headers["Authorization"] = "Api-Key " + api_key
        self._more = {} if ssl is None else {"ssl": ssl}
        self._lock = threading.RLock()
        self._manager = self._connection = None
        self._session = None
        self._steps = 0  # observations of this episode that the server has seen
        self.metadata = {}
        self.reconnects = 0
        with self._lock:
            self._connect()

    @property
    def session(self):
        """The session's id, or None where the server has no sessions."""
        return self._session

    def infer(self, observation):
        """Sends an observation and returns the answer: ``actions``, float32[H, A], and more.

        A connection that is lost on the way is opened again. If the server has seen the observation, it gives its
        answer; otherwise the observation is sent again.

        Raises:
          BadRequest: something in the observation is wrong.
          Disconnected: no server, or no answer, in time.
          SessionLost: the server has forgotten the episode.
        """
        with self._lock:
            begins = bool(observation.get("reset")) or self._steps == 0
            if begins and self._session is not None and not observation.get("reset"):
                observation = dict(observation, reset=True)  # so that it may be sent twice
            data = wire.pack(observation)
            if self._connection is None:
                self._resume(begins)
            try:
                answer = self._exchange(data)
            except ConnectionClosed:
                steps = self._steps
                answer = self._resume(begins)
                if begins or answer is None or self._steps != steps + 1:
                    answer = self._again(data)
            if "actions" in answer:
                self._steps = answer["step"] + 1 if "step" in answer else self._steps + 1
            return answer

    def _again(self, data):
        try:
            return self._exchange(data)
        except ConnectionClosed as error:
            self._drop()
            raise Disconnected(f"the connection was lost twice: {error}") from None

    def reset(self):
        """The next observation begins an episode. Servers without sessions have no such message."""
        with self._lock:
            self._steps = 0
            if self._connection is not None and self._session is not None:
                try:
                    self._exchange(wire.pack({"reset": True}))
                except ConnectionClosed:
                    self._drop()

    def close(self):
        """Ends the connection."""
        with self._lock:
            self._drop()

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.close()

    def _exchange(self, data):
        """Sends bytes and returns the answer. Raises ConnectionClosed if the connection ends before."""
        self._connection.send(data)
        try:
            found = self._connection.recv(timeout=self._timeout)
        except TimeoutError:
            # The answer may still come, and would be taken for the next one's.
            self._drop()
            raise Disconnected(f"no answer in {self._timeout:g} s") from None
        if isinstance(found, str):
            raise BadRequest(found)
        answer = wire.unpack(found)
        if "error" in answer:
            raise BadRequest(answer["error"])
        return answer

    def _resume(self, begins):
        """Connects again and goes on with the session; with ``begins`` a lost history does not matter.

        Returns:
          The session's last answer, or None.
        """
        before = self._session
        self._drop()
        self._connect()
        self.reconnects += 1
        if before is None:
            return None
        found = self._again(wire.pack({"resume": before}))
        if found["resumed"]:
            self._session, self._steps = before, found["step"]
            return found.get("last")
        self._steps = 0
        if not begins:
            raise SessionLost("the server has no history of this episode any more")
        return None

    def _connect(self):
        until = time.monotonic() + self._wait
        pause = FIRST_PAUSE
        while True:
            left = until - time.monotonic()
            try:
                self._manager = connect(
                    self._url,
                    compression=None,
                    max_size=None,
                    additional_headers=self._headers,
                    open_timeout=max(0.1, min(left, 10.0)),
                    close_timeout=1.0,
                    **self._more,
                )
                self._connection = self._manager.__enter__()
                self.metadata = wire.unpack(self._connection.recv(timeout=max(0.1, left)))
                self._session = self.metadata.get("session")
                return
            except InvalidURI as error:
                raise BadRequest(f"{self._url}: expected ws://HOST:PORT, found {error}") from None
            except (OSError, InvalidHandshake, ConnectionClosed, EOFError) as error:
                self._drop()
                status = getattr(getattr(error, "response", None), "status_code", None)
                if status == 401:
                    text = f"{self._url}: expected an API key, found none or a wrong one"
                    raise BadRequest(text) from None
                if time.monotonic() + pause > until:
                    text = f"{self._url}: no server in {self._wait:g} s: {error}"
                    raise Disconnected(text) from None
            time.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE)

    def _drop(self):
        connection, self._connection = self._connection, None
        if connection is not None:
            self._manager.__exit__(None, None, None)
