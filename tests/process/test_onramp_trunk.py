"""The on-ramp's worker and devices that come by WireGuard: their tunnels share a trunk, and outlive the worker and its flow worker."""

from __future__ import annotations

import base64
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from falkirk.linux import trains
from falkirk.onramp.control import Close, Heard, Opened, Places, State, owner
from falkirk.onramp.tables import DeviceRow
from falkirk.wire.context import Framing, Transport
from falkirk.wire.handover import Adopt, Adopted, AdoptRefused, Held, Trunked, TunnelClosed
from falkirk.wire.trunk import DATAGRAM, HEADER, NUMBER
from falkirk.wireguard.node import Node
from falkirk.wireguard.outcome import Arrivals
from tests.process.onramp_rig import ROWS, FlowFake, Rig, eventually, readable, rig
from tests.unit.wire import samples
from tests.unit.wire.test_handover import CONTEXT

KEY = bytes(range(32))
SERVER = bytes([203, 0, 113, 5])


class Phone:
    """A WireGuard client with a socket of its own."""

    def __init__(self, number: int, port: int) -> None:
        self.sock = trains.open_socket("127.0.0.1")
        self.address = bytes([100, 96, 0, number])
        self.id = f"d-phone-{number}"
        self._there = ("127.0.0.1", port)
        self._key = bytes([number]) * 32
        self._arrivals = Arrivals()
        self._buffer = memoryview(bytearray(trains.MAX_RECEIVE))
        self.packets: list[bytes] = []
        self.restart()

    def restart(self) -> None:
        """It has no session, and knows of none."""
        self.node = Node(self._key, rng=os.urandom)
        server = Node(KEY, rng=os.urandom).public_key
        self.peer = self.node.add_peer(server, allowed=[(bytes(4), 0)], endpoint=self._there)

    @property
    def row(self) -> DeviceRow:
        return DeviceRow(self.id, "t-acme", self.id, addresses=(self.address,), public_key=self.node.public_key)

    @property
    def endpoint(self) -> str:
        return f"127.0.0.1:{self.sock.getsockname()[1]}"

    def packet(self, number: int) -> bytes:
        """One of its own."""
        return samples.ip4(
            17, samples.udp(self.address, SERVER, number.to_bytes(4, "big")), source=self.address, destination=SERVER
        )

    def answer(self, number: int) -> bytes:
        """One to it."""
        return samples.ip4(
            17, samples.udp(SERVER, self.address, number.to_bytes(4, "big")), source=SERVER, destination=self.address
        )

    def send(self, *packets: bytes) -> None:
        """Packets, or what has to come before them."""
        datagrams = self.node.send(self.peer, packets, time.monotonic(), time.time_ns())
        trains.send(self.sock, self._there, datagrams)

    def step(self) -> None:
        """Take what has come, answer what is to be answered."""
        while (got := trains.receive(self.sock, self._buffer)) is not None:
            length, segment, address = got
            self.node.receive(self._buffer[:length], address, time.monotonic(), time.time_ns(), self._arrivals, segment)
            for endpoint, datagram in self._arrivals.datagrams:
                trains.send(self.sock, endpoint, [datagram])
            for some in self._arrivals.packets.values():
                self.packets += some
            self._arrivals.clear()

    def handshake(self) -> None:
        """Until there is a session."""
        self.until(lambda: self.peer.current is not None)

    def until(self, condition: Any) -> None:
        """Step until it holds."""

        def found() -> bool:
            self.step()
            return bool(condition())

        eventually(found)


