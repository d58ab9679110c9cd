"""Runs a case (`tests.packets.script`), packet by packet: injects, demands, moves the server's sockets.

What a case runs over is a `Road`: something that takes IP packets in and gives IP packets out, and says when all that it will ever answer
to what went in has come out (`settle`). Falkirk's is a connected tunnel, pasta's a TAP device (`tests.packets.roads`, `tools.packets_vs_pasta`).

Every case has source and server ports of its own, so that nothing of another can be taken for its. Waits have deadlines and end by what they
wait for. Afterwards the case's connections are reset and what is left in the road is thrown away.
"""

from __future__ import annotations

import itertools
import time
from dataclasses import dataclass, replace
from typing import Final, Protocol

from tests.packets import craft
from tests.packets.craft import Endpoints, pattern
from tests.packets.read import Seen, seen
from tests.packets.script import Case, Key, Step
from tests.packets.server import Server
from tools.netlab import wait_for

DEADLINE_S: Final = 10.0
"""For what takes no time on an idle machine."""
_BACKGROUND: Final = ("no_flow", "not_tcp", "ended", "fragment_timeout")
"""Counted at any time: what the private namespace's kernel still says of earlier cases, their ends, their fragments."""
_BARE: Final = Step(0, "", "", (), (), None)
_PORTS: Final = itertools.count(20000)


class Road(Protocol):
    """Where packets go in and come out."""

    name: str
    partial: bool
    """It carries super-packets and partial checksums."""
    mtu: int

    def address(self, family: str) -> str:
        """The client's own."""

    def send(self, packet: bytes, *, whole: bool = False, gso: int = 0) -> bytes:
        """Put a packet in; `whole`: with its checksum as it is; `gso`: as a super-packet of segments of this size.

        The packet as it went, which may be with a partial checksum.
        """

    def receive(self, deadline: float) -> Seen | None:
        """The next packet out; None where none came until `deadline` (monotonic)."""

    def settle(self) -> list[Seen]:
        """All that comes out on account of what was put in so far."""

    def dropped(self) -> dict[str, int] | None:
        """Packets dropped since the start by reason, where that is known."""


class Mismatch(AssertionError):
    """A case went another way than its script."""


@dataclass
class Connection:
    """The client's end of one TCP connection."""

    port: int
    first: int = 0
    """The client's ISN."""
    base: int | None = None
    """The server's ISN."""
    acked: int | None = None
    """The last acknowledgment number that came."""
    next_in: int = 0
    """What follows the last byte that came, counted from the server's ISN."""
    next_out: int = 0
    """What follows the last byte of a flood."""
    window: int = 65535
    """The last window that came."""
    echo: int = 0
    """The last timestamp that came."""
    over: bool = False

    def relative(self, sequence: int) -> int:
        """A sequence number of the server's as scripts count it."""
        return sequence - (self.base or 0) & 0xFFFFFFFF


