"""Timers (section 6) as transcripts in time, removal, and lasting traffic."""

from __future__ import annotations

import pytest

from falkirk.wireguard.messages import DATA_HEADER
from falkirk.wireguard.node import Node
from falkirk.wireguard.outcome import Arrivals
from falkirk.wireguard.peer import INF
from tests.unit.wireguard.pair import BACK, CLIENT, SERVER, World, packet, randomness, secret


def kinds(datagrams: list[bytes]) -> list[str]:
    """i, r, c, d for data and k for a keepalive."""
    return ["k" if len(each) == 32 else "?ircd"[each[0]] for each in datagrams]


def test_who_received_and_has_nothing_to_say_says_so_after_ten_seconds() -> None:
    """6.5."""
    world = World()
    world.connect()
    world.wait(9.9)
    assert kinds(world.passed) == []
    world.wait(0.2)
    assert kinds(world.passed) == ["k"]
    world.wait(60)
    assert kinds(world.passed) == ["k"]


def test_who_goes_on_receiving_says_so_every_ten_seconds() -> None:
    world = World()
    world.connect()
    for _ in range(30):
        world.wait(1)
        world.client.send(world.to_server, packet())
        world.run()
    assert kinds(world.passed).count("k") == 3
    assert kinds(world.passed).count("i") == 0


def test_an_answer_is_as_good_as_a_keepalive() -> None:
    world = World()
    world.connect()
    for _ in range(4):
        world.wait(5)
        world.client.send(world.to_server, packet())
        world.answer(BACK)
        world.run()
    world.wait(5)
    assert "k" not in kinds(world.passed)


def test_who_hears_nothing_for_15_seconds_asks_for_a_new_session() -> None:
    """6.2 and 6.5: and its packets go on by the old one."""
    world = World()
    world.connect()
    world.client.send(world.to_server, packet())
    world.wire.clear()
    world.wait(14.9, deliver=False)
    assert world.to_server.pending is None
    world.wait(0.5)
    assert kinds(world.passed) == ["i", "r", "k"]


def test_the_initiator_renews_after_two_minutes_when_it_sends() -> None:
    world = World()
    world.connect()
    first = world.to_server.current
    for _ in range(119):
        world.wait(1)
        world.client.send(world.to_server, packet())
        world.answer(BACK)
        world.run()
    assert world.to_server.current is first
    world.passed.clear()
    world.wait(1)
    world.client.send(world.to_server, packet())
    world.run()
    assert kinds(world.passed) == ["d", "i", "r", "k"]
    assert world.to_server.current is not first
    # The one before stays ten seconds for stragglers.
    assert world.to_server.previous is first
    world.answer(BACK)
    world.run()
    world.wait(10.1)
    assert world.to_server.previous is None
    assert world.to_client.previous is None
    assert len(world.client.node._table.sessions) == len(world.server.node._table.sessions) == 1


def test_the_responder_does_not_renew_while_its_session_is_good() -> None:
    world = World()
    world.connect()
    world.wait(150)
    world.passed.clear()
    world.answer(BACK)
    world.run()
    assert kinds(world.passed) == ["d"]


def test_an_initiator_that_only_receives_renews_in_the_last_minute_once() -> None:
    """6.2: at Reject-After-Time - Keepalive-Timeout - Rekey-Timeout."""
    world = World()
    world.connect()
    world.wait(164)
    world.answer(BACK)
    world.run()
    assert "i" not in kinds(world.passed)
    world.wait(1)
    world.passed.clear()
    world.answer(BACK)
    world.answer(BACK)
    world.run()
    assert kinds(world.passed) == ["d", "d", "i", "r", "k"]


def test_either_side_may_begin_once_the_session_is_too_old() -> None:
    world = World()
    world.connect()
    world.wait(181)
    assert world.server.kinds() == ["expired"]
    assert world.client.kinds() == ["expired"]
    assert (world.to_client.sessions(), world.to_server.sessions()) == ([], [])
    world.passed.clear()
    world.answer(BACK)
    world.run()
    assert kinds(world.passed) == ["i", "r", "d"]
    assert world.client.take() == [BACK]


def test_a_message_of_an_old_session_is_refused() -> None:
    world = World()
    world.connect()
    world.client.send(world.to_server, packet())
    (datagram,) = world.lost()
    world.now += 180
    assert world.server.receive(datagram, CLIENT) == []
    assert world.server.counted() == {"session_expired": 1}
    assert world.server.take() == []


def test_an_unanswered_initiation_is_repeated_for_90_seconds_then_given_up() -> None:
    """6.4."""
    world = World()
    world.client.send(world.to_server, packet())
    tries = []
    while world.to_server.pending is not None:
        tries += kinds(world.lost())
        world.now = world.client.node.next_deadline()
        world.client.poll()
    assert tries == ["i"] * len(tries)
    assert 16 <= len(tries) <= 18
    assert 1090 <= world.now < 1097
    assert world.client.kinds() == ["silent"]
    assert world.client.counted() == {"queue_given_up": 1}
    assert world.client.node._table.handshakes == {}
    world.wait(1000)
    assert world.lost() == []


