"""Connections to this mesh's resolver, made for flows whose route leads there.

The resolver is a process of the router's that listens in `mesh/` (`falkirk.wire.asker`). Who may be there is known by uid, as with every peer
on a mesh socket: what a device asks for is no business of anybody else's. The flow's preface is written here, before the socket is anybody's: a
device can't speak in its place.

Limit: a new unix socket takes the whole preface at once (it holds at least 200 KiB); one that doesn't is refused with EAGAIN.
"""

from __future__ import annotations

import errno
import socket
from collections.abc import Collection
from pathlib import Path
from typing import Final

from falkirk.linux import seqpacket, sockets
from falkirk.wire import asker

_STREAM: Final = socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC


def datagrams(directory: Path, preface: bytes, uids: Collection[int]) -> socket.socket:
    """A SEQPACKET connection for a session of UDP. `directory` is `mesh/`.

    Raises OSError: what connect() says (ENOENT, ECONNREFUSED: no resolver), EPERM where its uid isn't one of `uids`.
    """
    sock = seqpacket.connect(directory / asker.DATAGRAMS)
    try:
        _trust(sock, uids)
        if not seqpacket.send(sock, preface):
            raise OSError(errno.EAGAIN, "the resolver doesn't take the preface")
    except BaseException:
        sock.close()
        raise
    return sock


def stream(directory: Path, preface: bytes, uids: Collection[int]) -> socket.socket:
    """A stream connection for a flow of TCP; it resets on close, as every upstream does. Raises OSError as `datagrams` does."""
    sock = socket.socket(socket.AF_UNIX, _STREAM)
    try:
        sock.connect(str(directory / asker.STREAMS))
        _trust(sock, uids)
        sockets.reset_on_close(sock)
        data = asker.framed(preface)
        if sock.send(data) != len(data):
            raise OSError(errno.EAGAIN, "the resolver doesn't take the preface")
    except BaseException:
        sock.close()
        raise
    return sock


def _trust(sock: socket.socket, uids: Collection[int]) -> None:
    uid = seqpacket.peer(sock).uid
    if uid not in uids:
        raise OSError(errno.EPERM, f"the resolver runs as uid {uid}, which isn't of this mesh")
