"""Data messages: what is delivered, what is refused and counted, and that nothing unauthentic changes anything."""

from __future__ import annotations

import pytest

from falkirk.wireguard.counters import Reason
from falkirk.wireguard.messages import DATA_HEADER, DATA_OVERHEAD, MAX_PACKET, NONCE
from falkirk.wireguard.outcome import Arrivals
from falkirk.wireguard.session import REJECT_AFTER_MESSAGES
from falkirk.wireguard.transport import MAX_QUEUED
from tests.unit.wireguard.pair import CLIENT, CLIENT_ADDRESS, SERVER, SERVER_ADDRESS, World, packet


def connected(*, mtu: int = 1420) -> World:
    world = World(mtu=mtu)
    world.connect()
    return world


def sealed(world: World, plain: bytes, counter: int | None = None) -> bytes:
    """A data message of the client's, of whatever content."""
    session = world.to_server.current
    assert session is not None
    if counter is None:
        counter = session.counter
        session.counter += 1
    return DATA_HEADER.pack(4, session.remote, counter) + session.sealer()(NONCE.pack(counter), plain, None)


@pytest.mark.parametrize("size", [20, 21, 31, 32, 33, 1400, 1419, 1420, 9000, MAX_PACKET])
def test_packets_arrive_as_they_were_sent(size: int) -> None:
    world = connected()
    world.client.send(world.to_server, packet(size=size))
    world.run()
    assert world.server.take() == [packet(size=size)]


@pytest.mark.parametrize(
    ("size", "padded"),
    [(20, 32), (32, 32), (1393, 1408), (1404, 1408), (1409, 1420), (1419, 1420), (1420, 1420), (1500, 1500)],
)
def test_padding_is_to_16_but_not_beyond_the_mtu(size: int, padded: int) -> None:
    """5.4.6."""
    world = connected(mtu=1420)
    world.client.send(world.to_server, packet(size=size))
    assert [len(datagram) for datagram in world.lost()] == [padded + DATA_OVERHEAD]


def test_a_train_is_one_call_and_keeps_its_order() -> None:
    world = connected()
    packets = [packet(size=1000, fill=number) for number in range(40)] + [packet(size=60)]
    world.client.send(world.to_server, *packets)
    datagrams = world.lost()
    assert len({len(datagram) for datagram in datagrams[:-1]}) == 1
    world.server.receive(b"".join(datagrams), CLIENT, len(datagrams[0]))
    assert world.server.take() == packets
    assert (world.to_client.rx_packets, world.to_client.rx_bytes) == (42, 60 + sum(map(len, packets)))
    assert (world.to_server.tx_packets, world.to_server.tx_bytes) == (42, 60 + sum(map(len, packets)))


