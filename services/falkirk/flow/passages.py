"""Forwarded flows and their two directions, as data, and the questions that can be answered from bytes alone. PURE.

A *passage* is one direction of a forwarded flow, as the worker knows it that reads its packets. It lies in its tunnel's `passages` under
the key of those packets: the flow's own key in the tunnel that it began in, the reply's in the tunnel that it leads to. So only
the exact reply is let back, whatever the other device's own rules say, and nothing else of that device is.

    tunnel A ──Passage(up)──► flow ──► tunnel B            one worker
    tunnel A ◄── flow ◄──Passage(down)── tunnel B

    tunnel A ──Passage(up)──► flow ──pair──► tunnel B      two workers: the flow is at A's, B's has a passage
    tunnel A ◄── flow ◄──pair──Passage(link, handle)── B   that knows the owner's number of the flow only

An echo's identifier stands where the source port would, and in its reply's key where the destination port would: two devices may
ping each other with one identifier, and only a reply is taken for a reply.
"""

from __future__ import annotations

from typing import Any, Final

from falkirk.decide.routes import RouteEntry
from falkirk.flow.follow import Follower
from falkirk.flow.keys import key_of, signature
from falkirk.flow.table import Flow, Owner, Tunnel
from falkirk.wire import icmp, ipv4, ipv6
from falkirk.wire.checksum import Buffer
from falkirk.wire.datagram import Heads
from falkirk.wire.packet import Packet
from falkirk.wire.protocol import DESTINATION_OPTIONS, FRAGMENT, HOP_BY_HOP, ICMP, ICMPV6, ROUTING, TCP, UDP
from falkirk.wire.translate import Quoted

HEADER: Final = 10
REQUESTS: Final = {ICMP: icmp.ECHO4, ICMPV6: icmp.ECHO6}
_WALKED: Final = frozenset((HOP_BY_HOP, ROUTING, FRAGMENT, DESTINATION_OPTIONS))
_SUFFIX: Final = [bytes((number,)) for number in range(256)]
REPLIES: Final = {ICMP: icmp.ECHO_REPLY4, ICMPV6: icmp.ECHO_REPLY6}
_UDP_HEADER: Final = 8


class Remote:
    """A tunnel that another worker reads, and the pair with that worker."""

    __slots__ = ("link", "mtu", "number")

    def __init__(self, link: Any, number: int, mtu: int) -> None:
        self.link = link
        self.number = number
        self.mtu = mtu


class ForwardFlow(Flow):
    """A flow between two tunnels. `up` is read from `tunnel`, `down` from what `to` stands for."""

    __slots__ = ("handle", "heads", "held", "reply", "route", "tcp", "to")

    def __init__(self, owner: Owner[ForwardFlow], tunnel: Tunnel, key: bytes, handle: int, route: RouteEntry) -> None:
        super().__init__(owner, tunnel, key)
        self.to: Tunnel | Remote | None = None
        """Where it leads to; None before its first packet has gone, and after its end."""
        self.handle = handle
        """This worker's number for it, never used twice."""
        self.route = route
        """The one that was decided on; it leads to a device."""
        self.reply = reply_key(key)
        self.held: list[tuple[int, int, bytes]] = []
        """Packets (behind their virtio-net headers) that wait until the flow's start is on record, each with where its upper layer starts and
        how large its fragments were (`falkirk.flow.fragments`)."""
        self.tcp = Follower() if key[-1] == TCP else None
        self.heads: tuple[Heads, Heads] | None = None
        """Down and up, where its packets are taken apart and built anew (UDP under treatment l4)."""

    def rebuild(self) -> None:
        """Have its packets built anew from now on."""
        _, source, destination, source_port, destination_port = signature(self.key)
        up = Heads(source, destination, source_port, destination_port)
        self.heads = Heads(destination, source, destination_port, source_port), up


class Passage:
    """One direction. Either `flow`, at its owner, or `link` and `handle`, at the other tunnel's worker."""

    __slots__ = ("flow", "handle", "link", "mtu", "prefix", "up", "vnet_ok", "vnet_put")

    def __init__(
        self, flow: ForwardFlow | None, up: bool, link: Any = None, handle: int = 0, mtu: int = 0, prefix: str = ""
    ) -> None:
        self.flow = flow
        self.up = up
        self.link = link
        self.handle = handle
        self.mtu = mtu
        """Of the tunnel that a foreign flow's replies go to."""
        self.prefix = prefix
        """Of the route that leads to this tunnel, where the direction is down: routers behind it may send ICMP errors."""
        self.vnet_ok = b""
        """The last virtio-net header of this direction that was found to be true."""
        self.vnet_put = b""
        """Its normal form, which goes on."""


def reply_key(key: bytes) -> bytes:
    """The key of the packets that answer those of `key` (13 or 37 bytes)."""
    protocol, source, destination, source_port, destination_port = signature(key)
    return key_of(protocol, destination, source, destination_port, source_port)


