"""The resolver's process: one thread, `python -m falkirk.router.worker --control-fd N`.

    flow worker ──SEQPACKET (UDP)──► question ──answering──► reply
    relay       ──stream (TCP)─────►    │                      ▲
                                        └─► exchange ──────────┘   with other resolvers

A connection begins with who asks (`falkirk.wire.asker`), which only processes of this mesh may say: the kernel tells their uid. A device's questions come
behind it, and can be anything. Each one's record is in the spool before its reply leaves, so that nobody learns a name unrecorded; while the disk
takes no records, questions are refused.

Questions are few and small next to packets, and most of their time is spent waiting for others, so this is an asyncio loop and not one of the
packet workers' own.

It exits when its parent's pair ends. Limits: `resolver_questions` of the settings wait for other resolvers at once, a twentieth of them for one device, which
has at most a twentieth of the connections too; a stream that is silent for `IDLE_S` is closed (RFC 7766 6.2.3); connections as RLIMIT_NOFILE allows.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import mmap
import os
import resource
import socket
import sys
import time
from collections import Counter
from collections.abc import Coroutine
from functools import partial
from ipaddress import ip_address
from pathlib import Path
from typing import Any, Final

import msgspec

from falkirk.decide.resolver import endpoint
from falkirk.decide.routes import RouteTable, martian
from falkirk.decide.rules import RuleTable
from falkirk.linux import heap, seqpacket
from falkirk.router import control, messages, query_log
from falkirk.router.answering import Answer, Answering, Ask
from falkirk.router.exchange import Unanswered, Upstreams, Way, exchange
from falkirk.router.name_table import NameTable
from falkirk.runtime import spool
from falkirk.runtime.counters import Counters
from falkirk.runtime.log import Log
from falkirk.wire import asker
from falkirk.wire.asker import Asker, NotAnAsker
from falkirk.wire.protocol import TCP, UDP

BUDGET: Final = 32
"""Questions of one connection that are taken before others have their turn."""
IDLE_S: Final = 20.0
PREFACE_S: Final = 5.0
"""A connection that hasn't said who asks by then is closed."""
TELL_S: Final = 0.1
"""How often the parent is told that the spool has grown, at most."""
RESERVED: Final = 64
SHARE: Final = 20
"""A device has at most this part of the questions that wait, and of the connections."""


