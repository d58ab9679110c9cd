"""`falkirk trace receive`: an OTLP receiver that prints traces as trees.

A tool to look at what a mesh sends, with nothing to install: point `telemetry.otlp_endpoint` at it. It answers
opentelemetry.proto.collector.trace.v1.TraceService/Export on plain-text gRPC, collects spans by trace, and prints a trace once nothing
more has come for it for `--quiet` seconds. `Receiver` is what tests and the demo use; `Span` and `render` know nothing of gRPC.

A span whose parent hasn't come is printed as a root with a mark, so a broken link is seen. Limits: the newest 1,000 traces are kept; nothing is stored.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from concurrent import futures
from threading import Condition
from typing import Annotated, Any, Final

import msgspec
import typer

MAX_TRACES: Final = 1000
SERVICE: Final = "opentelemetry.proto.collector.trace.v1.TraceService"


class Span(msgspec.Struct, frozen=True):
    """A finished span; ids in hexadecimal, times in wall-clock nanoseconds."""

    trace_id: str
    span_id: str
    parent_id: str
    """Empty for a root."""
    service: str
    name: str
    start_ns: int
    end_ns: int
    attributes: dict[str, Any] = {}
    error: str = ""
    """What went wrong; empty where nothing did."""


def render(spans: Sequence[Span]) -> str:
    """One trace as a tree: service, name, milliseconds since the trace's start, duration, attributes."""
    known = {span.span_id for span in spans}
    children: dict[str, list[Span]] = {}
    for span in sorted(spans, key=lambda span: (span.start_ns, span.end_ns)):
        children.setdefault(span.parent_id if span.parent_id in known else "", []).append(span)
    start = min(span.start_ns for span in spans)
    lines = [f"trace {spans[0].trace_id}  {len(spans)} spans, {len({span.service for span in spans})} services"]
    for root in children.get("", []):
        lines += _branch(root, children, start, "", "")
    return "\n".join(lines) + "\n"


def _branch(span: Span, children: dict[str, list[Span]], start: int, first: str, rest: str) -> Iterator[str]:
    attributes = "".join(f" {key}={value}" for key, value in sorted(span.attributes.items()))
    lost = " (parent not received)" if span.parent_id and not first else ""
    error = f" ERROR {span.error}" if span.error else ""
    yield (
        f"{first}{span.service} {span.name}  +{(span.start_ns - start) / 1e6:.3f} ms"
        f"  {(span.end_ns - span.start_ns) / 1e6:.3f} ms{error}{lost}{attributes}"
    )
    below = children.get(span.span_id, [])
    for place, child in enumerate(below):
        last = place == len(below) - 1
        yield from _branch(child, children, start, rest + ("└─ " if last else "├─ "), rest + ("   " if last else "│  "))