def key_of_packet(packet: Packet) -> bytes | None:
    """The key of a parsed packet; None for ICMP that is neither an echo nor its reply."""
    ports = packet.source_port, packet.destination_port
    if packet.icmp_type >= 0:
        if packet.icmp_type == REQUESTS[packet.protocol]:
            ports = packet.identifier, 0
        elif packet.icmp_type == REPLIES[packet.protocol]:
            ports = 0, packet.identifier
        else:
            return None
    return key_of(packet.protocol, packet.source, packet.destination, *ports)


def plain(buffer: bytearray, view: memoryview, end: int) -> tuple[bytes, int] | None:
    """(key, where the upper layer starts) of the packet at [10, end) where it is so plain that it needs no parsing: no options or
    extension headers, no fragment, hops left, lengths that add up. None where it isn't. As `key_of_packet`, at a fifth of the cost."""
    if buffer[10] == 0x45:
        if (
            end < 38
            or end - HEADER != buffer[12] << 8 | buffer[13]
            or buffer[16] & 0x3F
            or buffer[17]
            or buffer[18] < 2
            or int.from_bytes(view[10:30], "little") % 0xFFFF
        ):
            return None
        protocol, first, l4, echo = buffer[19], 22, 30, ICMP
    elif buffer[10] >> 4 == 6:
        if end < 58 or end - 50 != buffer[14] << 8 | buffer[15] or buffer[17] < 2 or buffer[16] in _WALKED:
            return None
        protocol, first, l4, echo = buffer[16], 18, 50, ICMPV6
    else:
        return None
    if protocol == TCP:
        if end < l4 + 20 or not 20 <= buffer[l4 + 12] >> 4 << 2 <= end - l4:
            return None
        key = view[first : l4 + 4].tobytes() + b"\x06"
    elif protocol == UDP:
        if buffer[l4 + 4] << 8 | buffer[l4 + 5] != end - l4:
            return None
        key = view[first : l4 + 4].tobytes() + b"\x11"
    elif protocol != echo:
        key = view[first:l4].tobytes() + b"\0\0\0\0" + _SUFFIX[protocol]
    elif buffer[l4] == REQUESTS[echo]:
        key = b"%b%b\0\0%c" % (view[first:l4].tobytes(), view[l4 + 4 : l4 + 6].tobytes(), echo)
    elif buffer[l4] == REPLIES[echo]:
        key = b"%b\0\0%b%c" % (view[first:l4].tobytes(), view[l4 + 4 : l4 + 6].tobytes(), echo)
    else:
        return None
    return key, l4


def key_of_quoted(data: Buffer, packet: Packet, quote: Quoted) -> bytes | None:
    """The key under which the flow's passage lies in the tunnel that an ICMP error came from: the quoted packet was sent into it, so
    this is the key of what answers it. None where the quoted packet can't have been one."""
    ports = quote.source_port, quote.destination_port
    if quote.protocol in REQUESTS:
        at = packet.at + packet.payload_offset + quote.header_length
        identifier = data[at + 4] << 8 | data[at + 5]
        if data[at] == REQUESTS[quote.protocol]:
            ports = identifier, 0
        elif data[at] == REPLIES[quote.protocol]:
            ports = 0, identifier
        else:
            return None
    return key_of(quote.protocol, quote.destination, quote.source, ports[1], ports[0])


def size_on_the_wire(buffer: Buffer, end: int) -> int:
    """Bytes of the packet at [10, end), or of the largest segment of the super-packet that it is by its (true) virtio-net header."""
    if not buffer[1]:
        return end - HEADER
    start = buffer[6] | buffer[7] << 8
    size = buffer[4] | buffer[5] << 8
    l4 = HEADER + start
    # csum_offset: 16 is TCP's, whose header has a length of its own.
    header = buffer[l4 + 12] >> 4 << 2 if buffer[8] == 16 else _UDP_HEADER
    return min(end - HEADER, start + header + size)


def may_be_cut(buffer: Buffer) -> bool:
    """Whether a packet may be sent on in fragments: IPv4 without DF (RFC 791 3.2; RFC 8200 5: no router does that with IPv6)."""
    return buffer[10] >> 4 == 4 and not buffer[16] & 0x40


def unreachable_of(key: bytes, kind: icmp.Unreachable) -> bytearray:
    """An ICMP error (without its checksum) about a packet of a flow, of which no more is known than the key: it quotes as much as lets
    the initiator find the socket, an IP header and eight bytes (RFC 792)."""
    protocol, source, destination, source_port, destination_port = signature(key)
    ports = source_port.to_bytes(2, "big") + destination_port.to_bytes(2, "big")
    if protocol in REQUESTS:
        upper = icmp.build(REQUESTS[protocol], 0, source_port << 16)
    elif protocol == UDP:
        upper = ports + b"\0\x08\0\0"
    else:
        upper = bytes(8)
    code, type6, code6 = kind.value
    if len(source) == 4:
        return bytearray(icmp.build(icmp.UNREACHABLE4, code, 0) + ipv4.build(source, destination, protocol, 8) + upper)
    return bytearray(icmp.build(type6, code6, 0) + ipv6.build(source, destination, protocol, 8) + upper)
