"""What a server counts and measures, in Prometheus' text."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)


class Metrics:
    """Of one server."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        kept = {"registry": self._registry}
        self.answers = Counter("mllm_act_answers", "Observations answered.", **kept)
        self.errors = Counter("mllm_act_errors", "Messages answered by an error.", ["kind"], **kept)
        self.dropped = Counter("mllm_act_dropped", "Observations dropped for newer ones.", **kept)
        self.refused = Counter("mllm_act_refused", "Connections refused.", ["reason"], **kept)
        self.resumed = Counter("mllm_act_resumed", "Sessions that went on.", **kept)
        self.connections = Gauge("mllm_act_connections", "Clients connected.", **kept)
        self.sessions = Gauge("mllm_act_sessions", "Sessions whose history is held.", **kept)
        self.waiting = Gauge("mllm_act_waiting", "Observations that wait for a batch.", **kept)
        self.batch = Histogram(
            "mllm_act_batch", "Observations in a batch.", buckets=(1, 2, 4, 8, 16, 32, 64), **kept
        )
        self.queue = Histogram(
            "mllm_act_queue_seconds", "Wait for a batch.", buckets=SECONDS, **kept
        )
        self.infer = Histogram(
            "mllm_act_infer_seconds", "Inference of a batch.", buckets=SECONDS, **kept
        )
        self.total = Histogram(
            "mllm_act_answer_seconds", "From a message to its answer.", buckets=SECONDS, **kept
        )

    def text(self) -> bytes:
        """Returns all of them in Prometheus' text format."""
        return generate_latest(self._registry)
