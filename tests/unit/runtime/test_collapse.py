"""The same thing over and over: transcripts."""

from __future__ import annotations

from falkirk.runtime.collapse import Collapse


def test_the_first_is_told_at_once_and_the_rest_at_the_end_of_the_window() -> None:
    some: Collapse[str] = Collapse(10.0, 8)
    assert some.first("a", 0.0)
    assert not some.first("a", 1.0)
    assert not some.first("a", 9.0)
    assert some.first("b", 9.0)
    assert some.due(9.9) == []
    assert some.due(10.0) == [("a", 2)]
    assert not some.first("a", 11.0)
    assert some.due(20.0) == [("a", 1)]


def test_a_window_in_which_nothing_came_ends() -> None:
    some: Collapse[str] = Collapse(10.0, 8)
    assert some.first("a", 0.0)
    assert some.due(10.0) == []
    assert some.first("a", 10.1)


def test_beyond_the_limit_they_are_counted_together() -> None:
    some: Collapse[int] = Collapse(10.0, 2)
    assert [some.first(key, 0.0) for key in range(5)] == [True, True, False, False, False]
    assert some.due(10.0) == [(None, 3)]
    assert some.first(7, 10.0)
    assert some.due(20.0) == []
    assert some.due(30.0) == []
