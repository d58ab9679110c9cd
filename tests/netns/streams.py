"""Connections between namespaces of a lab, their ends in this process."""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Callable, Iterator

from tests.netns.conftest import in_namespace
from tools.netlab import Namespace

DEADLINE_S = 20.0


def listen(namespace: Namespace, address: str, port: int = 0) -> socket.socket:
    """A listener inside."""
    return inside(namespace, lambda: socket.create_server((address, port), family=_family(address)))


def connect(namespace: Namespace, address: str, port: int) -> socket.socket:
    """A connection from inside."""
    return inside(namespace, lambda: socket.create_connection((address, port), timeout=DEADLINE_S))


def inside(namespace: Namespace, make: Callable[[], socket.socket]) -> socket.socket:
    """A socket that is made in the namespace, for use here."""
    descriptor = os.open(f"/proc/{namespace.pid}/ns/net", os.O_RDONLY)
    try:
        return in_namespace(descriptor, make)
    finally:
        os.close(descriptor)


def _family(address: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in address else socket.AF_INET


@contextlib.contextmanager
def stream(client: Namespace, server: Namespace, address: str) -> Iterator[tuple[socket.socket, socket.socket]]:
    """A connection from one place to the other: both ends."""
    with listen(server, address) as listener:
        listener.settimeout(DEADLINE_S)
        with connect(client, address, listener.getsockname()[1]) as there:
            here, _ = listener.accept()
            with here:
                here.settimeout(DEADLINE_S)
                yield there, here


def exchange(there: socket.socket, here: socket.socket, size: int = 1 << 20) -> None:
    """Bytes both ways, whole."""
    sent = os.urandom(size)
    for source, sink in ((there, here), (here, there)):
        source.setblocking(False)
        came, at = bytearray(), 0
        end = time.monotonic() + DEADLINE_S
        while len(came) < size:
            assert time.monotonic() < end
            with contextlib.suppress(BlockingIOError):
                at += source.send(sent[at : at + 65536]) if at < size else 0
            sink.settimeout(0.01)
            with contextlib.suppress(TimeoutError):
                came += sink.recv(1 << 18)
        assert bytes(came) == sent
        source.settimeout(DEADLINE_S)
