"""The loop of an interface: TUN, UDP socket, control socket, timers, signals.

In packets' order: `_from_device` reads super-packets, cuts them, and gives them to the peer that their destination belongs to; `_from_socket` reads
trains and gives what they hold to the device. Each is drained up to a budget, so that neither starves the other.
"""

from __future__ import annotations

import contextlib
import ipaddress
import os
import select
import signal
import socket
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from falkirk.linux import trains, tun
from falkirk.linux.wireguard import control
from falkirk.linux.wireguard.network import MARK, Network
from falkirk.linux.wireguard.request import InterfaceRequest, PeerRequest
from falkirk.linux.wireguard.resolver import Resolver
from falkirk.wire import vnet
from falkirk.wire.endpoint import endpoint_text, host_and_port
from falkirk.wire.segment import segments
from falkirk.wireguard.messages import INITIATION_SIZE
from falkirk.wireguard.node import Node
from falkirk.wireguard.outcome import Arrivals
from falkirk.wireguard.peer import INF, Peer

_BUDGET: Final = 64
"""Reads of one descriptor in a turn."""
_LONGEST: Final = 60.0


class _Way:
    """A peer with what it may be sent."""

    def __init__(self, request: PeerRequest, peer: Peer, endpoints: list[trains.Address]) -> None:
        self.peer = peer
        self.endpoints = endpoints
        self.patience = request.patience_s
        self.networks = [ipaddress.ip_network(prefix) for prefix in request.allowed]


