"""The server of packet cases: plain sockets of a namespace, moved by `server ...` lines.

    server accept                 take the next connection
    server send 5000 | "text"     write so many bytes of its stream's pattern, or a text
    server receive 5000 | "text"  read exactly this
    server end | reset | quiet    read the end; a reset; find nothing to read
    server await 5000             have so much to read, and leave it
    server broken                 find the connection reset after its end was read
    server shutdown | close | abort
    server fill | unfill          fill the listener's queue so that SYNs go unanswered; make room
    server rcvbuf 4096            (before the connection) a small receive buffer
    server udp receive "text"     the same for datagrams; `udp send` answers whoever spoke last
    server forgotten              let this machine's kernel forget the path MTU that it has learned of the server
    server icmp unreachable-host  send an ICMP error about what came last to the server's ports, from any host (`src=nobody mtu=1300`)

Limits: one listener, one connection and one UDP socket at a time; all waits have a deadline.
"""

from __future__ import annotations

import contextlib
import select
import socket
import struct
import subprocess
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any, Final, TypeVar

from tests.netns.conftest import ServerNamespace
from tests.packets import craft
from tests.packets.craft import Endpoints, pattern
from tests.packets.script import Step
from tools.netlab import wait_for

T = TypeVar("T")
DEADLINE_S: Final = 10.0
HOSTS: Final = {"server": 1, "nobody": 5, "slow": 6, "blackhole": 7, "unreachable": 8, "prohibited": 9, "narrow": 10}
"""Hosts of the server's prefix by their names in scripts; `narrow` is the server behind a path with an MTU of `NARROW`."""
NARROW: Final = 1300
ELSEWHERE: Final = {
    "noroute": ("198.51.100.1", "2001:db8::1"),
    "stranger": ("10.99.99.99", "fd99::99"),
    "multicast": ("224.0.0.251", "ff02::fb"),
    "broadcast": ("255.255.255.255", "ff02::1"),
    "loopback": ("127.0.0.1", "::1"),
    "unspecified": ("0.0.0.0", "::"),
    "router": ("192.0.0.8", "fd66:616c:6b69:726b::1"),
}
"""Others, for IPv4 and IPv6; `router` is who Falkirk's own ICMP errors come from."""


