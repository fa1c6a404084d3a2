"""What a server counts and measures, in Prometheus' text."""

from collections.abc import Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)


class Metrics:
    """Of one server."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self.answers = self._counter("answers", "Observations answered.")
        self.errors = self._counter("errors", "Messages answered by an error.", "kind")
        self.dropped = self._counter("dropped", "Observations dropped for newer ones.")
        self.refused = self._counter("refused", "Connections refused.", "reason")
        self.resumed = self._counter("resumed", "Sessions that went on.")
        self.connections = self._gauge("connections", "Clients connected.")
        self.sessions = self._gauge("sessions", "Sessions whose history is held.")
        self.waiting = self._gauge("waiting", "Observations that wait for a batch.")
        self.batch = self._histogram("batch", "Observations in a batch.", (1, 2, 4, 8, 16, 32, 64))
        self.queue = self._histogram("queue_seconds", "Wait for a batch.", SECONDS)
        self.infer = self._histogram("infer_seconds", "Inference of a batch.", SECONDS)
        self.total = self._histogram("answer_seconds", "From a message to its answer.", SECONDS)

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"mllm_act_{name}", text, labels, registry=self._registry)

    def _gauge(self, name: str, text: str) -> Gauge:
        return Gauge(f"mllm_act_{name}", text, registry=self._registry)

    def _histogram(self, name: str, text: str, buckets: Sequence[float]) -> Histogram:
        return Histogram(f"mllm_act_{name}", text, buckets=buckets, registry=self._registry)

    def text(self) -> bytes:
        """Returns all of them in Prometheus' text format."""
        return generate_latest(self._registry)
