"""A bounded number of mutated WireGuard datagrams; `python -m tests.fuzz.wireguard_mutants` runs a million."""

from __future__ import annotations

from tests.fuzz.wireguard_mutants import run

COUNT = 20_000
REACHED = {
    "bad_length",
    "bad_type",
    "bad_mac1",
    "bad_mac2",
    "no_cookie",
    "bad_static",
    "bad_timestamp",
    "unknown_handshake",
    "bad_response",
    "bad_cookie_reply",
    "unknown_index",
    "bad_packet",
    "replayed",
    "counter_limit",
}
"""What mutants must come to, or they would show nothing."""


def test_no_mutant_does_anything() -> None:
    counted = run(COUNT, 20)
    assert {reason for reason in REACHED if not counted[reason]} == set()
