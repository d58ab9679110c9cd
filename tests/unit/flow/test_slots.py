"""NAT slots: none is handed out twice at once, none before it has rested."""

from __future__ import annotations

import random

import pytest

from falkirk.flow.slots import LONG_REST, REST, SlotPool


def test_fresh_indices_come_in_order_and_run_out() -> None:
    pool = SlotPool(16, 3)
    assert [pool.claim(0) for _ in range(4)] == [16, 17, 18, None]
    assert (pool.active, pool.resting, pool.size) == (3, 0, 3)


def test_a_freed_index_rests_a_minute() -> None:
    pool = SlotPool(0, 1)
    assert pool.claim(100) == 0
    pool.release(0, 100)
    assert (pool.active, pool.resting) == (0, 1)
    assert pool.claim(100 + REST - 1) is None
    assert pool.claim(100 + REST) == 0
    assert (pool.active, pool.resting) == (1, 0)


def test_one_with_a_path_mtu_rests_ten_minutes_and_holds_nobody_up() -> None:
    pool = SlotPool(0, 2)
    assert [pool.claim(0), pool.claim(0)] == [0, 1]
    pool.release(0, 0, long=True)
    pool.release(1, 1)
    assert pool.resting == 2
    assert pool.claim(REST) is None
    assert pool.claim(1 + REST) == 1
    assert pool.claim(LONG_REST - 1) is None
    assert pool.claim(LONG_REST) == 0


def test_rested_indices_come_in_the_order_of_their_release() -> None:
    pool = SlotPool(0, 4)
    for _ in range(4):
        pool.claim(0)
    for index in (2, 0, 3, 1):
        pool.release(index, 5)
    assert [pool.claim(5 + REST) for _ in range(5)] == [2, 0, 3, 1, None]


def test_a_successor_starts_where_its_predecessor_stood() -> None:
    pool = SlotPool(0, 4)
    pool.claim(0)
    pool.claim(0)
    assert pool.cursor == 2
    successor = SlotPool(0, 4, start=pool.cursor)
    assert [successor.claim(0) for _ in range(5)] == [2, 3, 0, 1, None]
    assert successor.cursor == 2


@pytest.mark.parametrize("start", [0, 7, 12])
def test_any_order_of_claims_and_releases(start: int) -> None:
    chance = random.Random(start)
    pool = SlotPool(100, 12, start=start)
    claimed: set[int] = set()
    resting: dict[int, int] = {}
    now = 0
    for _ in range(5000):
        now += chance.randrange(8)
        if claimed and chance.random() < 0.5:
            index = chance.choice(sorted(claimed))
            claimed.discard(index)
            long = chance.random() < 0.2
            pool.release(index, now, long=long)
            resting[index] = now + (LONG_REST if long else REST)
        else:
            got = pool.claim(now)
            free = {index for index in range(100, 112) if index not in claimed and resting.get(index, 0) <= now}
            if got is None:
                assert not free
                continue
            assert got in free
            claimed.add(got)
            resting.pop(got, None)
        assert (pool.active, pool.resting) == (len(claimed), len(resting))


def test_a_pool_of_nothing() -> None:
    pool = SlotPool(0, 0)
    assert (pool.claim(0), pool.cursor) == (None, 0)