def test_a_train_may_come_as_a_view_and_is_not_kept() -> None:
    world = connected()
    world.client.send(world.to_server, packet(), packet(fill=9))
    buffer = bytearray(b"".join(world.lost()))
    arrivals = Arrivals()
    world.server.node.receive(memoryview(buffer), CLIENT, world.now, world.wall, arrivals, len(buffer) // 2)
    buffer[:] = bytes(len(buffer))
    assert arrivals.packets == {world.to_client: [packet(), packet(fill=9)]}


def test_a_train_of_several_sessions_and_kinds() -> None:
    """As GRO never makes it, but nothing says that it can't."""
    world = connected()
    world.client.send(world.to_server, packet(size=100), packet(size=100, fill=8))
    first, second = world.lost()
    stranger = first[:4] + b"\xff\xff\xff\xff" + first[8:]
    world.server.receive(b"".join((first, stranger, b"\1" + first[1:], second, bytes(20))), CLIENT, len(first))
    assert world.server.take() == [packet(size=100), packet(size=100, fill=8)]
    assert world.server.counted() == {"unknown_index": 1, "bad_length": 1, "bad_type": 1}


def test_out_of_order_and_twice() -> None:
    world = connected()
    packets = [packet(fill=number) for number in range(6)]
    world.client.send(world.to_server, *packets)
    sent = world.lost()
    for number in (3, 1, 5, 1, 0, 4, 2, 3, 5):
        world.server.receive(sent[number], CLIENT)
    assert world.server.take() == [packets[number] for number in (3, 1, 5, 0, 4, 2)]
    assert world.server.counted() == {"replayed": 3}


def test_what_is_replayed_from_elsewhere_moves_nothing() -> None:
    world = connected()
    world.client.send(world.to_server, packet())
    (datagram,) = world.lost()
    world.server.receive(datagram, CLIENT)
    world.server.kinds()
    world.server.receive(datagram, ("203.0.113.66", 666))
    assert world.to_client.endpoint == CLIENT
    assert world.server.kinds() == []
    assert world.server.counted() == {"replayed": 1}


@pytest.mark.parametrize("at", [8, 15, 16, 40, -1])
def test_what_is_changed_on_the_way_is_refused_and_the_original_still_good(at: int) -> None:
    world = connected()
    world.client.send(world.to_server, packet())
    (datagram,) = world.lost()
    changed = bytearray(datagram)
    changed[at] ^= 1
    before = world.to_client.current
    assert before is not None
    window = (before.window.highest, before.window.missing)
    assert world.server.receive(bytes(changed), ("203.0.113.66", 666)) == []
    assert (before.window.highest, before.window.missing) == window
    assert world.to_client.endpoint == CLIENT
    assert world.server.take() == []
    world.server.receive(datagram, CLIENT)
    assert world.server.take() == [packet()]
    assert sum(world.server.counted().values()) == 1


def test_a_stolen_index_is_of_no_use() -> None:
    """Somebody saw the index, and seals with a session of his own."""
    world = connected()
    thief = World(preshared=b"t" * 32)
    thief.connect()
    stolen, own = world.to_server.current, thief.to_server.current
    assert stolen is not None
    assert own is not None
    own.remote = stolen.remote
    thief.client.send(thief.to_server, packet())
    for datagram in thief.lost():
        assert world.server.receive(datagram, ("203.0.113.66", 666)) == []
    assert world.server.take() == []
    assert world.server.counted() == {"bad_packet": 1}
    assert world.to_client.endpoint == CLIENT


@pytest.mark.parametrize(
    ("plain", "reason"),
    [
        (packet(bytes((10, 0, 0, 9))), "source_not_allowed"),
        (packet(bytes((10, 0, 0, 2))), "source_not_allowed"),
        (packet(bytes(15) + b"\1", bytes(16)), "source_not_allowed"),
        (b"\x45", "bad_inner"),
        (packet()[:19], "bad_inner"),
        (packet(size=60)[:59], "bad_inner"),
        (b"\x45\0\0\x13" + packet()[4:], "bad_inner"),
        (b"\x60" + bytes(38), "bad_inner"),
        (b"\x60\0\0\0\0\1" + bytes(34), "bad_inner"),
        (b"\x55" + packet()[1:], "bad_inner"),
        (bytes(64), "bad_inner"),
    ],
)
def test_an_authentic_message_must_hold_a_packet_of_the_peers_own(plain: bytes, reason: Reason) -> None:
    world = connected()
    datagram = sealed(world, plain)
    world.server.receive(datagram, CLIENT)
    assert world.server.take() == []
    assert world.server.counted() == {reason: 1}
    # Its counter is used up all the same.
    world.server.receive(datagram, CLIENT)
    assert world.server.counted()["replayed"] == 1


def test_padding_of_any_length_is_cut_off() -> None:
    world = connected()
    world.server.receive(sealed(world, packet(size=60) + bytes(700)), CLIENT)
    assert world.server.take() == [packet(size=60)]


def test_both_families_inside() -> None:
    world = World()
    one, other = bytes.fromhex("fd00") + bytes(13) + b"\1", bytes.fromhex("fd00") + bytes(13) + b"\2"
    world.to_client.allowed = type(world.to_client.allowed)([(one, 128), (CLIENT_ADDRESS, 32)])
    world.client.send(
        world.to_server,
        packet(one, other, size=80),
        packet(CLIENT_ADDRESS, SERVER_ADDRESS),
        packet(other, one, size=80),
    )
    world.run()
    assert world.server.take() == [packet(one, other, size=80), packet()]
    assert world.server.counted() == {"source_not_allowed": 1}


def test_a_message_of_no_session_tells_its_owner_once_a_train() -> None:
    world = connected()
    datagram = DATA_HEADER.pack(4, 0xDEAD, 0) + bytes(16)
    assert world.server.receive(datagram * 5, CLIENT, len(datagram)) == []
    assert [(event.kind, event.endpoint) for event in world.server.events] == [("unknown_index", CLIENT)]
    assert world.server.counted() == {"unknown_index": 5}


def test_counters_end() -> None:
    """6.1: beyond Reject-After-Messages nothing is taken, nor sent."""
    world = connected()
    world.server.receive(sealed(world, packet(), REJECT_AFTER_MESSAGES - 1), CLIENT)
    assert world.server.take() == [packet()]
    world.server.receive(sealed(world, packet(), REJECT_AFTER_MESSAGES), CLIENT)
    world.server.receive(sealed(world, packet(), 2**64 - 1), CLIENT)
    assert world.server.take() == []
    assert world.server.counted() == {"counter_limit": 2}
    session = world.to_server.current
    assert session is not None
    session.counter = REJECT_AFTER_MESSAGES - 1
    world.now += 6
    datagrams = world.client.node.send(world.to_server, [packet(), packet()], world.now, world.wall)
    assert [datagram[0] for datagram in datagrams] == [4, 1]
    assert session.counter == REJECT_AFTER_MESSAGES
    assert world.client.counted() == {"counter_limit": 1}


def test_a_packet_that_no_datagram_holds_is_refused() -> None:
    world = connected()
    world.client.send(world.to_server, bytes(MAX_PACKET + 1), packet())
    assert len(world.lost()) == 1
    assert world.client.counted() == {"packet_too_long": 1}


def test_without_a_session_the_newest_packets_are_kept() -> None:
    world = World()
    packets = [packet(size=60 + number) for number in range(MAX_QUEUED + 7)]
    for each in packets:
        world.client.send(world.to_server, each)
    assert world.client.counted() == {"queue_full": 7}
    world.run()
    assert world.server.take() == packets[7:]
    assert [datagram[0] for datagram in world.passed] == [1, 2] + [4] * MAX_QUEUED


def test_a_new_sender_address_is_taken_up_at_once() -> None:
    world = connected()
    world.client.endpoint = ("198.51.100.7", 4711)
    world.client.send(world.to_server, packet())
    world.run()
    assert world.server.kinds() == ["moved"]
    world.answer(packet(SERVER_ADDRESS, CLIENT_ADDRESS))
    world.run()
    assert world.client.take() == [packet(SERVER_ADDRESS, CLIENT_ADDRESS)]
    assert world.client.counted() == world.server.counted() == {}
    assert world.to_server.endpoint == SERVER
