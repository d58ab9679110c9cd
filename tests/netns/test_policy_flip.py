"""Rules, routes and groups change under two hundred live streams: what is forbidden ends at both sides, what isn't doesn't notice.

The issue asks for an end within 1 s of the write. On a machine that other tests share that is no test's to promise, so the deadline here
is generous (`PATIENCE_S`), and what the audit log says of the last end is printed. Each byte of a stream that stays is compared with what
was sent.
"""

from __future__ import annotations

import errno
import hashlib
import select
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, suppress
from typing import Any, Final

import pytest
import yaml

from falkirk.flow.events import nanoseconds
from tests.netns.fidelity import World, open_world
from tests.netns.stream_load import LASTING, Habit, Load, Stream
from tests.process.cli_shell import Cli
from tools.mesh import resource, rule
from tools.netlab import wait_for

pytestmark = [pytest.mark.netns, pytest.mark.slow]
FAMILIES: Final = (socket.AF_INET, socket.AF_INET6)
PATIENCE_S: Final = 20.0
RESEND_S: Final = 2.0
"""After which a datagram is sent again; UDP may lose it."""
LOST: Final = {"ECONNRESET", "EPIPE"}
"""What a RST is told as; EPIPE where a FIN had come before (tcp_reset in Linux)."""
HABITS: Final = [habit for habit in LASTING if habit is not Habit.FINISHED]
KEPT, FORBIDDEN = "kept", "forbidden"