@pytest.mark.parametrize("wanted", [False, True])
def test_an_initiation_that_is_withdrawn_is_not_repeated_unless_a_packet_waits(wanted: bool) -> None:
    world = World()
    world.wire += [
        (CLIENT, SERVER, each) for each in world.client.node.initiate(world.to_server, world.now, world.wall)
    ]
    if wanted:
        world.client.send(world.to_server, packet())
    assert kinds(world.lost()) == ["i"]
    world.client.node.withdraw(world.to_server)
    assert (world.to_server.pending is not None) == wanted
    world.now += 5.4
    world.client.poll()
    assert kinds(world.lost()) == (["i"] if wanted else [])
    # And it may ask as ever.
    world.now += 5
    world.client.send(world.to_server, packet())
    world.run()
    assert packet() in world.server.take()


def test_initiations_are_five_seconds_apart_whoever_asks() -> None:
    world = World()
    for _ in range(20):
        world.client.send(world.to_server, packet())
        assert world.client.node.initiate(world.to_server, world.now, world.wall) == []
        world.now += 0.2
    assert kinds(world.lost()) == ["i"]
    world.now += 1.1
    world.client.send(world.to_server, packet())
    assert kinds(world.lost()) == ["i"]


def test_a_lost_response_is_made_good_by_the_next_try() -> None:
    world = World()
    world.client.send(world.to_server, packet())
    (datagram,) = world.lost()
    world.server.receive(datagram, CLIENT)
    world.lost()
    world.wait(6)
    assert world.server.take() == [packet()]


def test_a_lost_confirmation_is_made_good_by_the_next_packet() -> None:
    world = World()
    world.client.send(world.to_server, packet())
    (datagram,) = world.lost()
    (response,) = world.server.receive(datagram, CLIENT)
    world.lost()
    world.client.receive(response, SERVER)
    world.lost()
    assert not world.to_client.usable(world.now)
    world.client.send(world.to_server, packet(fill=9))
    world.run()
    assert world.server.take() == [packet(fill=9)]
    assert world.to_client.usable(world.now)


def test_a_silent_line_is_kept_open_when_asked() -> None:
    world = World(keepalive_seconds=25)
    world.wait(0.1)
    assert kinds(world.passed) == ["i", "r", "k"]
    world.passed.clear()
    world.wait(100)
    assert kinds(world.passed) == ["k"] * 4
    # And goes on over renewals, for which it counts as sending.
    world.passed.clear()
    world.wait(600)
    assert kinds(world.passed).count("i") in (4, 5)
    assert world.to_client.usable(world.now)
    assert world.server.counted() == world.client.counted() == {}


def test_a_kept_line_comes_back_after_any_silence() -> None:
    world = World(keepalive_seconds=25)
    world.wait(1)
    world.wait(1000, deliver=False)
    assert not world.to_server.usable(world.now)
    world.wait(120)
    assert world.to_server.usable(world.now)
    assert world.to_client.usable(world.now)


def test_both_asking_at_once_come_to_a_session() -> None:
    world = World()
    world.to_client.endpoint = CLIENT
    world.client.send(world.to_server, packet())
    world.answer(BACK)
    world.run()
    world.wait(7)
    assert world.server.take() == [packet()]
    assert world.client.take() == [BACK]
    for _ in range(3):
        world.client.send(world.to_server, packet())
        world.answer(BACK)
        world.run()
    assert len(world.server.take()) == len(world.client.take()) == 3


def test_a_server_that_forgot_everything_is_found_again_by_its_peers_next_silence() -> None:
    """As a stock client does it: 15 s without an answer."""
    world = World()
    world.connect()
    world.server.node = Node(secret("server"), rng=randomness("again"))
    world.to_client = world.server.node.add_peer(world.client.node.public_key, allowed=[(bytes((10, 0, 0, 1)), 32)])
    world.client.send(world.to_server, packet())
    world.run()
    assert world.server.kinds() == ["unknown_index"]
    world.wait(16)
    world.client.send(world.to_server, packet())
    world.run()
    assert world.server.take() == [packet()]


def test_a_server_that_forgot_its_sessions_may_ask_at_once() -> None:
    """As our on-ramp does it: it knows who was at that address, and a peer answers whoever holds the key."""
    world = World()
    world.connect()
    world.server.node = Node(secret("server"), rng=randomness("again"))
    world.client.send(world.to_server, packet())
    world.run()
    (event,) = world.server.events
    peer = world.server.node.add_peer(
        world.client.node.public_key, allowed=[(bytes((10, 0, 0, 1)), 32)], endpoint=event.endpoint
    )
    (asked,) = world.server.node.initiate(peer, world.now, world.wall)
    world.client.receive(asked, SERVER)
    world.run()
    world.client.send(world.to_server, packet(fill=9))
    world.run()
    assert world.server.take() == [packet(fill=9)]
    assert world.now == 1000.0