class Place:
    """The on-ramp, its flow worker, and phones."""

    def __init__(self, made: Rig, flow: FlowFake, port: int, numbers: tuple[int, int] = (2, 3)) -> None:
        self.rig, self.flow = made, flow
        self.phones = [Phone(number, port) for number in numbers]
        self.trunk = flow.trunk()
        flow.send(Trunked())
        made.ready(*ROWS, *(phone.row for phone in self.phones))

    def opened(self, phone: Phone) -> Adopt:
        """Its tunnel."""
        phone.send(phone.packet(0))
        phone.handshake()
        adopt = self.flow.expect(Adopt)
        self.flow.send(Adopted(adopt.tunnel))
        assert self.came(adopt.tunnel, 1) == [phone.packet(0)]
        return adopt

    def came(self, tunnel: int, count: int) -> list[bytes]:
        """So many packets that have come up for a tunnel."""
        found = b""
        size = 32
        while len(found) < count * size:
            readable(self.trunk)
            data = self.trunk.recv(HEADER + DATAGRAM)
            assert NUMBER.unpack_from(data) == (tunnel,)
            found += data[HEADER:]
        return [found[at : at + size] for at in range(0, len(found), size)]

    def down(self, tunnel: int, *packets: bytes) -> None:
        """Packets of the flow worker's."""
        self.trunk.send(NUMBER.pack(tunnel) + b"".join(packets))

    def restart(self) -> None:
        """Another worker process, which doesn't know devices yet."""
        self.rig.kill()
        self.trunk.close()
        self.flow.die()
        self.rig.setup = msgspec.structs.replace(self.rig.setup, first_tunnel=self.rig.setup.first_tunnel + 100)
        self.rig.start()
        self.flow.accept()
        self.trunk = self.flow.trunk()

    def dropped(self, reason: str) -> int:
        return self.rig.counters.read(f"wireguard_{reason}")

    def close(self) -> None:
        for phone in self.phones:
            phone.sock.close()
        self.trunk.close()


@pytest.fixture
def outside() -> Iterator[socket.socket]:
    with trains.open_socket("127.0.0.1") as sock:
        yield sock


@pytest.fixture
def key(tmp_path: Path) -> str:
    path = tmp_path / "key"
    with open(os.open(path, os.O_WRONLY | os.O_CREAT, 0o600), "wb") as file:
        file.write(base64.b64encode(KEY))
    return str(path)


@pytest.fixture
def place(tmp_path: Path, outside: socket.socket, key: str) -> Iterator[Place]:
    with rig(tmp_path, outside=outside, wireguard_key=key) as (made, (flow,)):
        place = Place(made, flow, outside.getsockname()[1])
        yield place
        place.close()


def held(adopt: Adopt) -> Held:
    return Held(adopt.tunnel, adopt.context, Framing.RAW, adopt.mtu, Transport.TRUNK, descriptors=0)


def test_devices_share_a_trunk_and_have_no_descriptor(place: Place) -> None:
    one, two = place.phones
    before = place.rig.descriptors()
    adopts = [place.opened(phone) for phone in (one, two)]
    for phone, adopt in zip((one, two), adopts, strict=True):
        assert (adopt.context.device_id, adopt.context.packed) == (phone.id, True)
        assert (adopt.framing, adopt.mtu, adopt.greeting) == (Framing.RAW, 1420, b"")
        assert place.rig.report(Opened, lambda opened: opened.tunnel == adopt.tunnel).transport is Transport.TRUNK  # noqa: B023
    assert place.rig.descriptors() <= before
    one.send(*(one.packet(number) for number in range(5)))
    assert place.came(adopts[0].tunnel, 5) == [one.packet(number) for number in range(5)]
    two.send(two.packet(7))
    assert place.came(adopts[1].tunnel, 1) == [two.packet(7)]
    # Interleaved, and each in its order.
    for number in (1, 2):
        for phone, adopt in zip((one, two), adopts, strict=True):
            place.down(adopt.tunnel, phone.answer(number), phone.answer(number + 10))
    for phone in (one, two):
        phone.until(lambda: len(phone.packets) == 4)  # noqa: B023
        assert phone.packets == [phone.answer(number) for number in (1, 11, 2, 12)]
    heard = place.rig.report(Heard, lambda heard: heard.tunnel == adopts[0].tunnel)
    assert heard.endpoint == one.endpoint


