"""UDP sockets that carry many peers' datagrams in trains: UDP_GRO on the way in, UDP_SEGMENT on the way out.

A train is up to 64 datagrams of one size between the same two addresses, the last maybe shorter, in one call. Sockets are IPv6 ones that
take IPv4 too (as ::ffff:a.b.c.d), so that one descriptor serves both; where the namespace has no IPv6 they are IPv4's.

A machine with several addresses must answer from the one that was asked: a NAT or a firewall in front of the sender lets nothing else in. A socket that is
`told` has that behind the sender's address, as what `IP_PKTINFO` takes, and an address with it is sent to from there, for as long as it is this machine's.

Limits: Linux 5.0 or later. What the kernel doesn't take at once is dropped and told, as a full queue of a network card would.
"""

from __future__ import annotations

import errno
import socket
from collections.abc import Sequence
from struct import Struct
from typing import Any, Final

from falkirk.linux import sockets
from falkirk.linux.datagrams import SOL_UDP, UDP_GRO, UDP_SEGMENT

MAX_SEGMENTS: Final = 64
MAX_TRAIN: Final = 65_487
"""Bytes of one send: what is left of a datagram over IPv4 and over IPv6."""
MAX_RECEIVE: Final = 65_536
BUFFER: Final = 4 << 20
"""Bytes each way, where this process may have so many."""
_SIZE: Final = Struct("=H")
_ANCILLARY: Final = socket.CMSG_SPACE(4) + socket.CMSG_SPACE(20)
_IPV6_RECVPKTINFO: Final = 49
_INFO: Final = {socket.AF_INET: (socket.IPPROTO_IP, 8), socket.AF_INET6: (socket.IPPROTO_IPV6, 50)}
"""Level and type of IP_PKTINFO and IPV6_PKTINFO."""
_ANY: Final = bytes(4)
"""No interface, or no address, of that structure."""
_LINK_LOCAL: Final = b"\xfe\x80"
_NO_SEGMENTS: Final = (errno.EIO, errno.EINVAL, errno.EMSGSIZE, errno.EOPNOTSUPP)

_NOT_OURS: Final = (errno.EINVAL, errno.ENETUNREACH, errno.EADDRNOTAVAIL)

Address = tuple[Any, ...]


def open_socket(
    address: str = "", port: int = 0, *, shared: bool = False, told: bool = False, mark: int = 0
) -> socket.socket:
    """A bound, non-blocking UDP socket. `address`: empty for every address of both families. `shared`: SO_REUSEPORT. `told`: which of our addresses was
    sent to.

    `mark`: SO_MARK of what it sends, which takes CAP_NET_ADMIN. Raises OSError.
    """
    family = socket.AF_INET if address and ":" not in address else socket.AF_INET6
    try:
        sock = socket.socket(family, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
    except OSError as error:
        if address or error.errno != errno.EAFNOSUPPORT:
            raise
        family = socket.AF_INET
        sock = socket.socket(family, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
    try:
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0 if not address else 1)
        if shared:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        if told:
            level, kind = _INFO[family]
            sock.setsockopt(level, kind if family == socket.AF_INET else _IPV6_RECVPKTINFO, 1)
        if mark:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, mark)
        sockets.raise_buffers(sock, BUFFER)
        sock.setsockopt(SOL_UDP, UDP_GRO, 1)
        sock.bind((address or ("::" if family == socket.AF_INET6 else "0.0.0.0"), port))
    except BaseException:
        sock.close()
        raise
    return sock


def destination(sock: socket.socket, host: str, port: int) -> Address:
    """An IP address and port as this socket wants it (and gives it). Raises ValueError where its family can't reach it."""
    if sock.family == socket.AF_INET6:
        return (host if ":" in host else f"::ffff:{host}", port, 0, 0)
    if ":" in host:
        raise ValueError(f"{host} can't be reached: there is no IPv6 here")
    return (host, port)


def sender(address: Address) -> Address:
    """Whom a train is from, without which of our addresses it was sent to."""
    return address[:-1] if type(address[-1]) is bytes else address


def receive(sock: socket.socket, buffer: memoryview) -> tuple[int, int, Address] | None:
    """A train into `buffer`: its length, the size of its datagrams, and whom it is from (where the socket is `told`, with which address of ours it was sent to). None
    where nothing waits.

    Errors that earlier sends have left on the socket are none of a receiver's business, and skipped.
    """
    while True:
        try:
            length, ancillary, _, address = sock.recvmsg_into((buffer,), _ANCILLARY)
        except BlockingIOError:
            return None
        except ConnectionError:
            continue
        segment = length
        for level, kind, data in ancillary:
            if level == SOL_UDP:
                if kind == UDP_GRO:
                    segment = int.from_bytes(data[:2], "little")
            elif kind == _INFO[socket.AF_INET6][1] and level == socket.IPPROTO_IPV6:
                # The interface only where the address means nothing without: the way back may be another one.
                address = (*address, data if data[:2] == _LINK_LOCAL else data[:16] + _ANY)
            elif kind == _INFO[socket.AF_INET][1] and level == socket.IPPROTO_IP:
                address = (*address, _ANY + data[4:8] + _ANY)
        return length, segment, address


def send(sock: socket.socket, address: Address, datagrams: Sequence[bytes]) -> int:
    """Send datagrams in their order, runs of one size as trains; how many the kernel didn't take."""
    count = len(datagrams)
    lost = at = 0
    while at < count:
        size = len(datagrams[at])
        stop = at + 1
        most = min(count, at + MAX_SEGMENTS, at + MAX_TRAIN // (size or 1))
        while stop < most and len(datagrams[stop]) == size:
            stop += 1
        # The last of a train may be shorter.
        if stop < most and len(datagrams[stop]) < size:
            stop += 1
        lost += _send(sock, address, datagrams[at:stop], size)
        at = stop
    return lost


def _send(sock: socket.socket, address: Address, datagrams: Sequence[bytes], size: int) -> int:
    told = type(address[-1]) is bytes
    to = address[:-1] if told else address
    source = [(*_INFO[sock.family], address[-1])] if told else []
    if len(datagrams) > 1:
        try:
            sock.sendmsg(datagrams, (*source, (SOL_UDP, UDP_SEGMENT, _SIZE.pack(size))), 0, to)
        except OSError as error:
            # A device without checksum offload, or a path whose MTU is smaller: one by one they may pass.
            if error.errno not in _NO_SEGMENTS and not (told and error.errno in _NOT_OURS):
                return len(datagrams)
        else:
            return 0
    lost = 0
    for number, datagram in enumerate(datagrams):
        try:
            sock.sendmsg((datagram,), source, 0, to)
        except OSError as error:
            if told and error.errno in _NOT_OURS:
                # That address isn't ours any more.
                return lost + _send(sock, to, datagrams[number:], size)
            lost += 1
    return lost
