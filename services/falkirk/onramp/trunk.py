"""The near end of a trunk: one pair with one flow worker, for all WireGuard devices whose flows are there (`falkirk.wire.trunk`).

Nothing is kept here: what it doesn't take is the caller's to count.

Limit: which tunnels wait for a reader that doesn't keep up can't be told, so one device's packets may cost another's.
"""

from __future__ import annotations

import os
from typing import Final

from falkirk.linux import seqpacket, sockets
from falkirk.wire.trunk import BUFFER, DATAGRAM, HEADER, NUMBER

PARTS: Final = 1000
"""Packets of a datagram: `sendmsg` takes 1,024 parts."""


class Trunk:
    """The pair with one flow worker. `far` is its end, to be handed over."""

    def __init__(self) -> None:
        self._sock, self.far = seqpacket.pair()
        sockets.raise_buffers(self._sock, BUFFER)
        self._head = bytearray(HEADER)

    def fileno(self) -> int:
        """For a loop; negative where it is closed."""
        return self._sock.fileno()

    def handed_over(self) -> None:
        """The flow worker has its end: from now on this one ends with it."""
        self.far.close()

    def send(self, tunnel: int, packets: list[bytes]) -> tuple[int, int]:
        """Packets of a tunnel, as many in a datagram as there is room for: how many found the trunk full, and how many nobody at its end."""
        head = NUMBER.pack(tunnel)
        full = lost = at = 0
        while at < len(packets):
            size = len(packets[at])
            stop, most = at + 1, min(len(packets), at + PARTS)
            while stop < most and size + len(packets[stop]) <= DATAGRAM:
                size += len(packets[stop])
                stop += 1
            try:
                self._sock.sendmsg([head, *packets[at:stop]])
            except BlockingIOError:
                full += stop - at
            except OSError:
                lost += stop - at
            at = stop
        return full, lost

    def receive(self, buffer: memoryview) -> tuple[int, int]:
        """A datagram's packets into the buffer: whose they are, and how many bytes. Raises BlockingIOError where there is none, EOFError at the end."""
        try:
            size = os.readv(self._sock.fileno(), (self._head, buffer)) - HEADER
        except BlockingIOError:
            raise
        except OSError as error:
            raise EOFError from error
        if size < 0:
            raise EOFError
        return NUMBER.unpack(self._head)[0], size

    def close(self) -> None:
        """End it, for the flow worker too. Idempotent."""
        self._sock.close()
        self.far.close()
