"""Handshakes as transcripts: who is answered, with what, and what is refused without costing or changing anything."""

from __future__ import annotations

import pytest

from falkirk.wireguard import primitives
from falkirk.wireguard.guard import COOKIES_PER_SECOND, Guard
from falkirk.wireguard.messages import COOKIE_SIZE, INITIATION_SIZE, MAC_OFFSETS, RESPONSE_SIZE
from falkirk.wireguard.node import Node
from falkirk.wireguard.peer import Peer
from tests.unit.wireguard.pair import BACK, CLIENT, SERVER, World, packet, randomness, secret

ELSEWHERE = ("203.0.113.66", 666)


def initiation(world: World) -> bytes:
    (datagram,) = world.client.node.initiate(world.to_server, world.now, world.wall)
    return datagram


def counting_exchanges(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """The public keys that a Diffie-Hellman was made with, from now on."""
    made: list[bytes] = []
    real = primitives.exchange

    def exchange(private: object, public: bytes) -> bytes:
        made.append(public)
        return real(private, public)  # type: ignore[arg-type]

    for module in ("handshake", "dialogue"):
        monkeypatch.setattr(f"falkirk.wireguard.{module}.exchange", exchange)
    return made


def test_the_transcript_of_a_first_packet() -> None:
    world = World()
    world.client.send(world.to_server, packet())
    world.run()
    assert [(datagram[0], len(datagram)) for datagram in world.passed] == [
        (1, INITIATION_SIZE),
        (2, RESPONSE_SIZE),
        (4, 96),
    ]
    assert world.server.take() == [packet()]
    assert (world.client.kinds(), world.server.kinds()) == (["handshake"], ["handshake"])
    world.answer(BACK)
    world.run()
    assert world.client.take() == [BACK]
    assert world.client.counted() == world.server.counted() == {}
    assert world.to_client.handshake_wall_ns == world.to_server.handshake_wall_ns == world.wall


def test_without_a_packet_the_initiator_confirms_by_an_empty_one() -> None:
    world = World()
    world.server.receive(initiation(world), CLIENT)
    world.run()
    assert [len(datagram) for datagram in world.passed] == [RESPONSE_SIZE, 32]
    assert world.to_client.usable(world.now)
    assert world.server.take() == []


def test_a_session_that_was_answered_carries_nothing_before_it_was_used() -> None:
    """5.4.5: the responder waits for key confirmation."""
    world = World()
    world.server.receive(initiation(world), CLIENT)
    (response,) = world.lost()
    world.answer(BACK)
    assert world.lost() == []
    assert world.to_client.next is not None
    world.client.receive(response, SERVER)
    world.run()
    assert world.client.take() == [BACK]


def test_a_preshared_key_must_be_the_same() -> None:
    world = World(preshared=b"p" * 32)
    world.connect()
    world = World(preshared=b"p" * 32)
    world.to_client.preshared = b"q" * 32
    world.client.send(world.to_server, packet())
    world.run()
    assert world.client.counted() == {"bad_response": 1}
    assert not world.to_server.usable(world.now)


def test_a_replayed_initiation_is_refused_forever() -> None:
    world = World()
    datagram = initiation(world)
    assert len(world.server.receive(datagram, CLIENT)) == 1
    answered = world.to_client.next
    for later in (0.0, 10.0, 1e6):
        world.now += later
        assert world.server.receive(datagram, ELSEWHERE) == []
    assert world.server.counted() == {"old_timestamp": 3}
    assert world.to_client.next is answered
    assert world.to_client.endpoint == CLIENT


def test_an_older_initiation_than_the_last_is_refused() -> None:
    world = World()
    first = initiation(world)
    world.now += 6
    second = initiation(world)
    assert len(world.server.receive(second, CLIENT)) == 1
    assert world.server.receive(first, CLIENT) == []
    assert world.server.counted() == {"old_timestamp": 1}


def test_initiations_within_20_ms_are_one_too_many() -> None:
    world = World()
    first = initiation(world)
    world.now += 6
    second = initiation(world)
    world.server.receive(first, CLIENT)
    assert world.server.receive(second, CLIENT) == []
    assert world.server.counted() == {"early_initiation": 1}
    # It changed nothing: it may come again.
    world.now += 0.03
    assert len(world.server.receive(second, CLIENT)) == 1


def test_an_initiation_moves_no_endpoint_until_its_session_is_used() -> None:
    world = World()
    world.connect()
    world.now += 6
    assert len(world.server.receive(initiation(world), ELSEWHERE)) == 1
    assert world.to_client.endpoint == CLIENT
    assert world.server.kinds() == []


def test_an_unknown_key_costs_one_exchange_and_no_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World()
    world.server.node.remove_peer(world.client.node.public_key)
    datagram = initiation(world)
    made = counting_exchanges(monkeypatch)
    assert world.server.receive(datagram, CLIENT) == []
    assert len(made) == 1
    assert world.server.counted() == {"unknown_key": 1}
    (event,) = world.server.events
    assert (event.kind, event.public_key, event.endpoint) == ("unknown_key", world.client.node.public_key, CLIENT)


def test_a_known_key_costs_four_and_its_static_secret_once(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World()
    first = initiation(world)
    world.now += 6
    second = initiation(world)
    made = counting_exchanges(monkeypatch)
    world.server.receive(first, CLIENT)
    assert len(made) == 4
    world.now += 6
    world.server.receive(second, CLIENT)
    assert len(made) == 7
    assert made[4:].count(world.client.node.public_key) == 1


def test_a_key_can_be_looked_up_when_it_first_asks() -> None:
    asked: list[bytes] = []
    world = World()

    def find(public_key: bytes) -> Peer | int | None:
        asked.append(public_key)
        return node.add_peer(public_key)

    node = Node(secret("server"), rng=randomness("server"), find=find)
    world.server.node = node
    assert len(world.server.receive(initiation(world), CLIENT)) == 1
    assert asked == [world.client.node.public_key]
    world.now += 6
    assert len(world.server.receive(initiation(world), CLIENT)) == 1
    assert len(asked) == 1


@pytest.mark.parametrize("kind", ["initiation", "response"])
def test_without_mac1_there_is_no_answer_and_no_exchange(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    world = World()
    datagram = initiation(world)
    host = world.server
    if kind == "response":
        (datagram,) = world.server.receive(datagram, CLIENT)
        host = world.client
    made = counting_exchanges(monkeypatch)
    changed = bytearray(datagram)
    changed[MAC_OFFSETS[datagram[0]]] ^= 1
    assert host.receive(bytes(changed), ELSEWHERE) == []
    assert made == []
    assert host.counted() == {"bad_mac1": 1}


def test_under_load_a_cookie_is_asked_for_and_then_honoured(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World()
    world.server.node.guard.forced = True
    made = counting_exchanges(monkeypatch)
    world.client.send(world.to_server, packet())
    made.clear()
    world.run()
    assert made == []
    assert [(datagram[0], len(datagram)) for datagram in world.passed] == [(1, INITIATION_SIZE), (3, COOKIE_SIZE)]
    assert world.server.counted() == {"no_cookie": 1}
    # 6.6: the cookie waits for the next try.
    world.wait(6)
    assert world.server.take() == [packet()]
    assert [datagram[0] for datagram in world.passed] == [1, 3, 1, 2, 4]
    assert world.server.counted() == {"no_cookie": 1}


def test_a_cookie_of_another_address_is_refused_and_answered() -> None:
    world = World()
    world.server.node.guard.forced = True
    world.client.send(world.to_server, packet())
    world.run()
    world.now += 6
    datagram = initiation(world)
    (reply,) = world.server.receive(datagram, ELSEWHERE)
    assert reply[0] == 3
    assert world.server.counted() == {"no_cookie": 1, "bad_mac2": 1}


def test_an_address_with_a_cookie_has_a_rate() -> None:
    world = World()
    world.server.node.guard.forced = True
    world.client.send(world.to_server, packet())
    world.run()
    world.now += 6
    datagram = initiation(world)
    for _ in range(10):
        world.server.receive(datagram, CLIENT)
    assert world.server.counted() == {"no_cookie": 1, "old_timestamp": 4, "handshake_rate": 5}


def test_a_flood_of_spoofed_initiations_makes_load_and_a_bounded_number_of_replies() -> None:
    world = World()
    world.server.node = Node(secret("server"), rng=randomness("server"), guard=Guard(50))
    datagram = initiation(world)
    replies = 0
    for number in range(3000):
        replies += len(world.server.receive(datagram, (f"198.18.{number >> 8}.{number & 255}", 1)))
    replied = int(COOKIES_PER_SECOND / 10)
    assert world.server.counted() == {"unknown_key": 50, "no_cookie": replied, "handshake_rate": 2950 - replied}
    assert replies == replied
    # It stays under load while the flood lasts, though most of it isn't looked at.
    for _ in range(10):
        world.now += 0.5
        for _ in range(700):
            world.server.receive(datagram, ("198.18.0.1", 1))
    assert world.server.counted()["unknown_key"] == 50


def test_a_response_under_load_needs_a_cookie_unless_it_comes_from_where_it_was_asked_for() -> None:
    world = World()
    world.client.node.guard.forced = True
    (response,) = world.server.receive(initiation(world), CLIENT)
    assert [reply[0] for reply in world.client.receive(response, ELSEWHERE)] == [3]
    assert world.client.counted() == {"no_cookie": 1}
    assert not world.to_server.usable(world.now)
    assert [answer[0] for answer in world.client.receive(response, SERVER)] == [4]
    assert world.to_server.usable(world.now)


def test_a_response_is_good_once() -> None:
    world = World()
    (response,) = world.server.receive(initiation(world), CLIENT)
    world.client.receive(response, SERVER)
    world.client.kinds()
    assert world.client.receive(response, ELSEWHERE) == []
    assert world.client.counted() == {"unknown_handshake": 1}
    assert world.to_server.endpoint == SERVER


def test_a_response_to_a_replaced_initiation_is_too_late() -> None:
    world = World()
    (response,) = world.server.receive(initiation(world), CLIENT)
    world.now += 6
    initiation(world)
    assert world.client.receive(response, SERVER) == []
    assert world.client.counted() == {"unknown_handshake": 1}


def test_a_cookie_reply_must_be_to_our_last_message() -> None:
    world = World()
    world.server.node.guard.forced = True
    (reply,) = world.server.receive(initiation(world), CLIENT)
    changed = bytearray(reply)
    changed[-1] ^= 1
    world.client.receive(bytes(changed), SERVER)
    world.client.receive(reply[:4] + b"\0\0\0\0" + reply[8:], SERVER)
    assert world.client.counted() == {"bad_cookie_reply": 1, "unknown_handshake": 1}
    assert world.to_server.cookie == b""
    world.client.receive(reply, SERVER)
    assert len(world.to_server.cookie) == 16


def test_a_point_of_low_order_is_refused() -> None:
    """RFC 7748 6.1, in the initiation's ephemeral key."""
    world = World()
    datagram = initiation(world)
    body = datagram[:8] + bytes(32) + datagram[40 : MAC_OFFSETS[1]]
    key = primitives.digest(b"mac1----", world.server.node.public_key)
    assert world.server.receive(body + primitives.mac(key, body) + bytes(16), CLIENT) == []
    assert world.server.counted() == {"low_order_point": 1}


def test_who_has_only_seen_public_keys_gets_nothing() -> None:
    """An impostor claims the client's key: he seals it as anybody could, and can't seal the timestamp."""
    world = World()
    impostor = Node(secret("impostor"), rng=randomness("impostor"))
    impostor._identity.public = world.client.node.public_key
    peer = impostor.add_peer(world.server.node.public_key, endpoint=SERVER)
    (datagram,) = impostor.initiate(peer, world.now, world.wall)
    assert world.server.receive(datagram, ELSEWHERE) == []
    assert world.server.counted() == {"bad_timestamp": 1}
    assert world.to_client.timestamp == b""


@pytest.mark.parametrize(
    ("datagram", "reason"),
    [
        (b"", "bad_length"),
        (b"\1", "bad_length"),
        (b"\1\0\0\0", "bad_length"),
        (b"\1\0\0\0" + bytes(143), "bad_length"),
        (b"\1\0\0\0" + bytes(145), "bad_length"),
        (b"\2\0\0\0" + bytes(87), "bad_length"),
        (b"\3\0\0\0" + bytes(61), "bad_length"),
        (b"\4\0\0\0" + bytes(27), "bad_length"),
        (b"\0\0\0\0" + bytes(144), "bad_type"),
        (b"\5\0\0\0" + bytes(144), "bad_type"),
        (b"\1\0\0\1" + bytes(144), "bad_type"),
        (b"\4\1\0\0" + bytes(60), "bad_type"),
    ],
)
def test_what_no_message_is(datagram: bytes, reason: str) -> None:
    world = World()
    assert world.server.receive(datagram, ELSEWHERE) == []
    assert world.server.counted() == {reason: 1}
    assert world.server.events == []
