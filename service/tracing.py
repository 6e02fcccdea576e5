"""OpenTelemetry spans of requests, where the operator wants them (`DSG_TRACING=1`, the extra `tracing`).

A request's span is the child of the caller's (`traceparent`); its stages are children of it, made from the times that
`Server-Timing` says. Nothing is measured twice, and nothing is done where tracing is off.
"""

import threading
import time
from collections.abc import Mapping
from typing import Any

_CLOSE_S = 1.0  # for the last spans: a collector that is not there would be asked again and again


class Tracing:
    """Makes spans and sends them, as the `OTEL_*` environment variables say.

    Args:
        on: whether any are made.

    Raises:
        ValueError: they are wanted, and OpenTelemetry is not installed.
    """

    def __init__(self, on: bool) -> None:
        self._provider: Any = None
        if not on:
            return
        try:
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
        except ImportError:
            raise ValueError("tracing needs OpenTelemetry: pip install 'dsg[tracing]'") from None
        # OTEL_SERVICE_NAME and OTEL_RESOURCE_ATTRIBUTES go before this.
        # It would wait for its collector at Python's end, too, however long.
        self._provider = TracerProvider(resource=Resource.create({"service.name": "dsg"}), shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))

    def record(
        self,
        headers: Mapping[str, str],
        name: str,
        seconds: float,
        stages: Mapping[str, float],
        attributes: Mapping[str, str | int | float],
        failed: bool,
    ) -> None:
        """Make the spans of a request that has just ended.

        Args:
            headers: of the request, names in lower case; `traceparent` says whose child it is.
            name: of the request's span.
            seconds: how long it took until now.
            stages: name -> seconds, one after the other, the last of them ending now.
            attributes: of the request's span.
            failed: whether our side was at fault.
        """
        if self._provider is None:
            return
        from opentelemetry import trace
        from opentelemetry.propagate import extract

        end = time.time_ns()
        tracer = self._provider.get_tracer("dsg.service")
        span = tracer.start_span(
            name,
            context=extract(headers),
            kind=trace.SpanKind.SERVER,
            start_time=end - round(seconds * 1e9),
            attributes=dict(attributes),
        )
        if failed:
            span.set_status(trace.StatusCode.ERROR)
        begin = end - round(sum(stages.values()) * 1e9)
        for stage, stage_s in stages.items():
            child = tracer.start_span(stage, context=trace.set_span_in_context(span), start_time=begin)
            begin += round(stage_s * 1e9)
            child.end(begin)
        span.end(end)

    def close(self) -> None:
        """Send what is left, within a second; what takes longer is lost."""
        if self._provider is not None:
            thread = threading.Thread(target=self._provider.shutdown, name="dsg-tracing", daemon=True)
            thread.start()
            thread.join(_CLOSE_S)
