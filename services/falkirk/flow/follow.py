"""How far a forwarded TCP connection is, seen from between its ends. PURE.

Nothing is changed here and nothing answered: both ends have a TCP of their own. What is watched are the flags that open and close
(RFC 9293 3.5, 3.6), so that a dead connection's entry goes early and a living one's stays (RFC 5382 REQ-5):

    OPENING      a SYN has passed one way
    ESTABLISHED  the other end's SYN has come back, and a segment without SYN went after it
    CLOSING      a FIN or a RST has passed
    over         both FINs are acknowledged, or a RST has passed and its sender has been silent since

A RST that its receiver ignores (RFC 5961 3) is followed by more segments of its sender: then it doesn't count.

Limit: windows aren't followed, so whether a receiver takes a segment isn't known here. Nobody but the two ends can make one: each
tunnel speaks for its own addresses only.
"""

from __future__ import annotations

from typing import Final

FIN: Final = 1
SYN: Final = 2
RST: Final = 4
ACK: Final = 16
OPENING: Final = 2
ESTABLISHED: Final = 3
CLOSING: Final = 4
"""Numbers as in `falkirk.flow.table.State`."""


class Follower:
    """One connection. `up` is from who opened it."""

    __slots__ = ("_acked", "_answered", "_fins", "reset", "state")

    def __init__(self) -> None:
        self.state = OPENING
        self.reset: bool | None = None
        """Who has sent a RST that still counts: True for who opened it, False for the other end."""
        self._answered = False
        self._fins: dict[bool, int] = {}
        """By sender: the sequence number that acknowledges its FIN."""
        self._acked: set[bool] = set()
        """Senders whose FIN is acknowledged."""

    @property
    def over(self) -> bool:
        """Whether only stragglers are to be expected."""
        return self.reset is not None or len(self._acked) == 2

    @property
    def reason(self) -> str:
        """Why it is over."""
        if self.reset is None:
            return "finished"
        return "client_reset" if self.reset else "upstream_reset"

    def segment(self, up: bool, flags: int, sequence: int, acknowledged: int, length: int) -> None:
        """A segment passes; `length` is its payload's. Not for those without SYN, FIN or RST while the state is ESTABLISHED."""
        if flags & RST:
            self.reset = up
            self.state = CLOSING
            return
        if self.reset is up:
            self.reset = None
        if flags & SYN:
            self._answered = self._answered or not up
        elif self.state == OPENING and self._answered and up:
            self.state = ESTABLISHED
        if flags & FIN:
            self._fins[up] = (sequence + length + 1) & 0xFFFFFFFF
            self.state = CLOSING
        other = self._fins.get(not up)
        # RFC 9293 3.4: numbers are compared modulo 2^32.
        if other is not None and flags & ACK and (acknowledged - other) & 0x80000000 == 0:
            self._acked.add(not up)
