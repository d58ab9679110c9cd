"""Channels to services of the same machine, over their unix sockets.

A channel reconnects by itself, trying again after 50 ms at first and 500 ms at last. It pings every 10 s, so a peer that was stopped
without closing its sockets is noticed 15 s later at most; a call that must not wait that long sets its own deadline. The current span goes
along as `traceparent`.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

import grpc

from falkirk.runtime import trace_context
from falkirk.runtime.errors import FalkirkError
from falkirk.runtime.settings import ROADS, UNIX_PATH_MAX, Road, Shell

MESSAGE_BYTES: Final = 16 * 1024 * 1024
OPTIONS: Final = (
    ("grpc.initial_reconnect_backoff_ms", 50),
    ("grpc.min_reconnect_backoff_ms", 200),  # also how long one attempt may take
    ("grpc.max_reconnect_backoff_ms", 500),
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.max_receive_message_length", MESSAGE_BYTES),
    ("grpc.max_send_message_length", MESSAGE_BYTES),
    ("grpc.enable_http_proxy", 0),
    ("grpc.use_local_subchannel_pool", 1),
)


def channel(shell: Shell, service: str, road: Road = "mesh") -> grpc.aio.Channel:
    """A channel to a service on a road, for use in the loop that makes it. It may be made before the service is there."""
    return grpc.aio.insecure_channel(
        f"unix:{shell.socket(road, service)}", options=OPTIONS, interceptors=[kind() for kind in _INTERCEPTORS]
    )


def sync_channel(run_dir: Path, service: str) -> grpc.Channel:
    """A blocking channel by the most privileged road that this user can open.

    Raises FalkirkError UNAVAILABLE, reason SERVICE_UNREACHABLE, naming what stood in the way of each road.
    """
    path, _ = open_road(run_dir, service)
    return grpc.insecure_channel(f"unix:{path}", options=OPTIONS)


def open_road(run_dir: Path, service: str) -> tuple[Path, Road]:
    """The socket and road that `sync_channel` takes."""
    obstacles = []
    for road in ROADS:
        path = run_dir / road / f"{service}.sock"
        error = obstacle(path)
        if error is None:
            return path, road
        obstacles.append(f"{road}/: {error}")
    raise FalkirkError(
        grpc.StatusCode.UNAVAILABLE,
        "SERVICE_UNREACHABLE",
        f"{service} can't be reached in {run_dir} ({'; '.join(obstacles)}); is `falkirk up` running, with this --run-dir?",
        service=service,
        run_dir=run_dir,
    )


def obstacle(path: Path) -> str | None:
    """Why nobody answers at a unix socket; None where it accepts connections."""
    if len(os.fsencode(path)) > UNIX_PATH_MAX:
        return "path too long"
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(1.0)
        try:
            probe.connect(os.fsencode(path))
        except OSError as error:
            return (error.strerror or str(error)).lower()
    return None


def _traced(details: grpc.aio.ClientCallDetails) -> grpc.aio.ClientCallDetails:
    """The call's details with the current span in their metadata."""
    span = trace_context.current.get()
    if span is None:
        return details
    metadata = grpc.aio.Metadata(*(details.metadata or ()))
    metadata.add(trace_context.HEADER, trace_context.render(span))
    return grpc.aio.ClientCallDetails(
        details.method, details.timeout, metadata, details.credentials, details.wait_for_ready
    )


Continuation = Callable[[grpc.aio.ClientCallDetails, Any], Any]


class _UnaryUnary(grpc.aio.UnaryUnaryClientInterceptor):  # type: ignore[type-arg]  # generic in the stubs only
    async def intercept_unary_unary(
        self, continuation: Continuation, client_call_details: grpc.aio.ClientCallDetails, request: Any
    ) -> Any:
        return await continuation(_traced(client_call_details), request)


class _UnaryStream(grpc.aio.UnaryStreamClientInterceptor):  # type: ignore[type-arg]  # generic in the stubs only
    async def intercept_unary_stream(
        self, continuation: Continuation, client_call_details: grpc.aio.ClientCallDetails, request: Any
    ) -> Any:
        return await continuation(_traced(client_call_details), request)


class _StreamUnary(grpc.aio.StreamUnaryClientInterceptor):  # type: ignore[type-arg]  # generic in the stubs only
    async def intercept_stream_unary(
        self, continuation: Continuation, client_call_details: grpc.aio.ClientCallDetails, request_iterator: Any
    ) -> Any:
        return await continuation(_traced(client_call_details), request_iterator)


class _StreamStream(grpc.aio.StreamStreamClientInterceptor):  # type: ignore[type-arg]  # generic in the stubs only
    async def intercept_stream_stream(
        self, continuation: Continuation, client_call_details: grpc.aio.ClientCallDetails, request_iterator: Any
    ) -> Any:
        return await continuation(_traced(client_call_details), request_iterator)


_INTERCEPTORS: Final[Sequence[Callable[[], Any]]] = (_UnaryUnary, _UnaryStream, _StreamUnary, _StreamStream)