class Resolver:
    """State of the process."""

    def __init__(self, start: control.Start, counters: Counters, parent: socket.socket) -> None:
        self.start = start
        self.log = Log("router.resolver", start.log_level, start.log_format)
        self._counters = counters
        for name in control.GAUGES:
            counters.view[counters.index[name]] = 0
        self._parent = parent
        self._answering = Answering()
        self._routes = RouteTable()
        self._upstreams = Upstreams(start.settings.resolver_upstreams)
        self._waiting: Counter[str] = Counter()
        self._tasks: set[asyncio.Task[None]] = set()
        directory = Path(start.spool)
        directory.mkdir(parents=True, exist_ok=True)
        spool.repair(directory)
        self._spool = spool.SpoolWriter(directory, max(time.time_ns(), spool.last_epoch(directory) + 1))
        self._untold = False
        self.connections = 0
        # Each question that waits for another resolver has a socket of its own.
        most = resource.getrlimit(resource.RLIMIT_NOFILE)[0] - RESERVED
        self.most_connections = max(most - start.settings.resolver_questions, most // 2)
        self._connected: Counter[str] = Counter()

    # what it must know

    def load(self, name: str, fd: int) -> None:
        """A snapshot; one that can't be read leaves the old one in force."""
        error = ""
        try:
            with open(fd, "rb") as file:
                size = os.fstat(file.fileno()).st_size
                # Written once; what keeps it needs no copy.
                data = memoryview(mmap.mmap(fd, 0, prot=mmap.PROT_READ) if size else b"")
            if name == "names":
                self._answering.names = NameTable.load(data)
            elif name == "routes":
                self._routes = RouteTable.loaded(data)
            else:
                loading = RuleTable.load(bytes(data))
                for _ in loading:
                    pass
                self._answering.rules = loading.table
        except (ValueError, OSError) as failed:
            error = str(failed)
        self.tell(control.Loaded(name, error))

    def tell(self, message: control.Message) -> None:
        """To the parent; what it doesn't take is told again with the next, or isn't needed."""
        with contextlib.suppress(OSError):
            seqpacket.send(self._parent, control.encode(message))

    def count(self, name: str, number: int = 1) -> None:
        """Count something."""
        self._counters.add(name, number)

    def spawn(self, work: Coroutine[Any, Any, None]) -> None:
        """Run something until it ends."""
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    # questions

    async def question(self, said: Asker, data: bytes, reply: ReplyTo) -> None:
        """One message of a device, from its first byte to the reply."""
        begun = time.monotonic_ns()
        try:
            answer = await self._answer(said, data)
        except messages.Unanswerable as why:
            self.count(why.reason)
            return
        took = time.monotonic_ns() - begun
        if not self._record(said, answer, took):
            # Unrecorded, nobody learns anything.
            refused = self._answering.refuse(data, "the audit log can't be written", udp=said.protocol == UDP)
            reply(refused.reply)
            return
        rcode = f"answers_{answer.said.rcode.lower()}"
        self.count(rcode if rcode in self._counters.index else "answers_other")
        if answer.said.answered_by == "policy":
            self.count("hidden")
        reply(answer.reply)

    async def _answer(self, said: Asker, data: bytes) -> Answer:
        found = self._answering.ask(said, data)
        if isinstance(found, Answer):
            return found
        most = self.start.settings.resolver_questions
        device = said.context.device_id
        if self._waiting.total() >= most or self._waiting[device] >= max(1, most // SHARE):
            self.count("dns_too_many")
            return self._answering.fail(found, "too many questions wait for other resolvers", messages.REFUSED)
        self._waiting[device] += 1
        self.count("waiting")
        try:
            return await self._elsewhere(said, found)
        finally:
            self._waiting[device] -= 1
            if not self._waiting[device]:
                del self._waiting[device]
            self._counters.view[self._counters.index["waiting"]] -= 1

    async def _elsewhere(self, said: Asker, ask: Ask) -> Answer:
        self.count("asked_forward" if ask.forward_to else "asked_upstream")
        try:
            ways = self._ways(said, ask)
            make = partial(messages.forwarded, ask.question, labels=ask.labels)
            response = await exchange(make, ways, self.start.settings.resolver_timeout_ms / 1000)
        except Unanswered as why:
            self.count("asked_failed")
            return self._answering.fail(ask, str(why))
        return self._answering.finish(ask, response)

    def _ways(self, said: Asker, ask: Ask) -> list[Way]:
        """Whom to ask: the node's own resolvers, or those that a zone names, by the routes of the device's virtual network."""
        if not ask.forward_to:
            return self._upstreams.ways()
        ways, blocked = [], []
        for text in ask.forward_to:
            host, port = endpoint(text)
            packed = ip_address(host).packed
            route = self._routes.lookup(said.context.virtual_network_id, packed)
            special = martian(packed)
            if special is not None or route is None or route.target != "internet":
                blocked.append(
                    f"{host}: "
                    + (special or (f"route {route.name} leads to a {route.target}" if route else "no route"))
                )
                continue
            egress = route.egress4 if len(packed) == 4 else route.egress6
            ways.append(Way(host, port, str(ip_address(egress)) if egress else ""))
        if not ways:
            raise Unanswered("; ".join(blocked))
        return ways

    def _record(self, said: Asker, answer: Answer, took_ns: int) -> bool:
        """The record of a question; False where the disk doesn't take it."""
        writer = self._spool
        if writer.stuck and not writer.flush():
            return False
        writer.add(
            query_log.line(
                query_log.Ids(self.start.node, control.AUDIT_WORKER, writer.epoch, writer.next()),
                time.time_ns(),
                said,
                answer.said,
                took_ns,
            )
        )
        written = writer.flush()
        if not written:
            self.log.error("audit_unwritable", error=writer.error)
        self.count("records")
        if not self._untold:
            self._untold = True
            asyncio.get_running_loop().call_later(TELL_S, self._tell_spooled)
        return written

    def _tell_spooled(self) -> None:
        self._untold = False
        self.tell(control.Spooled())

    # connections

    def trusted(self, sock: socket.socket) -> bool:
        """Whether a connection is from a process of this mesh, and there is room for it."""
        if seqpacket.peer(sock).uid not in self.start.uids:
            self.count("peer_refused")
            return False
        if self.connections >= self.most_connections:
            self.count("accept_failed")
            return False
        return True

    def asker(self, data: bytes, protocol: int) -> Asker | None:
        """Who asks, as a connection of a protocol begins; None, counted, where that isn't said properly or the device has too many.

        `left` ends what this begins.
        """
        try:
            said = asker.decode(data)
            if said.protocol != protocol:
                raise NotAnAsker(f"protocol {said.protocol} on the road of protocol {protocol}")
        except NotAnAsker as error:
            self.count("asker_refused")
            self.log.error("asker_refused", error=str(error))
            return None
        device = said.context.device_id
        if self._connected[device] >= max(1, self.most_connections // SHARE):
            self.count("dns_too_many")
            return None
        self._connected[device] += 1
        return said

    def left(self, said: Asker | None) -> None:
        """The connection of somebody who was let in is over."""
        if said is not None:
            self._connected[said.context.device_id] -= 1
            if not self._connected[said.context.device_id]:
                del self._connected[said.context.device_id]

    def opened(self, change: int) -> None:
        """A connection more, or one less."""
        self.connections += change
        self._counters.view[self._counters.index["connections"]] = self.connections


class ReplyTo:
    """Where a reply goes; a connection that has ended takes none."""

    def __call__(self, reply: bytes) -> None:
        """Send it."""
        raise NotImplementedError


class Datagrams(ReplyTo):
    """A SEQPACKET connection: a device's UDP port."""

    def __init__(self, resolver: Resolver, sock: socket.socket) -> None:
        self._resolver, self._sock = resolver, sock
        self._said: Asker | None = None
        self._open = True
        loop = asyncio.get_running_loop()
        loop.add_reader(sock, self._readable)
        self._deadline = loop.call_later(PREFACE_S, self._close)
        resolver.opened(1)

    def _readable(self) -> None:
        for _ in range(BUDGET):
            if not self._open:
                return
            try:
                received = seqpacket.receive(self._sock, messages.LARGEST + 1, 0)
            except OSError:
                received = b"", []
            if received is None:
                return
            data, _ = received
            if not data:
                self._close()
            elif self._said is None:
                self._deadline.cancel()
                self._said = self._resolver.asker(data, UDP)
                if self._said is None:
                    self._close()
            else:
                self._resolver.count("questions_udp")
                self._resolver.spawn(self._resolver.question(self._said, data, self))

    def __call__(self, reply: bytes) -> None:
        """Send it; dropped and counted where the flow worker doesn't read."""
        try:
            sent = self._open and seqpacket.send(self._sock, reply)
        except OSError:
            sent = False
        if not sent:
            self._resolver.count("dns_unsent")

    def _close(self) -> None:
        if self._open:
            self._open = False
            self._deadline.cancel()
            asyncio.get_running_loop().remove_reader(self._sock)
            self._sock.close()
            self._resolver.left(self._said)
            self._resolver.opened(-1)


class Streamed(ReplyTo):
    """A stream: replies may come in another order than their questions (RFC 7766 6.2.1.1)."""

    def __init__(self, resolver: Resolver, writer: asyncio.StreamWriter) -> None:
        self._resolver, self._writer = resolver, writer

    def __call__(self, reply: bytes) -> None:
        """Send it."""
        if self._writer.is_closing():
            self._resolver.count("dns_unsent")
        else:
            self._writer.write(len(reply).to_bytes(2, "big") + reply)


async def stream(resolver: Resolver, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """A device's TCP connection."""
    sock = writer.get_extra_info("socket")
    if not resolver.trusted(sock):
        writer.close()
        return
    resolver.opened(1)
    reply = Streamed(resolver, writer)
    said: Asker | None = None
    try:
        said = await _preface(resolver, reader)
        async with asyncio.TaskGroup() as tasks:
            while said is not None and (data := await _next(reader, writer)) is not None:
                resolver.count("questions_tcp")
                tasks.create_task(resolver.question(said, data, reply))
            # A client that has said all still gets what it asked for.
    finally:
        writer.close()
        resolver.left(said)
        resolver.opened(-1)


async def _preface(resolver: Resolver, reader: asyncio.StreamReader) -> Asker | None:
    try:
        async with asyncio.timeout(PREFACE_S):
            size = int.from_bytes(await reader.readexactly(asker.LENGTH), "big")
            return resolver.asker(await reader.readexactly(size) if size <= asker.MAX else b"", TCP)
    except (TimeoutError, OSError, EOFError):
        return None


async def _next(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bytes | None:
    """The next question; None where the stream is over."""
    try:
        async with asyncio.timeout(IDLE_S):
            # A device that asks and doesn't read is waited for, not buffered for.
            await writer.drain()
            return await reader.readexactly(int.from_bytes(await reader.readexactly(2), "big"))
    except (TimeoutError, OSError, EOFError):
        return None


def listen_stream(path: Path, mode: int) -> socket.socket:
    """A listening stream socket with exactly these permissions; one that a dead process left is replaced (the parent's lock says that it is dead)."""
    path.unlink(missing_ok=True)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
    os.fchmod(sock.fileno(), mode)
    sock.bind(str(path))
    path.chmod(mode)
    sock.listen(seqpacket.BACKLOG)
    return sock


async def serve(parent: socket.socket) -> None:
    """Until the parent's pair ends."""
    loop = asyncio.get_running_loop()
    over = loop.create_future()
    resolver: Resolver | None = None

    def heard() -> None:
        nonlocal resolver
        received = seqpacket.receive(parent, control.MAX_DATAGRAM)
        if received is None:
            return
        data, fds = received
        if not data:
            loop.remove_reader(parent)
            if not over.done():
                over.set_result(None)
            return
        message = control.TO_WORKER.decode(data)
        if isinstance(message, control.Start):
            resolver = Resolver(message, Counters.attach(fds[0], control.COUNTERS), parent)
            resolver.spawn(_listen(resolver))
        elif resolver is not None:
            resolver.load(message.name, fds[0])

    loop.add_reader(parent, heard)
    await over


async def _listen(resolver: Resolver) -> None:
    loop = asyncio.get_running_loop()
    mesh, mode = Path(resolver.start.mesh_dir), resolver.start.mode
    listener = seqpacket.listen(mesh / asker.DATAGRAMS, mode)

    def accept() -> None:
        try:
            sock = seqpacket.accept(listener)
        except OSError:
            resolver.count("accept_failed")
            return
        if sock is not None:
            if resolver.trusted(sock):
                Datagrams(resolver, sock)
            else:
                sock.close()

    loop.add_reader(listener, accept)
    server = await asyncio.start_unix_server(
        partial(stream, resolver), sock=listen_stream(mesh / asker.STREAMS, mode), limit=messages.LARGEST + 2
    )
    resolver.tell(control.Ready())
    await server.serve_forever()


def main() -> int:
    """The process; its exit status."""
    heap.give_back()
    parser = argparse.ArgumentParser()
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    parser.add_argument("--control-fd", type=int, required=True)
    parent = socket.socket(fileno=parser.parse_args().control_fd)
    parent.setblocking(False)
    with contextlib.suppress(msgspec.DecodeError):
        asyncio.run(serve(parent))
    return 0


if __name__ == "__main__":
    sys.exit(main())
