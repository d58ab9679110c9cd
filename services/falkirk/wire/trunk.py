"""A trunk: the SEQPACKET pair of an on-ramp worker and a flow worker, for all tunnels that have no descriptor of their own. PURE.

    datagram = tunnel (u32, big endian) packet [packet …]        at most DATAGRAM bytes behind the number

A packet says itself where it ends, as in a raw datagram of a tunnel's own. Datagrams of a tunnel keep their order; nothing else is promised.
"""

from __future__ import annotations

from struct import Struct
from typing import Final

NUMBER: Final = Struct(">I")
"""Which tunnel a datagram is of."""
HEADER: Final = NUMBER.size
"""Bytes before the packets."""
DATAGRAM: Final = 65536
"""Bytes of packets in a datagram."""
BUFFER: Final = 4 * 1024 * 1024
"""What each end's socket is asked to hold."""