class Receiver:
    """Collects traces from OTLP/gRPC; a context manager. `port` is what it got where 0 was asked for."""

    def __init__(self, host: str = "127.0.0.1", port: int = 0) -> None:
        import grpc
        from opentelemetry.proto.collector.trace.v1 import trace_service_pb2

        self._traces: OrderedDict[str, dict[str, Span]] = OrderedDict()
        self._touched: dict[str, float] = {}
        self._changed = Condition()

        def export(request: trace_service_pb2.ExportTraceServiceRequest, _context: Any) -> Any:
            self._take(list(_spans(request)))
            return trace_service_pb2.ExportTraceServiceResponse()

        handler = grpc.unary_unary_rpc_method_handler(
            export,
            request_deserializer=trace_service_pb2.ExportTraceServiceRequest.FromString,
            response_serializer=trace_service_pb2.ExportTraceServiceResponse.SerializeToString,
        )
        self._server = grpc.server(futures.ThreadPoolExecutor(2), options=(("grpc.so_reuseport", 0),))
        self._server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler(SERVICE, {"Export": handler})])
        try:
            self.port = self._server.add_insecure_port(f"{host}:{port}")
        except RuntimeError as error:
            raise OSError(f"{host}:{port} can't be bound: {error}") from error
        self.endpoint = f"{host}:{self.port}"

    def __enter__(self) -> Receiver:
        self._server.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.stop(0.5).wait()

    def traces(self) -> dict[str, list[Span]]:
        """What has come so far, by trace id, oldest trace first."""
        with self._changed:
            return {trace_id: list(spans.values()) for trace_id, spans in self._traces.items()}

    def wait(self, timeout: float) -> bool:
        """Waits for anything new; False where nothing came in time."""
        with self._changed:
            return self._changed.wait(timeout)

    def finished(self, quiet: float) -> list[list[Span]]:
        """Takes out the traces to which nothing was added for `quiet` seconds."""
        now = time.monotonic()
        with self._changed:
            ready = [trace_id for trace_id, at in self._touched.items() if now - at >= quiet]
            for trace_id in ready:
                del self._touched[trace_id]
            return [list(self._traces.pop(trace_id).values()) for trace_id in ready if trace_id in self._traces]

    def _take(self, spans: Iterable[Span]) -> None:
        with self._changed:
            for span in spans:
                self._traces.setdefault(span.trace_id, {})[span.span_id] = span
                self._touched[span.trace_id] = time.monotonic()
            while len(self._traces) > MAX_TRACES:
                self._touched.pop(self._traces.popitem(last=False)[0], None)
            self._changed.notify_all()


def _spans(request: Any) -> Iterator[Span]:
    for of_resource in request.resource_spans:
        service = next(
            (_value(item.value) for item in of_resource.resource.attributes if item.key == "service.name"), "unknown"
        )
        for of_scope in of_resource.scope_spans:
            for span in of_scope.spans:
                failed = span.status.code == 2  # STATUS_CODE_ERROR
                yield Span(
                    trace_id=span.trace_id.hex(),
                    span_id=span.span_id.hex(),
                    parent_id=span.parent_span_id.hex(),
                    service=str(service),
                    name=span.name,
                    start_ns=span.start_time_unix_nano,
                    end_ns=span.end_time_unix_nano,
                    attributes={item.key: _value(item.value) for item in span.attributes},
                    error=(span.status.message or "error") if failed else "",
                )


def _value(value: Any) -> Any:
    kind = value.WhichOneof("value")
    if kind in ("string_value", "bool_value", "int_value", "double_value"):
        return getattr(value, kind)
    return str(getattr(value, kind)).strip() if kind else ""


def register(app: typer.Typer) -> None:
    """Adds `falkirk trace`."""
    group = typer.Typer(help="Look at traces.", no_args_is_help=True)
    group.callback()(_group)
    group.command("receive")(receive)
    app.add_typer(group, name="trace")


def _group() -> None:
    """Look at traces."""


def receive(
    listen: Annotated[str, typer.Option(help="host:port to listen on.")] = "127.0.0.1:4317",
    quiet: Annotated[float, typer.Option(min=0.0, help="Seconds without news after which a trace is printed.")] = 2.0,
    count: Annotated[int, typer.Option(min=0, help="End after so many traces; 0 goes on until interrupted.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a span, one line each.")] = False,
) -> None:
    """Receive spans over OTLP/gRPC and print each trace as a tree.

    Point telemetry.otlp_endpoint of a mesh's settings here.
    """
    from falkirk.runtime.settings import host_port

    try:
        host, port = host_port(listen)
        receiver = Receiver(f"[{host}]" if ":" in host else host, port)
    except (ValueError, OSError) as error:
        raise typer.BadParameter(str(error), param_hint="--listen") from error
    printed = 0
    with receiver:
        typer.echo(f"listening on {receiver.endpoint}", err=True)
        try:
            while not count or printed < count:
                receiver.wait(0.2)
                for spans in receiver.finished(quiet):
                    printed += 1
                    if as_json:
                        typer.echo("\n".join(msgspec.json.encode(span).decode() for span in spans))
                    else:
                        typer.echo(render(spans))
        except KeyboardInterrupt:
            return
