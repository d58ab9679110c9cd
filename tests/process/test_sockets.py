"""Socket options on loopback."""

from __future__ import annotations

import errno
import select
import socket

import pytest

from falkirk.linux import sockets


@pytest.mark.parametrize(("family", "address"), [(socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")])
def test_bound_without_a_port_and_reset_on_close(family: socket.AddressFamily, address: str) -> None:
    with sockets.tcp_listener(family, address, 0, 8) as listener:
        client = socket.socket(family, socket.SOCK_STREAM)
        sockets.bind_address(client, address)
        assert client.getsockname()[1] == 0
        client.connect(listener.getsockname()[:2])
        assert select.select([listener], [], [], 10)[0]
        server, peer = listener.accept()
        assert peer[0] == address
        sockets.no_delay(client)
        sockets.reset_on_close(client)
        client.close()
        with server, pytest.raises(ConnectionResetError):
            server.recv(1)


def test_a_clean_end_after_all() -> None:
    with sockets.tcp_listener(socket.AF_INET, "127.0.0.1", 0, 8) as listener:
        client = socket.create_connection(listener.getsockname())
        assert select.select([listener], [], [], 10)[0]
        server, _ = listener.accept()
        sockets.reset_on_close(client)
        sockets.fin_on_close(client)
        client.close()
        with server:
            assert server.recv(1) == b""


def test_congestion_falls_back() -> None:
    with socket.socket() as sock:
        assert sockets.set_congestion(sock, "no-such-control", "reno") == "reno"
        assert sockets.congestion(sock) == "reno"
        assert sockets.set_congestion(sock, "no-such-control") is None


def test_buffers_grow() -> None:
    left, right = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with left, right:
        before = left.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF)
        send, receive = sockets.raise_buffers(left, 1 << 20)
        assert 2 * send > before or send == 1 << 20
        assert receive > 0


def test_pending_error_is_taken_off() -> None:
    with sockets.tcp_listener(socket.AF_INET, "127.0.0.1", 0, 1) as listener:
        gone = listener.getsockname()
    with socket.socket() as sock:
        sock.setblocking(False)
        sock.connect_ex(gone)
        assert select.select([], [sock], [], 10)[1]
        assert sockets.pending_error(sock) == errno.ECONNREFUSED
        assert sockets.pending_error(sock) == 0
