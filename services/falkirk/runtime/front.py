"""The TCP front of a service: TLS ends here, and gRPC behind it hears who calls.

    TCP ──► TLS 1.3 ──► whose certificate? ──► unix socket from an abstract name ──► gRPC: peer() is that name ──► the TCP gate asks `find`

gRPC's own TLS either demands a client certificate or never asks for one, and says nothing of a handshake that failed. Here a caller without a certificate
gets as far as its call, which the gate refuses by name (or lets pass, where the request brings its own authority), an expired one is told so, and
every failed handshake is told to `on_refused`.

The name is 128 random bits, and the kernel gives it to one socket at a time: a process of this machine that found the socket behind the front has
no name that `find` knows.

The protocol `ROOTS`, chosen by ALPN, answers with the mesh's roots and ends: how somebody who has only a fingerprint of one gets them.

A new certificate, new roots: `renew` swaps the TLS context for connections to come. `sweep` closes the connections of callers that were revoked meanwhile (who
comes revoked or expired is told so at each call; streams end with their certificate by themselves), and those of strangers after `STRANGER_SECONDS`: who has no
valid certificate has a call to make, not a connection to keep.

Limits: `MOST` connections, of which `STRANGERS` may be of strangers, and `HANDSHAKE_SECONDS` to say hello; more are closed at once, counted, and not recorded.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import socket
import ssl
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import structlog
from prometheus_client import CollectorRegistry, Counter

from falkirk.decide.callers import Caller, NotAnIdentity
from falkirk.runtime.certificates import ROOTS, caller_of
from falkirk.runtime.settings import SettingsError, host_port

MOST: Final = 1024
STRANGERS: Final = 256
STRANGER_SECONDS: Final = 60.0
HANDSHAKE_SECONDS: Final = 5.0
CHUNK: Final = 65536
HTTP2: Final = "h2"
SWEEP_SECONDS: Final = 1.0

log = structlog.get_logger()


@dataclass(eq=False, slots=True)
class _Connection:
    caller: Caller | None
    peer: str
    stranger: bool
    """Came without a certificate, or with one that is expired or revoked."""
    task: asyncio.Task[None]
    since: float = field(default_factory=time.monotonic)


class Front:
    """One listener. `on_refused(reason, message, peer)` hears of handshakes that failed."""

    def __init__(
        self, address: str, backend: Path, metrics: CollectorRegistry, on_refused: Callable[[str, str, str], None]
    ) -> None:
        self._backend, self._on_refused = backend, on_refused
        self._context: ssl.SSLContext | None = None
        self._roots = b""
        self._connections: dict[str, _Connection] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        """Every connection's task, from its handshake to its end."""
        self._revoked: Collection[str] = ()
        self._closed = Counter(
            "falkirk_tcp_closed",
            "TCP connections that were closed before a call, by reason.",
            ("reason",),
            registry=metrics,
        )
        self._socket = _listen(address)

    @property
    def address(self) -> tuple[str, int]:
        """Where it listens: host and port."""
        host, port = self._socket.getsockname()[:2]
        return str(host), int(port)

    def find(self, peer: str) -> tuple[Caller | None, str]:
        """By gRPC's name of a peer: its caller, and its address. Raises KeyError."""
        connection = self._connections[peer.removeprefix("unix-abstract:")]
        return connection.caller, connection.peer

    def renew(self, context: ssl.SSLContext, roots: str) -> None:
        """Connections to come get this certificate and are verified by these roots."""
        context.set_alpn_protocols([HTTP2, ROOTS])
        self._context, self._roots = context, roots.encode()

    def sweep(self, revoked: Collection[str]) -> None:
        """Close connections of callers that were revoked meanwhile, and of strangers that have been here for long."""
        self._revoked = revoked
        late = time.monotonic() - STRANGER_SECONDS
        for connection in self._connections.values():
            gone = connection.caller is not None and connection.caller.id in revoked
            if connection.since < late if connection.stranger else gone:
                connection.task.cancel()

    async def run(self) -> None:
        """Accept until cancelled; then all connections end."""
        loop = asyncio.get_running_loop()
        try:
            while True:
                try:
                    accepted, address = await loop.sock_accept(self._socket)
                except OSError as error:
                    log.warning("tcp_accept_failed", why=str(error))
                    await asyncio.sleep(0.1)
                    continue
                if self._context is None or len(self._tasks) >= MOST:
                    self._closed.labels("no_certificate_yet" if self._context is None else "too_many").inc()
                    accepted.close()
                    continue
                task = loop.create_task(self._serve(accepted, _named(address), self._context))
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)
        finally:
            self._socket.close()
            for task in self._tasks:
                task.cancel()
            if self._tasks:
                await asyncio.wait(self._tasks)

    async def _serve(self, accepted: socket.socket, peer: str, context: ssl.SSLContext) -> None:
        """One connection, from its handshake to its end."""
        loop = asyncio.get_running_loop()
        reader = asyncio.StreamReader(limit=CHUNK)
        protocol = asyncio.StreamReaderProtocol(reader)
        try:
            accepted.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            transport, _ = await loop.connect_accepted_socket(
                lambda: protocol,
                accepted,
                ssl=context,
                ssl_handshake_timeout=HANDSHAKE_SECONDS,
                ssl_shutdown_timeout=1.0,
            )
        except (OSError, TimeoutError) as error:  # ssl's errors are OSErrors
            accepted.close()
            self._refuse(*_why(error), peer)
            return
        writer = asyncio.StreamWriter(transport, protocol, reader, loop)
        try:
            tls: ssl.SSLObject = transport.get_extra_info("ssl_object")
            if tls.selected_alpn_protocol() == ROOTS:
                writer.write(self._roots)
                await writer.drain()
                return
            der = tls.getpeercert(binary_form=True)
            try:
                caller = caller_of(der) if der else None
            except NotAnIdentity as error:
                self._refuse("CERTIFICATE_UNKNOWN", str(error), peer)
                return
            await self._carry(reader, writer, caller, peer)
        except OSError:
            return  # either side went away
        finally:
            writer.close()

    async def _carry(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, caller: Caller | None, peer: str
    ) -> None:
        """Bytes both ways, until one side ends."""
        task = asyncio.current_task()
        assert task is not None
        stranger = caller is None or caller.end <= time.time() or caller.id in self._revoked
        if stranger and sum(other.stranger for other in self._connections.values()) >= STRANGERS:
            self._closed.labels("too_many_strangers").inc()
            return
        name = f"falkirk-{secrets.token_hex(16)}"
        self._connections[name] = _Connection(caller, peer, stranger, task)
        behind = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            behind.setblocking(False)
            behind.bind(b"\0" + name.encode())
            await asyncio.get_running_loop().sock_connect(behind, str(self._backend))
            inner_reader, inner_writer = await asyncio.open_connection(sock=behind)
            try:
                ways = [
                    asyncio.create_task(_pump(reader, inner_writer)),
                    asyncio.create_task(_pump(inner_reader, writer)),
                ]
                try:
                    await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
                finally:
                    for way in ways:
                        way.cancel()
                    await asyncio.wait(ways)
            finally:
                inner_writer.close()
        finally:
            # The name is forgotten before another socket could have it.
            del self._connections[name]
            behind.close()

    def _refuse(self, reason: str, message: str, peer: str) -> None:
        self._closed.labels(reason.lower()).inc()
        if reason != "HANDSHAKE_LEFT":
            self._on_refused(reason, message, peer)


