"""Datagrams from one on-ramp worker to another, by a real pair."""

from __future__ import annotations

import socket
from collections import Counter

from falkirk.onramp import neighbours
from falkirk.onramp.control import Asked, Passed
from falkirk.onramp.neighbours import BUDGET, Neighbours
from falkirk.onramp.reactor import Reactor
from falkirk.wireguard.handshake import Claim

ENDPOINT = ("::ffff:192.0.2.1", 1001, 0, 0)
MESSAGES: list[Passed | Asked] = [
    Passed(ENDPOINT, b"\4" * 65_487),
    Passed(("192.0.2.1", 7), b"\1" * 148, Claim(*(bytes((number,)) * 32 for number in range(4)))),
    Asked(ENDPOINT),
]


def read(reading: socket.socket, expected: int) -> list[list[Passed | Asked]]:
    """What a worker takes, by turns, until it has so many."""
    reactor, turns = Reactor(), list[list[Passed | Asked]]()

    def take(messages: list[Passed | Asked]) -> None:
        turns.append(messages)
        if sum(map(len, turns)) >= expected:
            reactor.stop()

    Neighbours(reactor, reading, lambda name, count: None).start(take)
    reactor.run()
    return turns


def test_what_is_given_arrives_and_what_does_not_fit_is_counted() -> None:
    counts: Counter[str] = Counter()

    def count(name: str, more: int) -> None:
        counts[name] += more

    (reading, writing), (other_reading, other_writing) = neighbours.inbox(), neighbours.inbox()
    with reading, writing, other_reading, other_writing:
        one = Neighbours(Reactor(), other_reading, count)
        one.know(0, writing)
        for message in MESSAGES:
            one.give(0, message)
        assert counts == {"passed_on": len(MESSAGES)}
        assert read(reading, len(MESSAGES)) == [MESSAGES]
        # A worker that is being replaced reads nothing, and its inbox has an end.
        counts.clear()
        while not counts["wireguard_worker_full"]:
            one.give(0, MESSAGES[1])
            assert counts["passed_on"] < 100_000
        turns = read(reading, counts["passed_on"])
        assert [message for turn in turns for message in turn] == [MESSAGES[1]] * counts["passed_on"]
        assert max(map(len, turns)) == BUDGET
        one.give(0, MESSAGES[2])
        assert counts["wireguard_worker_full"] == 1
        # Nobody told of a worker: as good as one that doesn't read.
        one.give(1, MESSAGES[2])
        assert counts["wireguard_worker_full"] == 2
