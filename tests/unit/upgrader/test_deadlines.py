"""Deadlines against a plain list of them."""

from __future__ import annotations

import random

import pytest

from falkirk.upgrader.deadlines import BUCKETS, TICK_S, Deadlines


class Thing:
    """Something with a deadline."""

    def __init__(self, at: float) -> None:
        self.at = at
        self.due = -1

    def expires(self) -> float:
        return self.at


def test_nothing_filed_waits_for_ever() -> None:
    deadlines: Deadlines[Thing] = Deadlines(50.0)
    assert deadlines.wait(50.0) == -1.0
    thing = Thing(60.0)
    deadlines.add(thing)
    deadlines.remove(thing)
    deadlines.remove(thing)
    assert (len(deadlines), deadlines.wait(50.0)) == (0, -1.0)
    assert list(deadlines.expire(100.0)) == []


@pytest.mark.parametrize("after", [0.0, 0.05, 1.0, 51.0, 52.0, 7440.0])
def test_a_thing_is_due_within_a_tick_and_not_before(after: float) -> None:
    now = 1000.03
    deadlines: Deadlines[Thing] = Deadlines(now)
    deadlines.add(Thing(now + after))
    start, wakes = now, 0
    while not (ended := list(deadlines.expire(now))):
        wakes += 1
        now += max(deadlines.wait(now), 0.001)
    assert start + after <= now <= start + after + 2 * TICK_S
    assert wakes <= 3 + 2 * after / (BUCKETS * TICK_S)
    assert len(ended) == 1
    assert len(deadlines) == 0


def test_a_deadline_that_moved_later_is_kept() -> None:
    deadlines: Deadlines[Thing] = Deadlines(0.0)
    thing = Thing(1.0)
    deadlines.add(thing)
    thing.at = 5.0
    assert list(deadlines.expire(2.0)) == []
    assert list(deadlines.expire(5.2)) == [thing]


def test_filing_again_moves_a_deadline_earlier() -> None:
    deadlines: Deadlines[Thing] = Deadlines(0.0)
    thing = Thing(30.0)
    deadlines.add(thing)
    thing.at = 1.0
    deadlines.add(thing)
    assert len(deadlines) == 1
    assert list(deadlines.expire(1.2)) == [thing]


def test_a_long_sleep_misses_nothing() -> None:
    deadlines: Deadlines[Thing] = Deadlines(0.0)
    things = [Thing(number * 0.37) for number in range(1000)]
    for thing in things:
        deadlines.add(thing)
    assert set(deadlines.expire(100_000.0)) == set(things)
    late = Thing(100_001.0)
    deadlines.add(late)
    assert list(deadlines.expire(100_001.2)) == [late]


@pytest.mark.parametrize("seed", range(5))
def test_against_a_list(seed: int) -> None:
    dice = random.Random(seed)
    now = dice.uniform(0, 1e6)
    deadlines: Deadlines[Thing] = Deadlines(now)
    filed: set[Thing] = set()
    for _ in range(2000):
        if dice.random() < 0.5:
            thing = Thing(now + dice.choice((0.01, 0.5, 3, 100)) * dice.random())
            deadlines.add(thing)
            filed.add(thing)
        elif filed and dice.random() < 0.3:
            thing = filed.pop()
            deadlines.remove(thing)
        elif filed and dice.random() < 0.3:
            next(iter(filed)).at += 2.0
        now += dice.choice((0.0, 0.01, 0.3, 80.0)) * dice.random()
        for thing in deadlines.expire(now):
            assert thing.at <= now
            filed.remove(thing)
        assert len(deadlines) == len(filed)
        assert all(thing.at > now - 2 * TICK_S for thing in filed)
        if filed:
            assert deadlines.wait(now) <= max(0.0, min(thing.at for thing in filed) - now) + 2 * TICK_S
