"""Streams that the parent has in hand and that are to be lowered: each is a caller, known by a number until flow has given it a slot.

    parent ── Lower ──► worker ── LowerWanted ──► flow      which tunnel, may it be, which slot
    parent ◄─ LowerOver ─ worker ◄─ LowerRefused ─ flow     or else
    parent ◄─ LowerOpened ─ worker ◄── Prepare ─── flow     then a dial like any other, and a relay

The caller's socket is TCP over loopback, as it must reset: whatever dies, neither side may take it for an end.
"""

from __future__ import annotations

import socket
from collections.abc import Callable

from falkirk.linux import sockets
from falkirk.upgrader.control import Lower, LowerOpened, LowerOver
from falkirk.wire.handover import LowerRefused, LowerWanted, Prepare


class Callers:
    """Those of one worker. `report` tells the parent."""

    def __init__(self, report: Callable[[LowerOpened | LowerOver], object]) -> None:
        self._report = report
        self._asking: dict[int, socket.socket] = {}
        """By number: flow hasn't answered."""
        self._prepared: dict[int, tuple[int, socket.socket, bytes]] = {}
        """By slot: the device hasn't answered."""
        self._open: dict[int, int] = {}
        """Numbers by slot."""

    @property
    def asking(self) -> bool:
        """Flow owes somebody an answer."""
        return bool(self._asking)

    def wanted(self, message: Lower, sock: socket.socket) -> LowerWanted:
        """A new caller; what flow is to be asked."""
        sock.setblocking(False)
        sockets.reset_on_close(sock)
        sockets.no_delay(sock)
        self._asking[message.request] = sock
        return LowerWanted(
            message.request, message.tenant, message.device, message.version, message.port, message.actor
        )

    def refused(self, message: LowerRefused) -> None:
        """Flow has no way for it."""
        sock = self._asking.pop(message.request, None)
        if sock is not None:
            sock.close()
            self._report(LowerOver(message.request, message.reason, message.why))

    def lost(self) -> None:
        """Flow is gone (or another one has come), and with it what it was asked."""
        for request in list(self._asking):
            self.refused(LowerRefused(request, "not_ready", "the flow tracker is away"))

    def prepared(self, wish: Prepare) -> bool:
        """Flow has a way; False where nobody asked."""
        sock = self._asking.pop(wish.request, None)
        if sock is None:
            return False
        self._prepared[wish.slot] = wish.request, sock, wish.flow_id
        return True

    def connected(self, slot: int) -> socket.socket | None:
        """The device has accepted: the caller's socket, to relay; None where the stream is no caller's."""
        found = self._prepared.pop(slot, None)
        if found is None:
            return None
        request, sock, flow_id = found
        self._open[slot] = request
        self._report(LowerOpened(request, flow_id))
        return sock

    def over(self, slot: int, reason: str, bytes_up: int = 0, bytes_down: int = 0) -> None:
        """The stream of a slot is over, or couldn't be opened; nothing where it is no caller's."""
        found = self._prepared.pop(slot, None)
        if found is not None:
            found[1].close()
            self._report(LowerOver(found[0], reason))
        request = self._open.pop(slot, None)
        if request is not None:
            self._report(LowerOver(request, reason, "", bytes_up, bytes_down))

    def close(self) -> None:
        """Let all go."""
        for sock in (*self._asking.values(), *(sock for _, sock, _ in self._prepared.values())):
            sock.close()
        self._asking.clear()
        self._prepared.clear()
