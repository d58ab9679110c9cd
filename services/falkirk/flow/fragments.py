"""Fragments, in and out. A fragment is never a packet to anybody here: not to policy, not to a flow, not to another tunnel.

In: fragments wait (`falkirk.flow.reassembly`) until their packet is whole; it then goes the way of any other. One that is wrong
by itself is dropped, or answered where RFC 8200 4.5 says so. When time is up and the first fragment had come, its sender is told
(RFC 792, RFC 4443 3.3).

Out: `say` cuts what is too long for its tunnel. Identifications of what has none of its own count up in each tunnel from a random
start, so that they don't come again soon (RFC 6864 4.3) and tell nothing of other tunnels (RFC 7739 5).

Accounting: a fragment that waits isn't `received` yet. It counts once it is known what came of it: fragments that became a packet count
as that one packet, which is then forwarded, answered or dropped; each of the others counts for itself. So what is received is always what is
forwarded, answered, held as a flow's first packet, or dropped.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from falkirk.flow.counters import DROPS, RECEIVED
from falkirk.flow.randomness import Randomness
from falkirk.flow.reassembly import Limits, Reassembly
from falkirk.flow.table import Tunnel
from falkirk.wire import fragments
from falkirk.wire.malformed import MalformedPacket
from falkirk.wire.packet import Packet

if TYPE_CHECKING:
    from falkirk.flow.lane import Lane
    from falkirk.flow.worker import Worker

HEADER = 10


class Fragments:
    """Fragments of one worker."""

    def __init__(self, worker: Worker) -> None:
        self._worker = worker
        settings = worker.settings
        self._random = Randomness()
        self._enabled = settings.fragment_bytes > 0
        self.reassembly = Reassembly(
            Limits(
                settings.fragment_bytes,
                settings.fragment_tunnel_bytes,
                settings.fragment_tunnel_packets,
                settings.fragment_timeout_s,
            )
        )
        self.largest = 0
        """While a packet is on its way that was put together here: bytes of its largest fragment. Else 0."""

    # in

    def take(self, lane: Lane, tunnel: Tunnel, packet: Packet) -> None:
        """A fragment in the lane's buffer, from an address of the device; its virtio-net header is true."""
        worker = self._worker
        if not self._enabled:
            worker.drop("fragment")
            return
        try:
            piece = fragments.piece(lane.buffer, packet)
        except MalformedPacket as error:
            self._wrong(lane, tunnel, packet, error)
            return
        lane.waiting += 1
        taken = self.reassembly.take(tunnel.id, piece, worker.second)
        for reason, count in taken.dropped:
            self._dropped(reason, count)
        if taken.refused:
            worker.counts[RECEIVED] += 1
            worker.drop(taken.refused)
        if taken.whole is None:
            return
        worker.counts[RECEIVED] += 1
        end = HEADER + len(taken.whole.packet)
        if not lane.raw:
            lane.view[:HEADER] = bytes(HEADER)
        lane.view[HEADER:end] = taken.whole.packet
        self.largest = taken.whole.largest
        lane.up(tunnel, end)
        self.largest = 0

    def _wrong(self, lane: Lane, tunnel: Tunnel, packet: Packet, error: MalformedPacket) -> None:
        if packet.version == 6 and error.reason in ("fragment_length", "fragment_too_long"):
            # RFC 8200 4.5: the pointer is at the payload length, or at the fragment offset.
            behind, _ = fragments.fragment_header(lane.buffer, packet.at)
            pointer = 4 if error.reason == "fragment_length" else behind - fragments.HEADER6 + 2
            self._worker.answers.parameter_problem(tunnel, lane, packet, pointer, error.reason)
        else:
            self._worker.drop(error.reason)

    def each_second(self) -> None:
        """Give up what has waited too long."""
        worker = self._worker
        for expired in self.reassembly.expire(worker.second):
            count = expired.fragments
            tunnel = worker.tunnels.get(expired.tunnel)
            if expired.first is not None and tunnel is not None:
                worker.counts[RECEIVED] += 1
                count -= 1
                worker.answers.reassembly_time_exceeded(tunnel, expired.first)
            self._dropped("fragment_timeout", count)

    def close(self, tunnel: Tunnel) -> None:
        """A tunnel is over: what waits of it is dropped."""
        self._dropped("tunnel_closed", self.reassembly.close(tunnel.id))

    def _dropped(self, reason: str, count: int) -> None:
        """Some that waited: another packet is under way, or none."""
        counts = self._worker.counts
        counts[RECEIVED] += count
        counts[DROPS[reason]] += count

    # out

    def say(self, tunnel: Tunnel, packet: bytes, mtu: int = 0) -> bool:
        """Send a whole packet of ours to a tunnel, in fragments where it is larger than `mtu` (0: the tunnel's).

        Its checksums are complete. False, and the reason counted once, where the tunnel didn't take all of it.
        """
        return all(self._worker.tunnels.say(tunnel, part) for part in self.parts(tunnel, packet, mtu))

    def parts(self, tunnel: Tunnel, packet: bytes, mtu: int = 0) -> list[bytes]:
        """What `say` sends."""
        most = min(mtu, tunnel.mtu) if mtu else tunnel.mtu
        if len(packet) <= most:
            return [packet]
        # RFC 791 3.2: who forwards keeps what the sender has chosen; with DF set there was nothing to choose.
        own = packet[0] >> 4 == 4 and not packet[6] & 0x40
        return fragments.cut(packet, most, None if own else self._identification(tunnel))

    def _identification(self, tunnel: Tunnel) -> int:
        if tunnel.identification < 0:
            tunnel.identification = int.from_bytes(self._random(4), "big")
        tunnel.identification = (tunnel.identification + 1) & 0xFFFFFFFF
        return tunnel.identification