class Flip:
    """A mesh with two workers, one listener for what is kept and one for what is forbidden, and streams to both."""

    def __init__(self, world: World, stack: ExitStack) -> None:
        self.world = world
        self.cli = Cli(world.mesh.run_dir)
        server = world.server
        listeners = {
            (name, family): stack.enter_context(server.listener(family, backlog=4096))
            for name in (KEPT, FORBIDDEN)
            for family in FAMILIES
        }
        hosts = {socket.AF_INET: server.address4, socket.AF_INET6: server.address6}
        self.addresses = {at: (hosts[at[1]], sock.getsockname()[1]) for at, sock in listeners.items()}
        self.sources: dict[int, tuple[str, int]] = {}
        """Address and port of each stream's client, by the stream's number."""
        self.load = Load(listeners.values())
        stack.callback(self.load.close)

    def ports(self, name: str) -> str:
        """The ports of one kind, as CEL has a list."""
        return f"[{', '.join(str(self.addresses[name, family][1]) for family in FAMILIES)}]"

    def policy(self, *rules: dict[str, str]) -> None:
        """Write the policy, in this process: a command of its own would take a second to start."""
        self.apply(resource("Policy", "access", "acme", priority=10, rules=list(rules)))

    def apply(self, *documents: Any) -> None:
        """Write resources."""
        self.cli.ok("apply", "-f", "-", text=yaml.safe_dump_all(documents))

    def open(self, count: int) -> list[Stream]:
        """So many streams, all habits, all ways, half of each kind; once all are steady."""
        self.allowed()
        ways = self.world.ways()
        streams = []
        for number in range(count):
            name = (KEPT, FORBIDDEN)[number % 2]
            way = ways[number // 2 % len(ways)]
            habit = HABITS[number // 2 // len(ways) % len(HABITS)]
            sock = way.client.socket(way.family)
            streams.append(self.load.begin(habit, sock, self.addresses[name, way.family], name))
        wait_for("every stream is steady", lambda: all(stream.steady for stream in streams), PATIENCE_S)
        self.sources = {stream.number: stream.client.sock.getsockname()[:2] for stream in streams}
        return streams

    def allowed(self) -> None:
        """Wait until everything is."""
        for way in self.world.ways():
            for name in (KEPT, FORBIDDEN):
                host, port = self.addresses[name, way.family]
                wait_for(f"{host} is allowed", lambda: not way.attempt(host, port).error, PATIENCE_S)  # noqa: B023

    def ends(self, streams: Sequence[Stream], start: int, reason: str) -> list[int]:
        """Nanoseconds from `start` to the end of each of these streams' flows that ended for this reason, by the audit log."""
        wanted = {self.sources[stream.number] for stream in streams}
        return [
            nanoseconds(record["time"]) - start
            for record in self.world.audit("ended", "")
            if record["reason"] == reason and (record["source"], record["source_port"]) in wanted
        ]

    def judge(self, streams: Sequence[Stream], doomed: Sequence[Stream], start: int, reason: str) -> float:
        """All of `doomed` end, none of the others; returns the seconds that the last end took."""

        def told(stream: Stream) -> bool:
            return stream.server is not None and bool(stream.client.outcome and stream.server.outcome)

        wait_for("what is forbidden ends at both sides", lambda: all(map(told, doomed)), PATIENCE_S)
        for stream in doomed:
            assert stream.server is not None
            assert {stream.client.outcome, stream.server.outcome} <= LOST, str(stream)
        wait_for("its records", lambda: len(self.ends(doomed, start, reason)) == len(doomed), PATIENCE_S)
        taken = self.ends(doomed, start, reason)
        others = [stream for stream in streams if stream not in doomed]
        before = {stream.number: stream.progress for stream in others}
        moving = [stream for stream in others if stream.moves]
        wait_for("what stays moves on", lambda: all(s.progress > before[s.number] for s in moving), PATIENCE_S)
        assert [str(stream) for stream in others if not stream.open] == []
        assert [lie for stream in others for lie in stream.lies()] == []
        return max(taken, default=0) / 1e9

    def clear(self, streams: Sequence[Stream]) -> None:
        """Close them all. A flow whose end was read on neither side may stay for minutes; it is nobody's here."""
        for stream in streams:
            self.load.forget(stream)


@pytest.fixture(scope="module")
def flip() -> Iterator[Flip]:
    with ExitStack() as stack:
        world = stack.enter_context(open_world(2))
        yield Flip(world, stack)


@pytest.fixture
def restored(flip: Flip) -> Iterator[Flip]:
    """With everybody allowed before and after."""
    flip.policy(rule("staff", '"staff" in identity.groups', "allow"))
    yield flip
    flip.apply(resource("User", "alice", "acme", groups=["staff"]))
    flip.policy(rule("staff", '"staff" in identity.groups', "allow"))


@pytest.mark.parametrize("count", [200])
def test_a_rule_that_denies_half_of_them(
    restored: Flip, count: int, record_property: Callable[[str, object], None]
) -> None:
    flip = restored
    streams = flip.open(count)
    start = time.time_ns()
    flip.policy(
        rule("no", f"net.port in {flip.ports(FORBIDDEN)}", "deny"), rule("staff", '"staff" in identity.groups', "allow")
    )
    doomed = [stream for stream in streams if stream.group == FORBIDDEN]
    taken = flip.judge(streams, doomed, start, "policy_changed: access/no")
    print(f"{len(doomed)} of {count} flows ended, the last one {taken:.3f} s after the write began")
    record_property("last_end_s", round(taken, 3))
    flip.clear(streams)


class Datagrams:
    """UDP sessions to an echo server, each with one datagram under way at a time; what comes back is compared with what was sent."""

    def __init__(self, flip: Flip, stack: ExitStack) -> None:
        self.flip = flip
        self.rounds: dict[socket.socket, int] = {}
        self.failed: dict[socket.socket, str] = {}
        self._sent: dict[socket.socket, tuple[bytes, float]] = {}
        self._poll = select.epoll()
        self._sockets: dict[int, socket.socket] = {}
        self._echoes: dict[int, socket.socket] = {}
        stack.callback(self.close)
        for name in (KEPT, FORBIDDEN):
            for family in FAMILIES:
                # On the ports of the streams' listeners, so that the same rules are about both.
                echo = flip.world.server.call(socket.socket, family, socket.SOCK_DGRAM)
                echo.bind(flip.addresses[name, family])
                echo.setblocking(False)
                self._echoes[echo.fileno()] = echo
                self._poll.register(echo, select.EPOLLIN)

    def open(self, name: str, count: int) -> list[socket.socket]:
        """So many sessions, on all ways."""
        opened = []
        for number in range(count):
            ways = self.flip.world.ways()
            way = ways[number % len(ways)]
            sock = way.client.socket(way.family, socket.SOCK_DGRAM)
            sock.setblocking(False)
            sock.connect(self.flip.addresses[name, way.family])
            self._sockets[sock.fileno()] = sock
            self._poll.register(sock, select.EPOLLIN)
            self.rounds[sock] = 0
            self._send(sock)
            opened.append(sock)
        return opened

    def run(self, what: str, done: Callable[[], bool]) -> None:
        """Echo until something holds."""

        def turn() -> bool:
            for fd, _ in self._poll.poll(0.05):
                if fd in self._echoes:
                    self._echo(self._echoes[fd])
                else:
                    self._receive(self._sockets[fd])
            for sock, (_, when) in list(self._sent.items()):
                if time.monotonic() - when > RESEND_S:
                    self._send(sock)
            return done()

        wait_for(what, turn, PATIENCE_S)

    def _send(self, sock: socket.socket) -> None:
        data = hashlib.sha256(f"{sock.fileno()} {self.rounds[sock]}".encode()).digest() * 30
        self._sent[sock] = (data, time.monotonic())
        try:
            sock.send(data)
        except OSError as error:
            self._fail(sock, error)

    def _receive(self, sock: socket.socket) -> None:
        try:
            data = sock.recv(2048)
        except OSError as error:
            self._fail(sock, error)
            return
        # One that was sent again may be answered twice.
        if data == self._sent[sock][0]:
            self.rounds[sock] += 1
            self._send(sock)

    def _fail(self, sock: socket.socket, error: OSError) -> None:
        self.failed[sock] = errno.errorcode[error.errno or 0]
        self._sent.pop(sock, None)
        self._poll.unregister(sock)

    @staticmethod
    def _echo(sock: socket.socket) -> None:
        with suppress(BlockingIOError):
            while True:
                data, sender = sock.recvfrom(2048)
                sock.sendto(data, sender)

    def close(self) -> None:
        """Let all go."""
        for sock in (*self._sockets.values(), *self._echoes.values()):
            sock.close()
        self._poll.close()


def test_datagrams_of_what_is_forbidden_are_refused_and_no_others(
    restored: Flip, record_property: Callable[[str, object], None]
) -> None:
    flip = restored
    flip.allowed()
    with ExitStack() as stack:
        datagrams = Datagrams(flip, stack)
        kept, doomed = datagrams.open(KEPT, 100), datagrams.open(FORBIDDEN, 100)
        datagrams.run("every session is answered", lambda: all(datagrams.rounds.values()))
        start = time.time_ns()
        flip.policy(
            rule("no", f"net.port in {flip.ports(FORBIDDEN)}", "deny"),
            rule("staff", '"staff" in identity.groups', "allow"),
        )
        datagrams.run("what is forbidden is refused", lambda: all(sock in datagrams.failed for sock in doomed))
        # ICMP "administratively prohibited", as Linux tells it: RFC 1812 5.2.7.1, RFC 4443 3.1.
        told = {(sock.family, datagrams.failed[sock]) for sock in doomed}
        assert told == {(socket.AF_INET, "EHOSTUNREACH"), (socket.AF_INET6, "EACCES")}
        so_far = {sock: datagrams.rounds[sock] for sock in kept}
        datagrams.run("what stays goes on", lambda: all(datagrams.rounds[sock] > so_far[sock] + 3 for sock in kept))
        assert not [sock for sock in kept if sock in datagrams.failed]
        sources = {sock.getsockname()[:2] for sock in doomed}
        reason = "policy_changed: access/no"

        def ends() -> list[int]:
            return [
                nanoseconds(record["time"]) - start
                for record in flip.world.audit("ended", "")
                if record["reason"] == reason and (record["source"], record["source_port"]) in sources
            ]

        wait_for("their records", lambda: len(ends()) >= len(doomed), PATIENCE_S)
        taken = max(ends()) / 1e9
        print(
            f"{len(doomed)} UDP sessions of {len(doomed) + len(kept)} ended, the last one {taken:.3f} s after the write began"
        )
        record_property("last_end_s", round(taken, 3))


def everything_denied(flip: Flip) -> str:
    flip.cli.ok("policy", "delete", "--tenant", "acme", "access")
    return "policy_changed: default deny"


def group_lost(flip: Flip) -> str:
    flip.apply(resource("User", "alice", "acme", groups=["guests"]))
    return "device_changed: default deny"


@pytest.mark.parametrize("change", [everything_denied, group_lost])
def test_what_ends_all(
    restored: Flip, change: Callable[[Flip], str], record_property: Callable[[str, object], None]
) -> None:
    flip = restored
    streams = flip.open(32)
    start = time.time_ns()
    reason = change(flip)
    taken = flip.judge(streams, streams, start, reason)
    print(f"{reason}: {len(streams)} flows ended, the last one {taken:.3f} s after the write began")
    record_property("last_end_s", round(taken, 3))
    # The tunnels are still there: whoever is allowed again connects at once.
    flip.clear(streams)
    flip.apply(resource("User", "alice", "acme", groups=["staff"]))
    flip.policy(rule("staff", '"staff" in identity.groups', "allow"))
    flip.clear(flip.open(8))


def test_a_route_that_leads_nowhere_ends_what_took_it(restored: Flip) -> None:
    flip = restored
    streams = flip.open(16)
    doomed = [stream for stream in streams if stream.client.sock.family is socket.AF_INET]
    assert len(doomed) == 8
    server = flip.world.server
    start = time.time_ns()
    flip.apply(
        resource("Route", "hole", "acme", prefix=f"{server.address4}/32", target={"blackhole": {}}),
    )
    flip.judge(streams, doomed, start, "route_changed: blackhole")
    flip.cli.ok("route", "delete", "--tenant", "acme", "hole")
    flip.clear(streams)
