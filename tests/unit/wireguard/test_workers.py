"""One node of three workers: each datagram comes to what its owner makes of it, wherever it came in."""

from __future__ import annotations

from zlib import crc32

import pytest

from falkirk.wireguard import primitives
from falkirk.wireguard.messages import COOKIE_SIZE, MAC_OFFSETS, RESPONSE_SIZE
from falkirk.wireguard.node import Node
from falkirk.wireguard.outcome import Arrivals, Event
from falkirk.wireguard.peer import Endpoint, Peer
from tests.unit.wireguard.pair import BACK, CLIENT, CLIENT_ADDRESS, WALL, World, packet, randomness, secret
from tests.unit.wireguard.test_dialogue import ELSEWHERE, counting_exchanges, initiation

WORKERS = 3


class Workers:
    """The server of a world, in three parts, of which one owns the client; events are carried between them by hand."""

    def __init__(self, world: World, known: bool = True) -> None:
        self.world, self.known = world, known
        self.owner = crc32(world.client.node.public_key) % WORKERS
        self.other = (self.owner + 1) % WORKERS
        self.nodes = [self._node(worker) for worker in range(WORKERS)]

    def _node(self, worker: int) -> Node:
        def find(public_key: bytes) -> Peer | int | None:
            if not self.known:
                return None
            return self.owner if worker != self.owner else node.add_peer(public_key, allowed=[(CLIENT_ADDRESS, 32)])

        node = Node(secret("server"), rng=randomness(f"worker {worker}"), worker=worker, workers=WORKERS, find=find)
        return node

    def receive(self, worker: int, data: bytes, source: Endpoint = CLIENT, segment: int = 0) -> Arrivals:
        """A train at one worker, and what comes of it there."""
        arrivals = Arrivals()
        self.nodes[worker].receive(data, source, self.world.now, self.world.wall, arrivals, segment)
        return arrivals

    def give(self, event: Event) -> Arrivals:
        """What a worker has for another, there."""
        assert event.kind == "other_worker"
        assert event.endpoint is not None
        if event.claim is None:
            return self.receive(event.worker, event.datagram, event.endpoint)
        arrivals = Arrivals()
        node = self.nodes[event.worker]
        node.receive_claimed(event.datagram, event.claim, event.endpoint, self.world.now, arrivals)
        return arrivals

    def counted(self, worker: int) -> dict[str, int]:
        """The reasons that were counted."""
        return {reason: count for reason, count in self.nodes[worker].counters.items() if count}

    def connect(self) -> list[bytes]:
        """A session by way of a worker that isn't the owner; then the client's first datagrams."""
        (event,) = self.receive(self.other, initiation(self.world)).events
        ((_, response),) = self.give(event).datagrams
        self.world.client.receive(response, ("192.0.2.2", 51820))
        first = self.world.lost()
        self.world.client.send(self.world.to_server, packet())
        return first + self.world.lost()


