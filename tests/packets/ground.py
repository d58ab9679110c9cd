"""What a running case stands on: its road, its ports and connections, what came last, and what to say when it went another way."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Final, Protocol

from tests.packets import craft
from tests.packets.craft import Endpoints, pattern
from tests.packets.read import Seen
from tests.packets.script import Case, Step
from tests.packets.server import Server
from tools.netlab import LabError

DEADLINE_S: Final = 10.0
"""For what takes no time on an idle machine."""
BARE: Final = Step(0, "", "", (), (), None)
_PORTS: Final = itertools.count()


def next_port() -> int:
    """A client port that no case had lately."""
    return next(_PORTS) % 40000 + 20000


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
    host: str = "server"
    """With whom."""
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


class Ground:
    """State of one case on one road and family."""

    verbs: ClassVar[dict[str, Callable[[Any, Step], None]]] = {}
    """What each verb of a script does."""

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
        self.port = next_port()
        self.wants_reassembly = any("reassembly" in text for _, text in case.lines)
        self.connections: dict[str, Connection] = {}
        self.peer_port = next_port()
        self.last_sent = b""
        self.last_seen: Seen | None = None
        self.inbox: list[Seen] = []
        self.pieces: dict[int, Seen] = {}
        self.defined: dict[str, tuple[Step, int, bytes]] = {}
        self.drops: dict[str, int] | None = None

    def _step(self, step: Step) -> None:
        self.transcript.append(f"{step.line:5} {step.text}")
        try:
            self.verbs[step.verb](self, step)
        except Mismatch:
            raise
        except (AssertionError, OSError, KeyError, ValueError, LabError) as error:
            raise self._wrong(step, f"{type(error).__name__}: {error}") from error

    def _wrong(self, step: Step, what: str) -> Mismatch:
        told = "\n".join(self.transcript)
        where = f"{self.case.file}.pkt:{step.line}: {self.case.name} on {self.road.name}, {self.family}"
        return Mismatch(f"{where}:\n{step.text}\n{what}\n--- what happened\n{told}")

    def _receive(self, deadline: float, *, told: bool = True) -> Seen | None:
        while True:
            packet = self.inbox.pop(0) if self.inbox else self.road.receive(deadline)
            if packet is None:
                return None
            if self._is_ours(packet):
                self._note(packet, told)
                return packet

    def _is_ours(self, packet: Seen) -> bool:
        """Not the last word of an earlier case's connection, nor of its fragments: every case has ports of its own."""
        if packet.kind in ("tcp", "udp"):
            return packet.destination_port in {self.port, *(each.port for each in self.connections.values())}
        return packet.fields.get("type") != "reassembly" or self.wants_reassembly

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
            connection.over = "R" in packet.flags
            at = connection.relative(packet.sequence)
            said = f"{packet.flags} {at} {said.split(' ', 2)[-1]}"
            end = at + len(packet.payload) + ("S" in packet.flags) + ("F" in packet.flags)
            if at < 0x80000000:
                connection.next_in = max(connection.next_in, end)
        if told:
            self.transcript.append(f"    {'':4} came: {said}")
        self.last_seen = packet

    def _connection(self, step: Step) -> Connection:
        name = step.value("conn", "a")
        if name not in self.connections:
            self.connections[name] = Connection(self.port if name == "a" else next_port())
        return self.connections[name]

    def _port(self, host: str, kind: str) -> int:
        if host == "peer":
            return self.peer_port
        return self.server.udp_port if kind == "udp" else self.server.port

    def _resolve(self, name: str) -> str:
        if name == "client":
            return self.road.address(self.family)
        if name == "peer":
            assert self.peer is not None
            return self.peer.address(self.family)
        return self.server.host(name, self.family)

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
        self.last_sent = self.road.send(craft.ip(BARE, ends, self.family, 6, segment))

    def _bytes(self, step: Step) -> bytes:
        return step.data if step.data is not None else pattern(0, step.number("len"))
