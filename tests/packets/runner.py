"""Runs a case (`tests.packets.script`), packet by packet: injects, demands, moves the server's sockets.

What a case runs over is a `Road`: something that takes IP packets in and gives IP packets out, and says when all that it will ever answer
to what went in has come out (`settle`). Falkirk's is a connected tunnel, pasta's a TAP device (`tests.packets.roads`, `tools.packets_vs_pasta`).

Every case has source and server ports of its own, so that nothing of another can be taken for its. Waits have deadlines and end by what they
wait for. Afterwards the case's connections are reset and what is left in the road is thrown away.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

from tests.packets import craft
from tests.packets.craft import Endpoints
from tests.packets.demand import Demand
from tests.packets.exchange import Exchange
from tests.packets.ground import BARE
from tests.packets.inject import Injection
from tests.packets.peer import Peer
from tests.packets.script import Step


class Run(Injection, Exchange, Peer):
    """One case on one road and family."""

    def run(self) -> None:
        """Raises Mismatch."""
        steps = self.case.steps(self.family)
        if any(step.verb in ("drop", "ended") for step in steps):
            self.drops = self.road.dropped()
        try:
            self.server.begin(self.family, self.case.server)
            for step in steps:
                self._step(step)
        finally:
            self._clean_up()

    def move_server(self, step: Step) -> None:
        """`server accept`, `send`, `receive`, `end`, `reset`, `shutdown`, `close`, ...: see `tests.packets.server`."""
        self.server.act(step)

    def _clean_up(self) -> None:
        for connection in self.connections.values():
            if connection.acked is not None and not connection.over:
                ends = Endpoints(
                    self.road.address(self.family),
                    self._resolve(connection.host),
                    connection.port,
                    self._port(connection.host, "tcp"),
                )
                # Where timestamps are in use a reset needs none (RFC 7323 3.2).
                segment = craft.tcp(BARE, ends, "R", connection.acked, 0, b"")
                self.road.send(craft.ip(BARE, ends, self.family, 6, segment))
        self.server.end()
        self.road.settle()
        if self.peer is not None and any(step.verb.startswith("peer") for step in self.case.steps(self.family)):
            self.peer.settle()

    verbs: ClassVar[dict[str, Callable[[Any, Step], None]]] = {
        ">": Injection.inject,
        "<": Demand.demand,
        "<~": Demand.demand_later,
        "<*": Demand.demand_at_last,
        "packet": Injection.define,
        "silence": Demand.silence,
        "drop": Demand.drop,
        "ended": Demand.ended,
        "whole": Demand.whole,
        "peer>": Peer.peer_inject,
        "peer<": Peer.peer_demand,
        "peer-silence": Peer.peer_silence,
        "open": Exchange.open,
        "push": Exchange.push,
        "flood": Exchange.flood,
        "flood-parts": Injection.flood_parts,
        "flood-pieces": Injection.flood_pieces,
        "fetch": Exchange.fetch,
        "take": Exchange.take,
        "close": Exchange.close,
        "server": move_server,
    }
