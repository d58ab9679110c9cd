"""What Falkirk says itself: resets and ICMP errors, towards the tunnel that a packet came from.

ICMP errors are limited a tunnel (RFC 1812 4.3.2.8, RFC 4443 2.4 f); resets aren't, as each answers one segment. A packet
that must not be answered (an ICMP error, a multicast source: RFC 1122 3.2.2) is dropped as `unanswerable`.
"""

from __future__ import annotations

import ipaddress
from errno import EACCES, ECONNREFUSED, ECONNRESET, ENETUNREACH, EPERM
from typing import TYPE_CHECKING

from falkirk.flow.counters import ANSWERED, FORWARDED
from falkirk.flow.decision import Outcome
from falkirk.flow.table import Tunnel
from falkirk.wire import build
from falkirk.wire.icmp import Unreachable
from falkirk.wire.packet import Packet, parse
from falkirk.wire.protocol import NO_NEXT_HEADER

if TYPE_CHECKING:
    from falkirk.flow.lane import Lane
    from falkirk.flow.worker import Worker

HEADER = 10


class Answers:
    """Answers of one worker."""

    def __init__(self, worker: Worker) -> None:
        self._worker = worker
        settings = worker.settings
        self.source4 = ipaddress.IPv4Address(settings.icmp_source4).packed
        """Falkirk's own address, as devices see it."""
        self.source6 = ipaddress.IPv6Address(settings.icmp_source6).packed

    def reset(self, tunnel: Tunnel, data: bytes) -> None:
        """A RST for the segment in `data` (behind its virtio-net header)."""
        self._say(tunnel, build.reset(parse(data, HEADER, len(data) - HEADER)))

    def dial_failed(self, tunnel: Tunnel, data: bytes, errno: int) -> None:
        """What a host or a router on the way would have said of this failed connection."""
        if errno in (ECONNREFUSED, ECONNRESET):
            self.reset(tunnel, data)
        elif errno == ENETUNREACH:
            self.unreachable(tunnel, data, Unreachable.NET)
        elif errno in (EACCES, EPERM):
            self.unreachable(tunnel, data, Unreachable.PROHIBITED)
        else:
            self.unreachable(tunnel, data, Unreachable.HOST)

    def decided(self, tunnel: Tunnel, data: bytes, outcome: Outcome) -> None:
        """What a first packet gets that may not go on."""
        if outcome is Outcome.DENY:
            self.reset(tunnel, data)
        elif outcome is Outcome.PROHIBITED:
            self.unreachable(tunnel, data, Unreachable.PROHIBITED)
        else:
            self.no_route(tunnel, data)

    def no_route(self, tunnel: Tunnel, data: bytes) -> None:
        """There is no way to the destination."""
        self.unreachable(tunnel, data, Unreachable.NET)

    def not_built(self, tunnel: Tunnel, lane: Lane, packet: Packet, reason: str) -> None:
        """A protocol that this version doesn't carry."""
        data = bytes(lane.view[: HEADER + packet.total_length])
        # RFC 8200 4.7: nothing follows, so nothing is missing.
        if packet.protocol == NO_NEXT_HEADER or not self._allowed(tunnel):
            self._worker.drop(reason)
            return
        self._say(tunnel, build.unreachable(data, packet, Unreachable.PROTOCOL, self._source(packet)), reason)

    def time_exceeded(self, tunnel: Tunnel, lane: Lane, packet: Packet) -> None:
        """The TTL ran out here (RFC 1812 5.3.1)."""
        data = bytes(lane.view[: HEADER + packet.total_length])
        if not self._allowed(tunnel):
            self._worker.drop("icmp_rate_limit")
            return
        self._say(tunnel, build.time_exceeded(data, packet, self._source(packet)))

    def reassembly_time_exceeded(self, tunnel: Tunnel, first: bytes) -> None:
        """The rest of a packet whose first fragment this is didn't come (RFC 792, RFC 4443 3.3)."""
        if not self._allowed(tunnel):
            self._worker.drop("fragment_timeout")
            return
        packet = parse(first, 0, len(first), fragments=True)
        answer = build.time_exceeded(first, packet, self._source(packet), build.REASSEMBLY)
        self._say(tunnel, answer, "fragment_timeout")

    def parameter_problem(self, tunnel: Tunnel, lane: Lane, packet: Packet, pointer: int, reason: str) -> None:
        """What an IPv6 header says at `pointer` can't be."""
        data = bytes(lane.view[: HEADER + packet.total_length])
        if not self._allowed(tunnel):
            self._worker.drop(reason)
            return
        self._say(tunnel, build.parameter_problem6(data, packet, pointer, self._source(packet)), reason)

    def too_big(self, tunnel: Tunnel, data: bytes, packet: Packet, mtu: int) -> None:
        """A packet (parsed where it is in `data`) that the way on takes only in smaller pieces (RFC 1191 4, RFC 4443 3.2)."""
        if not self._allowed(tunnel):
            self._worker.drop("icmp_rate_limit")
            return
        self._say(tunnel, build.too_big(data, packet, mtu, self._source(packet)))

    def relay(
        self, tunnel: Tunnel, message: bytearray, source: bytes, destination: bytes, *, counted: bool = True
    ) -> None:
        """An ICMP error (its checksum isn't made yet) from somebody beyond, or of our own where `source` is empty, about what the
        tunnel's device has sent. `counted` where it stands for one that was received."""
        four = len(destination) == 4
        if not self._allowed(tunnel):
            if counted:
                self._worker.drop("icmp_rate_limit")
            return
        ours = self.source4 if four else self.source6
        packet = build.icmp_packet(message, source or ours, destination, traffic_class=0xC0 if four else 0)
        if self._worker.tunnels.say(tunnel, packet, counted=counted) and counted:
            self._worker.counts[FORWARDED] += 1

    def unreachable(self, tunnel: Tunnel, data: bytes, kind: Unreachable) -> None:
        """The packet in `data` (behind its virtio-net header) doesn't reach its destination."""
        if not self._allowed(tunnel):
            self._worker.drop("icmp_rate_limit")
            return
        packet = parse(data, HEADER, len(data) - HEADER)
        self._say(tunnel, build.unreachable(data, packet, kind, self._source(packet)))

    def _source(self, packet: Packet) -> bytes:
        return self.source4 if packet.version == 4 else self.source6

    def _allowed(self, tunnel: Tunnel) -> bool:
        if tunnel.icmp_tick != self._worker.second:
            tunnel.icmp_tick = self._worker.second
            tunnel.icmp_left = self._worker.settings.icmp_per_second
        if tunnel.icmp_left == 0:
            return False
        tunnel.icmp_left -= 1
        return True

    def _say(self, tunnel: Tunnel, answer: bytes | None, otherwise: str = "unanswerable") -> None:
        if answer is None:
            self._worker.drop(otherwise)
            return
        if self._worker.tunnels.say(tunnel, answer):
            self._worker.counts[ANSWERED] += 1
