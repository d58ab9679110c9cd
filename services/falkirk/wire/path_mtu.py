"""What an ICMP error says of a path's MTU, and which of it can be true.

"Fragmentation needed" (RFC 1191 4) and "packet too big" (RFC 4443 3.2) tell the size that the next link takes. Anybody can send one, so what
no path is isn't believed:

- less than 1,280 bytes with IPv6 (RFC 8201 4), less than 68 with IPv4 (RFC 791 3.2, RFC 1191 3);
- no less than the quoted packet had: that would have fitted (RFC 5927 7.2).

Whether the quoted packet is one that was sent is for those to know who sent it: the private namespace's kernel looks at its sequence number
(RFC 5927 4.1), and takes 552 for anything below that of IPv4.
"""

from __future__ import annotations

from typing import Final

from falkirk.wire import icmp
from falkirk.wire.checksum import Buffer
from falkirk.wire.malformed import MalformedPacket
from falkirk.wire.packet import Packet

LEAST4: Final = 68
LEAST6: Final = 1280
UNKNOWN4: Final = 576
"""RFC 1191 5: what a router that doesn't say is taken to mean, at least."""


def told(data: Buffer, packet: Packet) -> int | None:
    """The MTU in an ICMP message; None where it is about something else."""
    at = packet.at + packet.header_length
    if packet.version == 6:
        if packet.icmp_type != icmp.PACKET_TOO_BIG6:
            return None
        return int.from_bytes(data[at + 4 : at + 8], "big")
    if (packet.icmp_type, packet.icmp_code) != (icmp.UNREACHABLE4, icmp.FRAGMENTATION_NEEDED4):
        return None
    # RFC 1191 5: a router from before then says 0.
    return data[at + 6] << 8 | data[at + 7] or UNKNOWN4


def check(data: Buffer, packet: Packet, quoted_length: int) -> None:
    """Raises MalformedPacket("icmp_mtu") for an error that can't be true; `quoted_length` is what the quoted packet's header says."""
    mtu = told(data, packet)
    if mtu is not None and not (LEAST4 if packet.version == 4 else LEAST6) <= mtu < quoted_length:
        raise MalformedPacket("icmp_mtu")
