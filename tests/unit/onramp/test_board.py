"""What workers know of each other: how many tunnels there are, and which number is the newest."""

from __future__ import annotations

import os

import pytest

from falkirk.onramp import board
from falkirk.onramp.board import LAST, Board
from falkirk.runtime.counters import Counters


def boards(workers: int, first: int = 1) -> tuple[Counters, list[Board]]:
    memory = board.create(workers)
    return memory, [Board(os.dup(memory.fd), worker, workers, first) for worker in range(workers)]


@pytest.mark.parametrize("workers", [1, 2, 3, 64])
def test_numbers_are_each_workers_own_and_go_up_over_all_of_them(workers: int) -> None:
    _, all_of_them = boards(workers, first=100)
    given = []
    for turn in range(200):
        worker = turn * 7 % workers
        number = all_of_them[worker].take(())
        assert number % workers == worker
        given.append(number)
    assert given == sorted(set(given))
    assert given[0] >= 100
    # No gaps beyond what it takes: fewer than `workers` a number.
    assert given[-1] < 100 + 201 * workers


def test_one_worker_counts_up_by_one() -> None:
    _, (only,) = boards(1)
    assert [only.take(()) for _ in range(3)] == [1, 2, 3]
    only.seen(10)
    only.seen(7)
    assert only.take(()) == 11
    assert only.take({12, 13}) == 14


def test_a_tunnel_of_before_keeps_its_number_whoever_has_it_now() -> None:
    _, (zero, one) = boards(2)
    zero.seen(41)
    assert (one.take(()), zero.take(())) == (43, 44)


def test_at_the_end_numbers_start_over() -> None:
    _, (zero, one) = boards(2, first=LAST)
    assert one.take(()) == LAST
    assert zero.take(()) == 2
    assert zero.take({2, 4}) == 6
    assert one.take({1}) == 3


def test_tunnels_are_counted_together_and_a_new_process_begins_at_none() -> None:
    memory, (zero, one) = boards(2)
    zero.count(3)
    one.count(4)
    assert zero.tunnels() == one.tunnels() == 7
    last = one.take(())
    again = Board(os.dup(memory.fd), 1, 2, 1)
    assert again.tunnels() == 3
    assert again.take(()) > last


def test_memory_of_other_workers_is_refused() -> None:
    memory = board.create(3)
    with pytest.raises(ValueError, match="need others"):
        Board(os.dup(memory.fd), 0, 2, 1)
