"""Socket options that Python has no name for, each as one small function that says what it is for.

Limits: Linux only. Setters raise OSError unless they say otherwise.
"""

from __future__ import annotations

import _socket
import ctypes
import socket
import struct
from collections.abc import Sequence
from typing import Final

IP_BIND_ADDRESS_NO_PORT: Final = 24
IP_FREEBIND: Final = 15
IPV6_FREEBIND: Final = 78
SO_SNDBUFFORCE: Final = 32
SO_RCVBUFFORCE: Final = 33
TCP_CONGESTION: Final = 13
_TCP_CONGESTION_NAME_SIZE: Final = 16
_LINGER: Final = struct.Struct("=ii")
_INSTRUCTION: Final = struct.Struct("=HBBI")
_PROGRAM: Final = struct.Struct("HxxxxxxP")

Instruction = tuple[int, int, int, int]
"""Of classic BPF: code, where to jump if true and if false, operand."""

Socket = _socket.socket
"""What `socket.socket` is derived from. One takes half the memory and a third of the time to make, which counts where there are very many."""


def set_congestion(sock: Socket, *names: str) -> str | None:
    """The first of these congestion controls that the kernel grants, or None: the namespace's default stays."""
    for name in names:
        try:
            sock.setsockopt(socket.IPPROTO_TCP, TCP_CONGESTION, name.encode())
        except OSError:
            continue
        return name
    return None


def congestion(sock: Socket) -> str:
    """The socket's congestion control."""
    name = sock.getsockopt(socket.IPPROTO_TCP, TCP_CONGESTION, _TCP_CONGESTION_NAME_SIZE)
    return name.split(b"\0", 1)[0].decode()


def reset_on_close(sock: Socket) -> None:
    """From now on a close (also that of a killed process) sends RST, never FIN."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _LINGER.pack(1, 0))


def fin_on_close(sock: Socket) -> None:
    """Undo `reset_on_close`: a close ends the stream in order."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _LINGER.pack(0, 0))


def no_delay(sock: Socket) -> None:
    """Send small segments at once: a relay must not add Nagle's delay to that of the peers."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


def urgent_in_line(sock: Socket) -> None:
    """Urgent data is data (RFC 6093 6): without this the kernel takes the byte at the urgent pointer out of the stream.

    A listener's connections inherit it.
    """
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_OOBINLINE, 1)


def bind_address(sock: Socket, address: str) -> None:
    """Choose the source address and leave the port to connect(), so that ports are shared between destinations."""
    sock.setsockopt(socket.IPPROTO_IP, IP_BIND_ADDRESS_NO_PORT, 1)
    sock.bind((address, 0))


def raise_buffers(sock: socket.socket, size: int) -> tuple[int, int]:
    """Make both buffers `size` bytes, past the system's limit where the process may; what came of it (send, receive).

    Never raises: a process without CAP_NET_ADMIN gets at most net.core.{w,r}mem_max.
    """
    result = []
    for forced, plain in ((SO_SNDBUFFORCE, socket.SO_SNDBUF), (SO_RCVBUFFORCE, socket.SO_RCVBUF)):
        try:
            sock.setsockopt(socket.SOL_SOCKET, forced, size)
        except PermissionError:
            sock.setsockopt(socket.SOL_SOCKET, plain, size)
        # The kernel keeps and reports twice what was asked, for its own book-keeping.
        result.append(sock.getsockopt(socket.SOL_SOCKET, plain) // 2)
    return result[0], result[1]


def attach(sock: Socket, option: int, program: Sequence[Instruction]) -> None:
    """Give the socket a classic BPF program; `option` says what for (SO_ATTACH_FILTER and its like)."""
    code = b"".join(_INSTRUCTION.pack(*instruction) for instruction in program)
    buffer = ctypes.create_string_buffer(code, len(code))
    sock.setsockopt(socket.SOL_SOCKET, option, _PROGRAM.pack(len(program), ctypes.addressof(buffer)))


def pending_error(sock: Socket) -> int:
    """The socket's error (SO_ERROR), taken off it; 0 where there is none. What a non-blocking connect came to."""
    return sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)


def tcp_listener(family: socket.AddressFamily, address: str, port: int, backlog: int) -> socket.socket:
    """A non-blocking TCP listener; an IPv6 one takes IPv6 only."""
    sock = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        sock.bind((address, port))
        sock.listen(backlog)
    except BaseException:
        sock.close()
        raise
    return sock
