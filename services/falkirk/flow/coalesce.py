"""Plain TCP segments joined to super-packets, as a network card or the kernel's GRO does it, before they go to the device. PURE.

A tunnel's packets lie one behind another in an arena, as they came. `walk` looks at each in its place: a segment that continues its
flow's run joins it, and a run is given on as one super-packet by the list of its parts, nothing copied. What can't be joined is given on
by itself, after what came before it of its flow, so that a flow's packets stay in order. Nothing waits longer than the caller's
drain of one tunnel, at whose end `flush` gives on what is there: joining adds no latency.

What joins is what the kernel's GRO joins: consecutive sequence numbers; the same acknowledgment, window, options, TTL and TOS; no flag
but ACK and PSH, which ends a run; equal sizes but for the last; no fragment; IPv4 identifications one apart, or all the same where DF
makes them meaningless (RFC 6864 4). `falkirk.wire.segment` takes a super-packet apart into what it was made of.

A super-packet's checksum is partial, so nobody looks at the payload again. Hence each segment's own is verified first: their sums are taken
by numpy, a row a segment (0.3 us each, where Python's integers take 5). A run with a bad one isn't joined: the bad are dropped and counted, the
others go on by themselves.

Limits: IPv4 without options and IPv6 without extension headers; payloads of at least 536 bytes (`vnet.MINIMUM_GSO_SIZE`) but for a run's
last; 65,535 bytes a super-packet. Runs of fewer than `WORTHWHILE` segments, and parts of runs that
lie scattered, go on one by one: writing them costs less than verifying.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from struct import Struct
from typing import TYPE_CHECKING, Final, Protocol

import numpy as np

from falkirk.flow.table import State, TcpLift
from falkirk.wire import tcp
from falkirk.wire.checksum import checksum, pseudo_header
from falkirk.wire.protocol import ICMP, ICMPV6, TCP, UDP
from falkirk.wire.vnet import GSO_TCPV4, GSO_TCPV6, MINIMUM_GSO_SIZE, NEEDS_CSUM, STRUCT

if TYPE_CHECKING:
    from numpy.typing import NDArray

WORTHWHILE: Final = 3
"""Segments of a row that are cheaper to verify and join than to write by themselves."""
MAX_PACKET: Final = 65535
PARTS: Final = 1000
"""Segments of a run at most: `writev` takes 1,024 parts."""
_HEAD4: Final = Struct(">HH2xHHH12s8xH2xHH").unpack_from
"""Version to TOS, total length, fragment bits, TTL and protocol, checksum, signature; offset and flags, checksum, urgent pointer."""
_HEAD6: Final = Struct(">4xHH36s8xH2xHH").unpack_from
"""Payload length, next header and hop limit, signature; the rest as in `_HEAD4`."""
_FLAGS: Final = 0x0FFF
"""Flags and reserved bits, behind the offset."""
_ACK: Final = tcp.ACK
_OPEN_CLOSE: Final = tcp.FIN | tcp.SYN | tcp.RST
_ESTABLISHED: Final = State.ESTABLISHED
_APART: Final = (UDP, ICMP, ICMPV6)
"""Protocols whose packets can't belong to a flow that has a run."""


@lru_cache(64)
def _masks(upper: int, header: int) -> tuple[int, int]:
    """Over the headers as one number: all but TCP's checksum, which a run's segments needn't share; and all but what its last one
    needn't either, length, PSH and the checksums."""
    strict, loose = bytearray(b"\xff" * header), bytearray(b"\xff" * header)
    for mask in (strict, loose):
        mask[upper + tcp.CHECKSUM_OFFSET : upper + tcp.CHECKSUM_OFFSET + 2] = b"\0\0"
    loose[upper + tcp.FLAGS_OFFSET] = ~tcp.PSH & 0xFF
    length = 2 if upper == 20 else 4
    loose[length : length + 2] = b"\0\0"
    if upper == 20:
        loose[10:12] = b"\0\0"
    return int.from_bytes(strict), int.from_bytes(loose)