class Server:
    """Sockets in the server's namespace for one case at a time."""

    def __init__(self, namespace: ServerNamespace, deadline: float = DEADLINE_S) -> None:
        self._namespace, self._deadline = namespace, deadline
        self._sockets: list[socket.socket] = []
        self._listener: socket.socket | None = None
        self._connection: socket.socket | None = None
        self._udp: socket.socket | None = None
        self._peer: Any = None
        self._sent = self._received = 0
        self._family = socket.AF_INET
        self.port = self.udp_port = 0
        self._capture = namespace.call(socket.socket, socket.AF_PACKET, socket.SOCK_DGRAM, socket.ntohs(3))
        self._capture.setblocking(False)
        self._captured: deque[bytes] = deque(maxlen=64)
        self.owed = 0
        """Bytes that a flood has sent."""

    def host(self, name: str, family: str) -> str:
        """An address by its name."""
        if name in ELSEWHERE:
            return ELSEWHERE[name][family == "ipv6"]
        if name in HOSTS:
            number = HOSTS[name]
            return self._namespace.host4(number) if family == "ipv4" else self._namespace.host6(number)
        return name

    def begin(self, family: str, how: Mapping[str, str]) -> None:
        """Sockets for a case: a listener (none where `closed`), and a UDP socket where `udp`."""
        self._family = socket.AF_INET if family == "ipv4" else socket.AF_INET6
        self._sent = self._received = 0
        self._connection = self._peer = None
        listener = self._make(socket.SOCK_STREAM)
        if "rcvbuf" in how:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, int(how["rcvbuf"]))
        listener.bind((self._any, int(how.get("port", "0"))))
        self.port = int(listener.getsockname()[1])
        if "closed" in how:
            listener.close()
        else:
            listener.listen(0 if "full" in how else 16)
        self._listener = listener
        self._udp = None
        if "full" in how:
            self._fill()
        datagrams = self._make(socket.SOCK_DGRAM)
        datagrams.bind((self._any, 0))
        self.udp_port = int(datagrams.getsockname()[1])
        if "closed" in how:
            datagrams.close()
        self._udp = datagrams

    @property
    def _any(self) -> str:
        return "0.0.0.0" if self._family == socket.AF_INET else "::"

    def _make(self, kind: int) -> socket.socket:
        sock = self._namespace.call(socket.socket, self._family, kind)
        sock.settimeout(self._deadline)
        if kind == socket.SOCK_STREAM:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._sockets.append(sock)
        return sock

    def _fill(self) -> None:
        """One connection is all that a backlog of 0 holds; SYNs beyond are dropped."""
        filler = self._make(socket.SOCK_STREAM)
        filler.connect((self.host("server", "ipv4" if self._family == socket.AF_INET else "ipv6"), self.port))

    def act(self, step: Step) -> None:
        """One `server ...` line."""
        words = step.words
        if words[0] == "udp":
            self._udp_act(step)
            return
        if words[0] == "icmp":
            self._icmp(step)
            return
        if words[0] == "forgotten":
            self.forget_paths()
            return
        actions: dict[str, Callable[[], None]] = {
            "accept": self.accept,
            "end": self.receive_end,
            "reset": self._receive_reset,
            "quiet": self._quiet,
            "shutdown": lambda: self._conn.shutdown(socket.SHUT_WR),
            "close": self.close,
            "abort": self.abort,
            "unfill": self._unfill,
            "gone": self._gone,
            "drain": self._drain,
            "broken": self._broken,
            "await": lambda: self._await(int(words[1])),
            "send": lambda: self._send(step),
            "receive": lambda: self._receive(step),
            "urgent": lambda: self._send(step, socket.MSG_OOB),
        }
        actions[words[0]]()

    @property
    def _conn(self) -> socket.socket:
        assert self._connection is not None, "no connection was accepted"
        return self._connection

    def accept(self) -> None:
        """Take the next connection."""
        assert self._listener is not None
        connection, _ = self._listener.accept()
        connection.settimeout(self._deadline)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_OOBINLINE, 1)
        self._sockets.append(connection)
        self._connection = connection
        self._sent = self._received = 0

    def _unfill(self) -> None:
        assert self._listener is not None
        filler, _ = self._listener.accept()
        self._sockets.append(filler)

    def _gone(self) -> None:
        """The listener closes."""
        assert self._listener is not None
        self._listener.close()

    def _send(self, step: Step, flags: int = 0) -> None:
        data = step.data
        if data is None:
            data = pattern(self._sent, int(step.words[1]))
        self._conn.settimeout(self._deadline)
        assert self._conn.send(data, flags) == len(data), "the server's socket is full"
        self._sent += len(data)

    def _receive(self, step: Step) -> None:
        size = len(step.data) if step.data is not None else int(step.words[1])
        data = b""
        while len(data) < size:
            more = self._conn.recv(size - len(data))
            assert more, f"the end came after {data!r}"
            data += more
        wanted = step.data if step.data is not None else pattern(self._received, size)
        assert data == wanted, f"the server read {data[:60]!r} instead of {wanted[:60]!r}"
        self._received += size

    def _drain(self) -> None:
        """Read what a flood has left."""
        while self._received < self.owed:
            data = self._conn.recv(min(65536, self.owed - self._received))
            assert data == pattern(self._received, len(data)), f"other bytes at {self._received}"
            self._received += len(data)

    def receive_end(self) -> None:
        """Read the end, and nothing before it."""
        data = self._conn.recv(65536)
        assert not data, f"instead of the end the server read {data[:60]!r}"

    def _receive_reset(self) -> None:
        try:
            data = self._conn.recv(65536)
        except ConnectionResetError:
            return
        raise AssertionError(f"instead of a reset the server read {data[:60]!r}")

    def _await(self, size: int) -> None:
        data = self._conn.recv(size, socket.MSG_PEEK | socket.MSG_WAITALL)
        assert len(data) == size, f"the end came after {len(data)} bytes"

    def _broken(self) -> None:
        poll = select.poll()
        poll.register(self._conn, 0)
        assert poll.poll(self._deadline * 1000), "the connection still stands"

    def _quiet(self) -> None:
        self._conn.setblocking(False)
        try:
            data = self._conn.recv(65536)
        except BlockingIOError:
            return
        finally:
            self._conn.settimeout(self._deadline)
        raise AssertionError(f"the server read {data[:60]!r}")

    def close(self) -> None:
        """Close in order."""
        self._conn.close()

    def abort(self) -> None:
        """Close with a reset."""
        self._conn.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("=ii", 1, 0))
        self._conn.close()

    def _udp_act(self, step: Step) -> None:
        assert self._udp is not None
        what = step.words[1]
        if what == "receive":
            data, self._peer = self._udp.recvfrom(65536)
            wanted = step.data if step.data is not None else pattern(0, int(step.words[2]))
            assert data == wanted, f"the server read {data[:60]!r} ({len(data)} bytes)"
        elif what == "send":
            data = step.data if step.data is not None else pattern(0, int(step.words[2]))
            self._udp.sendto(data, self._peer)
        elif what == "quiet":
            self._udp.setblocking(False)
            try:
                data = self._udp.recv(65536)
            except BlockingIOError:
                return
            finally:
                self._udp.settimeout(self._deadline)
            raise AssertionError(f"the server read {data[:60]!r}")
        elif what == "close":
            self._udp.close()
            # Nobody may have the port until the case is over.
            self._udp = None
        else:
            raise AssertionError(f"server udp {what}?")

    def _icmp(self, step: Step) -> None:
        family = "ipv4" if self._family == socket.AF_INET else "ipv6"
        quoted = self._last_packet(step.value("about", "port"))
        source = self.host(step.value("src", "server"), family)
        four = family == "ipv4"
        addressed = socket.inet_ntop(self._family, quoted[12:16] if four else quoted[8:24])
        ends = Endpoints(source, addressed, 0, 0)
        body = quoted[: step.number("quoted", 548 if four else 1232)]
        message = craft.icmp(step, ends, family, step.words[1], body)
        packet = craft.ip(step, ends, family, 1 if four else 58, message)
        with self._namespace.call(socket.socket, self._family, socket.SOCK_RAW, socket.IPPROTO_RAW) as raw:
            raw.sendto(packet, (addressed, 0))

    @staticmethod
    def forget_paths() -> None:
        """A path MTU is kept by destination, and every case has the same."""
        for family in ("-4", "-6"):
            subprocess.run(["ip", family, "route", "flush", "cache"], check=True, timeout=10)

    def _last_packet(self, about: str) -> bytes:
        """The last IP packet that came to the case's ports, or the last echo request."""
        found: list[bytes] = []

        def look() -> bool:
            with contextlib.suppress(BlockingIOError):
                while True:
                    self._captured.append(self._capture.recv(1 << 17))
            found[:] = [packet for packet in self._captured if self._concerns(packet, about)]
            return bool(found)

        wait_for("a packet at the server", look, self._deadline)
        return found[-1]

    def _concerns(self, packet: bytes, about: str) -> bool:
        four = self._family == socket.AF_INET
        if not packet or packet[0] >> 4 != (4 if four else 6):
            return False
        upper, protocol = (20, packet[9]) if four else (40, packet[6])
        if about == "echo":
            return protocol in (1, 58) and packet[upper] in (8, 128)
        port = int.from_bytes(packet[upper + 2 : upper + 4], "big")
        return (protocol, port) in ((6, self.port), (17, self.udp_port))

    def end(self) -> None:
        """Close everything of the case, with resets."""
        for sock in self._sockets:
            with contextlib.suppress(OSError):
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("=ii", 1, 0))
            sock.close()
        self._sockets.clear()
        with contextlib.suppress(BlockingIOError):
            while True:
                self._capture.recv(1 << 17)
        self._captured.clear()

    def close_for_good(self) -> None:
        """After the last case."""
        self._capture.close()