class Run:
    """One case on one road and family."""

    def __init__(
        self,
        case: Case,
        road: Road,
        family: str,
        server: Server,
        deadline: float = DEADLINE_S,
        peer: Road | None = None,
    ) -> None:
        self.peer = peer
        self.peer_seen: Seen | None = None
        self.deadline = deadline
        self.case, self.road, self.family, self.server = case, road, family, server
        self.transcript: list[str] = []
        self.port = next(_PORTS) % 40000 + 20000
        self.connections: dict[str, Connection] = {}
        self.peer_port = next(_PORTS) % 40000 + 20000
        self.last_sent = b""
        self.last_seen: Seen | None = None
        self.inbox: list[Seen] = []
        self.pieces: dict[int, Seen] = {}
        self.defined: dict[str, tuple[Step, int, bytes]] = {}
        self.drops: dict[str, int] | None = None

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

    def _step(self, step: Step) -> None:
        self.transcript.append(f"{step.line:5} {step.text}")
        try:
            self._verbs[step.verb](self, step)
        except Mismatch:
            raise
        except (AssertionError, OSError, KeyError, ValueError) as error:
            raise self._wrong(step, f"{type(error).__name__}: {error}") from error

    def _wrong(self, step: Step, what: str) -> Mismatch:
        told = "\n".join(self.transcript)
        where = f"{self.case.file}.pkt:{step.line}: {self.case.name} on {self.road.name}, {self.family}"
        return Mismatch(f"{where}:\n{step.text}\n{what}\n--- what happened\n{told}")

    # packets in

    def _inject(self, step: Step) -> None:
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

    def _port(self, host: str, kind: str) -> int:
        if host == "peer":
            return self.peer_port
        return self.server.udp_port if kind == "udp" else self.server.port

    def _segment(self, step: Step, ends: Endpoints, connection: Connection) -> bytes:
        flags = step.words[0]
        sequence = connection.next_out if step.words[1] == "NEXT" else int(step.words[1])
        if "S" in flags and "." not in flags and not step.has("stray"):
            connection.first, connection.base, connection.acked, connection.over = sequence, None, None, False
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

    def _bytes(self, step: Step) -> bytes:
        return step.data if step.data is not None else pattern(0, step.number("len"))

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

    def _define(self, step: Step) -> None:
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

    def _flood_parts(self, step: Step) -> None:
        """`flood-parts NAME N`: the first fragment of N packets."""
        whole, protocol, upper = self.defined[step.words[0]]
        for number in range(int(step.words[1])):
            self._put_part(
                replace(whole, keys=(Key("ipid", "=", str(30000 + number)),)), whole, protocol, upper[:1480], 0, True
            )

    def _flood_pieces(self, step: Step) -> None:
        """`flood-pieces NAME N`: one packet in N fragments of eight bytes, the last of which never comes."""
        whole, protocol, upper = self.defined[step.words[0]]
        for number in range(int(step.words[1])):
            self._put_part(step, whole, protocol, upper[8 * number : 8 * number + 8], 8 * number, True)

    # packets out

    def _demand(self, step: Step) -> None:
        self._next(step)

    def _demand_later(self, step: Step) -> None:
        self._next(step, acknowledgments=True)

    def _demand_at_last(self, step: Step) -> None:
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
            if packet.fields.get("type") == "reassembly":
                # An earlier case's fragments whose time is up.
                continue
            bare = packet.kind == "tcp" and packet.flags == "." and not packet.payload
            if not (anything or (acknowledgments and bare)):
                raise self._wrong(step, f"{wrong}; came: {packet}")

    def _receive(self, deadline: float, *, told: bool = True) -> Seen | None:
        packet = self.inbox.pop(0) if self.inbox else self.road.receive(deadline)
        if packet is not None:
            self._note(packet, told)
        return packet

    def _note(self, packet: Seen, told: bool = True) -> None:
        """Follow the connection that a packet belongs to."""
        connection = next((c for c in self.connections.values() if c.port == packet.destination_port), None)
        said = str(packet)
        ours = packet.source_port in (self.server.port, self.peer_port)
        if packet.kind == "tcp" and connection is not None and ours:
            if "S" in packet.flags:
                connection.base = packet.sequence
            if "." in packet.flags:
                acked = packet.fields["ack"]
                assert isinstance(acked, int)
                connection.acked = acked
            window = packet.fields["win"]
            assert isinstance(window, int)
            connection.window = window
            stamp = packet.fields.get("ts")
            if isinstance(stamp, int):
                connection.echo = stamp
            connection.over |= "R" in packet.flags
            at = connection.relative(packet.sequence)
            said = f"{packet.flags} {at} {said.split(' ', 2)[-1]}"
            end = at + len(packet.payload) + ("S" in packet.flags) + ("F" in packet.flags)
            if at < 0x80000000:
                connection.next_in = max(connection.next_in, end)
        if told:
            self.transcript.append(f"    {'':4} came: {said}")
        self.last_seen = packet

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

    def _whole(self, step: Step) -> None:
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

    # the other device

    def _peer_inject(self, step: Step) -> None:
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

    def _peer_demand(self, step: Step) -> None:
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

    def _peer_silence(self, step: Step) -> None:
        """`peer-silence`: the other device gets nothing on account of what the client has sent."""
        assert self.peer is not None
        self._silence(step)
        rest = self.peer.settle()
        if rest:
            raise self._wrong(step, f"the peer got: {rest[0]}")

    def _silence(self, step: Step) -> None:
        rest, self.inbox = [*self.inbox, *self.road.settle()], []
        for packet in rest:
            self._note(packet)
        rest = [packet for packet in rest if packet.fields.get("type") != "reassembly"]
        if rest:
            raise self._wrong(step, f"came: {rest[0]}")

    def _drop(self, step: Step) -> None:
        """`drop REASON [N]`: nothing comes, and since the case's begin (or the last such line) N packets were dropped for it."""
        self._silence(step)
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

    def _ended(self, step: Step) -> None:
        """`ended [N]`: since the case's begin so many flows have ended (one)."""
        if self.drops is None:
            return
        wanted = self.drops["ended"] + (int(step.words[0]) if step.words else 1)

        def over() -> bool:
            now = self.road.dropped()
            return now is not None and now["ended"] >= wanted

        wait_for("the flow's end", over, self.deadline)

    # the usual exchanges

    def _open(self, step: Step) -> None:
        """A connection: SYN 1000 with the step's options, SYN-ACK, ACK; the server accepts."""
        connection = self._connection(step)
        self._say(connection, step, "S", 1000, 0, b"", options=True)
        syn_ack = self._expect_flags(step, connection, "S.")
        if syn_ack.fields["ack"] != 1001:
            raise self._wrong(step, f"it acknowledges {syn_ack.fields['ack']}")
        self._say(connection, step, ".", 1001, 1, b"")
        self.server.accept()

    def _push(self, step: Step) -> None:
        """`push FROM N`: N bytes of the client's stream from a sequence number on, each segment acknowledged in its turn."""
        connection = self._connection(step)
        at, left, size = int(step.words[0]), int(step.words[1]), step.number("mss", 1000)
        while left:
            part = min(left, size)
            self._say(connection, step, "P.", at, connection.next_in, pattern(at - connection.first - 1, part))
            at, left = at + part, left - part
            deadline = time.monotonic() + self.deadline
            while connection.acked is None or connection.acked - at & 0x80000000:
                if self._receive(deadline) is None:
                    raise self._wrong(step, f"{at} isn't acknowledged")

    def _flood(self, step: Step) -> None:
        """`flood FROM`: the client's stream from a sequence number on, until the window is closed and everything is acknowledged."""
        connection = self._connection(step)
        at = connection.acked = int(step.words[0])
        deadline = time.monotonic() + 3 * self.deadline
        while connection.window or connection.acked != at:
            room = connection.acked + connection.window - at
            while room > 0:
                part = min(room, 32000 if self.road.partial else 1400)
                ends = Endpoints(
                    self.road.address(self.family), self._resolve("server"), connection.port, self.server.port
                )
                sent = pattern(at - connection.first - 1, part)
                segment = craft.tcp(_BARE, ends, ".", at, (connection.base or 0) + connection.next_in, sent)
                gso = 1400 if part > 1400 else 0
                self.road.send(craft.ip(_BARE, ends, self.family, 6, segment), gso=gso)
                at, room = at + part, room - part
            if self._receive(deadline, told=False) is None:
                raise self._wrong(step, f"the window is still open at {at}")
        connection.next_out = at
        self.server.owed = at - connection.first - 1
        self.transcript.append(f"    {'':4} {self.server.owed} bytes filled it")

    def _take(self, step: Step) -> None:
        """`take N`: N bytes of the server's stream, in order, and no acknowledgment."""
        self._gather(step, acknowledged=False)

    def _fetch(self, step: Step) -> None:
        """`fetch N [client=SEQ]`: N bytes of the server's stream, in order, each segment acknowledged."""
        self._gather(step, acknowledged=True)

    def _gather(self, step: Step, *, acknowledged: bool) -> None:
        connection = self._connection(step)
        at, sequence = connection.next_in, step.number("client", 1001)
        end = at + int(step.words[0])
        deadline = time.monotonic() + self.deadline
        while at < end:
            packet = self._receive(deadline)
            if packet is None:
                raise self._wrong(step, f"nothing came at {at}")
            if packet.kind != "tcp" or packet.flags.strip("P") != ".":
                raise self._wrong(step, f"came: {packet}")
            if not packet.payload:
                continue
            if connection.relative(packet.sequence) + len(packet.payload) <= at:
                # A segment again whose acknowledgment crossed it.
                continue
            if connection.relative(packet.sequence) != at or packet.payload != pattern(at - 1, len(packet.payload)):
                raise self._wrong(step, f"at {at} came: {packet}")
            at += len(packet.payload)
            if step.has("mss") and len(packet.payload) > step.number("mss"):
                raise self._wrong(step, f"a segment of {len(packet.payload)} bytes")
            if acknowledged:
                self._say(connection, step, ".", sequence, at, b"")
        if at != end:
            raise self._wrong(step, f"{at - end} bytes too many")

    def _close(self, step: Step) -> None:
        """`close SEQ`: the client ends first; the server follows."""
        connection = self._connection(step)
        sequence, at = int(step.words[0]), connection.next_in
        self._say(connection, step, "F.", sequence, at, b"")
        self.server.receive_end()
        self.server.close()
        fin = self._expect_flags(step, connection, "F.")
        if fin.fields["ack"] != sequence + 1:
            raise self._wrong(step, f"it acknowledges {fin.fields['ack']}")
        self._say(connection, step, ".", sequence + 1, connection.next_in, b"")

    def _expect_flags(self, step: Step, connection: Connection, flags: str) -> Seen:
        deadline = time.monotonic() + self.deadline
        while True:
            packet = self._receive(deadline)
            if packet is None:
                raise self._wrong(step, f"no {flags} came")
            if packet.kind == "tcp" and packet.destination_port == connection.port:
                if packet.flags == flags:
                    return packet
                if packet.flags == "." and not packet.payload:
                    continue
            raise self._wrong(step, f"instead of {flags} came: {packet}")

    def _say(
        self,
        connection: Connection,
        step: Step,
        flags: str,
        sequence: int,
        ack: int,
        payload: bytes,
        *,
        options: bool = False,
    ) -> None:
        ends = Endpoints(self.road.address(self.family), self._resolve("server"), connection.port, self.server.port)
        if flags == "S":
            connection.first, connection.base = sequence, None
        stamped = (
            step
            if options
            else Step(
                step.line, step.text, step.verb, (), tuple(key for key in step.keys if key.name in ("ts", "win")), None
            )
        )
        acknowledged = (connection.base or 0) + ack if "." in flags else 0
        segment = craft.tcp(stamped, ends, flags, sequence, acknowledged, payload, connection.echo)
        self.last_sent = self.road.send(craft.ip(_BARE, ends, self.family, 6, segment))

    # the server

    def _server(self, step: Step) -> None:
        """`server accept`, `send`, `receive`, `end`, `reset`, `shutdown`, `close`, ...: see `tests.packets.server`."""
        self.server.act(step)

    # small things

    def _connection(self, step: Step) -> Connection:
        name = step.value("conn", "a")
        if name not in self.connections:
            self.connections[name] = Connection(self.port if name == "a" else next(_PORTS) % 40000 + 20000)
        return self.connections[name]

    def _resolve(self, name: str) -> str:
        if name == "client":
            return self.road.address(self.family)
        if name == "peer":
            assert self.peer is not None
            return self.peer.address(self.family)
        return self.server.host(name, self.family)

    def _clean_up(self) -> None:
        for connection in self.connections.values():
            if connection.acked is not None and not connection.over:
                ends = Endpoints(
                    self.road.address(self.family), self._resolve("server"), connection.port, self.server.port
                )
                # Where timestamps are in use a reset needs none (RFC 7323 3.2).
                segment = craft.tcp(_BARE, ends, "R", connection.acked, 0, b"")
                self.road.send(craft.ip(_BARE, ends, self.family, 6, segment))
        self.server.end()
        self.road.settle()
        if self.peer is not None and any(step.verb.startswith("peer") for step in self.case.steps(self.family)):
            self.peer.settle()

    _verbs: Final = {
        ">": _inject,
        "<": _demand,
        "<~": _demand_later,
        "<*": _demand_at_last,
        "packet": _define,
        "silence": _silence,
        "drop": _drop,
        "ended": _ended,
        "whole": _whole,
        "peer>": _peer_inject,
        "peer<": _peer_demand,
        "peer-silence": _peer_silence,
        "open": _open,
        "push": _push,
        "flood": _flood,
        "flood-parts": _flood_parts,
        "flood-pieces": _flood_pieces,
        "fetch": _fetch,
        "take": _take,
        "close": _close,
        "server": _server,
    }
