"""A connection watched from between its ends, as transcripts: who sends what, and what the watcher makes of it."""

from __future__ import annotations

import pytest

from falkirk.flow.follow import CLOSING, ESTABLISHED, OPENING, Follower
from falkirk.flow.table import State

FLAGS = {"F": 1, "S": 2, "R": 4, "P": 8, "A": 16}
OPEN = [("> S 100", OPENING), ("< SA 500 101", OPENING), ("> A 101 501", ESTABLISHED)]


def play(lines: list[tuple[str, int]]) -> Follower:
    """Lines are "> FLAGS SEQUENCE [ACKNOWLEDGED [LENGTH]]" and the state after them."""
    follower = Follower()
    for line, state in lines:
        way, letters, *numbers = line.split()
        sequence, acknowledged, length = (*map(int, numbers), 0, 0)[:3]
        follower.segment(way == ">", sum(FLAGS[letter] for letter in letters), sequence, acknowledged, length)
        assert follower.state == state, line
    return follower


def test_states_are_those_of_the_table() -> None:
    assert (OPENING, ESTABLISHED, CLOSING) == (State.OPENING, State.ESTABLISHED, State.CLOSING)


@pytest.mark.parametrize(
    ("lines", "over", "reason"),
    [
        (OPEN, False, ""),
        # Closed by who opened it; then by the other end; both at once.
        ([*OPEN, ("> FA 101 501", 4), ("< A 501 102", 4), ("< FA 501 102", 4), ("> A 102 502", 4)], True, "finished"),
        ([*OPEN, ("< FA 501 101", 4), ("> A 101 502", 4), ("> FA 101 502", 4), ("< A 502 102", 4)], True, "finished"),
        ([*OPEN, ("> FA 101 501", 4), ("< FA 501 101", 4), ("> A 102 502", 4), ("< A 502 102", 4)], True, "finished"),
        # A FIN with data is acknowledged behind them.
        ([*OPEN, ("> FPA 101 501 10", 4), ("< FA 501 111", 4), ("> A 112 502", 4)], False, ""),
        ([*OPEN, ("> FPA 101 501 10", 4), ("< FA 501 112", 4), ("> A 112 502", 4)], True, "finished"),
        # Half closed: only one side has finished.
        ([*OPEN, ("> FA 101 501", 4), ("< A 501 102", 4), ("< PA 501 102 1000", 4)], False, ""),
        # Numbers wrap.
        ([*OPEN, ("> FA 4294967295 501", 4), ("< FA 501 0", 4), ("> A 0 502", 4)], True, "finished"),
        # Resets by either side, at any time.
        ([("> S 100", OPENING), ("< RA 0 101", CLOSING)], True, "upstream_reset"),
        ([*OPEN, ("> R 101", CLOSING)], True, "client_reset"),
        ([*OPEN, ("< R 501", CLOSING)], True, "upstream_reset"),
        # Stragglers of the other side change nothing; more from its sender shows that it wasn't taken for one.
        ([*OPEN, ("> R 101", CLOSING), ("< A 501 101", CLOSING)], True, "client_reset"),
        ([*OPEN, ("> R 101", CLOSING), ("> PA 101 501 10", CLOSING)], False, ""),
        # Simultaneous open, and a SYN that is sent again.
        (
            [("> S 100", OPENING), ("< S 500", OPENING), ("> SA 100 501", OPENING), ("> A 101 501", ESTABLISHED)],
            False,
            "",
        ),
        ([("> S 100", OPENING), ("> S 100", OPENING), ("> A 101 1", OPENING)], False, ""),
    ],
)
def test_a_connection(lines: list[tuple[str, int]], over: bool, reason: str) -> None:
    follower = play(lines)
    assert follower.over is over
    if over:
        assert follower.reason == reason
