"""Sockets of UDP and echo sessions: opened here, from the egress address that the route names, and handed to flow.

Nothing of a session stays here: not its socket, not its external port (flow says which one to share), so that this process's end costs
none. A wish that can't be granted is answered with what the kernel says.

Limit: an egress address must be this node's own.
"""

from __future__ import annotations

import errno
import socket
from typing import Final

from falkirk.linux import datagrams
from falkirk.wire.handover import OpenSocket
from falkirk.wire.protocol import ICMP, ICMPV6, UDP


def start(wish: OpenSocket) -> tuple[socket.socket, int, bool]:
    """The socket, its external port or identifier, and whether it is a raw one. Raises OSError."""
    if wish.protocol == UDP:
        if not wish.port:
            # A socket may be connected to it, and then can't send.
            raise OSError(errno.EINVAL, "0 is no port")
        sock = datagrams.udp(wish.destination, wish.port, wish.egress, wish.local)
        return sock, sock.getsockname()[1], False
    if wish.protocol != (ICMP if len(wish.destination) == 4 else ICMPV6):
        raise OSError(errno.EPROTONOSUPPORT, "neither UDP nor echo of the destination's family")
    return datagrams.echo(wish.destination, wish.egress, wish.local)


def kind(code: int) -> str:
    """The counter of a wish that came to this errno."""
    return _KINDS.get(code, "socket_failed")


_KINDS: Final = {
    0: "socket_opened",
    errno.EACCES: "socket_not_permitted",
    errno.EPERM: "socket_not_permitted",
    errno.EHOSTUNREACH: "socket_unreachable",
    errno.ENETUNREACH: "socket_unreachable",
    errno.EADDRNOTAVAIL: "socket_no_address",
    errno.EADDRINUSE: "socket_no_port",
    errno.EMFILE: "socket_no_descriptors",
    errno.ENFILE: "socket_no_descriptors",
    errno.EPROTONOSUPPORT: "socket_unsupported",
}
