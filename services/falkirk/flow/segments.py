"""What the segments of a lifted flow say of its connection's end, for whichever side of the upgrader they are on.

The private namespaces' kernels are the TCP; here is only followed who has said FIN and had it acknowledged, and whether a RST has passed. `up` is from
the tunnel, `down` to it.
"""

from __future__ import annotations

import struct
from abc import abstractmethod
from typing import TYPE_CHECKING, Final

from falkirk.flow.table import State, TcpLift, TcpOwner
from falkirk.wire.context import Framing
from falkirk.wire.tcp import clamp_segment_size

if TYPE_CHECKING:
    from falkirk.flow.worker import Worker

FIN: Final = 1
SYN: Final = 2
RST: Final = 4
ACK: Final = 16
LINGER: Final = 5
"""Seconds that a flow whose stream was reset waits for the RST to pass."""
SEQUENCES: Final = struct.Struct(">II")


class Segments(TcpOwner):
    """Follows the flows of one worker's side."""

    def __init__(self, worker: Worker) -> None:
        self._worker = worker
        self.finished: list[tuple[TcpLift, str]] = []
        """Flows whose last segment passed in this turn, and why they end."""

    @abstractmethod
    def advance(self, flow: TcpLift, state: State) -> None:
        """It is somewhere else in its life."""

    @abstractmethod
    def settle(self, flow: TcpLift) -> bool:
        """Whether nothing is awaited any more; then it ends with this turn."""

    def segment_down(self, flow: TcpLift, buffer: bytearray, l4: int, end: int) -> None:
        """A segment to the tunnel that opens, closes, or passes while the flow isn't established. It has been rewritten."""
        flags = buffer[l4 + 13]
        if flags & SYN:
            self.clamp(flow, buffer, l4, end)
        if flags & RST:
            flow.reset = True
            self.closing(flow)
            self.settle(flow)
            return
        if flags & FIN or flow.state is State.CLOSING:
            sequence, acknowledged = SEQUENCES.unpack_from(buffer, l4 + 4)
            if flags & FIN:
                flow.fin_down = (sequence + end - l4 - (buffer[l4 + 12] >> 4 << 2) + 1) & 0xFFFFFFFF
                self.closing(flow)
            if flow.fin_up is not None and (acknowledged - flow.fin_up) & 0x80000000 == 0:
                flow.fin_acked_up = True
                self.settle(flow)

    def fins_up(self, flow: TcpLift, buffer: bytearray, l4: int, end: int) -> None:
        """A segment from the tunnel: its FIN, and whether it acknowledges the other one."""
        flags = buffer[l4 + 13]
        if flags & FIN or flow.state is State.CLOSING:
            sequence, acknowledged = SEQUENCES.unpack_from(buffer, l4 + 4)
            if flags & FIN:
                flow.fin_up = (sequence + end - l4 - (buffer[l4 + 12] >> 4 << 2) + 1) & 0xFFFFFFFF
                self.closing(flow)
            if flow.fin_down is not None and (acknowledged - flow.fin_down) & 0x80000000 == 0:
                flow.fin_acked_down = True
                self.settle(flow)

    def closing(self, flow: TcpLift) -> None:
        """Its end has begun."""
        if flow.state is not State.CLOSING:
            self.advance(flow, State.CLOSING)

    @staticmethod
    def clamp(flow: TcpLift, buffer: bytearray, l4: int, end: int) -> None:
        """Offer no larger segments than the tunnel takes."""
        headers = 40 if flow.family == 4 else 60
        # A raw packet has no header in front of it, wherever it lies.
        partial = flow.tunnel.framing is Framing.VNET and bool(buffer[0] & 1)
        clamp_segment_size(buffer, l4, end, flow.tunnel.mtu - headers, partial=partial)
