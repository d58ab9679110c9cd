"""What is handed to the owner."""

from __future__ import annotations

from typing import get_args

from falkirk.wireguard.outcome import Arrivals, Event, EventKind


def test_cleared_arrivals_are_empty_and_the_same_objects() -> None:
    arrivals = Arrivals()
    arrivals.datagrams.append((("192.0.2.1", 1), b"x"))
    arrivals.events.append(Event("unknown_index", None, ("192.0.2.1", 1)))
    datagrams = arrivals.datagrams
    arrivals.clear()
    assert (arrivals.packets, arrivals.datagrams, arrivals.events) == ({}, [], [])
    assert arrivals.datagrams is datagrams


def test_every_kind_of_event_is_explained() -> None:
    assert Event.__doc__ is not None
    explained = {
        line.split()[0] for line in Event.__doc__.splitlines() if line.startswith("    ") and "  " in line.strip()
    }
    assert explained == set(get_args(EventKind))
