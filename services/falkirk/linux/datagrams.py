"""Connected datagram sockets that carry one session each: UDP, and ICMP echo.

What such a socket must do to stand for a router's way (RFC 4787, RFC 5508):

- share its external port with the other sessions of the same client's address and port (`udp` with a `port`), and yet take nothing but
  its own peer's datagrams: from before bind() until connect() is done a filter lets nothing in;
- tell of what is too big instead of fragmenting it, and of every ICMP error with its sender (`next_error`);
- tell each datagram's TTL and traffic class, and set those of each one it sends;
- take and give trains of datagrams in one call (UDP_GRO, UDP_SEGMENT).

Echo goes through a ping socket, whose identifier the kernel chooses; where net.ipv4.ping_group_range keeps this process from having
one, through a raw socket (CAP_NET_RAW) that takes echo replies of its identifier only, and gives IPv4 headers too.

Limits: Linux only. RFC 4884 extensions of errors aren't told.
"""

from __future__ import annotations

import errno
import socket
import struct
from typing import Final, NamedTuple

from falkirk.linux import sockets

SOL_UDP: Final = 17
UDP_SEGMENT: Final = 103
UDP_GRO: Final = 104

IP_TOS: Final = 1
IP_TTL: Final = 2
IP_MTU_DISCOVER: Final = 10
IP_RECVERR: Final = 11
IP_RECVTTL: Final = 12
IP_RECVTOS: Final = 13
IP_MTU: Final = 14
IPV6_UNICAST_HOPS: Final = 16
IPV6_MTU_DISCOVER: Final = 23
IPV6_MTU: Final = 24
IPV6_RECVERR: Final = 25
IPV6_RECVHOPLIMIT: Final = 51
IPV6_HOPLIMIT: Final = 52
IPV6_RECVTCLASS: Final = 66
IPV6_TCLASS: Final = 67
TTLS: Final = frozenset((IP_TTL, IPV6_HOPLIMIT))
"""Kinds of the control messages that tell a TTL."""
PMTUDISC_DONT: Final = 0
PMTUDISC_DO: Final = 2
SO_ATTACH_FILTER: Final = 26
SO_DETACH_FILTER: Final = 27

ORIGIN_LOCAL: Final = 1
"""The error is this machine's own: too big for the interface, for instance."""

ANCILLARY: Final = 3 * socket.CMSG_SPACE(4)
"""Room for what comes beside a datagram: TTL, traffic class, size of a train's datagrams."""
BUFFER: Final = 1 << 20
"""Bytes each way, where this process may have so many: a burst must wait for its reader somewhere."""
_ERROR: Final = struct.Struct("=IBBBBII")
_ERROR_ROOM: Final = socket.CMSG_SPACE(_ERROR.size + 28) + ANCILLARY
_QUOTED: Final = 2048
_FAMILIES: Final = {4: socket.AF_INET, 16: socket.AF_INET6}
_ANY: Final = {socket.AF_INET: "0.0.0.0", socket.AF_INET6: "::"}
_FLAGS: Final = socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC
_NOTHING: Final = [(0x06, 0, 0, 0)]
"""Classic BPF: return 0."""


class SocketError(NamedTuple):
    """One entry of a socket's error queue."""

    errno: int
    origin: int
    type: int
    """Of the ICMP or ICMPv6 message; 0 where the error is local."""
    code: int
    info: int
    """The next hop's MTU where a packet was too big."""
    offender: bytes
    """Who said it, 4 or 16 bytes; empty where that isn't known."""
    destination: bytes
    """Whom the quoted packet was for."""
    quoted: bytes
    """What is quoted behind the UDP header; of an echo, its ICMP header and what follows."""


def udp(destination: bytes, port: int, egress: bytes, local: int) -> socket.socket:
    """A connected UDP socket. `egress` is its address (empty: the kernel's choice); `local` the external port that it shares with
    others of its client, 0 where it is to choose one that nobody has. Raises OSError."""
    family = _family(destination, egress)
    sock = socket.socket(family, socket.SOCK_DGRAM | _FLAGS)
    try:
        sockets.attach(sock, SO_ATTACH_FILTER, _NOTHING)
        if local:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        sock.bind((_text(family, egress), local))
        # Only now: a socket that may share would be given a port that others have.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        _prepare(sock, family)
        sock.setsockopt(SOL_UDP, UDP_GRO, 1)
        sock.connect((_text(family, destination), port))
        sock.setsockopt(socket.SOL_SOCKET, SO_DETACH_FILTER, 0)
    except BaseException:
        sock.close()
        raise
    return sock


def echo(destination: bytes, egress: bytes, identifier: int) -> tuple[socket.socket, int, bool]:
    """A connected socket for echo requests, its identifier, and whether it is a raw one (which has the `identifier` given).

    Raises OSError; EPERM where this process may have neither kind.
    """
    family = _family(destination, egress)
    protocol = socket.IPPROTO_ICMP if family == socket.AF_INET else socket.IPPROTO_ICMPV6
    try:
        sock = socket.socket(family, socket.SOCK_DGRAM | _FLAGS, protocol)
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EPERM, errno.EPROTONOSUPPORT):
            raise
        return _raw_echo(family, protocol, destination, egress, identifier), identifier, True
    try:
        sock.bind((_text(family, egress), 0))
        _prepare(sock, family)
        sock.connect((_text(family, destination), 0))
    except BaseException:
        sock.close()
        raise
    return sock, sock.getsockname()[1], False


def echo_kind(family: socket.AddressFamily) -> str:
    """What this process may send echo requests by: "ping", "raw", or "" for nothing."""
    protocol = socket.IPPROTO_ICMP if family == socket.AF_INET else socket.IPPROTO_ICMPV6
    for name, kind in (("ping", socket.SOCK_DGRAM), ("raw", socket.SOCK_RAW)):
        try:
            socket.socket(family, kind | _FLAGS, protocol).close()
        except OSError:
            continue
        return name
    return ""


