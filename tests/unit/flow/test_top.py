"""Who uses most: looks as transcripts."""

from __future__ import annotations

from falkirk.flow.top import Observed, Tally, Whose

LAPTOP, NAS = Whose("acme", "laptop", "ann", ("eng", "sre")), Whose("acme", "nas")


def flow(number: int, up: int, down: int, *whose: Whose) -> Observed:
    return Observed(bytes([number]), whose or (LAPTOP,), up, down)


def closed(tally: Tally, most: int = 10) -> list[tuple[str, int, int, int]]:
    """Name, live flows, bytes that passed up and down of each row."""
    rows, _, _ = tally.close(most)
    return [(whose.name, row.flows, row.passed_up, row.passed_down) for whose, row in rows]


def test_the_first_look_only_learns_where_everything_stands() -> None:
    tally = Tally()
    tally.live(flow(1, 1000, 5000))
    assert closed(tally) == [("laptop", 1, 0, 0)]
    tally.live(flow(1, 1100, 5500))
    assert closed(tally) == [("laptop", 1, 100, 500)]


def test_a_new_flow_counts_whole_and_one_that_ended_what_it_carried_since() -> None:
    tally = Tally()
    tally.live(flow(1, 10, 10))
    closed(tally)
    tally.live(flow(2, 7, 8))
    tally.ended(flow(1, 15, 10))
    # One that began and ended between two looks was never in a table.
    tally.ended(flow(3, 1, 2))
    assert closed(tally) == [("laptop", 1, 13, 10)]


def test_an_end_that_is_told_a_look_later_counts_once() -> None:
    tally = Tally()
    tally.live(flow(1, 10, 10))
    closed(tally)
    assert closed(tally) == []
    tally.ended(flow(1, 12, 10))
    assert closed(tally) == [("laptop", 0, 2, 0)]


def test_a_flow_that_ends_during_a_look_is_not_live_in_it() -> None:
    tally = Tally()
    closed(tally)
    tally.live(flow(1, 10, 0))
    tally.ended(flow(1, 12, 0))
    tally.live(flow(1, 12, 0))
    assert closed(tally) == [("laptop", 0, 12, 0)]


def test_rows_are_in_order_and_the_total_has_those_that_are_left_out() -> None:
    tally = Tally()
    closed(tally)
    for number, size in enumerate((5, 50, 500)):
        tally.live(flow(number, size, 0, Whose("acme", f"d{size}")))
    rows, total, count = tally.close(2)
    assert [whose.name for whose, _ in rows] == ["d500", "d50"]
    assert (total.flows, total.passed_up, total.bytes_up, count) == (3, 555, 555, 3)


def test_a_flow_of_two_groups_counts_for_both_and_once_in_all() -> None:
    tally = Tally()
    closed(tally)
    tally.live(flow(1, 10, 0, Whose("acme", "eng"), Whose("acme", "sre")))
    rows, total, _ = tally.close(10)
    assert [(whose.name, row.passed_up) for whose, row in rows] == [("eng", 10), ("sre", 10)]
    assert total.passed_up == 10
