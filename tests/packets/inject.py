"""Packets of a case on their way in: `>`, `packet`, `> part`, floods."""

from __future__ import annotations

from dataclasses import replace

from tests.packets import craft
from tests.packets.craft import Endpoints, pattern
from tests.packets.ground import Connection, Ground
from tests.packets.script import Key, Step


class Injection(Ground):
    """What puts packets into the road."""

    def inject(self, step: Step) -> None:
        if step.words and step.words[0] == "part":
            self._inject_part(step)
            return
        protocol, upper, ends = self._upper(step)
        packet = craft.ip(step, ends, self.family, protocol, upper)
        whole = step.has("sum") or step.has("poke") or step.has("cut") or step.has("pad") or step.has("iplen")
        if step.has("gso") and not self.road.partial:
            size = len(packet) - len(self._payload(step, self._connection(step)))
            for part in craft.cut_up(packet, size, step.number("gso")):
                self.last_sent = self.road.send(part)
            return
        self.last_sent = self.road.send(packet, whole=whole, gso=step.number("gso"))

    def _upper(self, step: Step) -> tuple[int, bytes, Endpoints]:
        """Protocol number and bytes of the upper layer, and between whom."""
        kind = step.words[0]
        connection = self._connection(step)
        host = step.value("dst", "server")
        ends = Endpoints(
            self._resolve(step.value("src")) if step.has("src") else self.road.address(self.family),
            self._resolve(host),
            step.number("sport", connection.port),
            step.number("dport", self._port(host, kind)),
        )
        if kind == "udp":
            return 17, craft.udp(step, ends, self._bytes(step)), ends
        if kind in ("echo", "echo-reply"):
            body = self._bytes(step)
            return (1 if self.family == "ipv4" else 58), craft.icmp(step, ends, self.family, kind, body), ends
        if kind == "icmp":
            body = self._quote(step)
            return (1 if self.family == "ipv4" else 58), craft.icmp(step, ends, self.family, step.words[1], body), ends
        if kind == "proto":
            return int(step.words[1]), self._bytes(step), ends
        return 6, self._segment(step, ends, connection), ends

    def _segment(self, step: Step, ends: Endpoints, connection: Connection) -> bytes:
        flags = step.words[0]
        sequence = connection.next_out if step.words[1] == "NEXT" else int(step.words[1])
        if "S" in flags and "." not in flags and not step.has("stray"):
            connection.first, connection.base, connection.acked, connection.over = sequence, None, None, False
            connection.host = step.value("dst", "server")
        ack = (connection.base or 0) + step.number("ack") if "." in flags or step.has("ack") else 0
        payload = self._payload(step, connection)
        return craft.tcp(step, ends, flags, sequence, ack, payload, connection.echo, connection.base or 0)

    def _payload(self, step: Step, connection: Connection) -> bytes:
        if step.data is not None:
            return step.data
        if not step.number("len"):
            return b""
        start = int(step.words[1]) - connection.first - ("S" not in step.words[0])
        return pattern(start, step.number("len"))

    def _quote(self, step: Step) -> bytes:
        """What an ICMP message of ours carries: the last packet that came (`quote=last`), or was sent (`quote=sent`)."""
        what = step.value("quote")
        if what == "last":
            assert self.last_seen is not None
            quoted = self.last_seen.data
        elif what == "sent":
            quoted = self.last_sent
        elif what in self.defined:
            inner, protocol, upper = self.defined[what]
            ends = Endpoints(
                self._resolve(inner.value("src", "server")),
                self._resolve(inner.value("dst", "client")),
                inner.number("sport", self.server.port),
                inner.number("dport", self.port),
            )
            quoted = craft.ip(inner, ends, self.family, protocol, upper)
        else:
            return self._bytes(step)
        if step.has("flip"):
            at = step.number("flip")
            quoted = quoted[:at] + bytes([quoted[at] ^ 0x55]) + quoted[at + 1 :]
        if step.has("shift"):
            at = (quoted[0] & 15) * 4 + 4 if self.family == "ipv4" else 44
            sequence = int.from_bytes(quoted[at : at + 4], "big") + step.number("shift") & 0xFFFFFFFF
            quoted = quoted[:at] + sequence.to_bytes(4, "big") + quoted[at + 4 :]
        return quoted[: step.number("quoted", 548 if self.family == "ipv4" else 1232)]

    def define(self, step: Step) -> None:
        """`packet NAME udp len=3000`: for `> part NAME` and `quote=NAME`."""
        inner = replace(step, words=step.words[1:])
        protocol, upper, _ = self._upper(inner)
        self.defined[step.words[0]] = (inner, protocol, upper)

    def _inject_part(self, step: Step) -> None:
        """`> part NAME FROM TO`: these bytes of its upper layer as a fragment; `last` for none that follow it."""
        whole, protocol, upper = self.defined[step.words[1]]
        begin = int(step.words[2])
        end = len(upper) if step.words[3] == "end" else int(step.words[3])
        more = 0 if (end >= len(upper) or step.has("last")) and not step.has("more") else 1
        body = upper[begin:end] + bytes(max(0, end - len(upper)))
        if step.has("flip"):
            body = bytes(byte ^ 0x55 for byte in body)
        self._put_part(step, whole, protocol, body, step.number("at", begin), bool(more))

    def _put_part(self, step: Step, whole: Step, protocol: int, body: bytes, at: int, more: bool) -> None:
        word = (at >> 3 | more << 13) if self.family == "ipv4" else (at & 0xFFF8 | more)
        ends = Endpoints(self._resolve(step.value("src", "client")), self._resolve(whole.value("dst", "server")), 0, 0)
        self.road.send(craft.ip(step, ends, self.family, protocol, body, word), whole=True)

    def flood_parts(self, step: Step) -> None:
        """`flood-parts NAME N`: the first fragment of N packets."""
        whole, protocol, upper = self.defined[step.words[0]]
        for number in range(int(step.words[1])):
            self._put_part(
                replace(whole, keys=(Key("ipid", "=", str(30000 + number)),)), whole, protocol, upper[:1480], 0, True
            )

    def flood_pieces(self, step: Step) -> None:
        """`flood-pieces NAME N`: one packet in N fragments of eight bytes, the last of which never comes."""
        whole, protocol, upper = self.defined[step.words[0]]
        for number in range(int(step.words[1])):
            self._put_part(step, whole, protocol, upper[8 * number : 8 * number + 8], 8 * number, True)
