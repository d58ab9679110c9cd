"""Sessions that move to another worker: traffic goes on, and nothing can be had twice."""

from __future__ import annotations

import msgspec
import pytest

from falkirk.wireguard.node import Node
from tests.unit.wireguard.pair import BACK, CLIENT, CLIENT_ADDRESS, World, packet, randomness, secret


def successor(world: World, *, worker: int = 0, workers: int = 1) -> Node:
    node = Node(secret("server"), rng=randomness("successor"), worker=worker, workers=workers)
    node.add_peer(world.client.node.public_key, allowed=[(CLIENT_ADDRESS, 32)])
    return node


def move(world: World) -> None:
    """The server's session goes to another node, which takes its place."""
    record = world.server.node.export_peer(world.to_client)
    node = successor(world)
    moved = node.import_peer(record, world.now)
    assert moved is node.peers[world.client.node.public_key]
    world.server.node, world.to_client = node, moved


def test_traffic_goes_on_both_ways_without_a_handshake() -> None:
    world = World()
    world.connect()
    world.answer(BACK)
    world.run()
    move(world)
    world.client.send(world.to_server, packet(fill=1))
    world.answer(BACK, BACK)
    world.run()
    assert world.server.take() == [packet(fill=1)]
    assert world.client.take() == [BACK] * 3
    assert {datagram[0] for datagram in world.passed} == {4}
    assert world.client.counted() == world.server.counted() == {}


def test_no_replay_gets_through_the_gap() -> None:
    world = World()
    world.connect()
    world.client.send(world.to_server, *(packet(fill=number) for number in range(4)))
    first, second, third, fourth = world.lost()
    world.server.receive(first, CLIENT)
    world.server.receive(third, CLIENT)
    world.server.take()
    move(world)
    for datagram in (first, second, third, fourth, second):
        world.server.receive(datagram, CLIENT)
    assert world.server.take() == [packet(fill=1), packet(fill=3)]
    assert world.server.counted() == {"replayed": 3}


def test_a_replayed_initiation_is_still_old() -> None:
    world = World()
    world.client.send(world.to_server, packet())
    ((_, _, datagram),) = world.wire
    world.run()
    move(world)
    assert world.server.receive(datagram, CLIENT) == []
    assert world.server.counted() == {"old_timestamp": 1}


def test_whoever_gave_a_session_away_cannot_use_it() -> None:
    world = World()
    world.connect()
    session = world.to_client.current
    assert session is not None
    world.server.node.export_peer(world.to_client)
    assert (session.send_key, session.receive_key) == (b"", b"")
    world.client.send(world.to_server, packet())
    world.run()
    assert world.server.take() == []
    assert world.server.counted() == {"unknown_index": 1}


def test_all_three_sessions_and_the_timers_move() -> None:
    world = World()
    world.connect()
    world.now += 130
    world.client.send(world.to_server, packet())
    world.run()
    world.now += 6
    (asked,) = world.client.node.initiate(world.to_server, world.now, world.wall)
    world.server.receive(asked, CLIENT)
    assert len(world.to_client.sessions()) == 2
    move(world)
    assert [world.to_client.current is None, world.to_client.next is None] == [False, False]
    world.run()
    assert world.to_client.next is None
    world.wait(400)
    assert world.server.node._table.sessions == {}
    assert world.server.kinds()[-1] == "expired"


def test_what_is_too_old_is_left_behind() -> None:
    world = World()
    world.connect()
    record = world.server.node.export_peer(world.to_client)
    moved = successor(world).import_peer(record, world.now + 180)
    assert moved is not None
    assert moved.sessions() == []


def test_a_record_that_cannot_be_taken_is_refused() -> None:
    world = World()
    world.connect()
    record = world.server.node.export_peer(world.to_client)
    stranger = Node(secret("server"), rng=randomness("stranger"))
    assert stranger.import_peer(record, world.now) is None
    node = successor(world)
    assert node.import_peer(record, world.now) is not None
    assert node.import_peer(record, world.now) is None
    first = msgspec.msgpack.decode(record)[8][0][1] % 256
    other_worker = successor(world, worker=1 - first % 2, workers=2)
    assert other_worker.import_peer(record, world.now) is None


@pytest.mark.parametrize("record", [b"", b"\x90", b"junk", msgspec.msgpack.encode([1, b"k"])])
def test_junk_is_no_record(record: bytes) -> None:
    with pytest.raises(ValueError, match="not a peer's record"):
        Node(secret("server"), rng=randomness("x")).import_peer(record, 0.0)


def test_another_versions_record_is_refused() -> None:
    world = World()
    world.connect()
    fields = msgspec.msgpack.decode(world.server.node.export_peer(world.to_client))
    fields[0] += 1
    with pytest.raises(ValueError, match="version 2, this engine's is 1"):
        successor(world).import_peer(msgspec.msgpack.encode(fields), world.now)