def test_what_was_heard_of_a_device_before_its_tunnel_was_open_is_told_again(place: Place) -> None:
    """The parent has no use for it before, and a device that only keeps its session has no other news."""
    (phone, _) = place.phones
    phone.send(b"")
    phone.handshake()
    adopt = place.flow.expect(Adopt)
    place.rig.report(Heard, lambda heard: heard.tunnel == adopt.tunnel)
    place.flow.send(Adopted(adopt.tunnel))
    place.rig.report(Opened, lambda opened: opened.tunnel == adopt.tunnel)
    assert not [message for message in place.rig.reports if isinstance(message, Heard)]
    assert place.rig.report(Heard, lambda heard: heard.tunnel == adopt.tunnel).endpoint == phone.endpoint


def test_packets_wait_until_the_flow_worker_reads_the_tunnel(place: Place) -> None:
    (phone, _) = place.phones
    phone.send(phone.packet(0))
    phone.handshake()
    phone.send(*(phone.packet(number) for number in range(1, 70)))
    adopt = place.flow.expect(Adopt)
    eventually(lambda: place.dropped("tunnel_full") == 6)
    with pytest.raises(BlockingIOError):
        place.trunk.recv(1)
    place.flow.send(Adopted(adopt.tunnel))
    assert place.came(adopt.tunnel, 64) == [phone.packet(number) for number in range(64)]


def test_a_tunnel_that_is_closed_ends_the_session(place: Place) -> None:
    (phone, _) = place.phones
    adopt = place.opened(phone)
    place.flow.send(TunnelClosed(adopt.tunnel, "flow_said_so"))
    assert place.rig.ended(adopt.tunnel) == "flow_said_so"
    # A handshake is asked at once; the next packet opens another one.
    session = phone.peer.current
    phone.until(lambda: phone.peer.current is not session)
    phone.send(phone.packet(1))
    again = place.flow.expect(Adopt)
    assert again.tunnel > adopt.tunnel
    place.rig.tell(Close(again.tunnel, "not open yet"))
    assert place.flow.expect(TunnelClosed).tunnel == again.tunnel
    # What the flow worker still sends for them is nobody's.
    place.down(adopt.tunnel, phone.answer(1))
    eventually(lambda: place.dropped("no_tunnel") >= 2)


def test_a_tunnel_that_is_refused_is_tried_again(place: Place) -> None:
    (phone, _) = place.phones
    phone.send(phone.packet(0))
    phone.handshake()
    adopt = place.flow.expect(Adopt)
    place.flow.send(AdoptRefused(adopt.tunnel, "LIMIT", "no room"))
    place.flow.expect(TunnelClosed)
    session = phone.peer.current
    phone.until(lambda: phone.peer.current is not session)
    phone.send(phone.packet(1))
    assert place.flow.expect(Adopt).tunnel > adopt.tunnel


def test_a_new_flow_worker_gets_a_trunk_and_the_tunnels(place: Place) -> None:
    (phone, _) = place.phones
    adopt = place.opened(phone)
    place.trunk.close()
    place.flow.die()
    place.rig.report(State, lambda state: not all(state.links))
    phone.send(phone.packet(1))
    eventually(lambda: place.dropped("no_tunnel") == 1)
    place.flow.accept()
    place.trunk = place.flow.trunk()
    place.flow.send(Trunked())
    assert place.flow.expect(Adopt) == adopt
    place.flow.send(Adopted(adopt.tunnel))
    place.down(adopt.tunnel, phone.answer(1))
    phone.until(lambda: phone.packets == [phone.answer(1)])
    phone.send(phone.packet(2))
    assert place.came(adopt.tunnel, 1) == [phone.packet(2)]


def test_a_new_worker_takes_tunnels_up_and_asks_for_a_session(place: Place) -> None:
    (phone, other) = place.phones
    adopt = place.opened(phone)
    place.restart()
    place.rig.tell(Places(((phone.id, phone.endpoint), ("d-gone", "127.0.0.1:9"), (other.id, "[::1]:9"))))
    place.flow.send(held(adopt))
    place.flow.send(Trunked())
    # What waits in the trunk is read once it is known whose it is.
    place.down(adopt.tunnel, phone.answer(1))
    session = phone.peer.current
    place.rig.ready(*ROWS, *(phone.row for phone in place.phones))
    opened = place.rig.report(Opened)
    assert (opened.tunnel, opened.context, opened.resumed) == (adopt.tunnel, adopt.context, True)
    assert opened.transport is Transport.TRUNK
    phone.until(lambda: phone.packets == [phone.answer(1)])
    assert phone.peer.current is not session
    phone.send(phone.packet(1))
    assert place.came(adopt.tunnel, 1) == [phone.packet(1)]
    assert place.dropped("no_tunnel") == 0


