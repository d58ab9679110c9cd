"""The few rtnetlink requests that a private namespace needs: links, addresses, routes.

Written by hand because importing a netlink library takes longer than everything that a namespace helper does. Works in
the network namespace of the thread that made the object. Requests are answered one by one; errors carry the kernel's text
where it gives one.
"""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Iterable
from types import TracebackType
from typing import Final, Self

_HEADER: Final = struct.Struct("=IHHII")
_LINK: Final = struct.Struct("=BxHiII")
_ADDRESS: Final = struct.Struct("=BBBBI")
_ROUTE: Final = struct.Struct("=BBBBBBBBI")

_ERROR, _NEWLINK, _DELLINK, _NEWADDR, _NEWROUTE = 2, 16, 17, 20, 24
_REQUEST_ACK, _CREATE_EXCLUSIVE = 0x05, 0x600
_SOL_NETLINK, _EXT_ACK, _CAP_ACK = 270, 11, 10
_ACK_CAPPED, _ACK_TLVS = 0x100, 0x200
_IFF_UP: Final = 1
_NESTED: Final = 0x8000

_IFLA_IFNAME, _IFLA_MTU, _IFLA_TXQLEN, _IFLA_LINKINFO, _IFLA_AF_SPEC, _IFLA_NET_NS_FD = 3, 4, 13, 18, 26, 28
_INFO_KIND, _INFO_DATA, _VETH_INFO_PEER = 1, 2, 1
_INET6_ADDR_GEN_MODE, _ADDR_GEN_NONE = 8, 1
_IFA_ADDRESS, _IFA_LOCAL, _IFA_FLAGS, _IFA_F_NODAD, _IFA_F_NOPREFIXROUTE = 1, 2, 8, 2, 0x200
_RTA_DST, _RTA_OIF, _RTA_GATEWAY, _RTA_METRICS, _RTAX_CONGESTION = 1, 4, 5, 8, 16
_TABLE_MAIN, _PROTOCOL_STATIC, _SCOPE_UNIVERSE, _SCOPE_LINK, _UNICAST = 254, 4, 0, 253, 1


