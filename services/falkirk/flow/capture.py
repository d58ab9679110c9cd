"""Somebody captures: a pair to every worker, and what they push, merged.

Nothing is read from a pair before the watcher asks for it, so a watcher that is slow fills the pairs, and the workers lose copies instead of
this process growing. A worker that is restarted is asked again; what passed meanwhile isn't seen.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from typing import Final

from falkirk.api.flow.v1 import flow_service_pb2 as pb
from falkirk.flow import captured
from falkirk.flow.captured import Captured
from falkirk.flow.control import Tap
from falkirk.linux import seqpacket
from falkirk.wire.context import TunnelContext

BUFFER: Final = 4 * 1024 * 1024
"""Bytes of captured packets that wait for the watcher, a worker, as far as net.core.wmem_max allows."""
DATAGRAM: Final = 256 * 1024
BUDGET: Final = 64
"""Packets of one worker before the next one's turn."""
SIDES: Final = {
    captured.TUNNEL: pb.CaptureResponse.SIDE_TUNNEL,
    captured.NAMESPACE: pb.CaptureResponse.SIDE_NAMESPACE,
}
FATES: Final = {
    captured.FORWARDED: pb.CaptureResponse.FATE_FORWARDED,
    captured.HELD: pb.CaptureResponse.FATE_HELD,
    captured.ANSWERED: pb.CaptureResponse.FATE_ANSWERED,
    captured.DROPPED: pb.CaptureResponse.FATE_DROPPED,
    captured.SENT: pb.CaptureResponse.FATE_SENT,
}

Send = Callable[[int, Tap, int], bool]
"""Give a worker a tap and its end of the pair; False where the worker is away."""


class CaptureRefused(Exception):
    """A worker doesn't capture; the text says why."""


class Capture:
    """One watcher's packets. Close it when done."""

    def __init__(self, workers: int, wanted: Tap, send: Send) -> None:
        self._wanted = wanted
        self._send = send
        self._sources: list[socket.socket | None] = [None] * workers
        self._begun = [False] * workers
        self._woken = asyncio.Event()
        self._waiting: list[tuple[int, Captured]] = []
        for worker in range(workers):
            self.tap(worker)

    def tap(self, worker: int) -> None:
        """Ask a (new) worker; one that is away is asked when it has started."""
        self._drop(worker)
        ours, theirs = seqpacket.pair()
        with theirs:
            theirs.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, BUFFER)
            if self._send(worker, self._wanted, theirs.fileno()):
                self._sources[worker] = ours
            else:
                ours.close()

    async def begun(self) -> None:
        """Wait until every worker that runs captures. Raises CaptureRefused."""
        while True:
            self._waiting += self._read()
            if all(begun or source is None for begun, source in zip(self._begun, self._sources, strict=True)):
                return
            await self._readable()

    async def __aiter__(self) -> AsyncIterator[tuple[int, Captured]]:
        """(worker, packet) for ever. Raises CaptureRefused."""
        while True:
            found, self._waiting = self._waiting or list(self._read()), []
            for one in found:
                yield one
            if not found:
                await self._readable()

    def close(self) -> None:
        """The end of the capture; the workers notice by their ends of the pairs."""
        for worker in range(len(self._sources)):
            self._drop(worker)

    def _read(self) -> Iterator[tuple[int, Captured]]:
        for worker, source in enumerate(self._sources):
            for _ in range(BUDGET if source is not None else 0):
                assert source is not None
                received = seqpacket.receive(source, DATAGRAM, 0)
                if received is None:
                    break
                if not received[0]:
                    # The worker has died, or refuses and has said so; its successor is asked.
                    self._drop(worker)
                    break
                message = captured.decode(received[0])
                if isinstance(message, Captured):
                    yield worker, message
                elif message.error:
                    raise CaptureRefused(message.error)
                else:
                    self._begun[worker] = True

    async def _readable(self) -> None:
        """Wait until a worker has pushed something, or one was asked anew."""
        loop = asyncio.get_running_loop()
        self._woken.clear()
        watched = [source for source in self._sources if source is not None]
        for source in watched:
            loop.add_reader(source, self._woken.set)
        try:
            await self._woken.wait()
        finally:
            for source in watched:
                if source.fileno() >= 0:
                    loop.remove_reader(source)

    def _drop(self, worker: int) -> None:
        source, self._sources[worker] = self._sources[worker], None
        self._begun[worker] = False
        if source is not None:
            asyncio.get_running_loop().remove_reader(source)
            source.close()
        # Whoever waits for packets looks again whom to wait for.
        self._woken.set()


class Captures:
    """All captures of the service."""

    MOST: Final = 8

    def __init__(self, workers: int, send: Send) -> None:
        self._workers = workers
        self._send = send
        self._open: set[Capture] = set()

    @contextmanager
    def open(self, wanted: Tap) -> Iterator[Capture]:
        """A capture for as long as the context lasts. Raises CaptureRefused where there are too many."""
        if len(self._open) >= self.MOST:
            raise CaptureRefused(f"{self.MOST} captures are under way, which is the most")
        capture = Capture(self._workers, wanted, self._send)
        self._open.add(capture)
        try:
            yield capture
        finally:
            self._open.discard(capture)
            capture.close()

    def started(self, worker: int) -> None:
        """A (new) worker takes messages."""
        for capture in self._open:
            capture.tap(worker)


def response(worker: int, packet: Captured, context: TunnelContext | None = None) -> pb.CaptureResponse:
    """A captured packet as proto; `context` is its tunnel's, as far as it is known."""
    found = pb.CaptureResponse(
        side=SIDES[packet.side],
        fate=FATES[packet.fate],
        reason=packet.reason,
        flow_id=packet.flow_id.hex(),
        tenant=packet.tenant,
        device=packet.device,
        tunnel_id=packet.tunnel,
        outcome=packet.outcome,
        rule=packet.rule,
        gso_size=packet.gso_size,
        checksum_partial=packet.partial,
        length=packet.length,
        packet=packet.data,
        lost=packet.lost,
        worker=worker,
        user=context.user if context is not None else "",
        groups=context.groups if context is not None else (),
    )
    found.time.FromNanoseconds(packet.time)
    return found