def test_a_device_is_asked_before_it_sends_with_flows_or_without(place: Place) -> None:
    adopts = [place.opened(each) for each in place.phones]
    place.restart()
    place.rig.tell(Places(tuple((each.id, each.endpoint) for each in place.phones)))
    place.flow.send(msgspec.structs.replace(held(adopts[0]), busy=True), held(adopts[1]), Trunked())
    sessions = [each.peer.current for each in place.phones]
    place.rig.ready(*ROWS, *(each.row for each in place.phones))
    for phone, session in zip(place.phones, sessions, strict=True):
        phone.until(lambda phone=phone, session=session: phone.peer.current is not session)


def test_a_tunnel_of_before_is_taken_though_the_device_was_quicker(place: Place) -> None:
    (phone, _) = place.phones
    adopt = place.opened(phone)
    place.restart()
    place.rig.ready(*ROWS, *(phone.row for phone in place.phones))
    place.flow.send(Trunked())
    phone.restart()
    phone.send(phone.packet(1))
    phone.handshake()
    fresh = place.flow.expect(Adopt)
    assert fresh.tunnel > adopt.tunnel
    place.flow.send(held(adopt))
    assert place.flow.expect(TunnelClosed) == TunnelClosed(fresh.tunnel, "superseded")
    assert place.came(adopt.tunnel, 1) == [phone.packet(1)]
    # Of two that are read, the newer one.
    for told, closed in ((fresh.tunnel + 1, adopt.tunnel), (fresh.tunnel, fresh.tunnel)):
        place.flow.send(msgspec.structs.replace(held(adopt), tunnel=told))
        assert place.flow.expect(TunnelClosed) == TunnelClosed(closed, "superseded")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"public_key": b""}, "key_replaced"),
        ({"disabled": True}, "device_disabled"),
        (None, "device_removed"),
    ],
)
def test_a_tunnel_of_whom_may_not_come_any_more_is_closed(
    place: Place, change: dict[str, Any] | None, reason: str
) -> None:
    (phone, _) = place.phones
    adopt = place.opened(phone)
    place.restart()
    place.flow.send(held(adopt), Trunked())
    rows = [] if change is None else [msgspec.structs.replace(phone.row, **change)]
    place.rig.ready(*ROWS, *rows)
    assert place.flow.expect(TunnelClosed) == TunnelClosed(adopt.tunnel, reason)
    assert place.rig.ended(adopt.tunnel) == reason


def test_a_tunnel_whose_device_is_another_workers_by_now_is_closed(
    tmp_path: Path, outside: socket.socket, key: str
) -> None:
    with rig(tmp_path, outside=outside, wireguard_key=key, workers=2) as (made, (flow,)):
        place = Place(made, flow, outside.getsockname()[1], (6, 7))
        assert [owner(phone.node.public_key, 2) for phone in place.phones] == [0, 1]
        context = msgspec.structs.replace(CONTEXT, device_id=place.phones[1].id)
        flow.send(Held(21, context, Framing.RAW, 1420, Transport.TRUNK, descriptors=0))
        assert flow.expect(TunnelClosed) == TunnelClosed(21, "other_worker")
        place.close()


def test_tunnels_are_closed_where_wireguard_is_off(tmp_path: Path) -> None:
    with rig(tmp_path) as (_, (flow,)):
        flow.send(Held(5, CONTEXT, Framing.RAW, 1420, Transport.TRUNK, descriptors=0))
        assert flow.expect(TunnelClosed) == TunnelClosed(5, "wireguard_off")
