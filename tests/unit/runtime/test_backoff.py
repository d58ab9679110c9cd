"""Back-off between restarts: at once, then doubling, forgiven after a life."""

from __future__ import annotations

from itertools import pairwise

from falkirk.runtime.backoff import Backoff


def test_first_at_once_then_doubling_to_a_bound() -> None:
    backoff = Backoff()
    delays = [backoff.ended(0.1) for _ in range(10)]
    assert delays[0] == 0
    assert delays[1] > 0
    assert all(later == min(2 * earlier, delays[-1]) for earlier, later in pairwise(delays[1:]))
    assert delays[-1] == 2.0


def test_a_long_life_forgives() -> None:
    backoff = Backoff()
    for _ in range(5):
        backoff.ended(0.1)
    assert backoff.ended(60.0) == 0