class Road(Protocol):
    """Where packets go. They lie at `at` in the arena, and may be changed in place."""

    def plain(self, flow: TcpLift, at: int, size: int, ip_checksum: int, checksum: int) -> None:
        """A segment of an established flow that doesn't end it, by itself; its checksums (IPv6: the first is 0)."""

    def joined(self, run: Run) -> None:
        """Several of them, verified."""

    def datagrams(self, at: int, end: int) -> tuple[int, int]:
        """UDP packets that lie one behind another from `at` on, as far as they are taken: where the next packet is, and how many were before it."""

    def other(self, at: int, size: int) -> None:
        """Whatever else: not looked at further than that it says to be `size` bytes, or doesn't say where it ends."""

    def bad(self, at: int, size: int) -> None:
        """A segment whose checksum is wrong."""


class Run:
    """Consecutive segments of one flow: all but the last of `size` bytes, all with the headers of the first.

    Headers are compared as one number: what the next segment's must be, `expected`, is the first's plus `step` for each, which moves the
    sequence number on by the payload, the identification by one, and the IPv4 checksum back by one. `left` ends a run before one of
    them would carry over.
    """

    __slots__ = (
        "expected",
        "flow",
        "header",
        "last",
        "left",
        "length",
        "loose",
        "places",
        "pushed",
        "size",
        "step",
        "strict",
        "upper",
    )

    def __init__(self, flow: TcpLift, arena: bytearray, at: int, size: int, header: int, *, counts: bool) -> None:
        """`counts`: the identification goes up by one each (IPv4)."""
        self.flow = flow
        self.size = self.last = self.length = size
        """Bytes with headers: of a full segment, of the last one, of the super-packet so far."""
        self.header = header
        """Bytes of IP and TCP headers."""
        self.upper = upper = 20 if len(flow.key) == 12 else 40
        """Where TCP starts."""
        self.places = [at]
        """Where the segments lie."""
        self.pushed = False
        """PSH on the last one."""
        payload = size - header
        self.strict, self.loose = _masks(upper, header)
        self.step = payload << 8 * (header - upper - 8)
        sequence = int.from_bytes(arena[at + upper + 4 : at + upper + 8])
        self.left = min((0xFFFFFFFF - sequence) // payload, (MAX_PACKET - size) // payload, PARTS - 1)
        """How many segments may still be joined."""
        if counts:
            self.step += (1 << 8 * (header - 6)) - (1 << 8 * (header - 12))
            ident, check = int.from_bytes(arena[at + 4 : at + 6]), int.from_bytes(arena[at + 10 : at + 12])
            self.left = min(self.left, 0xFFFF - ident, check)
        self.expected = (int.from_bytes(arena[at : at + header]) & self.strict) + self.step

    def is_last(self, arena: bytearray, at: int, size: int) -> bool:
        """Whether a segment that isn't like the others ends the run: pushed, or shorter."""
        head = int.from_bytes(arena[at : at + self.header])
        if not self.left or not self.header < size <= self.size or (head ^ self.expected) & self.loose:
            return False
        return self.upper == 40 or int.from_bytes(arena[at : at + 20]) % 0xFFFF == 0

    def headers(self, arena: bytearray, forward: bytes) -> bytes:
        """The super-packet's: virtio-net, IP and TCP, with `forward` in place of the signature."""
        at, upper = self.places[0], self.upper
        made = arena[at : at + self.header]
        if upper == 20:
            made[2:4] = self.length.to_bytes(2, "big")
            made[10:12] = b"\0\0"
            made[12:24] = forward
            made[10:12] = checksum(made[:20]).to_bytes(2, "big")
            kind, addresses = GSO_TCPV4, forward[:8]
        else:
            made[4:6] = (self.length - 40).to_bytes(2, "big")
            made[8:44] = forward
            kind, addresses = GSO_TCPV6, forward[:32]
        if self.pushed:
            made[upper + tcp.FLAGS_OFFSET] |= tcp.PSH
        field = upper + tcp.CHECKSUM_OFFSET
        made[field : field + 2] = pseudo_header(addresses, b"", TCP, self.length - upper).to_bytes(2, "big")
        payload = self.size - self.header
        return STRUCT.pack(NEEDS_CSUM, kind, self.header, payload, upper, tcp.CHECKSUM_OFFSET) + made

    def bad(self, arena: bytearray) -> list[int] | None:
        """Places of the segments whose checksum is wrong; None where verifying isn't worth it."""
        rows = list(_rows(self.places))
        if len(self.places) < WORTHWHILE * len(rows):
            return None
        found: list[int] = []
        whole = len(self.places) if self.last == self.size else len(self.places) - 1
        for start, stride, count in rows:
            full = min(count, whole)
            whole -= full
            if full:
                found += [start + stride * at for at in self._wrong(arena, start, stride, full, self.size)]
            if full < count and self._wrong(arena, start + stride * full, 0, 1, self.last):
                found.append(start + stride * full)
        return found

    def _wrong(self, arena: bytearray, start: int, stride: int, count: int, size: int) -> list[int]:
        """Which of `count` segments don't add up (RFC 1071; sums of little-endian words, as good as any: 2(B))."""
        length = size - self.upper
        words, tail = length >> 2, length & 3
        at = start + self.upper
        rows = np.ndarray((count, words), "<u4", arena, at, (stride, 4))
        sums: NDArray[np.uint64] = np.add.reduce(rows, axis=1, dtype=np.uint64)
        for place in range(tail):
            column = np.ndarray(count, np.uint8, arena, at + 4 * words + place, (stride,))
            sums += column.astype(np.uint64) << np.uint64(8 * (place & 1))
        addresses = self.flow.key[: 8 if self.upper == 20 else 32]
        pseudo = int.from_bytes(addresses, "little") + (TCP << 8) + (length >> 8 | (length & 0xFF) << 8)
        return [number for number, total in enumerate(sums.tolist()) if (total + pseudo) % 0xFFFF]


def _rows(places: list[int]) -> Iterator[tuple[int, int, int]]:
    """The places as rows of equal distances: (first, distance, how many)."""
    if len(places) > 1:
        distance = places[1] - places[0]
        if places == list(range(places[0], places[-1] + 1, distance)):
            yield places[0], distance, len(places)
            return
    start, distance, count = places[0], 0, 1
    for place in places[1:]:
        if count == 1:
            distance, count = place - start, 2
        elif place == start + distance * count:
            count += 1
        else:
            yield start, distance, count
            start, distance, count = place, 0, 1
    yield start, distance, count


class Coalescer:
    """Joins what lies in `arena`; not `enabled`, it gives everything on by itself."""

    def __init__(self, arena: bytearray, road: Road, *, enabled: bool) -> None:
        self._arena = arena
        self._road = road
        self._least = MINIMUM_GSO_SIZE if enabled else MAX_PACKET
        self._runs: dict[bytes, Run] = {}
        self._last: Run | None = None
        """The one among them that the next packet is most likely of."""

    def walk(self, flows: dict[bytes, TcpLift], at: int, end: int) -> int:
        """Give on every packet of the datagram at [at, end), or keep it in a run; returns how many there were. What is left where
        a packet doesn't say where it ends counts as one."""
        arena = self._arena
        runs = self._runs
        least = self._least
        number = int.from_bytes
        plainly = self._road.plain
        run = self._last
        count = 0
        while at < end:
            if run is not None:
                # The segments that follow in their places: most of all, hence the fewest steps for each.
                begin, size, header, strict, expected = at, run.size, run.header, run.strict, run.expected
                step, stop = run.step, min(end, at + size * run.left)
                while at + size <= stop and number(arena[at : at + header]) & strict == expected:
                    expected += step
                    at += size
                if at > begin:
                    self._extend(run, begin, at, expected)
                    count += (at - begin) // size
                    continue
            count += 1
            left = end - at
            version = arena[at] >> 4
            if version == 4 and left >= 40:
                head, size, fragment, life, check, key, bits, check_l4, urgent = _HEAD4(arena, at)
                header = 20 + (bits >> 10 & 0x3C)
                plain = head >> 8 == 0x45 and life & 0xFF == TCP and life > 0x1FF and not fragment & 0x3FFF
            elif version == 6 and left >= 60:
                size, life, key, bits, check_l4, urgent = _HEAD6(arena, at)
                size += 40
                header = 40 + (bits >> 10 & 0x3C)
                plain = life >> 8 == TCP and life & 0xFE
                check = 0
            else:
                plain, size, header = 0, left, 0
            if not plain or not header <= size <= left:
                if left > 20 and arena[at + (9 if version == 4 else 6)] == UDP:
                    at, some = self._road.datagrams(at, end)
                    if some:
                        count += some - 1
                        continue
                at += self._other(at, left)
                run = None
                continue
            flow = flows.get(key)
            if (
                flow is None
                or flow.state is not _ESTABLISHED
                or bits & _OPEN_CLOSE
                or bits < 0x5000
                or (version == 4 and number(arena[at : at + 20]) % 0xFFFF)
            ):
                if key in runs:
                    self._give(runs.pop(key))
                self._road.other(at, size)
                run = None
            elif runs and key in runs and self._taken(key, at, size):
                run = runs.get(key)
            elif size - header < least or bits & _FLAGS != _ACK or urgent:
                plainly(flow, at, size, check, check_l4)
                run = None
            else:
                run = runs[key] = Run(flow, arena, at, size, header, counts=version == 4)
            at += size
        self._last = run
        return count

    def _taken(self, key: bytes, at: int, size: int) -> bool:
        """Whether a segment belongs to its flow's run; else the run is given on, and it is not."""
        arena = self._arena
        run = self._runs[key]
        if size == run.size and run.left:
            head = int.from_bytes(arena[at : at + run.header]) & run.strict
            if head != run.expected and len(run.places) == 1 and run.upper == 20 and arena[at + 6] & 0x40:
                # The second of them tells whether identifications stand still (RFC 6864 4.1: DF lets them).
                still = Run(run.flow, arena, run.places[0], size, run.header, counts=False)
                if head == still.expected:
                    run = self._runs[key] = still
            if head == run.expected:
                self._extend(run, at, at + size, head + run.step)
                return True
        del self._runs[key]
        last = run.is_last(arena, at, size)
        if last:
            run.places.append(at)
            run.length += size - run.header
            run.last = size
            run.pushed = arena[at + run.upper + tcp.FLAGS_OFFSET] & tcp.PSH != 0
        self._give(run)
        return last

    def _extend(self, run: Run, begin: int, end: int, expected: int) -> None:
        """The run has the segments in [begin, end) as well."""
        count = (end - begin) // run.size
        run.places.extend(range(begin, end, run.size))
        run.length += count * (run.size - run.header)
        run.left -= count
        run.expected = expected

    def flush(self) -> None:
        """Give on all that is kept."""
        self._last = None
        while self._runs:
            self._give(self._runs.pop(next(iter(self._runs))))

    def _other(self, at: int, left: int) -> int:
        """What isn't a plain TCP segment, or is broken; returns its size."""
        size = claimed(self._arena, at, left)
        protocol = self._arena[at + (9 if self._arena[at] >> 4 == 4 else 6)] if left >= 20 else 0
        if self._runs and protocol not in _APART:
            # It may belong to a flow that has a run.
            self.flush()
        self._road.other(at, size)
        return size

    def _give(self, run: Run) -> None:
        """On its way: as one, or segment by segment."""
        arena, road = self._arena, self._road
        bad = run.bad(arena)
        if bad is not None and not bad:
            road.joined(run)
            return
        size = run.size
        for place in run.places:
            if place == run.places[-1]:
                size = run.last
            if bad and place in bad:
                road.bad(place, size)
                continue
            check = 0 if run.upper == 40 else arena[place + 10] << 8 | arena[place + 11]
            field = place + run.upper + tcp.CHECKSUM_OFFSET
            road.plain(run.flow, place, size, check, arena[field] << 8 | arena[field + 1])


def claimed(data: bytearray, at: int, left: int) -> int:
    """How long the packet at `at` says that it is; all that is left where it doesn't, or can't be."""
    version = data[at] >> 4
    size = least = 0
    if version == 4 and left >= 20:
        size, least = data[at + 2] << 8 | data[at + 3], 20
    elif version == 6 and left >= 40:
        size, least = 40 + (data[at + 4] << 8 | data[at + 5]), 40
    return size if 0 < least <= size <= left else left


def count(data: bytearray, at: int, end: int) -> int:
    """How many packets there are at [at, end), as `Coalescer.walk` counts them."""
    packets = 0
    while at < end:
        at += claimed(data, at, end - at)
        packets += 1
    return packets
