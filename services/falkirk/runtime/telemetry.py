"""Logs and spans of a service's parent process.

`setup` makes structlog (and the standard library's logging below it) write the lines that `falkirk.runtime.log` describes, with `trace_id` where a
trace is current. Only where `telemetry.otlp_endpoint` is set it imports OpenTelemetry and exports spans over OTLP/gRPC in batches, at most
a second late; the resource is `service.name` "falkirk-<service>".

Spans of flows happen in packet workers, which know ids and times but not OpenTelemetry: the parent calls `emit_span` with both. `emit_span` is
free where nothing is exported. A trace's root is the flow's own span; its id is the flow's id.

Limits: the queue holds 8,192 spans and drops beyond that; a receiver that is away loses spans, never delays a call.
"""

from __future__ import annotations

import logging
import secrets
import sys
import threading
import time
from collections.abc import Mapping, MutableMapping
from typing import TYPE_CHECKING, Any, Final, Literal

import structlog

from falkirk.runtime import log
from falkirk.runtime.settings import Shell
from falkirk.runtime.trace_context import SpanContext, current

if TYPE_CHECKING:
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import SpanProcessor

Attributes = Mapping[str, str | bool | int | float]
QUEUE_SPANS: Final = 8192
BATCH_MILLISECONDS: Final = 1000
EXPORT_SECONDS: Final = 2
"""One export with its retries."""
SHUTDOWN_SECONDS: Final = 2.5
_SCOPE: Final = "falkirk"

_exporting: _Exporting | None = None


class _Exporting:
    """What `setup` made, where an endpoint is configured."""

    def __init__(self, processor: SpanProcessor, resource: Resource) -> None:
        self.processor, self.resource = processor, resource


def setup(name: str, shell: Shell) -> None:
    """Logs as the settings say, and exports spans where an endpoint is configured. `name` is the service's ("flow")."""
    global _exporting
    _setup_logs(name, shell)
    shutdown()
    if shell.telemetry.otlp_endpoint is not None:
        _exporting = _export(name, shell.telemetry.otlp_endpoint, shell.node)


def exporting() -> bool:
    """True where spans go anywhere."""
    return _exporting is not None


def shutdown() -> None:
    """Sends what is queued and stops exporting; gives up after `SHUTDOWN_SECONDS`, for a receiver that is away must not hold up a drain."""
    global _exporting
    if _exporting is not None:
        # A daemon: the exporter retries for longer than we wait, and the process may end meanwhile.
        last = threading.Thread(target=_exporting.processor.shutdown, name="telemetry-shutdown", daemon=True)
        _exporting = None
        last.start()
        last.join(SHUTDOWN_SECONDS)


def new_span_id() -> bytes:
    """Eight random bytes, not all zero."""
    return secrets.token_bytes(7) + b"\x01"


def emit_span(
    name: str,
    trace_id: bytes,
    parent_span_id: bytes | None,
    span_id: bytes | None,
    start_ns: int,
    end_ns: int,
    attributes: Attributes | None = None,
    status: str = "",
    *,
    kind: Literal["internal", "server"] = "internal",
) -> bytes:
    """Exports a finished span of known ids and wall-clock times; returns its id (made where `span_id` is None or empty).

    `trace_id` has 16 bytes, span ids have 8. `status`: "" leaves it unset, "ok" says so, any other text describes an error.
    """
    span_id = span_id or new_span_id()
    if _exporting is None:
        return span_id
    from opentelemetry.sdk.trace import ReadableSpan
    from opentelemetry.sdk.util.instrumentation import InstrumentationScope
    from opentelemetry.trace import SpanContext as OtelContext
    from opentelemetry.trace import SpanKind, Status, StatusCode, TraceFlags

    def context(span: bytes, remote: bool) -> OtelContext:
        return OtelContext(
            int.from_bytes(trace_id, "big"), int.from_bytes(span, "big"), remote, TraceFlags(TraceFlags.SAMPLED)
        )

    code = {"": StatusCode.UNSET, "ok": StatusCode.OK}.get(status, StatusCode.ERROR)
    _exporting.processor.on_end(
        ReadableSpan(
            name,
            context=context(span_id, False),
            parent=context(parent_span_id, True) if parent_span_id else None,
            resource=_exporting.resource,
            attributes=dict(attributes or {}),
            kind=SpanKind.SERVER if kind == "server" else SpanKind.INTERNAL,
            instrumentation_scope=InstrumentationScope(_SCOPE),
            status=Status(code, status if code is StatusCode.ERROR else None),
            start_time=start_ns,
            end_time=end_ns,
        )
    )
    return span_id


def child_of_current() -> SpanContext | None:
    """A new span below the current one, to be emitted when it is over; None where no sampled trace is current."""
    parent = current.get()
    return None if parent is None or not parent.sampled else SpanContext(parent.trace_id, new_span_id(), True)


def _export(name: str, endpoint: str, node: str) -> _Exporting:
    from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    exporter = OTLPSpanExporter(endpoint=endpoint, insecure=True, timeout=EXPORT_SECONDS)
    processor = BatchSpanProcessor(exporter, max_queue_size=QUEUE_SPANS, schedule_delay_millis=BATCH_MILLISECONDS)
    return _Exporting(processor, Resource.create({"service.name": f"falkirk-{name}", "host.name": node}))


def _setup_logs(name: str, shell: Shell) -> None:
    level = log.LEVELS[shell.log.level]

    def render(_logger: Any, method: str, event: MutableMapping[str, Any]) -> bytes:
        head = {
            "ts": log.timestamp(time.time_ns()),
            "level": event.pop("level", method),
            "service": name,
            "event": event.pop("event"),
        }
        span = current.get()
        if span is not None:
            event.setdefault("trace_id", span.trace_id.hex())
        return log.line(shell.log.format, head | dict(event)).rstrip(b"\n")

    structlog.configure(
        processors=[structlog.contextvars.merge_contextvars, structlog.processors.format_exc_info, render],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=structlog.BytesLoggerFactory(sys.stderr.buffer),
        cache_logger_on_first_use=False,
    )
    root = logging.getLogger()
    root.handlers[:] = [_Stdlib()]
    root.setLevel(max(level, logging.WARNING))


class _Stdlib(logging.Handler):
    """Libraries that use the standard library's logging end up in the same lines."""

    def emit(self, record: logging.LogRecord) -> None:
        """Hands a record to structlog; its logger's name becomes the field `logger`."""
        fields: dict[str, Any] = {"logger": record.name, "message": record.getMessage()}
        if record.exc_info:
            fields["exc_info"] = record.exc_info
        structlog.get_logger().log(record.levelno, "library", **fields)