class Interface:
    """One interface, from `open` to the end of `run`."""

    def __init__(self, request: InterfaceRequest) -> None:
        """Makes the device and everything around it. Raises OSError, tun.TunUnavailable."""
        self._request = request
        self._started = time.time()
        self._arrivals = Arrivals()
        self._stopping = False
        self._counters = {"lost_outside": 0, "lost_inside": 0, "no_peer": 0, "bad_from_device": 0}
        self._buffer = memoryview(bytearray(tun.MAX_READ))
        self._train = memoryview(bytearray(trains.MAX_RECEIVE))
        self._unreachable: set[trains.Address] = set()
        """Endpoints that an initiation couldn't be sent to just now."""
        self._cache: dict[bytes, _Way | None] = {}
        with contextlib.ExitStack() as stack:
            self._control = control.listen(Path(request.control)) if request.control else None
            if self._control is not None:
                stack.callback(self._close_control)
            prefixes = [prefix for peer in request.peers for prefix in peer.allowed]
            default = any(prefix.endswith("/0") for prefix in prefixes)
            self._socket = stack.enter_context(
                trains.open_socket(port=request.listen_port, mark=MARK if default else 0)
            )
            self._tun = tun.open_tun(request.name, True, tun.TCP_OFFLOADS)
            stack.callback(os.close, self._tun)
            self._node = Node(request.private_key, rng=os.urandom, mtu=request.mtu)
            self._ways = [self._way(peer) for peer in request.peers]
            network = Network(request.name)
            stack.callback(network.tear_down)
            network.set_up(request.addresses, request.mtu, prefixes)
            self._dns = ""
            if request.dns:
                resolver = Resolver(
                    request.name, Path(request.control or f"/run/{request.name}").with_suffix(".resolv")
                )
                stack.callback(resolver.tear_down)
                self._dns = resolver.set_up(request.dns, request.search)
            self._end = stack.pop_all()

    def _way(self, request: PeerRequest) -> _Way:
        endpoints: list[trains.Address] = []
        for text in request.endpoints:
            host, port = host_and_port(text)
            for *_, address in socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM):
                with contextlib.suppress(ValueError):
                    endpoints.append(trains.destination(self._socket, str(address[0]), port))
        if request.endpoints and not endpoints:
            raise OSError(f"no address of {', '.join(request.endpoints)} can be reached from here")
        networks = [ipaddress.ip_network(prefix) for prefix in request.allowed]
        peer = self._node.add_peer(
            request.public_key,
            preshared=request.preshared,
            allowed=[(network.network_address.packed, network.prefixlen) for network in networks],
            keepalive_seconds=request.keepalive_s,
            endpoint=endpoints[0] if endpoints else None,
        )
        return _Way(request, peer, endpoints)

    def run(self) -> None:
        """Until it is told to end, by a signal or the control socket; everything that was set up is undone then."""
        with self._end, select.epoll() as poller:
            woken, wake = socket.socketpair()
            woken.setblocking(False)
            wake.setblocking(False)
            signal.set_wakeup_fd(wake.fileno(), warn_on_full_buffer=False)
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, self._stop)
            handlers: dict[int, Any] = {
                self._tun: self._from_device,
                self._socket.fileno(): self._from_socket,
                woken.fileno(): lambda: woken.recv(4096),
            }
            if self._control is not None:
                handlers[self._control.fileno()] = self._answer
            for descriptor in handlers:
                poller.register(descriptor, select.EPOLLIN)
            with woken, wake:
                while not self._stopping:
                    wait = min(self._node.next_deadline() - time.monotonic(), _LONGEST)
                    if any(way.peer.pending is not None for way in self._ways):
                        wait = min(wait, 1.0)
                    for descriptor, _ in poller.poll(max(wait, 0)):
                        handlers[descriptor]()
                    self._timers()
                signal.set_wakeup_fd(-1)

    def _stop(self, _number: int, _frame: object) -> None:
        self._stopping = True

    def _from_device(self) -> None:
        """Super-packets of the kernel's -> segments -> the peer."""
        buffer = self._buffer
        batch: dict[_Way, list[bytes]] = {}
        for _ in range(_BUDGET):
            try:
                length = os.readv(self._tun, (buffer,))
            except BlockingIOError:
                break
            size = length - vnet.SIZE
            # An MTU of more than 1,280 has no room for a header to be cut; the kernel gives whole packets.
            if size < 20:
                self._counters["bad_from_device"] += 1
                continue
            version = buffer[vnet.SIZE] >> 4
            wanted = bytes(buffer[26:30] if version == 4 else buffer[34:50])
            way = self._cache[wanted] if wanted in self._cache else self._find(wanted)
            if way is None:
                self._counters["no_peer"] += 1
                continue
            header = vnet.unpack(buffer, 0, length)
            made = segments(header, buffer, vnet.SIZE, size)
            if way in batch:
                batch[way] += made
            else:
                batch[way] = made
        for way, packets in batch.items():
            self._send(way.peer, self._node.send(way.peer, packets, time.monotonic(), time.time_ns()))

    def _find(self, wanted: bytes) -> _Way | None:
        """Whose a destination is: the longest prefix, then who has a session. Remembered while that can't change."""
        address = ipaddress.ip_address(wanted)
        found = [
            (network.prefixlen, way.peer.usable(time.monotonic()), -number, way)
            for number, way in enumerate(self._ways)
            for network in way.networks
            if address in network
        ]
        way = max(found, key=lambda each: each[:3])[3] if found else None
        if len(self._ways) == 1:
            if len(self._cache) >= 4096:
                self._cache.clear()
            self._cache[wanted] = way
        return way

    def _from_socket(self) -> None:
        """Trains -> packets -> the device; answers -> the socket."""
        now, wall = time.monotonic(), time.time_ns()
        for _ in range(_BUDGET):
            got = trains.receive(self._socket, self._train)
            if got is None:
                break
            length, segment, address = got
            self._node.receive(self._train[:length], address, now, wall, self._arrivals, segment)
        self._deliver()

    def _deliver(self) -> None:
        arrivals = self._arrivals
        for packets in arrivals.packets.values():
            for packet in packets:
                try:
                    os.writev(self._tun, (vnet.ZERO, packet))
                except OSError:
                    self._counters["lost_inside"] += 1
        for endpoint, datagram in arrivals.datagrams:
            self._out(endpoint, (datagram,))
        arrivals.clear()

    def _send(self, peer: Peer, datagrams: list[bytes]) -> None:
        if datagrams and peer.endpoint is not None:
            self._out(peer.endpoint, datagrams)

    def _out(self, endpoint: trains.Address, datagrams: Sequence[bytes]) -> None:
        lost = trains.send(self._socket, endpoint, datagrams)
        if lost:
            self._counters["lost_outside"] += lost
            if len(datagrams[-1]) == INITIATION_SIZE:
                self._unreachable.add(endpoint)

    def _timers(self) -> None:
        now = time.monotonic()
        unreachable, self._unreachable = self._unreachable, set()
        for way in self._ways:
            pending = way.peer.pending
            late = pending is not None and now - pending.since > way.patience and len(way.endpoints) > 1
            if late or (way.endpoints and way.peer.endpoint in unreachable):
                self._next_endpoint(way)
        if now >= self._node.next_deadline():
            self._node.poll(now, time.time_ns(), self._arrivals)
            self._deliver()

    def _next_endpoint(self, way: _Way) -> None:
        """Nobody answers at this one: ask at the next, at once, since what was asked before was asked elsewhere."""
        peer = way.peer
        at = way.endpoints.index(peer.endpoint) + 1 if peer.endpoint in way.endpoints else 0
        peer.endpoint = way.endpoints[at % len(way.endpoints)]
        peer.initiated_at = -INF
        self._send(peer, self._node.initiate(peer, time.monotonic(), time.time_ns()))

    def _answer(self) -> None:
        assert self._control is not None
        with contextlib.suppress(BlockingIOError):
            connection, _ = self._control.accept()
            if control.answer(connection, self.state) == "down":
                self._stopping = True

    def _close_control(self) -> None:
        assert self._control is not None
        Path(self._request.control).unlink(missing_ok=True)
        self._control.close()

    def state(self) -> dict[str, Any]:
        """For people and programs: no secrets. Times are seconds."""
        now = time.monotonic()
        peers = [
            {
                "public_key": way.peer.public_key.hex(),
                "endpoint": endpoint_text(way.peer.endpoint),
                "connected": way.peer.usable(now),
                "handshake_age_s": round(now - way.peer.handshake_at, 3) if way.peer.handshake_wall_ns else None,
                "received_bytes": way.peer.rx_bytes,
                "sent_bytes": way.peer.tx_bytes,
                "allowed": [str(network) for network in way.networks],
            }
            for way in self._ways
        ]
        dropped = {reason: count for reason, count in (*self._node.counters.items(), *self._counters.items()) if count}
        return {
            "interface": self._request.name,
            "pid": os.getpid(),
            "up_s": round(time.time() - self._started, 3),
            "public_key": self._node.public_key.hex(),
            "addresses": list(self._request.addresses),
            "port": self._socket.getsockname()[1],
            "mtu": self._request.mtu,
            "dns": {"servers": list(self._request.dns), "search": list(self._request.search), "by": self._dns},
            "peers": peers,
            "dropped": dropped,
        }


def main(path: str) -> int:
    """Run the interface that the file describes; says `up` on standard output once it is. 0, or 1 with the reason on standard error."""
    from falkirk.linux.wireguard import request

    try:
        interface = Interface(request.decode(Path(path).read_bytes()))
    except (OSError, ValueError, tun.TunUnavailable) as error:
        print(f"falkirk: {error}", file=sys.stderr)
        return 1
    print("up", flush=True)
    interface.run()
    return 0
