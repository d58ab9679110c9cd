"""When something is due for a peer."""

from __future__ import annotations

import pytest

from falkirk.wireguard.allowed import Allowed
from falkirk.wireguard.handshake import Keys, State
from falkirk.wireguard.peer import INF, Peer, Pending
from falkirk.wireguard.session import Session


def peer(keepalive_seconds: float = 0) -> Peer:
    return Peer(bytes(32), bytes(32), Allowed(), keepalive_seconds, None)


def test_nothing_is_due_for_a_new_peer() -> None:
    assert peer().due == INF


@pytest.mark.parametrize("timer", ["retry", "keepalive", "forget", "erase"])
def test_the_earliest_timer_is_due(timer: str) -> None:
    one = peer()
    one.retry, one.keepalive, one.forget, one.erase = 40.0, 30.0, 35.0, 50.0
    setattr(one, timer, 20.0)
    assert one.due == 20.0


def test_a_pending_initiation_and_the_longest_silence_count_too() -> None:
    one = peer(25.0)
    one.passed_at = 100.0
    assert one.due == 125.0
    one.pending = Pending(1, State(b"", b"", b""), 100.0, 105.0)
    assert one.due == 105.0


def test_usable_is_a_current_session_that_has_not_expired() -> None:
    one = peer()
    session = Session(one, 1, 2, Keys(b"", b""), initiator=False, created=0.0)
    one.next = session
    assert not one.usable(1.0)
    one.current, one.next = session, None
    assert one.usable(1.0)
    assert not one.usable(180.0)
    assert one.sessions() == [session]