def test_an_initiation_is_given_to_the_owner_who_answers_where_it_came_from(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World()
    workers = Workers(world)
    datagram = initiation(world)
    made = counting_exchanges(monkeypatch)
    arrivals = workers.receive(workers.other, datagram, ELSEWHERE)
    assert (arrivals.datagrams, len(made)) == ([], 1)
    (event,) = arrivals.events
    assert (event.worker, event.public_key, event.datagram) == (workers.owner, world.client.node.public_key, datagram)
    ((endpoint, response),) = workers.give(event).datagrams
    # As many as one worker would have made.
    assert (endpoint, len(response), len(made)) == (ELSEWHERE, RESPONSE_SIZE, 4)
    assert response[4] % WORKERS == workers.owner
    assert all(not workers.counted(worker) for worker in range(WORKERS))
    assert [len(node.peers) for node in workers.nodes] == [worker == workers.owner for worker in range(WORKERS)]


def test_a_replay_is_refused_whichever_worker_it_comes_to() -> None:
    world = World()
    workers = Workers(world)
    datagram = initiation(world)
    workers.give(workers.receive(workers.other, datagram).events[0])
    world.now += 6
    for worker in range(WORKERS):
        arrivals = workers.receive(worker, datagram, ELSEWHERE)
        if worker != workers.owner:
            (event,) = arrivals.events
            arrivals = workers.give(event)
        assert arrivals.datagrams == []
    assert workers.counted(workers.owner) == {"old_timestamp": WORKERS}


def test_an_unknown_key_costs_one_exchange_and_has_no_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World()
    workers = Workers(world, known=False)
    datagram = initiation(world)
    made = counting_exchanges(monkeypatch)
    arrivals = workers.receive(workers.other, datagram)
    assert (arrivals.datagrams, [event.kind for event in arrivals.events], len(made)) == ([], ["unknown_key"], 1)


def test_workers_that_do_not_agree_drop_it() -> None:
    """Its row has come to one and not to the other yet, or both take the other for its owner: nothing goes round."""
    world = World()
    workers = Workers(world)
    (event,) = workers.receive(workers.other, initiation(world)).events
    workers.known = False
    assert workers.give(event).datagrams == []
    workers.known, workers.owner = True, workers.other
    assert workers.give(event._replace(worker=(workers.other + 1) % WORKERS)).datagrams == []
    assert sum(node.counters["unknown_key"] for node in workers.nodes) == 2


def test_a_cookie_is_asked_for_once() -> None:
    """By the worker that it comes to; the owner is under load too, and believes what that has seen."""
    world = World()
    workers = Workers(world)
    for node in workers.nodes:
        node.guard.forced = True
    ((_, reply),) = workers.receive(workers.other, initiation(world)).datagrams
    assert len(reply) == COOKIE_SIZE
    world.client.receive(reply, ("192.0.2.2", 51820))
    world.now += 6
    (event,) = workers.receive(workers.other, initiation(world)).events
    ((_, response),) = workers.give(event).datagrams
    assert len(response) == RESPONSE_SIZE
    assert workers.counted(workers.owner) == {}


def test_what_is_given_counts_towards_the_owners_load() -> None:
    world = World()
    workers = Workers(world)
    (event,) = workers.receive(workers.other, initiation(world)).events
    assert not workers.nodes[workers.owner].guard.under_load(world.now)
    for _ in range(1001):
        workers.give(event)
    assert workers.nodes[workers.owner].guard.under_load(world.now)
    assert not workers.nodes[workers.other].guard.under_load(world.now)


def test_data_behind_an_initiation_in_one_train_reaches_its_session() -> None:
    """The kernel looks at a train's first datagram; this one's goes by its hash."""
    world = World()
    workers = Workers(world)
    confirming, data = workers.connect()
    assert confirming[4] % WORKERS == data[4] % WORKERS == workers.owner
    workers.receive(workers.owner, confirming)
    world.now += 6
    first = initiation(world)
    arrivals = workers.receive(workers.other, first + data, segment=len(first))
    assert [(event.kind, event.worker) for event in arrivals.events] == [("other_worker", workers.owner)] * 2
    assert [event.claim is None for event in arrivals.events] == [False, True]
    assert arrivals.events[1].datagram == data
    given = [workers.give(event) for event in arrivals.events]
    assert [len(datagram) for _, datagram in given[0].datagrams] == [RESPONSE_SIZE]
    packets = [packet for found in given[1].packets.values() for packet in found]
    assert packets == [packet()]
    assert workers.counted(workers.other) == {}


def test_answers_to_what_another_worker_asked_reach_it() -> None:
    world = World()
    workers = Workers(world)
    owner = workers.nodes[workers.owner]
    peer = owner.add_peer(world.client.node.public_key, allowed=[(CLIENT_ADDRESS, 32)], endpoint=CLIENT)
    (asked,) = owner.send(peer, [BACK], world.now, world.wall)
    world.client.node.guard.forced = True
    (cookie,) = world.client.receive(asked, ("192.0.2.2", 51820))
    world.client.node.guard.forced = False
    (response,) = world.client.receive(asked, ("192.0.2.2", 51820))
    for datagram in (cookie, response):
        (event,) = workers.receive(workers.other, datagram).events
        assert (event.worker, event.datagram, event.claim) == (workers.owner, datagram, None)
        arrivals = workers.give(event)
    assert [event.kind for event in arrivals.events] == ["handshake"]
    assert len(peer.cookie) == 16
    # What doesn't know our key isn't carried about.
    changed = bytearray(response)
    changed[MAC_OFFSETS[2]] ^= 1
    assert workers.receive(workers.other, bytes(changed)).events == []
    assert workers.counted(workers.other) == {"bad_mac1": 1}


def test_an_index_of_ours_that_is_not_in_use_is_nobody_elses() -> None:
    """Of a process before this one, for instance: its owner hears of it, and is the only one who might know whose it was."""
    world = World()
    workers = Workers(world)
    index = bytes((workers.owner, 9, 9, 9))
    data = b"\4\0\0\0" + index + bytes(24)
    (event,) = workers.receive(workers.owner, data).events
    assert event.kind == "unknown_index"
    (event,) = workers.receive(workers.other, data).events
    assert [found.kind for found in workers.give(event).events] == ["unknown_index"]
    assert workers.counted(workers.owner) == {"unknown_index": 2}
    assert workers.counted(workers.other) == {}


@pytest.mark.parametrize("worker", range(WORKERS))
def test_indices_say_whose_they_are(worker: int) -> None:
    node = Node(secret("server"), rng=randomness("indices"), worker=worker, workers=WORKERS)
    peer = node.add_peer(primitives.public_bytes(primitives.private_key(secret("client"))), endpoint=CLIENT)
    for attempt in range(50):
        (datagram,) = node.initiate(peer, attempt * 6.0, WALL)
        assert datagram[4] % WORKERS == worker
