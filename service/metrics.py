"""Prometheus metrics of one application, in a registry of its own."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
_LAG_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1.0)
_BATCH_SIZES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
_BATCH_PIXELS = (1e5, 2.5e5, 5e5, 1e6, 2e6, 4e6, 8e6, 16e6, 32e6)


class Metrics:
    """Counters, gauges and histograms; every duration is in seconds, every size in its base unit."""

    content_type = CONTENT_TYPE_LATEST

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        self._of_requests()
        self._of_queue_and_batches()
        self._of_devices()

    def _of_requests(self) -> None:
        self.requests = Histogram(
            "dsg_request_duration_seconds",
            "From a request's headers to the end of its answer",
            ["route", "method", "status"],
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.active = Gauge(
            "dsg_requests_in_flight", "Requests whose answer is not complete yet", registry=self.registry
        )
        self.problems = Counter(
            "dsg_problems", "Requests answered with a problem document", ["reason"], registry=self.registry
        )
        self.rejected = Counter(
            "dsg_rejected_requests", "Requests refused with 429, by the bound", ["reason"], registry=self.registry
        )
        for bound in ("pictures", "pixels", "bytes", "deadline"):
            self.rejected.labels(bound)
        self.stages = Histogram(
            "dsg_stage_duration_seconds",
            "Time of a request in decode, queue, infer and encode",
            ["stage"],
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.event_loop_lag = Histogram(
            "dsg_event_loop_lag_seconds",
            "How late the event loop wakes, asked ten times a second",
            buckets=_LAG_SECONDS,
            registry=self.registry,
        )
        self.model = Gauge(
            "dsg_model_info",
            "1 for each model being served",
            ["name", "version", "hash", "licence"],
            registry=self.registry,
        )
        self.reloads = Counter(
            "dsg_model_reloads",
            "Reloads by what came of them; one that is refused before anything is loaded is none",
            ["result"],
            registry=self.registry,
        )
        for result in ("swapped", "failed"):
            self.reloads.labels(result)

    def _of_queue_and_batches(self) -> None:
        self.accepted = Gauge("dsg_accepted_pictures", "Pictures accepted and not answered yet", registry=self.registry)
        self.pixels_in_flight = Gauge(
            "dsg_in_flight_pixels", "Pixels of the pictures accepted and not answered yet", registry=self.registry
        )
        self.bytes_in_flight = Gauge(
            "dsg_in_flight_bytes", "Bytes of bodies read and not decoded yet", registry=self.registry
        )
        self.queued = Gauge("dsg_queued_pictures", "Pictures waiting for a device", registry=self.registry)
        self.batch_size = Histogram(
            "dsg_batch_size", "Pictures run together", buckets=_BATCH_SIZES, registry=self.registry
        )
        self.batch_pixels = Histogram(
            "dsg_batch_pixels", "Padded pixels run together", buckets=_BATCH_PIXELS, registry=self.registry
        )
        self.batched_pictures = Counter(
            "dsg_batched_pictures", "Pictures run, by padded height x width", ["shape"], registry=self.registry
        )
        self.batch_splits = Counter(
            "dsg_batch_splits",
            "Batches that failed and were run again in halves",
            ["cause"],
            registry=self.registry,
        )
        for cause in ("error", "out_of_memory"):
            self.batch_splits.labels(cause)
        self.dropped = Counter(
            "dsg_dropped_pictures",
            "Pictures dropped from the queue before they ran",
            ["cause"],
            registry=self.registry,
        )
        for cause in ("cancelled", "deadline"):
            self.dropped.labels(cause)

    def _of_devices(self) -> None:
        self.device_up = Gauge("dsg_device_up", "1 while a device takes batches", ["device"], registry=self.registry)
        self.device_busy = Counter(
            "dsg_device_busy_seconds", "Time a device spent on batches", ["device"], registry=self.registry
        )
        self.batch_limit = Gauge(
            "dsg_batch_limit_pixels",
            "Most padded pixels in a batch of a device; lower after it ran out of memory",
            ["device"],
            registry=self.registry,
        )
        self.gpu_memory = Gauge(
            "dsg_gpu_memory_bytes", "Memory of a GPU after a batch", ["device", "kind"], registry=self.registry
        )
        self.worker_deaths = Counter(
            "dsg_worker_deaths", "Ends of a device's process that no one asked for", ["device"], registry=self.registry
        )

    def text(self) -> bytes:
        """The page that Prometheus scrapes."""
        return generate_latest(self.registry)