class Netlink:
    """A connection to the kernel's routing tables; a context manager."""

    def __init__(self) -> None:
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.NETLINK_ROUTE)
        self._socket.bind((0, 0))
        self._socket.setsockopt(_SOL_NETLINK, _EXT_ACK, 1)
        self._socket.setsockopt(_SOL_NETLINK, _CAP_ACK, 1)
        self._sequence = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the connection."""
        self._socket.close()

    def set_link(self, index: int, *, up: bool = True, mtu: int | None = None, queue: int | None = None) -> None:
        """Bring an interface up (or down), with its MTU and transmit queue length. Raises OSError."""
        attributes = []
        if mtu is not None:
            attributes.append(_attribute(_IFLA_MTU, struct.pack("=I", mtu)))
        if queue is not None:
            attributes.append(_attribute(_IFLA_TXQLEN, struct.pack("=I", queue)))
        self._link(index, up, attributes)

    def add_veth(self, name: str, peer: str, peer_namespace: int) -> None:
        """Make a cable between this namespace and another (by descriptor), both ends down. Raises OSError (EEXIST)."""
        there = _LINK.pack(socket.AF_UNSPEC, 0, 0, 0, 0)
        there += _attribute(_IFLA_IFNAME, peer.encode() + b"\0")
        there += _attribute(_IFLA_NET_NS_FD, struct.pack("=I", peer_namespace))
        kind = _attribute(_INFO_KIND, b"veth\0")
        data = _nest(_INFO_DATA, [_nest(_VETH_INFO_PEER, [there])])
        attributes = [_attribute(_IFLA_IFNAME, name.encode() + b"\0"), _nest(_IFLA_LINKINFO, [kind, data])]
        self._ask(_NEWLINK, _CREATE_EXCLUSIVE, _LINK.pack(socket.AF_UNSPEC, 0, 0, 0, 0), attributes)

    def delete_link(self, index: int) -> None:
        """Remove an interface; a cable goes with both its ends. Raises OSError (ENODEV)."""
        self._ask(_DELLINK, 0, _LINK.pack(socket.AF_UNSPEC, 0, index, 0, 0), [])

    def no_generated_addresses(self, index: int) -> None:
        """The kernel adds no link-local address of its own when the interface comes up. Raises OSError."""
        mode = _attribute(_INET6_ADDR_GEN_MODE, bytes([_ADDR_GEN_NONE]))
        self._link(index, None, [_nest(_IFLA_AF_SPEC, [_nest(socket.AF_INET6, [mode])])])

    def add_address(self, index: int, address: bytes, prefix_length: int, prefix_route: bool = True) -> None:
        """Add a packed address, and its prefix's route unless told not to; no duplicate address detection.

        Raises OSError (EEXIST).
        """
        body = _ADDRESS.pack(_family(address), prefix_length, 0, 0, index)
        flags = (_IFA_F_NODAD if len(address) == 16 else 0) | (0 if prefix_route else _IFA_F_NOPREFIXROUTE)
        attributes = [
            _attribute(_IFA_LOCAL, address),
            _attribute(_IFA_ADDRESS, address),
            _attribute(_IFA_FLAGS, struct.pack("=I", flags)),
        ]
        self._ask(_NEWADDR, _CREATE_EXCLUSIVE, body, attributes)

    def add_route(
        self, index: int, prefix: bytes, prefix_length: int, congestion: str = "", gateway: bytes = b""
    ) -> None:
        """Route a prefix (packed, all zeros for the default) out of an interface, by a (packed) gateway or without.

        `congestion` is the TCP congestion control of streams that take the route, for namespaces whose sysctls can't
        be written. Raises OSError (EINVAL for a congestion control that the kernel hasn't).
        """
        scope = _SCOPE_UNIVERSE if gateway else _SCOPE_LINK
        body = _ROUTE.pack(_family(prefix), prefix_length, 0, 0, _TABLE_MAIN, _PROTOCOL_STATIC, scope, _UNICAST, 0)
        attributes = [_attribute(_RTA_OIF, struct.pack("=I", index))]
        if prefix_length:
            attributes.append(_attribute(_RTA_DST, prefix))
        if gateway:
            attributes.append(_attribute(_RTA_GATEWAY, gateway))
        if congestion:
            metric = _attribute(_RTAX_CONGESTION, congestion.encode() + b"\0")
            attributes.append(_nest(_RTA_METRICS, [metric]))
        self._ask(_NEWROUTE, _CREATE_EXCLUSIVE, body, attributes)

    def _link(self, index: int, up: bool | None, attributes: Iterable[bytes]) -> None:
        flags, change = (0, 0) if up is None else (_IFF_UP if up else 0, _IFF_UP)
        self._ask(_NEWLINK, 0, _LINK.pack(socket.AF_UNSPEC, 0, index, flags, change), attributes)

    def _ask(self, kind: int, flags: int, body: bytes, attributes: Iterable[bytes]) -> None:
        self._sequence += 1
        payload = body + b"".join(attributes)
        length = _HEADER.size + len(payload)
        self._socket.send(_HEADER.pack(length, kind, _REQUEST_ACK | flags, self._sequence, 0) + payload)
        while True:
            answer = self._socket.recv(65536)
            _, answer_kind, answer_flags, sequence, _ = _HEADER.unpack_from(answer)
            if sequence == self._sequence and answer_kind == _ERROR:
                break
        code = -struct.unpack_from("=i", answer, _HEADER.size)[0]
        if code:
            raise OSError(code, _reason(answer, answer_flags) or os.strerror(code))


def _family(address: bytes) -> int:
    return socket.AF_INET if len(address) == 4 else socket.AF_INET6


def _attribute(kind: int, value: bytes) -> bytes:
    length = 4 + len(value)
    return struct.pack("=HH", length, kind) + value + bytes(-length % 4)


def _nest(kind: int, attributes: Iterable[bytes]) -> bytes:
    return _attribute(kind | _NESTED, b"".join(attributes))


def _reason(answer: bytes, flags: int) -> str:
    """The kernel's own text (NLMSGERR_ATTR_MSG), which follows the error code and the request's header."""
    if not flags & _ACK_TLVS or not flags & _ACK_CAPPED:
        return ""
    offset = _HEADER.size + 4 + _HEADER.size
    while offset + 4 <= len(answer):
        length, kind = struct.unpack_from("=HH", answer, offset)
        if length < 4:
            return ""
        if kind == 1:
            return answer[offset + 4 : offset + length].rstrip(b"\0").decode(errors="replace")
        offset += length + -length % 4
    return ""
