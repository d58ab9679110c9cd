"""Unix SOCK_SEQPACKET sockets: datagrams with order, an end, and descriptors beside them.

Everything that crosses a process on the packet's way crosses such a socket: a datagram is one message, its peer's
uid is known to the kernel, and descriptors ride along (SCM_RIGHTS). All sockets made here are non-blocking and
close-on-exec; received descriptors are close-on-exec too.

Limits: a datagram of no bytes can't be told from the end and must not be sent. A datagram longer than the reader's
`size` arrives cut to `size`: ask for one byte more than you accept. A reader without room for descriptors (its limit,
or `max_descriptors`) gets the datagram without some of them: compare with what the message announces.
"""

from __future__ import annotations

import array
import errno
import os
import socket
import stat
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Final, NamedTuple

MAX_DESCRIPTORS: Final = 16
"""Descriptors that one datagram may carry by default."""
BACKLOG: Final = 1024
_INT: Final = array.array("i").itemsize
_FLAGS: Final = socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC


class Peer(NamedTuple):
    """Who connected, as the kernel knows it (SO_PEERCRED): ids at the time of connect."""

    pid: int
    uid: int
    gid: int


def send(sock: socket.socket | int, data: bytes | bytearray | memoryview, fds: Sequence[int] = ()) -> bool:
    """Send one datagram; False where the socket is full. The caller keeps (and closes) its own descriptors.

    Raises OSError (EPIPE, ECONNRESET) where the peer is gone, ValueError for a datagram of no bytes.
    """
    if not data:
        raise ValueError("an empty datagram would read as the end")
    try:
        if not fds:
            if isinstance(sock, int):
                os.write(sock, data)
            else:
                sock.send(data)
            return True
        ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))]
        if isinstance(sock, int):
            borrowed = _borrow(sock)
            try:
                borrowed.sendmsg([data], ancillary)
            finally:
                borrowed.detach()
        else:
            sock.sendmsg([data], ancillary)
    except BlockingIOError:
        return False
    return True


def receive(
    sock: socket.socket | int, size: int, max_descriptors: int = MAX_DESCRIPTORS
) -> tuple[bytes, list[int]] | None:
    """One datagram and its descriptors; None where nothing is there; no bytes where the peer has closed or died.

    The caller owns the descriptors. Raises OSError for anything but the end.
    """
    borrowed = _borrow(sock) if isinstance(sock, int) else sock
    try:
        data, ancillary, _, _ = borrowed.recvmsg(
            size, socket.CMSG_SPACE(max_descriptors * _INT) if max_descriptors else 0, socket.MSG_CMSG_CLOEXEC
        )
    except BlockingIOError:
        return None
    except ConnectionResetError:
        # A peer that died with unread data in its queue: for us the same end.
        return b"", []
    finally:
        if isinstance(sock, int):
            borrowed.detach()
    fds: list[int] = []
    for level, kind, content in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            received = array.array("i")
            received.frombytes(content[: len(content) - len(content) % _INT])
            fds.extend(received)
    return data, fds


def pair() -> tuple[socket.socket, socket.socket]:
    """A connected pair; pass one end to a child with `pass_fds`."""
    first, second = socket.socketpair(socket.AF_UNIX, _FLAGS)
    return first, second


def listen(path: str | Path, mode: int = 0o600, backlog: int = BACKLOG) -> socket.socket:
    """A listener at `path` with exactly these permissions, from its first moment on.

    A socket that a dead process left there is replaced; one that answers raises OSError (EADDRINUSE), and so does
    anything that isn't a socket. Paths are limited to 107 bytes by the kernel.
    """
    path = Path(path)
    sock = socket.socket(socket.AF_UNIX, _FLAGS)
    try:
        # The kernel takes the file's mode from the socket's inode (less the umask), so it is never wider than asked.
        os.fchmod(sock.fileno(), mode)
        try:
            sock.bind(str(path))
        except OSError as error:
            if error.errno != errno.EADDRINUSE or not _stale(path):
                raise
            path.unlink()
            sock.bind(str(path))
        path.chmod(mode)
        sock.listen(backlog)
    except BaseException:
        sock.close()
        raise
    return sock


def connect(path: str | Path) -> socket.socket:
    """A connected non-blocking socket. Raises OSError (ENOENT, ECONNREFUSED, EACCES; EAGAIN: the backlog is full)."""
    sock = socket.socket(socket.AF_UNIX, _FLAGS)
    try:
        sock.connect(str(path))
    except BaseException:
        sock.close()
        raise
    return sock


def accept(listener: socket.socket) -> socket.socket | None:
    """The next connection, non-blocking; None where there is none."""
    try:
        sock, _ = listener.accept()
    except (BlockingIOError, ConnectionAbortedError):
        return None
    sock.setblocking(False)
    return sock


def peer(sock: socket.socket) -> Peer:
    """Who is at the other end."""
    credentials = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("=3i"))
    return Peer(*struct.unpack("=3i", credentials))


def _borrow(fd: int) -> socket.socket:
    """A socket object for a descriptor that stays the caller's: detach it after use."""
    return socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET, 0, fileno=fd)


def _stale(path: Path) -> bool:
    """Is this a socket at which nobody listens?"""
    if not stat.S_ISSOCK(path.lstat().st_mode):
        return False
    with socket.socket(socket.AF_UNIX, _FLAGS) as probe:
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            return True
        except OSError:
            return False
    return False
