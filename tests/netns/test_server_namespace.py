"""The fixture itself: both families, both directions, nothing left behind."""

from __future__ import annotations

import socket

import pytest

from falkirk.linux import sockets
from tests.netns.conftest import ServerNamespace

pytestmark = pytest.mark.netns


@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_INET6])
def test_a_server_inside_sees_the_egress_address(server_ns: ServerNamespace, family: socket.AddressFamily) -> None:
    four = family == socket.AF_INET
    host = server_ns.host4 if four else server_ns.host6
    egress = host(5)
    server_ns.add_here(egress)
    with server_ns.listener(family) as listener:
        address = (host(1), listener.getsockname()[1])
        with socket.create_connection(address, timeout=10, source_address=(egress, 0)) as client:
            server, peer = listener.accept()
            with server:
                assert peer[0] == egress
                assert sockets.congestion(server) == "cubic"
                client.sendall(b"x")
                assert server.recv(1) == b"x"


def test_commands_run_inside(server_ns: ServerNamespace) -> None:
    names = server_ns.run(["cat", "/proc/net/dev"], capture_output=True, text=True).stdout
    assert "eth0" in names
    assert server_ns.device not in names
    assert server_ns.popen(["cat"], stdin=-1).poll() is None


def test_the_cable_goes_with_the_namespace() -> None:
    namespace = ServerNamespace()
    assert namespace.device in [name for _, name in socket.if_nameindex()]
    namespace.close()
    assert namespace.device not in [name for _, name in socket.if_nameindex()]
