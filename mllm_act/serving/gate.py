"""Who may connect: plain HTTP requests are answered here, and handshakes are let in or refused."""

import hmac
import time
from collections.abc import Callable

from websockets.asyncio.server import ServerConnection
from websockets.datastructures import Headers
from websockets.http11 import Request, Response

from mllm_act.serving.metrics import Metrics


class Gate:
    """Attributes: ``ready``, false while programs are compiled and while the server drains; and ``why`` not."""

    def __init__(
        self, key: str | None, most: int, connected: Callable[[], int], metrics: Metrics
    ) -> None:
        """Makes one.

        Args:
          key: that clients must send as ``Authorization: Api-Key KEY``; None for none.
          most: connections at a time.
          connected: how many there are.
          metrics: counts refusals.
        """
        self.ready, self.why = False, "starting"
        self._expected = None if key is None else f"Api-Key {key}".encode()
        self._most, self._connected, self._metrics = most, connected, metrics

    def __call__(self, connection: ServerConnection, request: Request) -> Response | None:
        """Answers ``/healthz`` and ``/metrics``; None lets a WebSocket handshake in."""
        path = request.path.partition("?")[0]
        if path == "/healthz":
            return _response(200, "OK\n") if self.ready else _response(503, f"{self.why}\n")
        if path == "/metrics":
            return _response(200, self._metrics.text().decode())
        if not self._allowed(request):
            return self._refuse(401, "key", "expected the header Authorization: Api-Key KEY")
        if not self.ready:
            return self._refuse(503, self.why, f"the server is {self.why}; try again later")
        if self._connected() >= self._most:
            return self._refuse(
                503, "full", f"expected at most {self._most} clients; try again later"
            )
        return None

    def _allowed(self, request: Request) -> bool:
        if self._expected is None:
            return True
        sent = request.headers.get_all("Authorization")
        found = sent[0].encode("utf-8", "replace") if len(sent) == 1 else b""
        return hmac.compare_digest(found, self._expected)

    def _refuse(self, status: int, reason: str, text: str) -> Response:
        self._metrics.refused.labels(reason).inc()
        return _response(status, f"{text}\n")


class Rate:
    """A token bucket: ``most`` messages per second, and a second's worth at once."""

    def __init__(self, most: float) -> None:
        self._most = self._left = most
        self._seen = time.monotonic()

    def take(self) -> bool:
        """Whether one more message may come now."""
        now = time.monotonic()
        self._left = min(self._most, self._left + (now - self._seen) * self._most)
        self._seen = now
        if self._left < 1:
            return False
        self._left -= 1
        return True


def _response(status: int, text: str) -> Response:
    body = text.encode()
    headers = Headers({
        "Content-Type": "text/plain; charset=utf-8", "Content-Length": str(len(body)), "Connection": "close",
    })  # fmt: skip
    reason = {200: "OK", 401: "Unauthorized", 503: "Service Unavailable"}[status]
    return Response(status, reason, headers, body)
