"""Reasons: each has an explanation, and no other."""

from __future__ import annotations

from falkirk.wireguard.counters import EXPLANATIONS, REASONS


def test_every_reason_is_explained_once() -> None:
    assert tuple(EXPLANATIONS) == REASONS
    assert len(set(EXPLANATIONS.values())) == len(REASONS)
