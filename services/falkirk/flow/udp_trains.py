"""The way out of UDP sessions: plain packets of one session leave together.

A session's packets that differ in nothing but their payloads, and are of one length, make a run, which leaves with one call (UDP_SEGMENT, what takes it
apart is the kernel or the network card). A packet that is shorter ends its run; one that differs begins another, behind it, so that a session's packets
stay in order. Nothing waits longer than the turn in which it was read.

Packets of a `raw` tunnel stay where they were read, in the lane's arena, until they leave. Most of them begin with the very bytes that the packet before
them in their session began with: the run is found by those, and neither the session nor anything of the headers needs another look (`plain`). Packets
of a `vnet` tunnel, and those that took the slow path, are put aside (`put_aside`).
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Final

from falkirk.flow.counters import FORWARDED
from falkirk.flow.lane import HEADER, ZERO_HEADER
from falkirk.flow.session import Opening, Session, Sessions
from falkirk.flow.table import State, Tunnel
from falkirk.linux import datagrams
from falkirk.wire.checksum import pseudo_header, residue
from falkirk.wire.datagram import Heads
from falkirk.wire.protocol import UDP

if TYPE_CHECKING:
    from falkirk.flow.lane import Lane
    from falkirk.flow.udp import Mapping
    from falkirk.flow.worker import Worker

CHUNK: Final = 64
"""Datagrams of one send; older kernels take no more (UDP_MAX_SEGMENTS)."""
MAX_PAYLOAD: Final = 65507
_NO_TRAIN: Final = (errno.EINVAL, errno.EIO, errno.EMSGSIZE)
_PROTOCOL: Final = bytes([UDP])
_STAGE: Final = 4 * 65536
_SHORT: Final = 192
"""Bytes whose sum needs no folding (`falkirk.wire.checksum`)."""


class UdpSession(Session):
    """A UDP session."""

    __slots__ = ("heads", "mapping", "pseudo", "run", "singly")

    def __init__(self, owner: Sessions[UdpSession], tunnel: Tunnel, key: bytes) -> None:
        super().__init__(owner, tunnel, key)
        self.heads = Heads(self.destination, self.source, self.destination_port, self.source_port)
        """Of packets to the client."""
        self.pseudo = pseudo_header(self.source, self.destination, UDP, 0)
        self.mapping: Mapping | None = None
        self.run: Run | None = None
        """Packets of this turn that leave at its end."""
        self.singly = False
        """The way out takes no trains (udp(7): an interface without checksums of its own, IPsec)."""


class Run:
    """Plain packets of one session, in their places, that leave together."""

    __slots__ = (
        "dont_fragment",
        "head",
        "last",
        "most",
        "places",
        "pseudo",
        "session",
        "size",
        "skip",
        "traffic_class",
        "ttl",
        "view",
    )

    def __init__(
        self,
        session: UdpSession,
        view: memoryview,
        skip: int,
        size: int,
        ttl: int,
        traffic_class: int,
        dont_fragment: bool,
    ) -> None:
        self.session = session
        self.view = view
        """Where they lie."""
        self.skip = skip
        """Bytes of headers."""
        self.size = self.last = size
        """Bytes of payload: of all but a last one that may be shorter, and of the last one."""
        self.ttl = ttl
        self.traffic_class = traffic_class
        self.dont_fragment = dont_fragment
        self.pseudo = session.pseudo + 8 + size
        """What the checksum of a whole one adds to its sum."""
        self.head = b""
        """What the last one began with, up to its UDP checksum; empty where nobody looks for it."""
        self.places: list[int] = []
        self.most = min(CHUNK, MAX_PAYLOAD // size)
        """Packets that one call takes."""


class UdpTrains(Sessions[UdpSession]):
    """What leaves by the sessions' sockets."""

    def __init__(self, worker: Worker, opening: Opening) -> None:
        super().__init__(worker, opening)
        self.runs: list[UdpSession] = []
        """Sessions with packets that leave at the end of this turn."""
        self._heads: dict[bytes, Run] = {}
        """Runs in an arena by what their last packet begins with."""
        self._stage = memoryview(bytearray(_STAGE))
        self._staged = 0
        """Bytes of packets that wait and lay in a lane's own buffer."""

    def plain(self, tunnel: Tunnel, arena: bytearray, view: memoryview, at: int, end: int) -> tuple[int, int]:
        """UDP packets one behind another from `at` of a raw lane's arena on, which lie there until `flush`, as far as they are plain ones of established
        sessions: where the first is that needs a closer look, and how many are before it. All of it is of one drain of one tunnel."""
        known = self._heads.get
        number = int.from_bytes
        count = 0
        while at < end:
            upper = 20 if arena[at] == 0x45 else 40
            run = known(view[at : at + upper + 6].tobytes())
            if run is None:
                size = self._meet(tunnel, arena, view, at, end)
                if not size:
                    break
                at += size
                count += 1
                continue
            length = run.size + 8
            start, stop = at + upper, at + upper + length
            if stop > end:
                break
            total = number(view[start:stop]) if length <= _SHORT and not length & 1 else residue(view[start:stop])
            # RFC 768: none was made. RFC 8200 8.1: IPv6 has no such choice.
            summed = arena[start + 6] or arena[start + 7]
            if (total + run.pseudo) % 0xFFFF if summed else upper == 40:
                self._worker.drop("bad_l4_checksum")
            else:
                places = run.places
                places.append(at)
                if len(places) == run.most:
                    self._ship(run.session)
            at = stop
            count += 1
        return at, count

    def _meet(self, tunnel: Tunnel, arena: bytearray, view: memoryview, at: int, end: int) -> int:
        """A packet at `at` that doesn't begin as those before it; its size, 0 where it needs a closer look."""
        left = end - at
        if left > 28 and arena[at] == 0x45 and arena[at + 9] == UDP:
            upper, size = 20, arena[at + 2] << 8 | arena[at + 3]
            key = view[at + 12 : at + 24].tobytes()
            if (
                arena[at + 6] & 0x3F
                or arena[at + 7]
                or arena[at + 8] < 2
                or int.from_bytes(view[at : at + 20]) % 0xFFFF
            ):
                return 0
        elif left > 48 and arena[at] >> 4 == 6 and arena[at + 6] == UDP:
            upper, size = 40, 40 + (arena[at + 4] << 8 | arena[at + 5])
            key = view[at + 8 : at + 44].tobytes()
            # As in `UdpSessions.packet`: what is longer than the MTU was in fragments.
            if arena[at + 7] < 2 or size > tunnel.mtu:
                return 0
        else:
            return 0
        session = tunnel.flows.get(key + _PROTOCOL)
        field, length = at + upper + 6, size - upper
        if (
            not isinstance(session, UdpSession)
            or session.state is not State.ESTABLISHED
            or length <= 8
            or size > left
            or arena[field - 2] << 8 | arena[field - 1] != length
        ):
            return 0
        summed = arena[field] or arena[field + 1]
        if (residue(view[at + upper : at + size]) + session.pseudo + length) % 0xFFFF if summed else upper == 40:
            self._worker.drop("bad_l4_checksum")
            return size
        skip = upper + 8
        if upper == 20:
            self._keep(session, view, at, skip, size - skip, arena[at + 8], arena[at + 1], arena[at + 6] & 0x40 != 0)
        else:
            traffic_class = (arena[at] & 15) << 4 | arena[at + 1] >> 4
            self._keep(session, view, at, skip, size - skip, arena[at + 7], traffic_class, True)
        run = session.run
        if run is not None:
            self._heads.pop(run.head, None)
            run.head = view[at:field].tobytes()
            self._heads[run.head] = run
        return size

    def put_aside(
        self, session: UdpSession, lane: Lane, end: int, skip: int, ttl: int, traffic_class: int, dont_fragment: bool
    ) -> None:
        """A plain packet at [10, end) of the lane's buffer, which has `skip` bytes of headers: it leaves by the end of the turn."""
        size = end - HEADER
        if self._staged + size > _STAGE:
            self.flush()
        at, self._staged = self._staged, self._staged + size
        self._stage[at : at + size] = lane.view[HEADER:end]
        self._keep(session, self._stage, at, skip, size - skip, ttl, traffic_class, dont_fragment)

    def _keep(
        self,
        session: UdpSession,
        view: memoryview,
        at: int,
        skip: int,
        size: int,
        ttl: int,
        traffic_class: int,
        dont_fragment: bool,
    ) -> None:
        """A plain packet at `at` of `view`, with `skip` bytes of headers and `size` of payload: it leaves with the next `flush` at the latest."""
        run = session.run
        if run is not None:
            if (
                size <= run.size
                and ttl == run.ttl
                and traffic_class == run.traffic_class
                and dont_fragment is run.dont_fragment
                and view is run.view
            ):
                run.places.append(at)
                run.last = size
                if size < run.size or len(run.places) == run.most:
                    self._ship(session)
                return
            self._ship(session)
        run = session.run = Run(session, view, skip, size, ttl, traffic_class, dont_fragment)
        run.places.append(at)
        self.runs.append(session)
        if self._worker.taps.passing is not None:
            # Whoever captures is told what becomes of a packet while it is looked at.
            self._ship(session)

    def flush(self) -> None:
        """The end of a turn, or of a buffer: send what waits."""
        runs, self.runs = self.runs, []
        for session in runs:
            if session.run is not None:
                self._ship(session)
        self._staged = 0

    def _ship(self, session: UdpSession) -> None:
        run, session.run = session.run, None
        assert run is not None
        if run.head:
            del self._heads[run.head]
        view, skip, size, places = run.view, run.skip, run.size, run.places
        count = len(places)
        parts = [view[at : at + size] for at in [place + skip for place in places]]
        if run.last < size:
            parts[-1] = parts[-1][: run.last]
        self._header(session, run.ttl - 1, run.traffic_class, run.dont_fragment)
        self._count_up(session, count * (skip + size) - size + run.last, count)
        if count > 1 and not session.singly:
            if session.segment != size:
                self._segment(session, size)
            code = self.write(session, parts)
            if not code:
                self._worker.counts[FORWARDED] += count
                return
            self._no_train(session, code)
        for place, part in zip(places, parts, strict=True):
            code = self._one(session, part)
            if code:
                self.unsent(session, ZERO_HEADER + view[place : place + skip + len(part)].tobytes(), code)
            else:
                self._worker.counts[FORWARDED] += 1

    @staticmethod
    def _segment(session: UdpSession, size: int) -> None:
        assert session.sock is not None
        datagrams.set_segment(session.sock, size)
        session.segment = size

    def _datagrams(self, session: UdpSession, data: memoryview, size: int) -> int:
        """Send datagrams of `size` bytes, the last may be shorter; the errno of the first that went wrong, else 0."""
        at, step, end = 0, size if session.singly else CHUNK * size, len(data)
        if end <= size:
            return self._one(session, data)
        while at < end:
            part = data[at : at + step]
            if step > size and size != session.segment:
                self._segment(session, size)
            code = self.write(session, [part]) if step > size else self._one(session, part)
            if code in _NO_TRAIN and step > size:
                self._no_train(session, code)
                step = size
                continue
            if code:
                return code
            at += step
        return 0

    def _no_train(self, session: UdpSession, code: int) -> None:
        """A train wasn't taken: what single datagrams come to is what counts."""
        session.singly = code in (errno.EINVAL, errno.EIO)
        if session.sock is not None:
            # Even one datagram is a train for the kernel where there is a size.
            self._segment(session, 0)

    def _one(self, session: UdpSession, data: memoryview) -> int:
        if session.segment and len(data) > session.segment:
            self._segment(session, 0)
        return self.write(session, [data])
