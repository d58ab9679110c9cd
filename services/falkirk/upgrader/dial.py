"""Connections to upstreams, made without waiting: the socket is given at once, its first event tells how it went.

The socket resets on close from the start (see `relay`), and sends small segments at once: a relay must not add Nagle's
delay (RFC 9293 3.7.4) to that of the two peers. Its address is the route's egress address; the port is chosen by connect(), so that
one egress address serves 28,000 streams *a destination*.

Limits: TCP only. An egress address must be this node's own.
"""

from __future__ import annotations

import errno
import select
import socket
from functools import lru_cache
from typing import Final

from falkirk.linux import sockets
from falkirk.linux.sockets import Socket

_FAMILY: Final = {4: socket.AF_INET, 16: socket.AF_INET6}
_TYPE: Final = socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC
_ERROR: Final = select.EPOLLERR | select.EPOLLHUP


@lru_cache(maxsize=1024)
def text(address: bytes) -> str:
    """A packed address as text."""
    return socket.inet_ntop(_FAMILY[len(address)], address)


def usable(congestion: str) -> str:
    """The congestion control where a socket may have it, else none: asked once, so that no dial fails to get it."""
    with socket.socket(socket.AF_INET, _TYPE) as probe:
        return sockets.set_congestion(probe, congestion) or "" if congestion else ""


def start(destination: bytes, port: int, egress: bytes, congestion: str) -> Socket:
    """A socket that connects. `egress` and `congestion` may be empty: the kernel's choice.

    Raises OSError: what connect() or bind() say at once, EAFNOSUPPORT where the families differ.
    """
    family = _FAMILY.get(len(destination))
    if family is None or (egress and len(egress) != len(destination)):
        raise OSError(errno.EAFNOSUPPORT, "egress and destination must be of one address family")
    sock = Socket(family, _TYPE)
    try:
        sockets.reset_on_close(sock)
        sockets.no_delay(sock)
        sockets.urgent_in_line(sock)
        if congestion:
            sockets.set_congestion(sock, congestion)
        if egress:
            sockets.bind_address(sock, text(egress))
        code = sock.connect_ex((text(destination), port))
        if code not in (0, errno.EINPROGRESS):
            raise OSError(code, errno.errorcode.get(code, "connect"))
    except BaseException:
        sock.close()
        raise
    return sock


def outcome(sock: Socket, events: int) -> int | None:
    """What the socket's epoll events say of its handshake: 0 connected, an errno failed, None nothing yet."""
    if events & _ERROR:
        return sockets.pending_error(sock) or None
    return 0 if events & select.EPOLLOUT else None


def kind(code: int) -> str:
    """The counter of a dial that came to this errno."""
    return _KINDS.get(code, "dial_failed")


_KINDS: Final = {
    0: "dial_connected",
    errno.ECONNREFUSED: "dial_refused",
    errno.ETIMEDOUT: "dial_timed_out",
    errno.EHOSTUNREACH: "dial_unreachable",
    errno.ENETUNREACH: "dial_unreachable",
    errno.EADDRNOTAVAIL: "dial_no_address",
    errno.EMFILE: "dial_no_descriptors",
    errno.EPROTONOSUPPORT: "dial_unsupported",
}
