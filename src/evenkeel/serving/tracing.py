"""Traces items with OpenTelemetry: one span an item, sent to a collector over HTTP.

    pip install evenkeel[otel]
    tracing: {endpoint: http://localhost:4318/v1/traces, sample: 0.01}

Whoever asks may be part of a trace already (W3C's header `traceparent`): then the item's span is its child, and it
decides whether it is recorded. Remote servers of the protocol are told in the same way.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

from evenkeel.errors import ConfigurationError, MissingExtraError
from evenkeel.serving.gateway.traced import ItemTrace, Tracer
from evenkeel.settings import checked, setting
from evenkeel.version import __version__

if TYPE_CHECKING:
    from opentelemetry.trace import Span, Tracer as Spans

__all__ = ["OtelTracer", "TracingConfig", "start_tracing"]

_MAX_PARENT = 128  # characters; those of the first version are 55
_MAX_EVENTS = 128  # of an item
_MAX_TEXT = 500  # characters of a value
_QUEUE = 2048  # spans that wait to be sent; more are dropped
_EXPORT_S = 3.0  # for one message to the collector, also for the last one when the server ends


def _check_endpoint(text: str) -> None:
    if not text.startswith(("http://", "https://")):
        raise ConfigurationError(f"expected the collector's URL, as http://localhost:4318/v1/traces, found {text!r}")


@dataclass(frozen=True)
class TracingConfig:
    """Says where traces go, and how many."""

    endpoint: Annotated[str, checked(_check_endpoint)] = setting(
        "", "Collector that takes OTLP over HTTP, as http://localhost:4318/v1/traces; empty: nothing is traced."
    )
    sample: float = setting(
        0.01, "Share of the items that are traced, of those whose caller did not decide it.", low=0, high=1
    )
    service: str = setting("evenkeel", "Name of this gateway among the services that are traced.")


class OtelTracer(Tracer):
    """Begins spans.

    Args:
        spans: of OpenTelemetry.
    """

    def __init__(self, spans: "Spans") -> None:
        from opentelemetry.trace import SpanKind
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self._spans = spans
        self._kind = SpanKind.SERVER
        self._extract = TraceContextTextMapPropagator().extract

    def begin(self, model: str, parent: str) -> ItemTrace:
        """Begins a span; a `traceparent` that is none is ignored, as W3C wants it."""
        context = self._extract({"traceparent": parent}) if parent and len(parent) <= _MAX_PARENT else None
        return _ItemSpan(self._spans.start_span(f"infer {model}", context, self._kind, {"evenkeel.model": model}))


class _ItemSpan(ItemTrace):
    __slots__ = ("_events", "_records", "_span", "traceparent")

    def __init__(self, span: "Span") -> None:
        self._span = span
        self._records = span.is_recording()
        self._events = 0
        context = span.get_span_context()
        self.traceparent = f"00-{context.trace_id:032x}-{context.span_id:016x}-{context.trace_flags:02x}"

    def event(self, name: str, **fields: Any) -> None:
        if self._records and self._events < _MAX_EVENTS:
            self._events += 1
            self._span.add_event(name, _shortened(fields))

    def end(self, error: BaseException | None = None, **fields: Any) -> None:
        if self._records:
            from opentelemetry.trace import StatusCode

            self._span.set_attributes({f"evenkeel.{name}": value for name, value in _shortened(fields).items()})
            if error is not None:
                self._span.set_attribute("error.type", type(error).__name__)
                self._span.set_status(StatusCode.ERROR, str(error)[:_MAX_TEXT])
        self._span.end()


def start_tracing(config: TracingConfig) -> tuple[OtelTracer, Callable[[], None]]:
    """Gives a tracer that sends its spans from a thread, and what sends the last of them and ends it.

    Raises:
        MissingExtraError: OpenTelemetry is not installed.
    """
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
        from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased
    except ModuleNotFoundError as error:
        raise MissingExtraError("OpenTelemetry", "otel") from error
    provider = TracerProvider(
        sampler=ParentBased(TraceIdRatioBased(config.sample)),
        resource=Resource.create({"service.name": config.service, "service.version": __version__}),
        shutdown_on_exit=False,
    )
    exporter = OTLPSpanExporter(endpoint=config.endpoint, timeout=_EXPORT_S)
    provider.add_span_processor(BatchSpanProcessor(exporter, max_queue_size=_QUEUE))
    return OtelTracer(provider.get_tracer("evenkeel", __version__)), provider.shutdown


def _shortened(fields: dict[str, Any]) -> dict[str, Any]:
    return {name: value[:_MAX_TEXT] if isinstance(value, str) else value for name, value in fields.items()}
