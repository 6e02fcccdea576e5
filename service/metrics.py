"""Prometheus metrics of one application, in a registry of its own."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
_BATCH_SIZES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)


class Metrics:
    """Counters, gauges and histograms; every duration is in seconds."""

    content_type = CONTENT_TYPE_LATEST

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        self.requests = Histogram(
            "dsg_request_duration_seconds",
            "From a request's headers to the end of its answer",
            ["route", "method", "status"],
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.problems = Counter(
            "dsg_problems", "Requests answered with a problem document", ["reason"], registry=self.registry
        )
        self.stages = Histogram(
            "dsg_stage_duration_seconds",
            "Time of a request in decode, queue, infer and encode",
            ["stage"],
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.accepted = Gauge("dsg_accepted_pictures", "Pictures accepted and not answered yet", registry=self.registry)
        self.queued = Gauge("dsg_queued_pictures", "Pictures waiting for the device", registry=self.registry)
        self.batch_size = Histogram(
            "dsg_batch_size", "Pictures run together", buckets=_BATCH_SIZES, registry=self.registry
        )
        self.batched_pictures = Counter(
            "dsg_batched_pictures",
            "Pictures run, by padded height x width",
            ["shape"],
            registry=self.registry,
        )
        self.batch_splits = Counter(
            "dsg_batch_splits", "Batches that failed and were run again in halves", registry=self.registry
        )
        self.dropped = Counter(
            "dsg_dropped_pictures",
            "Pictures dropped from the queue before they ran",
            ["cause"],
            registry=self.registry,
        )
        self.model = Gauge(
            "dsg_model_info",
            "1 for each model being served",
            ["name", "version", "hash", "licence"],
            registry=self.registry,
        )

    def text(self) -> bytes:
        """The page that Prometheus scrapes."""
        return generate_latest(self.registry)