def _raw_echo(
    family: socket.AddressFamily, protocol: int, destination: bytes, egress: bytes, identifier: int
) -> socket.socket:
    sock = socket.socket(family, socket.SOCK_RAW | _FLAGS, protocol)
    try:
        sockets.attach(sock, SO_ATTACH_FILTER, _replies(family, identifier))
        sock.bind((_text(family, egress), 0))
        _prepare(sock, family)
        sock.connect((_text(family, destination), 0))
        _drain(sock)
    except BaseException:
        sock.close()
        raise
    return sock


def _replies(family: socket.AddressFamily, identifier: int) -> list[sockets.Instruction]:
    """Classic BPF: echo replies of one identifier. IPv4 packets begin with their IP header, ICMPv6 ones with ICMP's."""
    four = family == socket.AF_INET
    return [
        (0xB1, 0, 0, 0) if four else (0x01, 0, 0, 0),  # X = 4 * (first byte & 15), or X = 0
        (0x50, 0, 0, 0),  # A = type
        (0x15, 0, 3, 0 if four else 129),  # a reply?
        (0x48, 0, 0, 4),  # A = identifier
        (0x15, 0, 1, identifier),
        (0x06, 0, 0, 0xFFFF),
        (0x06, 0, 0, 0),
    ]


def _drain(sock: socket.socket) -> None:
    """What came from others before connect() had named the peer."""
    try:
        while True:
            sock.recv(1)
    except BlockingIOError:
        pass


def _family(destination: bytes, egress: bytes) -> socket.AddressFamily:
    family = _FAMILIES.get(len(destination))
    if family is None or (egress and len(egress) != len(destination)):
        raise OSError(errno.EAFNOSUPPORT, "egress and destination must be of one address family")
    return family


def _text(family: socket.AddressFamily, address: bytes) -> str:
    return socket.inet_ntop(family, address) if address else _ANY[family]


def _prepare(sock: socket.socket, family: socket.AddressFamily) -> None:
    sockets.raise_buffers(sock, BUFFER)
    if family == socket.AF_INET:
        for option in (IP_RECVERR, IP_RECVTTL, IP_RECVTOS):
            sock.setsockopt(socket.IPPROTO_IP, option, 1)
    else:
        for option in (IPV6_RECVERR, IPV6_RECVHOPLIMIT, IPV6_RECVTCLASS):
            sock.setsockopt(socket.IPPROTO_IPV6, option, 1)
    may_fragment(sock, six=family == socket.AF_INET6, allowed=False)


def may_fragment(sock: socket.socket, *, six: bool, allowed: bool) -> None:
    """Whether the kernel may fragment what is too big for the path; otherwise sending it fails with EMSGSIZE."""
    how = PMTUDISC_DONT if allowed else PMTUDISC_DO
    if six:
        sock.setsockopt(socket.IPPROTO_IPV6, IPV6_MTU_DISCOVER, how)
    else:
        sock.setsockopt(socket.IPPROTO_IP, IP_MTU_DISCOVER, how)


def set_ttl(sock: socket.socket, ttl: int, *, six: bool) -> None:
    """TTL or hop limit of what is sent from now on, 1 to 255."""
    if six:
        sock.setsockopt(socket.IPPROTO_IPV6, IPV6_UNICAST_HOPS, ttl)
    else:
        sock.setsockopt(socket.IPPROTO_IP, IP_TTL, ttl)


def set_traffic_class(sock: socket.socket, traffic_class: int, *, six: bool) -> None:
    """DSCP and ECN of what is sent from now on."""
    if six:
        sock.setsockopt(socket.IPPROTO_IPV6, IPV6_TCLASS, traffic_class)
    else:
        sock.setsockopt(socket.IPPROTO_IP, IP_TOS, traffic_class)


def set_segment(sock: socket.socket, size: int) -> None:
    """From now on a longer send leaves as datagrams of `size` bytes; 0: as one, whatever its length."""
    sock.setsockopt(SOL_UDP, UDP_SEGMENT, size)


def path_mtu(sock: socket.socket, *, six: bool) -> int:
    """What the kernel knows of the path's MTU, in bytes of IP."""
    if six:
        return sock.getsockopt(socket.IPPROTO_IPV6, IPV6_MTU)
    return sock.getsockopt(socket.IPPROTO_IP, IP_MTU)


def next_error(sock: socket.socket) -> SocketError | None:
    """The oldest error that the socket has been told, taken off it; None where there is none."""
    try:
        quoted, ancillary, _, address = sock.recvmsg(_QUOTED, _ERROR_ROOM, socket.MSG_ERRQUEUE)
    except OSError:
        return None
    for level, kind, data in ancillary:
        if (level, kind) in ((socket.IPPROTO_IP, IP_RECVERR), (socket.IPPROTO_IPV6, IPV6_RECVERR)):
            code, origin, icmp_type, icmp_code, _, info, _ = _ERROR.unpack_from(data)
            six = level == socket.IPPROTO_IPV6
            family = int.from_bytes(data[_ERROR.size : _ERROR.size + 2], "little")
            offender = b""
            if family == socket.AF_INET and not six:
                offender = data[_ERROR.size + 4 : _ERROR.size + 8]
            elif family == socket.AF_INET6 and six:
                offender = data[_ERROR.size + 8 : _ERROR.size + 24]
            destination = socket.inet_pton(socket.AF_INET6 if six else socket.AF_INET, address[0]) if address else b""
            return SocketError(code, origin, icmp_type, icmp_code, info, offender, destination, quoted)
    return None
