"""Indices, the heap of timers, and which session takes whose place."""

from __future__ import annotations

import itertools

import pytest

from falkirk.wireguard.allowed import Allowed
from falkirk.wireguard.handshake import Keys
from falkirk.wireguard.peer import INF, Peer
from falkirk.wireguard.session import Session
from falkirk.wireguard.table import Table
from tests.unit.wireguard.pair import randomness

_INDICES = itertools.count(1)


def peer(table: Table, key: int = 1) -> Peer:
    made = Peer(bytes((key,)) * 32, bytes(32), Allowed(), 0, None)
    table.peers[made.public_key] = made
    return made


def places(of: Peer) -> tuple[Session | None, Session | None, Session | None]:
    return of.previous, of.current, of.next


def session(of: Peer, *, initiator: bool) -> Session:
    return Session(of, next(_INDICES), 9, Keys(b"s" * 32, b"r" * 32), initiator=initiator, created=0.0)


@pytest.mark.parametrize("workers", [1, 2, 3, 7, 64, 256])
def test_an_index_says_its_worker_by_its_first_byte_on_the_wire(workers: int) -> None:
    for worker in {0, workers // 2, workers - 1}:
        table = Table(randomness(f"{worker}"), worker, workers)
        made = [table.new_index() for _ in range(200)]
        assert {index.to_bytes(4, "little")[0] % workers for index in made} == {worker}
        assert all(table.may_have(index) for index in made)
        assert workers == 1 or not table.may_have(made[0] ^ 1) or (made[0] ^ 1) % 256 % workers == worker
        assert len(set(made)) == len(made)


def test_an_index_in_use_is_not_given_again() -> None:
    pieces = iter([b"\1\2\3\4", b"\1\2\3\4", b"\5\6\7\x08"])
    table = Table(lambda _: next(pieces))
    one = peer(table)
    first = table.new_index()
    table.begin(Session(one, first, 1, Keys(b"", b""), initiator=True, created=0.0))
    assert table.new_index() == int.from_bytes(b"\5\6\7\x08", "little")
    assert not table.may_have(first)


@pytest.mark.parametrize(("worker", "workers"), [(1, 1), (-1, 2), (0, 257), (0, 0)])
def test_workers_that_cannot_be_are_refused(worker: int, workers: int) -> None:
    with pytest.raises(ValueError, match="workers count from 0"):
        Table(randomness("x"), worker, workers)


def test_jitter_is_a_third_of_a_second_at_most() -> None:
    table = Table(randomness("jitter"))
    waits = {table.jitter() for _ in range(2000)}
    assert min(waits) >= 0
    assert max(waits) <= 0.334
    assert len(waits) > 300


def test_timers_come_in_their_order_and_stale_entries_never() -> None:
    table = Table(randomness("x"))
    one, two, three = (peer(table, key) for key in (1, 2, 3))
    one.retry, two.retry, three.retry = 30.0, 20.0, 10.0
    for each in (one, two, three):
        table.arm(each)
    one.keepalive = 5.0
    table.arm(one)
    assert table.next_due() == 5.0
    assert table.pop_due(4.9) is None
    assert table.pop_due(5.0) is one
    one.keepalive = INF
    table.arm(one)
    # Removed, or due later than its entry says: skipped, and not lost.
    del table.peers[three.public_key]
    two.retry = 25.0
    assert table.pop_due(24.9) is None
    assert table.next_due() == 25.0
    assert table.pop_due(100.0) is two
    two.retry = INF
    table.arm(two)
    assert table.pop_due(100.0) is one
    one.retry = INF
    table.arm(one)
    assert table.pop_due(1e9) is None
    assert table.next_due() == INF


def test_who_answers_keeps_the_old_session_until_the_new_one_is_used() -> None:
    table = Table(randomness("x"))
    one = peer(table)
    first, second, third = (session(one, initiator=False) for _ in range(3))
    table.begin(first)
    assert one.sessions() == [first]
    assert one.current is None
    table.confirm(first)
    assert places(one) == (None, first, None)
    table.begin(second)
    assert places(one) == (None, first, second)
    # Answered again before it was used: the one in between is gone.
    table.begin(third)
    assert places(one) == (None, first, third)
    assert second.local not in table.sessions
    assert second.send_key == b""
    table.confirm(third)
    assert places(one) == (first, third, None)
    assert set(table.sessions) == {first.local, third.local}


def test_who_asked_uses_the_new_session_at_once() -> None:
    table = Table(randomness("x"))
    one = peer(table)
    first, second, third = (session(one, initiator=True) for _ in range(3))
    table.begin(first)
    table.begin(second)
    table.begin(third)
    assert places(one) == (second, third, None)
    assert set(table.sessions) == {second.local, third.local}


def test_both_asked_at_once() -> None:
    table = Table(randomness("x"))
    one = peer(table)
    old, answered, asked = session(one, initiator=True), session(one, initiator=False), session(one, initiator=True)
    table.begin(old)
    table.begin(answered)
    table.begin(asked)
    assert places(one) == (answered, asked, None)
    assert set(table.sessions) == {answered.local, asked.local}


def test_dropped_keys_leave_nothing() -> None:
    table = Table(randomness("x"))
    one = peer(table)
    sessions = [session(one, initiator=False) for _ in range(2)]
    table.begin(sessions[0])
    table.confirm(sessions[0])
    table.begin(sessions[1])
    table.awake.update(sessions)
    sessions[0].seal = sessions[0].sealer()
    table.drop_keys(one)
    assert table.sessions == {}
    assert table.awake == set()
    assert [(each.send_key, each.receive_key, each.seal) for each in sessions] == [(b"", b"", None)] * 2
