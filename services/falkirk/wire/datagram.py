"""IP and UDP headers in front of payloads that came from a socket: the way back of a UDP session.

`Heads` knows one direction of a session and computes once what all its packets share. `put` writes the headers of one datagram
right in front of its payload, so nothing is copied; with `uso` the headers are those of a super-packet behind a virtio-net header.
`packed` makes the packets of a train that came in one piece, for a tunnel that takes several packets in one datagram.

Packets are atomic (DF set, identification 0: RFC 6864 4.1) unless an identification is given, which clears DF: for what is to be fragmented.
A checksum that comes to zero is sent as 0xffff (RFC 768, RFC 8200 8.1). The IPv6 flow label is 0.

`rebuild` is both ways at once: a packet is taken apart to its payload, and that gets new headers.

Limits: UDP; no IP options and no extension headers.
"""

from __future__ import annotations

from struct import Struct
from typing import Final

from falkirk.wire.checksum import pseudo_header, residue
from falkirk.wire.malformed import MalformedPacket
from falkirk.wire.protocol import UDP
from falkirk.wire.vnet import GSO_NONE, GSO_UDP_L4, NEEDS_CSUM, SIZE, STRUCT

HEADER: Final = 8
_FOUR: Final = Struct(">BBHHHBBH8sHHHH")
_SIX: Final = Struct(">IHBB32sHHHH")
_put4: Final = _FOUR.pack_into
_put6: Final = _SIX.pack_into
_put_vnet: Final = STRUCT.pack_into
_DONT_FRAGMENT: Final = 0x4000


class Heads:
    """Headers from `source` to `destination`, packed addresses of one family."""

    __slots__ = ("_addresses", "_destination_port", "_fixed", "_fixed4", "_source_port", "four", "size")

    def __init__(self, source: bytes, destination: bytes, source_port: int, destination_port: int) -> None:
        self.four = len(source) == 4
        self.size = (20 if self.four else 40) + HEADER
        """Bytes in front of a payload."""
        self._addresses = source + destination
        self._source_port = source_port
        self._destination_port = destination_port
        self._fixed = pseudo_header(source, destination, UDP, 0)
        self._fixed4 = residue(self._addresses) + 0x4500 + UDP

    def pseudo(self, length: int) -> int:
        """The pseudo-header's sum for a datagram of this many bytes, its header included."""
        return self._fixed + length

    def put(
        self,
        buf: bytearray | memoryview,
        at: int,
        length: int,
        ttl: int,
        traffic_class: int,
        *,
        partial: bool = False,
        identification: int = -1,
    ) -> None:
        """Write the headers at `at`, whose payload of `length` bytes stands behind them already.

        `partial` leaves the checksum to whoever sends it on (NEEDS_CSUM).
        """
        size = length + HEADER
        if partial:
            check = (self._fixed + size) % 0xFFFF
        else:
            start = at + self.size
            total = self._fixed + 2 * size + self._source_port + self._destination_port
            check = -(total + residue(memoryview(buf)[start : start + length])) % 0xFFFF or 0xFFFF
        if self.four:
            whole = size + 20
            flags = _DONT_FRAGMENT if identification < 0 else 0
            identification = max(identification, 0)
            head = -(self._fixed4 + traffic_class + whole + identification + flags + (ttl << 8)) % 0xFFFF
            _put4(
                buf,
                at,
                0x45,
                traffic_class,
                whole,
                identification,
                flags,
                ttl,
                UDP,
                head,
                self._addresses,
                self._source_port,
                self._destination_port,
                size,
                check,
            )
        else:
            _put6(
                buf,
                at,
                6 << 28 | traffic_class << 20,
                size,
                UDP,
                ttl,
                self._addresses,
                self._source_port,
                self._destination_port,
                size,
                check,
            )

    def put_vnet(self, buf: bytearray | memoryview, at: int, gso_size: int) -> None:
        """The virtio-net header at `at`, in front of what `put` wrote as partial; `gso_size` 0 where it is one datagram."""
        upper = self.size - HEADER
        if gso_size:
            _put_vnet(buf, at, NEEDS_CSUM, GSO_UDP_L4, self.size, gso_size, upper, 6)
        else:
            _put_vnet(buf, at, NEEDS_CSUM, GSO_NONE, self.size, 0, upper, 6)

    def packed(self, payload: memoryview, gso_size: int, ttl: int, traffic_class: int) -> bytearray:
        """The packets of a train of datagrams of `gso_size` bytes (the last may be shorter), one behind the other."""
        length = len(payload)
        count = -(-length // gso_size)
        made = bytearray(length + count * self.size)
        at = 0
        for begin in range(0, length, gso_size):
            part = payload[begin : begin + gso_size]
            start = at + self.size
            made[start : start + len(part)] = part
            self.put(made, at, len(part), ttl, traffic_class)
            at = start + len(part)
        return made


def quoted_packet(source: bytes, destination: bytes, source_port: int, destination_port: int, payload: bytes) -> bytes:
    """The packet of a datagram of which an error quotes `payload`, as far as it is known."""
    heads = Heads(source, destination, source_port, destination_port)
    packet = bytearray(heads.size) + payload
    heads.put(packet, 0, len(payload), 1, 0)
    return bytes(packet)


def rebuild(buf: bytearray, at: int, l4: int, end: int, heads: Heads) -> int:
    """Take the packet at [at, end), whose UDP header is at `l4`, apart to its payload, and build it anew in its place; its new end.

    What only its header said is gone: options, extension headers, the flow label, bytes behind the datagram. TTL, class and DF stay, and where DF is
    clear the identification. The virtio-net header in front of `at` is made to fit; where that says NEEDS_CSUM the checksum stays partial. Raises
    MalformedPacket for a length or a checksum that is wrong.
    """
    length = buf[l4 + 4] << 8 | buf[l4 + 5]
    if not HEADER <= length <= end - l4:
        raise MalformedPacket("bad_udp_length")
    partial = bool(buf[at - SIZE] & NEEDS_CSUM)
    if not partial and (buf[l4 + 6] or buf[l4 + 7]):
        # The pseudo-header's sum with this length.
        if (residue(memoryview(buf)[l4 : l4 + length]) + heads.pseudo(length)) % 0xFFFF:
            raise MalformedPacket("bad_l4_checksum")
    elif not partial and not heads.four:
        raise MalformedPacket("bad_l4_checksum")
    if heads.four:
        traffic_class, ttl = buf[at + 1], buf[at + 8]
        identification = -1 if buf[at + 6] & 0x40 else buf[at + 4] << 8 | buf[at + 5]
    else:
        traffic_class, ttl, identification = (buf[at] & 15) << 4 | buf[at + 1] >> 4, buf[at + 7], -1
    size = length - HEADER
    start = at + heads.size
    if start != l4 + HEADER:
        buf[start : start + size] = buf[l4 + HEADER : l4 + length]
    gso_size = buf[at - SIZE + 4] | buf[at - SIZE + 5] << 8 if buf[at - SIZE + 1] else 0
    heads.put(buf, at, size, ttl, traffic_class, partial=partial, identification=identification)
    if partial:
        heads.put_vnet(buf, at - SIZE, gso_size)
    return start + size


VNET_ROOM: Final = SIZE + 40 + HEADER
"""Room for all headers in front of a payload, of either family."""
