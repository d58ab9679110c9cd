"""The other device of a case, at its own tunnel: `peer>`, `peer<`, `peer-silence`."""

from __future__ import annotations

import time

from tests.packets import craft
from tests.packets.craft import Endpoints, pattern
from tests.packets.demand import Demand
from tests.packets.script import Step


class Peer(Demand):
    """What the other device says and hears."""

    def peer_inject(self, step: Step) -> None:
        """`peer> ...`: a packet of the other device to the client; its numbers are meant as they stand."""
        assert self.peer is not None
        ends = Endpoints(
            self._resolve(step.value("src", "peer")),
            self._resolve(step.value("dst", "client")),
            step.number("sport", self.peer_port),
            step.number("dport", self.port),
        )
        kind = step.words[0]
        if kind == "udp":
            protocol, upper = 17, craft.udp(step, ends, self._bytes(step))
        elif kind in ("echo", "echo-reply"):
            protocol = 1 if self.family == "ipv4" else 58
            upper = craft.icmp(step, ends, self.family, kind, self._bytes(step))
        elif kind == "icmp":
            protocol = 1 if self.family == "ipv4" else 58
            assert self.peer_seen is not None
            quoted = self.peer_seen.data[: step.number("quoted", 548)]
            upper = craft.icmp(step, ends, self.family, step.words[1], quoted)
        elif kind == "proto":
            protocol, upper = int(step.words[1]), self._bytes(step)
        else:
            payload = step.data if step.data is not None else pattern(0, step.number("len"))
            protocol, upper = 6, craft.tcp(step, ends, kind, int(step.words[1]), step.number("ack"), payload)
        self.peer.send(craft.ip(step, ends, self.family, protocol, upper))

    def peer_demand(self, step: Step) -> None:
        """`peer< ...`: the next packet out of the other device's tunnel."""
        assert self.peer is not None
        packet = self.peer.receive(time.monotonic() + self.deadline)
        if packet is None:
            raise self._wrong(step, f"nothing came to the peer within {self.deadline:g} s")
        self.transcript.append(f"    {'':4} the peer got: {packet}")
        self.peer_seen = packet
        kind = step.words[0]
        if packet.kind == "fragment":
            self.pieces[int(packet.fields["off"] or 0)] = packet
        wrong = self._field_difference(step, packet)
        if packet.kind != {"echo": "icmp", "echo-reply": "icmp", "proto": step.words[-1]}.get(
            kind, kind if kind in ("udp", "icmp", "fragment") else "tcp"
        ):
            wrong = "it isn't of that kind"
        elif packet.source != self.road.address(self.family) or packet.destination != self.peer.address(self.family):
            wrong = "it isn't from the client to the peer"
        elif packet.kind == "tcp" and (packet.flags.replace("P", ""), packet.sequence) != (
            kind.replace("P", ""),
            int(step.words[1]),
        ):
            wrong = "flags or sequence number differ"
        if wrong:
            raise self._wrong(step, f"{wrong}; came: {packet}")

    def peer_silence(self, step: Step) -> None:
        """`peer-silence`: the other device gets nothing on account of what the client has sent."""
        assert self.peer is not None
        self.silence(step)
        rest = self.peer.settle()
        if rest:
            raise self._wrong(step, f"the peer got: {rest[0]}")
