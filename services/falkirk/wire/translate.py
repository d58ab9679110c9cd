"""ICMP errors about a flow, carried across the NAT (RFC 5508 4.2).

Somebody on one side of a flow couldn't handle a packet that came out of the NAT, and says so in an ICMP error that quotes it.
The other side's TCP knows neither those addresses nor those ports, so the quoted packet is turned back into the one that
went in, and the error is sent on to whoever sent that:

    client's side   error to S, quoting S:443 -> C:40000    -- up -->    error to D, quoting D:1024 -> A:40000
    client's side   error to C, quoting C:40000 -> S:443    <-- down --  error to A, quoting A:40000 -> D:1024

(C client, S server; A slot, D the device's address in the private namespace.) What was changed on its way is changed back
by the constants of the opposite direction, which is the direction in which the error travels: `translate` takes `up` for an
error that travels up. Type, code, MTU and extensions (RFC 4884) stay, the outer header is made anew, without options.

The caller: `quoted` (checks and reads), look the flow up by the quoted packet, `translate`.

Limits: quoted TCP only; a quoted TCP checksum is adjusted as a full one, although a packet quoted from behind a vnet header has
a partial one (no receiver looks). Redirects and source quenches are not carried (RFC 1812 5.2.7.2, RFC 6633).
"""

from __future__ import annotations

from typing import Final, NamedTuple

from falkirk.wire import icmp, ipv4, ipv6, path_mtu, tcp
from falkirk.wire.build import icmp_packet
from falkirk.wire.checksum import Buffer
from falkirk.wire.malformed import MalformedPacket
from falkirk.wire.nat import Rewrite
from falkirk.wire.packet import Packet, verify
from falkirk.wire.protocol import ICMP, ICMPV6, TCP, UDP

CARRIED4: Final = frozenset((icmp.UNREACHABLE4, icmp.TIME_EXCEEDED4, icmp.PARAMETER_PROBLEM4))
CARRIED6: Final = frozenset((icmp.UNREACHABLE6, icmp.PACKET_TOO_BIG6, icmp.TIME_EXCEEDED6, icmp.PARAMETER_PROBLEM6))
_PORTS_AND_SEQUENCE: Final = 8
"""RFC 792: the least of the upper layer that is quoted."""


class Quoted(NamedTuple):
    """The packet in an ICMP error, as far as it identifies a flow. It travelled against the error."""

    header_length: int
    """Up to its upper layer; it starts 8 bytes into the ICMP message."""
    protocol: int
    source: bytes
    destination: bytes
    source_port: int
    """TCP and UDP, else 0."""
    destination_port: int
    sequence: int
    """TCP only: whose connection it is may be checked by it (RFC 5927 4.1)."""
    identifier: int = 0
    """Of an ICMP echo or its reply."""


def quoted(data: Buffer, packet: Packet) -> Quoted:
    """What the ICMP error `packet` quotes.

    Raises MalformedPacket: icmp_not_error for a message that isn't carried, bad_l4_checksum (RFC 5508 REQ-3), bad_icmp_quote
    where the quotation doesn't hold an IP header (right checksum, REQ-3 a) and eight bytes more, or icmp_mtu where it says
    of a path what none is.
    """
    if packet.icmp_type not in (CARRIED4 if packet.version == 4 else CARRIED6):
        raise MalformedPacket("icmp_not_error")
    verify(data, packet)
    at = packet.at + packet.payload_offset
    length = packet.payload_length
    try:
        head: ipv4.Ipv4 | ipv6.Ipv6
        if packet.version == 4:
            head = ipv4.parse(data, at, length, quoted=True)
        else:
            head = ipv6.parse(data, at, length, quoted=True)
    except MalformedPacket as error:
        raise MalformedPacket("bad_icmp_quote") from error
    if head.fragment_offset or length < head.header_length + _PORTS_AND_SEQUENCE:
        raise MalformedPacket("bad_icmp_quote")
    path_mtu.check(data, packet, head.total_length)
    upper = at + head.header_length
    source_port = destination_port = sequence = 0
    if head.protocol in (TCP, UDP):
        source_port = data[upper] << 8 | data[upper + 1]
        destination_port = data[upper + 2] << 8 | data[upper + 3]
    if head.protocol == TCP:
        sequence = int.from_bytes(data[upper + 4 : upper + 8], "big")
    identifier = 0
    if head.protocol == (ICMP if packet.version == 4 else ICMPV6) and icmp.is_echo(packet.version, data[upper]):
        identifier = data[upper + 4] << 8 | data[upper + 5]
    return Quoted(
        head.header_length,
        head.protocol,
        head.source,
        head.destination,
        source_port,
        destination_port,
        sequence,
        identifier,
    )


def translate(
    data: Buffer, packet: Packet, quote: Quoted, rewrite: Rewrite, source: bytes | None = None
) -> bytes | None:
    """The error for the other side; None where its own TTL doesn't last another hop.

    `rewrite` is the flow's in the direction in which the error travels. The error seems to come from the flow's own endpoint
    over there, or from `source`: a router's address tells a client more (RFC 5508 REQ-5 c), but the private namespace knows
    none but slots.
    """
    if packet.ttl < 2:
        return None
    message = bytearray(data[packet.at + packet.header_length : packet.at + packet.total_length])
    _turn_back(message, icmp.HEADER, quote.header_length, rewrite)
    message[icmp.CHECKSUM_OFFSET : icmp.CHECKSUM_OFFSET + 2] = b"\0\0"
    size = 4 if rewrite.version == 4 else 16
    return icmp_packet(
        message,
        rewrite.head[:size] if source is None else source,
        rewrite.head[size : 2 * size],
        ttl=packet.ttl - 1,
        traffic_class=packet.traffic_class,
    )


def _turn_back(message: bytearray, at: int, header_length: int, rewrite: Rewrite) -> None:
    """The quoted packet gets the new addresses and ports the other way round, as it travelled the other way."""
    head = rewrite.head
    upper = at + header_length
    if rewrite.version == 4:
        message[at + 12 : at + 20] = head[4:8] + head[:4]
        _add(message, at + 10, rewrite.addresses)
        message[upper : upper + 4] = head[10:12] + head[8:10]
    else:
        message[at + 8 : at + 40] = head[16:32] + head[:16]
        message[upper : upper + 4] = head[34:36] + head[32:34]
    if upper + tcp.CHECKSUM_OFFSET + 2 <= len(message):
        _add(message, upper + tcp.CHECKSUM_OFFSET, rewrite.full)


def _add(message: bytearray, at: int, delta: int) -> None:
    field = (message[at] << 8 | message[at + 1]) + delta
    message[at : at + 2] = (field % 0xFFFF).to_bytes(2, "big")