def test_a_removed_peer_is_gone_at_once() -> None:
    world = World()
    world.connect()
    world.client.send(world.to_server, packet())
    assert world.server.node.remove_peer(world.client.node.public_key)
    assert not world.server.node.remove_peer(world.client.node.public_key)
    world.run()
    assert world.server.take() == []
    world.wait(30)
    assert world.server.take() == []
    assert set(world.server.counted()) == {"unknown_index", "unknown_key"}
    table = world.server.node._table
    assert (table.sessions, table.handshakes, table.awake, table.peers) == ({}, {}, set(), {})
    assert world.server.node.next_deadline() == INF


def test_dropped_sessions_leave_the_peer() -> None:
    world = World()
    world.connect()
    world.server.node.drop_sessions(world.to_client)
    world.now += 6
    world.answer(BACK)
    assert kinds(world.lost()) == ["i"]


def test_nothing_is_sent_to_who_was_never_heard() -> None:
    world = World()
    world.answer(BACK, BACK)
    assert world.lost() == []
    assert world.server.counted() == {"no_endpoint": 2}
    assert world.to_client.queue is None


def test_ciphers_of_keepalives_and_of_forgeries_are_not_kept() -> None:
    world = World()
    world.client.send(world.to_server, b"")
    world.run()
    world.answer(b"")
    world.run()
    table = world.server.node._table
    (session,) = table.sessions.values()
    assert session is world.to_client.current
    world.server.receive(DATA_HEADER.pack(4, session.local, 9) + bytes(64), ("192.0.2.66", 1))
    assert world.server.counted() == {"bad_packet": 1}
    assert (session.open, session.seal, table.awake) == (None, None, set())
    world.client.send(world.to_server, packet())
    world.answer(BACK)
    world.run()
    assert session.open is not None
    assert session.seal is not None
    assert table.awake == {session}


def test_idle_sessions_drop_their_ciphers_and_take_them_up_again() -> None:
    world = World()
    world.connect()
    sessions = list(world.server.node._table.sessions.values())
    assert any(session.open for session in sessions)
    world.wait(11)
    world.wait(11)
    assert [(session.open, session.seal) for session in sessions] == [(None, None)]
    assert world.server.node._table.awake == set()
    world.client.send(world.to_server, packet())
    world.answer(BACK)
    world.run()
    assert (world.server.take(), world.client.take()) == ([packet()], [BACK])


def test_a_key_twice_or_none_is_refused() -> None:
    node = Node(secret("server"), rng=randomness("x"))
    node.add_peer(b"k" * 32)
    with pytest.raises(ValueError, match="a peer's already"):
        node.add_peer(b"k" * 32)
    with pytest.raises(ValueError, match="have 32 bytes"):
        node.add_peer(b"short")
    with pytest.raises(ValueError, match="have 32 bytes"):
        node.add_peer(b"l" * 32, preshared=b"")
    with pytest.raises(ValueError, match="32 bytes"):
        Node(b"short", rng=randomness("x"))


def test_timers_are_served_a_few_at_a_time() -> None:
    node = Node(secret("server"), rng=randomness("x"))
    for number in range(10):
        node.add_peer(bytes((number + 1,)) * 32, keepalive_seconds=25, endpoint=CLIENT)
    world = World()
    arrivals = Arrivals()
    node.poll(world.now, world.wall, arrivals, limit=4)
    assert len(arrivals.datagrams) == 4
    assert node.next_deadline() < world.now
    node.poll(world.now, world.wall, arrivals)
    assert len(arrivals.datagrams) == 10


def test_an_hour_of_traffic_with_every_hundredth_datagram_lost() -> None:
    """No packet is delivered twice, no session outlives its time, and no index is left behind."""
    world = World(keepalive_seconds=25)
    lose = randomness("loss")
    sent = got = 0
    for second in range(3600):
        world.wait(1)
        if second % 7 < 3:
            world.client.send(world.to_server, packet(fill=second % 251))
            world.answer(BACK)
            sent += 2
        world.wire[:] = [each for each in world.wire if lose(1)[0] > 2]
        world.run()
        got += len(world.server.take()) + len(world.client.take())
        for node in (world.client.node, world.server.node):
            table = node._table
            assert len(table.sessions) <= 3
            assert len(table.handshakes) <= 1
            assert all(not session.expired(world.now) for session in table.sessions.values())
    assert sent * 0.97 < got <= sent
    assert not set(world.client.counted()) - {"unknown_handshake"}
    assert not set(world.server.counted()) - {"unknown_handshake"}
