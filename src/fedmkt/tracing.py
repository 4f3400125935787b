"""Following one piece of work through all services: W3C trace context always, OpenTelemetry spans by setting.

A trace has an id that travels in `traceparent`: agent -> coordinator -> job -> LLM server. It stands in every log line,
so that the lines of one upload or one job are found by one search, with or without any tracing service.

Spans are recorded once `configure` was called, which needs the extra `otel` (`pip install 'fedmkt[otel]'`) and reads
the usual OTEL_ variables: OTEL_EXPORTER_OTLP_ENDPOINT, OTEL_EXPORTER_OTLP_HEADERS, OTEL_TRACES_SAMPLER and so on. Until
then nothing of OpenTelemetry is imported here, and `span` costs one comparison.
"""

import re
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Self

from fedmkt.errors import Refusal
from fedmkt.logs import binding

if TYPE_CHECKING:
    from opentelemetry.sdk.trace.export import SpanExporter
    from opentelemetry.trace import Tracer

HEADER = "traceparent"
_FORM = re.compile(r"^[0-9a-f]{2}-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(?:-.*)?$")

Kind = Literal["internal", "server", "client", "producer", "consumer"]
Value = str | int | float | bool


class TracingMissing(Refusal):
    code = "tracing.missing"
    title = "OpenTelemetry is not installed"


@dataclass(frozen=True, slots=True)
class TraceContext:
    """https://www.w3.org/TR/trace-context/: which trace, and which of its spans is the parent of what comes."""

    trace_id: str
    span_id: str
    sampled: bool = True  # whoever records nothing itself leaves it to those who do

    @classmethod
    def new(cls) -> Self:
        return cls(secrets.token_hex(16), secrets.token_hex(8))

    @classmethod
    def parse(cls, header: str | None) -> "TraceContext | None":
        """None for no header, and for one that is not well formed: the trace then begins here."""
        found = _FORM.match(header or "")
        if found is None or header is None or header.startswith("ff"):
            return None
        trace_id, span_id, flags = found.groups()
        if not trace_id.strip("0") or not span_id.strip("0"):
            return None
        return TraceContext(trace_id, span_id, bool(int(flags, 16) & 1))

    @property
    def header(self) -> str:
        return f"00-{self.trace_id}-{self.span_id}-{'01' if self.sampled else '00'}"

    def child(self) -> "TraceContext":
        return TraceContext(self.trace_id, secrets.token_hex(8), self.sampled)


_current: ContextVar[TraceContext | None] = ContextVar("trace", default=None)
_tracer: "Tracer | None" = None  # one a process, as its log handler is


def current() -> TraceContext | None:
    return _current.get()


def current_header() -> str | None:
    """The `traceparent` of whatever is sent from here."""
    context = _current.get()
    return None if context is None else context.header


class Span:
    """What a block may add to its span; nothing happens where none is recorded."""

    def __init__(self, recorded: object = None) -> None:
        self._recorded = recorded

    def set(self, **attributes: Value | None) -> None:
        if self._recorded is None:
            return
        for name, value in attributes.items():
            if value is not None:
                self._recorded.set_attribute(name.replace("__", "."), value)  # type: ignore[attr-defined]  # a Span

    def rename(self, name: str) -> None:
        if self._recorded is not None:
            self._recorded.update_name(name)  # type: ignore[attr-defined]  # a Span of OpenTelemetry

    def fail(self, why: str) -> None:
        if self._recorded is not None:
            from opentelemetry.trace import Status, StatusCode

            self._recorded.set_status(Status(StatusCode.ERROR, why))  # type: ignore[attr-defined]  # a Span


NO_SPAN = Span()


@contextmanager
def traced(name: str, *, parent: str | None = None, kind: Kind = "internal", **attributes: Value) -> Iterator[Span]:
    """A piece of work with a place in a trace: that of `parent` (a traceparent), else the present one, else a new one.

    Its trace id is bound to the log lines of the block. In attribute names two underscores stand for a dot.
    """
    above = TraceContext.parse(parent) or _current.get()
    if _tracer is None:
        with _entered(above.child() if above is not None else TraceContext.new()):
            yield NO_SPAN
        return
    with _recorded(_tracer, name, kind, above, attributes) as span:
        yield span


@contextmanager
def span(name: str, *, kind: Kind = "internal", **attributes: Value) -> Iterator[Span]:
    """A step of the present piece of work; recorded only."""
    if _tracer is None:
        yield NO_SPAN
        return
    with _recorded(_tracer, name, kind, _current.get(), attributes) as recorded:
        yield recorded


def enabled() -> bool:
    return _tracer is not None


@contextmanager
def _entered(context: TraceContext) -> Iterator[None]:
    token = _current.set(context)
    try:
        with binding(trace_id=context.trace_id):
            yield
    finally:
        _current.reset(token)


@contextmanager
def _recorded(
    tracer: "Tracer", name: str, kind: Kind, above: TraceContext | None, attributes: dict[str, Value]
) -> Iterator[Span]:
    from opentelemetry import trace
    from opentelemetry.context import Context

    context = Context()
    if above is not None:
        flags = trace.TraceFlags(trace.TraceFlags.SAMPLED if above.sampled else trace.TraceFlags.DEFAULT)
        remote = trace.SpanContext(int(above.trace_id, 16), int(above.span_id, 16), is_remote=True, trace_flags=flags)
        context = trace.set_span_in_context(trace.NonRecordingSpan(remote), context)
    named = {key.replace("__", "."): value for key, value in attributes.items()}
    with tracer.start_as_current_span(name, context, trace.SpanKind[kind.upper()], named) as recorded:
        made = recorded.get_span_context()
        here = TraceContext(f"{made.trace_id:032x}", f"{made.span_id:016x}", bool(made.trace_flags & 1))
        with _entered(here):
            yield Span(recorded)


def configure(service: str, exporter: "SpanExporter | None" = None) -> Callable[[], None]:
    """Record spans from now on and send them to `exporter` (OTLP over HTTP); what is returned sends the last ones.

    A trace that comes from outside is recorded if its sender records it; one that begins here always is, unless
    OTEL_TRACES_SAMPLER says otherwise. Raises TracingMissing where the extra `otel` is not installed.
    """
    global _tracer
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as error:
        raise TracingMissing(f"{error}; install 'fedmkt[otel]', or unset FEDMKT_OTEL") from error
    provider = TracerProvider(resource=Resource.create({"service.name": f"fedmkt-{service}"}), shutdown_on_exit=False)
    provider.add_span_processor(BatchSpanProcessor(exporter or OTLPSpanExporter()))
    _tracer = provider.get_tracer("fedmkt")

    def end() -> None:
        global _tracer
        _tracer = None
        provider.shutdown()

    return end
