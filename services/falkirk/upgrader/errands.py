"""What `Lower` asks of the workers: a stream to a device, for somebody who has the other end in hand.

An errand goes to one worker after the other until one of them has a tunnel of the device. Its socket is TCP over loopback: a process that dies resets it
(it is set to), and nobody takes that for an end in order.

Limit: workers are asked in turn, so with many of them the first byte takes a while; it is a tool for people.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import socket
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Final

import grpc

from falkirk.linux import sockets
from falkirk.runtime.errors import FalkirkError
from falkirk.upgrader import control
from falkirk.upgrader.stream import Reason

NO_TUNNEL: Final = "no_tunnel"
_CODE: Final = grpc.StatusCode
_REFUSALS: Final = {
    NO_TUNNEL: (_CODE.NOT_FOUND, "NO_TUNNEL"),
    "not_ready": (_CODE.UNAVAILABLE, "NOT_READY"),
    "audit_unwritable": (_CODE.UNAVAILABLE, "AUDIT_UNWRITABLE"),
    "no_address": (_CODE.FAILED_PRECONDITION, "NO_ADDRESS"),
    "ECONNREFUSED": (_CODE.UNAVAILABLE, "CONNECTION_REFUSED"),
    "ETIMEDOUT": (_CODE.DEADLINE_EXCEEDED, "CONNECT_TIMEOUT"),
    "EHOSTUNREACH": (_CODE.UNAVAILABLE, "UNREACHABLE"),
    "ENETUNREACH": (_CODE.UNAVAILABLE, "UNREACHABLE"),
    "EMFILE": (_CODE.RESOURCE_EXHAUSTED, "NO_DESCRIPTORS"),
}
_LIMITS: Final = ("_limit", "_exhausted", "table_full")


class Errand:
    """One stream. `sock` is the caller's end, blocking in nothing."""

    def __init__(self, number: int, worker: int, sock: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        self.number = number
        self.worker = worker
        self.sock = sock
        self.opened: asyncio.Future[bytes | control.LowerOver] = loop.create_future()
        """The flow's id, or why there is none."""
        self.over: asyncio.Future[control.LowerOver] = loop.create_future()


class Errands:
    """Those of all workers. `send(worker, data, fds)` reaches one, or is False."""

    def __init__(self, workers: int, send: Callable[[int, bytes, Sequence[int]], bool]) -> None:
        self._workers = workers
        self._send = send
        self._numbers = itertools.count(1)
        self._errands: dict[int, Errand] = {}

    @contextlib.asynccontextmanager
    async def run(
        self, tenant: str, device: str, version: int, port: int, actor: str
    ) -> AsyncIterator[tuple[Errand, bytes]]:
        """An open stream and its flow's id; what isn't over when the block ends is reset. Raises FalkirkError."""
        refusal = control.LowerOver(0, "not_ready", "no upgrader worker is there")
        for worker in range(self._workers):
            number = next(self._numbers)
            message = control.Lower(number, tenant, device, version, port, actor)
            ours, theirs = _loopback_pair()
            with theirs:
                if not self._send(worker, control.encode(message), [theirs.fileno()]):
                    ours.close()
                    continue
            errand = self._errands[number] = Errand(number, worker, ours)
            try:
                opened = await errand.opened
                if isinstance(opened, bytes):
                    yield errand, opened
                    return
                refusal = opened
            finally:
                del self._errands[number]
                ours.close()
            if refusal.reason != NO_TUNNEL:
                break
        raise _refused(refusal)

    def hear(self, message: control.LowerOpened | control.LowerOver) -> None:
        """A worker's word on an errand; one that nobody waits for any more says nothing."""
        errand = self._errands.get(message.request)
        if errand is None:
            return
        if isinstance(message, control.LowerOpened):
            errand.opened.set_result(message.flow_id)
        elif not errand.opened.done():
            errand.opened.set_result(message)
        elif not errand.over.done():
            errand.over.set_result(message)

    def worker_lost(self, worker: int) -> None:
        """A worker's end is its errands' end."""
        for errand in list(self._errands.values()):
            if errand.worker == worker:
                self.hear(control.LowerOver(errand.number, "worker_lost", "the upgrader worker ended"))


def ended(over: control.LowerOver) -> FalkirkError | None:
    """How a stream that was open ended; None: in order."""
    if over.reason == Reason.FINISHED:
        return None
    told = {
        Reason.UPSTREAM_RESET: "the device reset the connection",
        Reason.ABORTED: "the flow was ended here: `falkirk audit query` says why",
        Reason.IDLE: "nothing was sent for too long",
    }
    return FalkirkError(
        _CODE.ABORTED, over.reason.upper(), over.why or told.get(over.reason, f"the stream broke off ({over.reason})")
    )


def _refused(over: control.LowerOver) -> FalkirkError:
    code, reason = _REFUSALS.get(over.reason, (_CODE.UNAVAILABLE, over.reason.upper()))
    if over.reason.endswith(_LIMITS):
        code = _CODE.RESOURCE_EXHAUSTED
    told = {
        "ECONNREFUSED": "the device refuses the port",
        "ETIMEDOUT": "the device doesn't answer",
        "EHOSTUNREACH": "the device says that it can't be reached",
    }
    return FalkirkError(code, reason, over.why or told.get(over.reason, over.reason))


def _loopback_pair() -> tuple[socket.socket, socket.socket]:
    """Two ends of a TCP connection, non-blocking, that reset on close; nobody else's connection is taken for one."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        ours = socket.create_connection(server.getsockname(), timeout=5)
        server.settimeout(5)
        while True:
            theirs, peer = server.accept()
            if peer == ours.getsockname():
                break
            theirs.close()
    for end in (ours, theirs):
        end.setblocking(False)
        sockets.reset_on_close(end)
        sockets.no_delay(end)
    return ours, theirs
