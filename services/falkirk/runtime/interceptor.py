"""What happens around every call that a Falkirk server answers, in this order:

gate (may this method be called by this directory, or by this caller over TCP?), draining, trace, deadline, handler, error -> status, metrics.

- What the gate refuses (`falkirk.runtime.gates`), or the handler with UNAUTHENTICATED or PERMISSION_DENIED, is told to `Calls.on_refused`, for the
  audit log.
- A call over TCP ends with its caller's certificate, streams too: UNAUTHENTICATED, reason CERTIFICATE_EXPIRED.
- Unary calls have a cap of `UNARY_SECONDS` besides the client's deadline (which gRPC itself enforces): DEADLINE_EXCEEDED, reason SERVER_CAP.
- Streams end with UNAVAILABLE, reason DRAINING, when the server drains: at once where the handler waits, else after the message being sent.
- A traceparent that is sampled makes a server span; without one a share of calls makes a root (telemetry.sample_ratio), health and
  reflection never.

Handlers are coroutines, or async generators for response streams.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, Final, NoReturn

import grpc
import structlog
from prometheus_client import CollectorRegistry, Counter, Histogram

from falkirk.runtime import callers, sampling, telemetry, trace_context
from falkirk.runtime.errors import FalkirkError, from_rpc
from falkirk.runtime.gates import REFUSING, CallRefused, Gate
from falkirk.runtime.trace_context import SpanContext

UNARY_SECONDS: Final = 30.0
_BUCKETS: Final = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1.0, 5.0, 30.0)

log = structlog.get_logger()


class Calls:
    """The calls in progress on all roads of one server, and what is counted about them."""

    def __init__(self, service: str, registry: CollectorRegistry, sample_ratio: float) -> None:
        self.draining = False
        self.on_refused: Callable[[str, CallRefused], None] = lambda method, refused: None
        """Called with the method and what was said, for each call that is refused for who calls."""
        self._streams: set[_Stream] = set()
        self._bound = sampling.bound(sample_ratio)
        self._count = Counter(
            "falkirk_rpcs",
            "Calls answered; road is a socket directory, or tcp.",
            ("service", "method", "code", "road"),
            registry=registry,
        )
        self._seconds = Histogram(
            "falkirk_rpc_seconds", "Time of unary calls.", ("service", "method"), registry=registry, buckets=_BUCKETS
        )
        self._service = service

    def end_streams(self) -> None:
        """From now on every stream ends with UNAVAILABLE, and new calls are refused the same way."""
        self.draining = True
        for stream in self._streams:
            if stream.waiting:
                stream.ended = True
                stream.task.cancel()

    @contextlib.asynccontextmanager
    async def call(
        self, method: str, gate: Gate, context: Any, *, unary: bool
    ) -> AsyncIterator[Callable[[Any, bool], None]]:
        """Everything that surrounds a handler. Yields what must be called with each request, and whether it is the first one, before the handler has it."""
        code = grpc.StatusCode.OK
        start = time.perf_counter()
        start_ns = time.time_ns()
        token = caller_token = caller = None
        parent: SpanContext | None = None
        limit = UNARY_SECONDS if unary else None
        try:
            caller = gate.enter(method, context)
            if self.draining and not method.startswith("/grpc."):
                raise draining()
            if caller is not None:
                caller_token = callers.current.set(caller)
                limit = min(limit or caller.end, max(0.0, caller.end - time.time()))
            span, parent = self._span(method, context)
            token = trace_context.current.set(span) if span else None
            async with asyncio.timeout(limit) as cap:
                yield lambda request, first: gate.look(method, context, caller, request, first=first)
        except FalkirkError as error:
            code = error.code
            if isinstance(error, CallRefused):
                self.on_refused(method, error)
            elif code in REFUSING:
                self.on_refused(method, gate.told(error, context, caller))
            await _abort(context, error)
        except grpc.aio.AioRpcError as error:
            failed = from_rpc(error)
            code = failed.code
            await _abort(context, failed)
        except NotImplementedError:
            code = grpc.StatusCode.UNIMPLEMENTED
            await _abort(context, FalkirkError(code, "NOT_BUILT", f"{method.removeprefix('/')} is not built"))
        except grpc.aio.AbortError:
            code = _BY_NUMBER.get(_number(context.code()), grpc.StatusCode.UNKNOWN)
            raise
        except asyncio.CancelledError:
            code = grpc.StatusCode.CANCELLED
            raise
        except TimeoutError as error:
            if not cap.expired():
                code = grpc.StatusCode.INTERNAL
                await _abort(context, _internal(method, error))
            if caller is not None and time.time() >= caller.end:
                code = grpc.StatusCode.UNAUTHENTICATED
                expired = FalkirkError(code, "CERTIFICATE_EXPIRED", "the client certificate has expired")
                self.on_refused(method, gate.told(expired, context, caller))
                await _abort(context, expired)
            code = grpc.StatusCode.DEADLINE_EXCEEDED
            await _abort(context, FalkirkError(code, "SERVER_CAP", f"not answered within {UNARY_SECONDS:g} s"))
        except Exception as error:  # noqa: BLE001 - the one place where a handler's fault becomes a status
            code = grpc.StatusCode.INTERNAL
            await _abort(context, _internal(method, error))
        finally:
            self._count.labels(self._service, method, code.name, gate.name).inc()
            if unary:
                self._seconds.labels(self._service, method).observe(time.perf_counter() - start)
            if caller_token is not None:
                callers.current.reset(caller_token)
            if token is not None:
                _emit(method, parent, start_ns, code)
                trace_context.current.reset(token)

    @contextlib.contextmanager
    def stream(self) -> Any:
        """Registers the running task as one that a drain may end; yields its record."""
        task = asyncio.current_task()
        assert task is not None
        record = _Stream(task)
        self._streams.add(record)
        try:
            yield record
        except asyncio.CancelledError:
            if not record.ended:
                raise
            task.uncancel()
            raise draining() from None
        finally:
            self._streams.discard(record)

    def _span(self, method: str, context: Any) -> tuple[SpanContext | None, SpanContext | None]:
        """The span of this call, and its parent where the client sent one."""
        for key, value in context.invocation_metadata() or ():
            if key == trace_context.HEADER:
                parent = trace_context.parse(value)
                if parent is not None:
                    recorded = parent.sampled and telemetry.exporting()
                    return (parent._replace(span_id=telemetry.new_span_id()) if recorded else parent), parent
        if telemetry.exporting() and not method.startswith("/grpc."):
            trace_id = secrets.token_bytes(16)
            if sampling.sampled(trace_id, self._bound):
                return SpanContext(trace_id, telemetry.new_span_id(), True), None
        return None, None


class _Stream:
    """One stream in progress; `waiting` while its handler runs (it may be cancelled), not while gRPC sends."""

    __slots__ = ("ended", "task", "waiting")

    def __init__(self, task: asyncio.Task[Any]) -> None:
        self.task, self.waiting, self.ended = task, False, False


class GateInterceptor(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]  # generic in the stubs only
    """Wraps the handlers of the server behind one gate."""

    def __init__(self, gate: Gate, calls: Calls) -> None:
        self._gate, self._calls = gate, calls
        self._wrapped: dict[str, tuple[Any, Any]] = {}

    async def intercept_service(self, continuation: Callable[[Any], Awaitable[Any]], details: Any) -> Any:
        """The wrapped handler, made once a method; None (UNIMPLEMENTED) for methods that nobody has."""
        handler = await continuation(details)
        if handler is None:
            return None
        method = details.method
        known = self._wrapped.get(method)
        if known is None or known[0] is not handler:
            known = self._wrapped[method] = (handler, self._wrap(method, handler))
        return known[1]

    def _wrap(self, method: str, handler: Any) -> Any:
        codec = {
            "request_deserializer": handler.request_deserializer,
            "response_serializer": handler.response_serializer,
        }
        if not handler.response_streaming:
            behaviour = handler.stream_unary if handler.request_streaming else handler.unary_unary
            make = (
                grpc.stream_unary_rpc_method_handler
                if handler.request_streaming
                else grpc.unary_unary_rpc_method_handler
            )
            return make(self._single(method, behaviour, handler), **codec)
        behaviour = handler.stream_stream if handler.request_streaming else handler.unary_stream
        make = (
            grpc.stream_stream_rpc_method_handler if handler.request_streaming else grpc.unary_stream_rpc_method_handler
        )
        if inspect.isasyncgenfunction(behaviour):
            return make(self._many(method, behaviour, handler), **codec)
        return make(self._single(method, behaviour, handler), **codec)

    def _single(self, method: str, behaviour: Any, handler: Any) -> Any:
        """A handler that is awaited: unary answers, and response streams that write by themselves."""
        calls, gate, streamed = self._calls, self._gate, handler.request_streaming
        unary = not streamed and not handler.response_streaming

        async def wrapped(request: Any, context: Any) -> Any:
            async with calls.call(method, gate, context, unary=unary) as look:
                request = _looked(look, request) if streamed else _look(look, request)
                if unary:
                    return await behaviour(request, context)
                with calls.stream() as stream:
                    stream.waiting = True
                    return await behaviour(request, context)

        return wrapped

    def _many(self, method: str, behaviour: Any, handler: Any) -> Any:
        """A handler that yields its answers."""
        calls, gate, streamed = self._calls, self._gate, handler.request_streaming
        itself = method.startswith("/grpc.health.")  # Watch says NOT_SERVING first, then ends by itself

        async def wrapped(request: Any, context: Any) -> Any:
            async with calls.call(method, gate, context, unary=False) as look:
                request = _looked(look, request) if streamed else _look(look, request)
                with calls.stream() as stream:
                    async with contextlib.aclosing(behaviour(request, context)) as answers:
                        while True:
                            if calls.draining and not itself:
                                raise draining()
                            stream.waiting = not itself
                            try:
                                answer = await anext(answers)
                            except StopAsyncIteration:
                                return
                            finally:
                                stream.waiting = False
                            yield answer

        return wrapped


def _look(look: Callable[[Any, bool], None], request: Any) -> Any:
    look(request, True)
    return request


async def _looked(look: Callable[[Any, bool], None], requests: AsyncIterator[Any]) -> AsyncIterator[Any]:
    """A stream of requests, each looked at before the handler has it."""
    first = True
    async for request in requests:
        look(request, first)
        first = False
        yield request


def draining() -> FalkirkError:
    """What a client of a server that stops is told."""
    return FalkirkError(grpc.StatusCode.UNAVAILABLE, "DRAINING", "the service is stopping")


def _internal(method: str, error: Exception) -> FalkirkError:
    identity = secrets.token_hex(8)
    log.error("call_failed", method=method, id=identity, exc_info=error)
    return FalkirkError(
        grpc.StatusCode.INTERNAL, "INTERNAL", f"internal error {identity}; the service's log has the rest", id=identity
    )


async def _abort(context: Any, error: FalkirkError) -> NoReturn:
    await context.abort(error.code, error.message, error.trailing_metadata())
    raise AssertionError("abort returned")


def _emit(method: str, parent: SpanContext | None, start_ns: int, code: grpc.StatusCode) -> None:
    span = trace_context.current.get()
    if span is None or not span.sampled or span == parent:
        return
    service, _, name = method.removeprefix("/").partition("/")
    telemetry.emit_span(
        method.removeprefix("/"),
        span.trace_id,
        parent.span_id if parent else None,
        span.span_id,
        start_ns,
        time.time_ns(),
        {"rpc.system": "grpc", "rpc.service": service, "rpc.method": name, "rpc.grpc.status_code": code.value[0]},
        "" if code is grpc.StatusCode.OK else code.name,
        kind="server",
    )


def _number(code: Any) -> int:
    return int(code.value[0]) if isinstance(code, grpc.StatusCode) else int(code or 0)


_BY_NUMBER: Final = {code.value[0]: code for code in grpc.StatusCode}
