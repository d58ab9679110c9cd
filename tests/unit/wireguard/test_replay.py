"""The replay window: tables of the known implementations' cases, re-derived for a window of 8,192, and a set of integers as oracle."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from falkirk.wireguard.replay import WINDOW, Window
from falkirk.wireguard.session import REJECT_AFTER_MESSAGES

LIMIT = WINDOW + 1


def accepted(counters: Iterable[int], window: Window | None = None) -> list[bool]:
    """Whether each counter is accepted, one after the other."""
    window = window or Window()
    said = []
    for counter in counters:
        said.append(window.may(counter))
        if said[-1]:
            window.take(counter)
    return said


STEPS: list[tuple[int, bool]] = [
    # The first ones, and each once more.
    (0, True), (1, True), (1, False), (9, True), (8, True), (7, True), (7, False),
    # A jump by a window and one: what is just inside is good once, what is just outside never.
    (LIMIT, True), (LIMIT - 1, True), (LIMIT - 1, False), (LIMIT - 2, True), (2, True), (2, False),
    (LIMIT + 16, True), (3, False), (LIMIT + 16, False),
    # The same far away from the start.
    (LIMIT * 4, True), (LIMIT * 4 - (LIMIT - 1), False), (10, False),
    (LIMIT * 4 - LIMIT, False), (LIMIT * 4 - (LIMIT + 1), False), (LIMIT * 4 - (LIMIT - 2), True),
    (LIMIT * 4 + 1 - LIMIT, False), (0, False),
    # The end of the counters.
    (REJECT_AFTER_MESSAGES - 1, True), (REJECT_AFTER_MESSAGES - 2, True), (REJECT_AFTER_MESSAGES - 2, False),
    (REJECT_AFTER_MESSAGES - 1, False), (0, False),
]  # fmt: skip


def test_the_table() -> None:
    assert accepted(counter for counter, _ in STEPS) == [good for _, good in STEPS]


@pytest.mark.parametrize(
    ("counters", "refused"),
    [
        # Upwards, then the one at the start: it has just left, or is just there.
        (range(1, WINDOW + 1), 0),
        (range(2, WINDOW + 1), 0),
        # Downwards.
        (range(WINDOW + 1, 0, -1), 1),
    ],
)
def test_a_whole_window_in_each_direction(counters: range, refused: int) -> None:
    window = Window()
    assert accepted(counters, window).count(False) == refused
    assert accepted(counters, window).count(True) == 0


def test_bottom_of_the_window_is_good_and_below_is_not() -> None:
    window = Window()
    assert accepted([WINDOW], window) == [True]
    assert accepted([1, 0, 1], window) == [True, False, False]
    # Downwards from the top but one, then the bottom which is missing.
    assert all(accepted(range(WINDOW - 1, 1, -1), window))
    assert accepted([0, WINDOW + 1, 1, 2], window) == [False, True, False, False]


def test_every_place_of_the_window_once_and_no_more() -> None:
    """Odd ones first, then even ones, then all again."""
    window = Window()
    assert all(accepted(range(1, 2 * WINDOW, 2), window))
    evens = accepted(range(0, 2 * WINDOW, 2), window)
    assert evens == [counter > 2 * WINDOW - 1 - WINDOW for counter in range(0, 2 * WINDOW, 2)]
    assert not any(accepted(range(2 * WINDOW), window))


@pytest.mark.parametrize("step", [1, 2, 63, 64, 65, WINDOW - 1, WINDOW, WINDOW + 1, 3 * WINDOW, 1 << 40])
def test_steps_of_every_size_leave_what_is_between_open(step: int) -> None:
    window = Window()
    start = 5 * WINDOW
    assert accepted([start, start + step], window) == [True, True]
    inside = range(max(start + 1, start + step - WINDOW + 1), start + step)
    assert all(accepted(inside, window))
    assert not any(accepted([*inside, start + step, start], window))


def test_in_order_there_is_nothing_to_keep() -> None:
    window = Window()
    assert all(accepted(range(100_000), window))
    assert (window.highest, window.missing) == (99_999, 0)


def test_what_is_missing_never_outgrows_the_window() -> None:
    window = Window()
    accepted(range(0, 10 * WINDOW, 3), window)
    assert window.missing.bit_length() <= WINDOW


@settings(max_examples=60)
@given(
    st.lists(st.one_of(st.integers(0, 50), st.integers(0, 3 * WINDOW), st.integers(0, 1 << 63)), max_size=60),
    st.integers(0, 2 * WINDOW),
)
def test_against_a_set(counters: list[int], base: int) -> None:
    window = Window()
    seen: set[int] = set()
    for counter in (base + counter for counter in counters):
        highest = max(seen, default=-1)
        new = counter not in seen and counter > highest - WINDOW
        assert window.may(counter) == new
        if new:
            window.take(counter)
            seen.add(counter)
