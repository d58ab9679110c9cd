"""Packets of a case on their way out: `<` and its kind, what is different about them, and what must not come at all."""

from __future__ import annotations

import time
from typing import Final

from tests.packets import craft
from tests.packets.craft import pattern
from tests.packets.ground import Ground
from tests.packets.read import Seen, seen
from tests.packets.script import Step
from tools.netlab import wait_for

_BACKGROUND: Final = ("no_flow", "not_tcp", "ended", "fragment_timeout")
"""Counted at any time: what the private namespace's kernel still says of earlier cases, their ends, their fragments."""


class Demand(Ground):
    """What compares packets out of the road."""

    def demand(self, step: Step) -> None:
        self._next(step)

    def demand_later(self, step: Step) -> None:
        self._next(step, acknowledgments=True)

    def demand_at_last(self, step: Step) -> None:
        self._next(step, anything=True)

    def _next(self, step: Step, *, acknowledgments: bool = False, anything: bool = False) -> Seen:
        deadline = time.monotonic() + self.deadline
        while True:
            packet = self._receive(deadline)
            if packet is None:
                raise self._wrong(step, f"nothing came within {self.deadline:g} s")
            wrong = self._difference(step, packet)
            if not wrong:
                return packet
            bare = packet.kind == "tcp" and packet.flags == "." and not packet.payload
            if not (anything or (acknowledgments and bare)):
                raise self._wrong(step, f"{wrong}; came: {packet}")

    def _difference(self, step: Step, packet: Seen) -> str:
        """What of a packet isn't as demanded; empty where nothing."""
        kind = step.words[0]
        if kind == "udp":
            expected = "udp"
        elif kind in ("icmp", "echo", "echo-reply"):
            expected = "icmp"
        elif kind == "fragment":
            expected = "fragment"
        elif kind == "proto":
            expected = step.words[1]
        else:
            expected = "tcp"
        if packet.kind != expected:
            return f"expected {expected}"
        if packet.destination != self.road.address(self.family):
            return f"its destination is {packet.destination}"
        if step.has("from") and packet.source != self._resolve(step.value("from")):
            return f"it comes from {packet.source}"
        wrong = self._tcp_difference(step, packet) if expected == "tcp" else self._other_difference(step, packet)
        return wrong or self._field_difference(step, packet)

    def _tcp_difference(self, step: Step, packet: Seen) -> str:
        connection = self._connection(step)
        if packet.destination_port != connection.port:
            return f"it goes to port {packet.destination_port}"
        if packet.source_port != step.number("sport", self._port(step.value("from"), "tcp")):
            return f"it comes from port {packet.source_port}"
        flags = step.words[0].replace("P", "") or "-"
        # RFC 9293 3.9.1: PSH is a hint, and when it is set is the sender's choice.
        if sorted(packet.flags.replace("P", "") or "-") != sorted(flags):
            return f"its flags are {packet.flags}"
        if len(step.words) > 1 and step.words[1].lstrip("-").isdecimal():
            wanted = int(step.words[1])
            at = packet.sequence if connection.base is None else connection.relative(packet.sequence)
            if at != wanted & 0xFFFFFFFF:
                return f"its sequence number is {at}"
        if packet.payload and step.data is None and "S" not in flags and not step.has("!data"):
            place = connection.relative(packet.sequence) - 1
            if packet.payload != pattern(place, len(packet.payload)):
                return f"its bytes aren't the stream's at {place}"
        return ""

    def _other_difference(self, step: Step, packet: Seen) -> str:
        kind = step.words[0]
        if kind in ("echo", "echo-reply") and packet.fields["type"] != kind:
            return f"it is {packet.fields['type']}"
        kinds = (
            [craft.icmp_kind(self.family, name) for name in (step.words[-1], str(packet.fields.get("type")))]
            if kind == "icmp"
            else []
        )
        if kinds and kinds[0] != kinds[1]:
            return f"it is {packet.fields['type']}"
        if kind == "udp":
            if packet.destination_port != step.number("dport", self._connection(step).port):
                return f"it goes to port {packet.destination_port}"
            if step.data is None and packet.payload != pattern(0, len(packet.payload)):
                return "its bytes aren't those that were sent"
        if kind == "fragment":
            self.pieces[int(packet.fields["off"] or 0)] = packet
        if step.value("quote") == "flow":
            return self._quote_difference(packet)
        if step.value("quote") == "sent":
            quoted = packet.payload
            if self.last_sent[: len(quoted)] != quoted:
                return f"it quotes {quoted.hex()} of {self.last_sent.hex()}"
            if len(quoted) < min(len(self.last_sent), 28 if self.family == "ipv4" else 48):
                return f"it quotes {len(quoted)} bytes only"
        return ""

    def _field_difference(self, step: Step, packet: Seen) -> str:
        if step.data is not None and packet.payload != step.data:
            return f"it carries {packet.payload[:60]!r}"
        fields = dict(packet.fields)
        for key in step.keys:
            if key.name in ("src", "dst", "proto") and packet.kind != "fragment":
                continue
            if key.name in ("from", "quote", "port", "conn", "dport", "stream", "sport"):
                continue
            if not key.holds(fields.get(key.name)):
                return f"{key.name} is {fields.get(key.name)}"
        for word in step.words[2:]:
            if fields.get(word) is None:
                return f"{word} isn't there"
        return ""

    def _quote_difference(self, packet: Seen) -> str:
        """Whether an error quotes what was sent last: addresses, protocol, ports or identifier, and how its data begins."""
        sent, quoted, four = self.last_sent, packet.payload, self.family == "ipv4"
        least = 28 if four else 48
        if len(quoted) < least:
            return f"it quotes {len(quoted)} bytes only"
        addresses, protocol = (slice(12, 20), 9) if four else (slice(8, 40), 6)
        if sent[addresses] != quoted[addresses] or sent[protocol] != quoted[protocol]:
            return f"it quotes {quoted.hex()} of {sent.hex()}"
        upper = 20 if four else 40
        mine, theirs = sent[upper:], quoted[upper:]
        echo = sent[protocol] in (1, 58)
        same = mine[4:8] == theirs[4:8] if echo else mine[:4] == theirs[:4]
        head = 8 if echo or sent[protocol] == 17 else 20
        length = min(len(mine), len(theirs))
        if not same or mine[head:length] != theirs[head:length]:
            return f"it quotes {quoted.hex()} of {sent.hex()}"
        return ""

    def whole(self, step: Step) -> None:
        """`whole udp len=3000`: the fragments that came are this packet, and nothing is missing or twice."""
        upper = b""
        for at in sorted(self.pieces):
            if at != len(upper):
                raise self._wrong(step, f"a hole or an overlap at {at}")
            upper += self.pieces[at].payload
        last = self.pieces[max(self.pieces)]
        if last.fields["mf"]:
            raise self._wrong(step, "the last fragment hasn't come")
        head = bytearray(last.data[:20] if self.family == "ipv4" else last.data[:40])
        if self.family == "ipv4":
            head[2:4], head[6:8], head[10:12] = (20 + len(upper)).to_bytes(2, "big"), b"\0\0", b"\0\0"
            head[10:12] = craft.checksum(bytes(head)).to_bytes(2, "big")
        else:
            head[4:6], head[6] = len(upper).to_bytes(2, "big"), int(last.fields["proto"] or 0)
        self.pieces.clear()
        packet = seen(bytes(head) + upper)
        wrong = self._field_difference(step, packet)
        kind = {"udp": "udp", "tcp": "tcp"}.get(step.words[0], "icmp")
        if wrong or packet.kind != kind or (kind == "udp" and packet.payload != pattern(0, len(packet.payload))):
            raise self._wrong(step, f"{wrong}; came: {packet}")

    def silence(self, step: Step) -> None:
        rest, self.inbox = [each for each in (*self.inbox, *self.road.settle()) if self._is_ours(each)], []
        for packet in rest:
            self._note(packet)
        if rest:
            raise self._wrong(step, f"came: {rest[0]}")

    def drop(self, step: Step) -> None:
        """`drop REASON [N]`: nothing comes, and since the case's begin (or the last such line) N packets were dropped for it."""
        self.silence(step)
        if self.drops is None:
            return
        now = self.road.dropped()
        assert now is not None
        reason, count = step.words[0], int(step.words[1]) if len(step.words) > 1 else 1
        changed = {
            name: value - self.drops.get(name, 0)
            for name, value in now.items()
            if value != self.drops.get(name, 0) and name not in _BACKGROUND
        }
        if changed != ({reason: count} if count else {}):
            raise self._wrong(step, f"dropped: {changed}")
        self.drops = now

    def ended(self, step: Step) -> None:
        """`ended [N]`: since the case's begin so many flows have ended (one)."""
        if self.drops is None:
            return
        wanted = self.drops["ended"] + (int(step.words[0]) if step.words else 1)

        def over() -> bool:
            now = self.road.dropped()
            return now is not None and now["ended"] >= wanted

        wait_for("the flow's end", over, self.deadline)
