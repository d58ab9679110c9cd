"""One watcher of a worker's packets: what it wants, and the pair that takes it (`falkirk.flow.captured`).

What the pair doesn't take at once is lost for the watcher, counted, and told with the next packet that it takes; once it has refused one, nothing
more is tried in that turn.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Final

from falkirk.decide import cel
from falkirk.decide.destination import NO_DEVICE
from falkirk.flow import captured
from falkirk.flow.captured import Captured
from falkirk.flow.keys import Signature

if TYPE_CHECKING:
    from falkirk.flow.control import Tap as Wanted
    from falkirk.flow.table import Flow, Tunnel

MEMO: Final = 65536
"""Answers of an expression that a tap remembers."""


class Tap:
    """One watcher: what it wants, and where it gets it."""

    def __init__(self, wanted: Wanted, fd: int) -> None:
        self.wanted = wanted
        self.fd = fd
        self.lost = 0
        """Since the last one that was taken."""
        self.lost_in_all = 0
        self.count = 0
        self._full_at = 0
        self._expression = cel.Expression(wanted.expression) if wanted.expression else None
        self._memo: dict[tuple[int, bytes, int, int], bool] = {}

    def watches(self, tunnel: Tunnel | None) -> bool:
        """Whether packets of this tunnel may be wanted; None is a packet of which no tunnel is known."""
        wanted = self.wanted
        if tunnel is None:
            return not (wanted.tenant or wanted.device)
        context = tunnel.context
        return (not wanted.tenant or wanted.tenant == context.tenant) and (
            not wanted.device or wanted.device == context.device
        )

    def wants(self, tunnel: Tunnel | None, flow: Flow | None, flow_id: bytes, said: Signature | None) -> bool:
        """Whether a packet is wanted, which is of this flow (with this id; none: empty) or says that it would be of one like this."""
        wanted = self.wanted
        if not self.watches(tunnel) or wanted.flow_id not in (b"", flow_id):
            return False
        if self._expression is None:
            return True
        if tunnel is None or said is None:
            return False
        question = (tunnel.id, said.destination, said.destination_port, said.protocol)
        answer = self._memo.get(question)
        if answer is None:
            if len(self._memo) >= MEMO:
                self._memo.clear()
            route = flow.decision.route if flow is not None and flow.decision is not None else None
            device = route.device if route is not None else None
            variables = cel.activation(tunnel.context, *question[1:], device or NO_DEVICE)
            answer = self._memo[question] = self._expression.evaluate(variables) is True
        return answer

    def forget(self) -> None:
        """A tunnel's context has changed."""
        self._memo.clear()

    def has_room(self, now: int) -> bool:
        """Whether to make a message for it; False, and one is lost, where it has refused one in this turn (`now`)."""
        if self._full_at == now:
            self._lose()
            return False
        return True

    def take(self, message: Captured, now: int) -> None:
        """Hand a packet over, or lose it."""
        if self.push(captured.encode(message)):
            self.count += 1
            self.lost = 0
        else:
            self._full_at = now
            self._lose()

    def _lose(self) -> None:
        self.lost += 1
        self.lost_in_all += 1

    def push(self, datagram: bytes) -> bool:
        """Hand a datagram over; False where the watcher has no room or is gone."""
        try:
            os.write(self.fd, datagram)
        except OSError:
            # Its end is found by epoll.
            return False
        return True