async def _pump(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError):
        while data := await source.read(CHUNK):
            sink.write(data)
            await sink.drain()


def _why(error: Exception) -> tuple[str, str]:
    """Reason and message of a handshake that failed."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return "CERTIFICATE_UNTRUSTED", f"the client certificate isn't the mesh's: {error.verify_message}"
    if isinstance(error, ssl.SSLError):
        return "HANDSHAKE_FAILED", f"no TLS handshake: {(error.reason or str(error)).lower().replace('_', ' ')}"
    if isinstance(error, (TimeoutError, ConnectionAbortedError)):
        return "HANDSHAKE_SLOW", f"no TLS handshake within {HANDSHAKE_SECONDS:g} s"
    # A peer that left: scanners and health checks do nothing else, and there is nothing to refuse.
    return "HANDSHAKE_LEFT", "the peer left in the handshake"


def _named(address: tuple[str, int] | tuple[str, int, int, int]) -> str:
    host, port = address[:2]
    host = host.removeprefix("::ffff:")
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _listen(address: str) -> socket.socket:
    host, port = host_port(address)
    try:
        family, kind, protocol, _, where = socket.getaddrinfo(
            host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(where)
            listener.listen(256)
            listener.setblocking(False)
        except BaseException:
            listener.close()
            raise
    except OSError as error:
        raise SettingsError(f"listen_tcp {address}: {error.strerror}") from error
    return listener
