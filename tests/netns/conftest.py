"""Fixtures for tests with kernel TCP: a server's network namespace behind a cable.

Namespaces are made in threads of the test process (setns works per thread), so a socket opened inside can be used
outside, and a process started inside stays there. Nothing has a name on the machine but the cable's end.
"""

from __future__ import annotations

import ipaddress
import os
import random
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

import pytest

from falkirk.linux import netns
from falkirk.linux.netlink import Netlink
from tools.netlab import Network, wait_until_local

if TYPE_CHECKING:
    from tests.netns.fidelity import Way, World

P = ParamSpec("P")
T = TypeVar("T")


def in_namespace(namespace: int, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Call the function in a thread of that network namespace (by descriptor); its result, or what it raised."""
    return in_thread(lambda: netns.join_network(namespace), lambda: function(*args, **kwargs))


def add_address(device: str, address: bytes, prefix_length: int, prefix_route: bool = True) -> None:
    """Give a device of the calling thread's namespace, which is up, a packed address; returns once packets to it are taken."""
    with Netlink() as links:
        links.add_address(socket.if_nametoindex(device), address, prefix_length, prefix_route)
    if len(address) == 16:
        wait_until_local(str(ipaddress.ip_address(address)))


def in_thread(prepare: Callable[[], None], function: Callable[[], T]) -> T:
    result: list[T] = []
    failure: list[BaseException] = []

    def body() -> None:
        try:
            prepare()
            result.append(function())
        except BaseException as error:  # noqa: BLE001 -- handed to the caller's thread
            failure.append(error)

    thread = threading.Thread(target=body)
    thread.start()
    thread.join()
    if failure:
        raise failure[0]
    return result[0]


class ServerNamespace:
    """A network namespace with a cable to the test's own; host 1 of both prefixes is there, host 2 is here.

    Free hosts of the prefixes (3 to 14) can be added at either end, as further servers or egress addresses.
    """

    def __init__(self) -> None:
        self.namespace = in_thread(netns.unshare_network, lambda: netns.self_descriptor("net"))
        """Descriptor of the namespace."""
        self._network = Network()
        self.prefix4 = ipaddress.IPv4Network(f"198.18.{self._network.number}.0/28")
        self.prefix6 = ipaddress.IPv6Network(((0xFD << 120) | random.getrandbits(56) << 64, 64))
        self.address4, self.address6 = self.host4(1), self.host6(1)
        self.gateway4, self.gateway6 = self.host4(2), self.host6(2)
        self.device = f"fkt{random.getrandbits(32):08x}"
        self._processes: list[subprocess.Popen[Any]] = []
        with Netlink() as links:
            links.add_veth(self.device, "eth0", self.namespace)
            links.set_link(socket.if_nametoindex(self.device))
        self.call(self._set_up_inside)
        self.add_here(self.gateway4)
        self.add_here(self.gateway6)

    def host4(self, number: int) -> str:
        """The address of a host number, 1 to 14."""
        return str(self.prefix4[number])

    def host6(self, number: int) -> str:
        """The address of a host number."""
        return str(self.prefix6[number])

    def add_here(self, address: str) -> None:
        """Give the test's end of the cable a further address of the prefixes (an egress address)."""
        self._add(self.device, address)

    def add_there(self, address: str) -> None:
        """Give the server's end a further address of the prefixes."""
        self.call(self._add, "eth0", address, prefix_route=False)

    def call(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Call a function inside (in a thread); sockets that it opens stay inside for good."""
        return in_namespace(self.namespace, function, *args, **kwargs)

    def popen(self, command: Sequence[str], **options: Any) -> subprocess.Popen[Any]:
        """Start a process inside; killed at teardown if it still runs."""
        process = self.call(lambda: subprocess.Popen(command, **options))
        self._processes.append(process)
        return process

    def run(self, command: Sequence[str], **options: Any) -> subprocess.CompletedProcess[Any]:
        """Run a command inside to its end."""
        return self.call(lambda: subprocess.run(command, check=False, **options))

    def listener(
        self, family: socket.AddressFamily = socket.AF_INET, port: int = 0, backlog: int = 128
    ) -> socket.socket:
        """A blocking TCP listener inside, on the wildcard address; `getsockname()` tells the port."""

        def make() -> socket.socket:
            sock = socket.socket(family, socket.SOCK_STREAM)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind(("::" if family == socket.AF_INET6 else "0.0.0.0", port))
            sock.listen(backlog)
            return sock

        return self.call(make)

    def close(self) -> None:
        """Kill what runs inside, and remove the cable and the namespace."""
        for process in self._processes:
            process.kill()
            process.wait()
        with Netlink() as links:
            links.delete_link(socket.if_nametoindex(self.device))
        os.close(self.namespace)
        self._network.close()

    def _set_up_inside(self) -> None:
        # A restricted control can't be a namespace's default, but every route may name it.
        by_route = "" if netns.choose_congestion("cubic") else "cubic"
        with Netlink() as links:
            links.set_link(socket.if_nametoindex("lo"))
            links.set_link(index := socket.if_nametoindex("eth0"))
            for prefix, address, gateway in (
                (self.prefix4, self.address4, self.gateway4),
                (self.prefix6, self.address6, self.gateway6),
            ):
                self._add("eth0", address, prefix_route=False)
                own, there = prefix.network_address.packed, ipaddress.ip_address(gateway).packed
                links.add_route(index, own, prefix.prefixlen, by_route)
                links.add_route(index, bytes(len(own)), 0, by_route, gateway=there)

    def _add(self, device: str, address: str, prefix_route: bool = True) -> None:
        packed = ipaddress.ip_address(address).packed
        length = self.prefix4.prefixlen if len(packed) == 4 else self.prefix6.prefixlen
        add_address(device, packed, length, prefix_route)


@pytest.fixture
def server_ns() -> Iterator[ServerNamespace]:
    """A fresh server namespace, removed at teardown."""
    namespace = ServerNamespace()
    yield namespace
    namespace.close()


@pytest.fixture(scope="session", params=[1, 3], ids=["1-worker", "3-workers"])
def world(request: pytest.FixtureRequest) -> Iterator[World]:
    """A mesh with default settings between clients and a server: first with one worker, then with three."""
    from tests.netns.fidelity import open_world

    with open_world(request.param) as opened:
        yield opened


@pytest.fixture(params=["vnet-ipv4", "vnet-ipv6", "raw-ipv4", "raw-ipv6", "device-ipv4", "device-ipv6"])
def way(world: World, request: pytest.FixtureRequest) -> Way:
    """Each of the ways through the mesh."""
    framing, family = request.param.split("-")
    return world.way(framing, socket.AF_INET if family == "ipv4" else socket.AF_INET6)
