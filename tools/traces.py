"""An OTLP/gRPC trace receiver in memory: what a demo or a test shows and checks of a trace.

`with Receiver() as receiver:` listens on a port of 127.0.0.1 (`receiver.endpoint`); `trace` gives one trace's spans.
Limit: keeps everything it gets; meant for minutes.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Self

import grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc


@dataclass(frozen=True)
class Span:
    """One span; ids in hexadecimal, `parent_id` empty for a root, times in nanoseconds since 1970."""

    trace_id: str
    span_id: str
    parent_id: str
    service: str
    name: str
    start_ns: int
    end_ns: int


class _Collector(trace_service_pb2_grpc.TraceServiceServicer):
    def __init__(self) -> None:
        self.spans: list[Span] = []
        self.changed = threading.Condition()

    def Export(self, request: Any, context: grpc.ServicerContext) -> Any:
        """Keep the spans."""
        found = []
        for resource_spans in request.resource_spans:
            attributes = {item.key: item.value.string_value for item in resource_spans.resource.attributes}
            service = attributes.get("service.name", "?")
            found += [
                Span(
                    span.trace_id.hex(),
                    span.span_id.hex(),
                    span.parent_span_id.hex(),
                    service,
                    span.name,
                    span.start_time_unix_nano,
                    span.end_time_unix_nano,
                )
                for scope in resource_spans.scope_spans
                for span in scope.spans
            ]
        with self.changed:
            self.spans += found
            self.changed.notify_all()
        return trace_service_pb2.ExportTraceServiceResponse()


class Receiver:
    """Listens while its context lasts."""

    def __init__(self) -> None:
        self._collector = _Collector()
        self._server = grpc.server(ThreadPoolExecutor(max_workers=4))
        trace_service_pb2_grpc.add_TraceServiceServicer_to_server(self._collector, self._server)
        self.endpoint = f"127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}"

    def __enter__(self) -> Self:
        self._server.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._server.stop(grace=None).wait(5)

    def trace(self, trace_id: str, services: int, seconds: float) -> list[Span]:
        """The trace's spans, as soon as they name so many services or `seconds` have passed."""

        def found() -> list[Span]:
            return [span for span in self._collector.spans if span.trace_id == trace_id]

        with self._collector.changed:
            self._collector.changed.wait_for(lambda: len({span.service for span in found()}) >= services, seconds)
            return found()


def tree(spans: Iterable[Span]) -> list[str]:
    """The trace as indented lines, children below their parent in the order of their start."""
    ordered = sorted(spans, key=lambda span: span.start_ns)
    known = {span.span_id for span in ordered}
    lines: list[str] = []

    def walk(parent: str, depth: int) -> None:
        for span in ordered:
            is_root = span.parent_id not in known
            if (is_root and parent == "") or (parent and span.parent_id == parent):
                milliseconds = (span.end_ns - span.start_ns) / 1e6
                lines.append(
                    f"{'   ' * depth}{'└─ ' if depth else ''}{span.name:<12} {milliseconds:9.3f} ms  {span.service}"
                )
                walk(span.span_id, depth + 1)

    walk("", 0)
    return lines
