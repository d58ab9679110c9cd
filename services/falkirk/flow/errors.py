"""ICMP errors from a tunnel. Those that quote a segment of one of its flows go on to the private namespace's kernel, so that its
TCP hears of a smaller path MTU or of a host that is gone; RFC 5508 4.2. Each is translated to the flow's slot, an address
that no other flow has, so what the kernel learns from it (the path MTU) touches this flow only; an IPv6 slot whose path MTU
was told rests until the kernel has forgotten it (`falkirk.flow.slots`).

Errors about replies of UDP and echo end here: a socket can't send them on (see `falkirk.flow.session`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from falkirk.flow.counters import FORWARDED
from falkirk.flow.keys import key_of
from falkirk.flow.session import Session
from falkirk.flow.table import State, TcpLift, Tunnel
from falkirk.wire import path_mtu
from falkirk.wire.icmp import PACKET_TOO_BIG6
from falkirk.wire.malformed import MalformedPacket
from falkirk.wire.nat import Rewrite
from falkirk.wire.packet import Packet
from falkirk.wire.protocol import TCP, UDP
from falkirk.wire.translate import Quoted, quoted, translate

if TYPE_CHECKING:
    from falkirk.flow.lane import Lane
    from falkirk.flow.worker import Worker


class IcmpErrors:
    """ICMP of one worker's tunnels."""

    def __init__(self, worker: Worker) -> None:
        self._worker = worker

    def from_tunnel(self, lane: Lane, tunnel: Tunnel, packet: Packet) -> None:
        """An ICMP or ICMPv6 message in the lane's buffer, from an address of the device."""
        worker = self._worker
        try:
            quote = quoted(lane.buffer, packet)
        except MalformedPacket as error:
            worker.drop(error.reason)
            return
        session = _session(tunnel, quote)
        if session is not None:
            session.sessions.told(session, packet, path_mtu.told(lane.buffer, packet))
            return
        flow = self._flow(tunnel, quote)
        if flow is None or flow.state is State.HELD:
            worker.drop("icmp_error_unmatched")
            return
        error_packet = translate(lane.buffer, packet, quote, _forward(flow))
        assert error_packet is not None  # Its TTL was looked at before.
        try:
            flow.lane.put(error_packet)
        except OSError:
            worker.drop("tun_write_error")
        else:
            worker.counts[FORWARDED] += 1
            flow.long_rest |= packet.icmp_type == PACKET_TOO_BIG6 and packet.version == 6

    @staticmethod
    def _flow(tunnel: Tunnel, quote: Quoted) -> TcpLift | None:
        """The flow whose segment to the client is quoted."""
        if quote.protocol != TCP:
            return None
        ports = quote.destination_port.to_bytes(2, "big") + quote.source_port.to_bytes(2, "big")
        return tunnel.lifts.get(quote.destination + quote.source + ports)


def _session(tunnel: Tunnel, quote: Quoted) -> Session | None:
    """The session whose packet to the client is quoted."""
    if quote.protocol == TCP:
        return None
    client, server = (quote.destination, quote.destination_port), (quote.source, quote.source_port)
    if quote.protocol != UDP:
        client, server = (quote.destination, quote.identifier), (quote.source, 0)
    flow = tunnel.flows.get(key_of(quote.protocol, client[0], server[0], client[1], server[1]))
    return flow if isinstance(flow, Session) and flow.held is None else None


def _forward(flow: TcpLift) -> Rewrite:
    """The flow's rewrite towards the private namespace."""
    size = 4 if flow.family == 4 else 16
    return Rewrite(
        flow.source,
        flow.destination,
        flow.source_port,
        flow.destination_port,
        flow.forward[:size],
        flow.forward[size : 2 * size],
        int.from_bytes(flow.forward[-4:-2], "big"),
        int.from_bytes(flow.forward[-2:], "big"),
    )
