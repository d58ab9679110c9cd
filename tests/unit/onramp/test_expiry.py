"""Deadlines of devices as a transcript."""

from __future__ import annotations

from falkirk.onramp.expiry import Expiry


def test_each_device_ends_once_at_its_time() -> None:
    expiry = Expiry()
    expiry.set("a", 20)
    expiry.set("b", 10)
    assert expiry.due(9) == []
    assert expiry.due(10) == ["b"]
    assert expiry.due(100) == ["a"]
    assert (expiry.due(100), len(expiry)) == ([], 0)


def test_a_deadline_that_was_moved_or_taken_back_counts_for_nothing() -> None:
    expiry = Expiry()
    expiry.set("a", 10)
    expiry.set("a", 30)
    expiry.set("b", 10)
    expiry.set("b", 0)
    expiry.set("c", 10)
    expiry.set("c", 10)
    expiry.set("never", 0)
    assert expiry.due(10) == ["c"]
    expiry.set("a", 5)
    assert expiry.due(10) == ["a"]
    assert expiry.due(30) == []
