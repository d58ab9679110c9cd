"""An upgrader worker: one single-threaded process, `python -m falkirk.upgrader.worker --control-fd N`.

A turn of its loop: wait; then for each ready descriptor take what flow says (dial), finish dials, accept clients' streams and
pair them with their upstreams by slot, relay; then end what is overdue, send flow one datagram of answers, and
close what is over.

An upstream that is a device is dialled inside the lowering namespace (`lowering`); from its socket on there is no difference. A stream whose client
is in hand already (`callers`) is open as soon as its upstream is connected.

A client that comes from a slot where none is expected gets a RST. An upstream that resets while its client is awaited ends
the slot at once; what it sends or ends before stays with the kernel until the client is there.

It exits when its parent's pair ends (all streams are reset by their SO_LINGER), and on SIGTERM once no stream is left, no flow
worker is, or `DRAIN_S` is over; meanwhile it refuses to dial, with ESHUTDOWN.

Limits: no gRPC, no asyncio; streams as RLIMIT_NOFILE allows; a flow worker must be of the same build (see `handover`).
"""

from __future__ import annotations

import argparse
import errno
import gc
import os
import resource
import select
import signal
import socket
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

from falkirk.linux import scheduling, seqpacket, sockets
from falkirk.linux.sockets import Socket
from falkirk.runtime.counters import Counters
from falkirk.runtime.log import Log
from falkirk.upgrader import control, dial, resolver, sessions
from falkirk.upgrader.callers import Callers
from falkirk.upgrader.deadlines import Deadlines
from falkirk.upgrader.lowering import Asked, Lowering
from falkirk.upgrader.pairing import Pairing
from falkirk.upgrader.relay import MAX_PIPES, Relay, TcpStream
from falkirk.upgrader.stream import DIALLED, End, Phase, Reason, Stream, Trace
from falkirk.wire import handover
from falkirk.wire.handover import Closed, Connected, DialFailed, OpenSocket, Prepare, SocketFailed, SocketOpened
from falkirk.wire.slots import SlotPlan

ACCEPTS: Final = 64
"""Clients accepted a turn and listener."""
EVENTS: Final = 256
"""Descriptors looked at a turn."""
DRAIN_S: Final = 2.5
RESERVED: Final = 64 + 2 * MAX_PIPES
"""Descriptors kept for everything but streams."""
_STREAM: Final = int(socket.SOCK_STREAM)
IDLE_S: Final = 7440
"""RFC 5382 REQ-5: not before 2 h 4 min, where flow doesn't say."""


class Worker:
    """Everything that one worker holds. `slot_of` gives the slot of a client's address, in text form."""

    def __init__(
        self,
        setup: control.Setup,
        listeners: Sequence[socket.socket],
        slot_of: Callable[[str], int],
        flow_listener: socket.socket,
        device_fds: Sequence[int],
        counters: Counters,
        report: Callable[[control.FromWorker], bool],
        capacity: int,
    ) -> None:
        self._setup = setup
        self._slot_of = slot_of
        self._count = counters.view
        self._index = dict(counters.index)
        self._report = report
        self._capacity = capacity
        self._congestion = dial.usable(setup.congestion)
        self._mesh = Path(setup.path).parent
        self._uids = frozenset(setup.uids)
        self._log = Log("upgrader", setup.log_level, setup.log_format)
        self._epoll = select.epoll()
        self._relay = Relay(self._epoll, self._over)
        self._slots: dict[int, TcpStream] = {}
        self._asked: dict[int, Asked] = {}
        """Slots whose upstream's socket is still to come."""
        self._lowering = Lowering(self._epoll)
        self._callers = Callers(report)
        self._dialling = 0
        self._idle_s = IDLE_S
        self._deadlines: Deadlines[TcpStream | Asked] = Deadlines(time.monotonic())
        self._listeners = {listener.fileno(): (listener, int(listener.family)) for listener in listeners}
        for listener in listeners:
            # Clients' sockets inherit these, which spares two calls a stream.
            sockets.reset_on_close(listener)
            sockets.no_delay(listener)
            self._epoll.register(listener, select.EPOLLIN)
        hello = handover.Hello("upgrader", setup.worker, setup.generation)
        devices = handover.Devices(setup.workers, setup.listener_port, setup.mtu)
        self._pairing = Pairing(
            self._epoll,
            flow_listener,
            hello,
            (devices, device_fds),
            frozenset(setup.uids),
            self._refused,
            self._relay.bury,
        )
        self.draining = False
        for name in control.GAUGES:
            self._count[self._index[name]] = 0

    def watch(self, fd: int) -> None:
        """Also wake up for a descriptor that isn't the worker's own; `turn` returns those that are ready."""
        self._epoll.register(fd, select.EPOLLIN)

    def helper(self, pair: socket.socket) -> None:
        """The pair to the lowering namespace's (new) helper."""
        self._lowering.attach(pair)

    def lower(self, message: control.Lower, caller: socket.socket) -> None:
        """Somebody with a stream in hand wants a way to a device."""
        self._add("lower_asked")
        self._pairing.say(self._callers.wanted(message, caller))
        # Between two turns: nothing else may come that would have it sent, or its sender told.
        self._pairing.flush()
        if not self._pairing.paired:
            self._callers.lost()

    @property
    def idle(self) -> bool:
        """Nothing is left that a drain should wait for."""
        return not (self._slots or self._asked) or not self._pairing.paired

    def turn(self, timeout: float = -1.0) -> list[int]:
        """Wait for at most `timeout` seconds (negative: for anything), and do what there is; descriptors of others."""
        due = self._deadlines.wait(time.monotonic())
        if due >= 0 and not 0 <= timeout < due:
            timeout = due
        ready = self._epoll.poll(timeout, EVENTS)
        now = time.monotonic()
        streams = self._relay.streams
        others: list[int] = []
        for fd, events in ready:
            stream = streams[fd] if fd < len(streams) else None
            if stream is not None:
                if stream.phase is Phase.DIALLING:
                    self._dialled(stream, events, now)
                else:
                    self._relay.on_event(stream, fd, events, now)
            elif fd in self._listeners:
                self._accept(*self._listeners[fd], now)
            elif self._pairing.owns(fd):
                for message in self._pairing.on_event(fd, events):
                    self._obey(message, now)
            elif self._lowering.owns(fd):
                for asked, result in self._lowering.on_event(events):
                    self._answered(asked, result, now)
            else:
                others.append(fd)
        for overdue in self._deadlines.expire(now):
            self._expire(overdue, now)
        if self._callers.asking and not self._pairing.paired:
            self._callers.lost()
        self._pairing.flush()
        self._relay.close_buried()
        self._publish()
        return others

    def _obey(self, message: handover.Message, now: float) -> None:
        if isinstance(message, Prepare):
            self._prepare(message, now)
        elif isinstance(message, handover.Abort):
            self._abort(message.slot)
        elif isinstance(message, OpenSocket):
            self._open_socket(message)
        elif isinstance(message, handover.AbortAll):
            for slot in (*self._asked, *self._slots):
                self._abort(slot)
            self._callers.lost()
        elif isinstance(message, handover.LowerRefused):
            self._add("lower_refused")
            self._callers.refused(message)

    def _abort(self, slot: int) -> None:
        asked, stream = self._asked.get(slot), self._slots.get(slot)
        if asked is not None:
            self._forget_asked(asked)
            self._ended(slot, Reason.ABORTED, 0, 0)
        elif stream is not None:
            self._relay.reset(stream, Reason.ABORTED)

    def _prepare(self, wish: Prepare, now: float) -> None:
        old = self._slots.get(wish.slot) or self._asked.get(wish.slot)
        if old is not None:
            # Flow owns the slots: it has forgotten this one, and expects no end of it.
            self._add("slot_replaced")
            self._callers.over(wish.slot, Reason.ABORTED)
            if isinstance(old, Asked):
                self._forget_asked(old)
            else:
                self._forget(old)
        try:
            if wish.request and not self._callers.prepared(wish):
                raise OSError(errno.ECONNABORTED, "nobody asked")
            if self.draining:
                raise OSError(errno.ESHUTDOWN, "draining")
            if wish.treatment != "l4":
                raise OSError(errno.EPROTONOSUPPORT, "treatment isn't built")
            if len(self._slots) + len(self._asked) >= self._capacity:
                raise OSError(errno.EMFILE, "no descriptors")
            if wish.preface:
                self._dial(wish, resolver.stream(self._mesh, wish.preface, self._uids), now)
                return
            if not wish.lower:
                self._dial(wish, dial.start(wish.destination, wish.port, wish.egress, self._congestion), now)
                return
        except OSError as error:
            self._fail(wish.slot, error.errno or errno.EIO, 0)
            return
        asked = self._asked[wish.slot] = self._lowering.ask(wish, now)
        self._dialling += 1
        self._deadlines.add(asked)

    def _answered(self, asked: Asked, result: Socket | int, now: float) -> None:
        """A socket of the lowering namespace has come, or doesn't."""
        self._forget_asked(asked)
        if isinstance(result, int):
            self._fail(asked.wish.slot, result, int((now - asked.since) * 1e9))
        else:
            self._dial(asked.wish, result, asked.since)

    def _forget_asked(self, asked: Asked) -> None:
        self._lowering.forget(asked)
        self._deadlines.remove(asked)
        del self._asked[asked.wish.slot]
        self._dialling -= 1

    def _dial(self, wish: Prepare, upstream: Socket, now: float) -> None:
        """Await the outcome of a socket that connects since `now`."""
        idle_s = wish.idle_timeout_s or IDLE_S
        if idle_s != self._idle_s:
            self._idle_s = idle_s
        trace = Trace(wish.flow_id, wish.span_id, time.time_ns()) if wish.span_id else None
        stream: TcpStream = Stream(
            wish.slot, End(upstream, DIALLED), now, wish.connect_timeout_ms / 1000, self._idle_s, trace
        )
        self._slots[wish.slot] = stream
        self._dialling += 1
        self._relay.dial(stream)
        self._deadlines.add(stream)

    def _open_socket(self, wish: OpenSocket) -> None:
        begun = time.time_ns() if wish.span_id else 0
        code = 0
        try:
            if self.draining:
                raise OSError(errno.ESHUTDOWN, "draining")
            if wish.preface:
                sock, local, raw = resolver.datagrams(self._mesh, wish.preface, self._uids), 0, False
            else:
                sock, local, raw = sessions.start(wish)
        except OSError as error:
            code = error.errno or errno.EIO
            self._pairing.say(SocketFailed(wish.token, code))
        else:
            self._pairing.give(SocketOpened(wish.token, local, raw), sock)
        self._add(sessions.kind(code))
        if wish.span_id:
            status = os.strerror(code) if code else ""
            attributes: dict[str, str | int] = {"worker": self._setup.worker, "errno": code}
            self._tell(control.SpanEnded("dial", wish.flow_id, wish.span_id, begun, time.time_ns(), attributes, status))

    def _dialled(self, stream: TcpStream, events: int, now: float) -> None:
        code = dial.outcome(stream.upstream.handle, events)
        if code is None:
            return
        took = int((now - stream.active) * 1e9)
        if stream.trace is not None:
            self._span("dial", stream, "" if code == 0 else os.strerror(code), errno=code)
        if code:
            self._forget(stream)
            self._fail(stream.slot, code, took)
            return
        self._add("dial_connected")
        self._dialling -= 1
        stream.connected(now, self._setup.open_timeout_s)
        self._deadlines.add(stream)
        self._pairing.say(Connected(stream.slot, took))
        caller = self._callers.connected(stream.slot)
        if caller is not None:
            self._open(stream, caller, now)

    def _accept(self, listener: socket.socket, family: int, now: float) -> None:
        for _ in range(ACCEPTS):
            try:
                # What accept() wraps, which would make one more object, and ask the kernel what is known here.
                fd, address = listener._accept()  # type: ignore[attr-defined]
            except BlockingIOError:
                return
            except OSError:
                # ECONNABORTED: it has gone already. Others (no memory) may pass.
                self._add("accept_failed")
                return
            client = Socket(family, _STREAM, 0, fd)
            stream = self._slots.get(self._slot_of(address[0]))
            if stream is None or stream.phase is not Phase.HELD:
                self._add("accept_unknown_slot")
                client.close()
                continue
            client.setblocking(False)
            self._open(stream, client, now)

    def _open(self, stream: TcpStream, client: Socket, now: float) -> None:
        if stream.trace is not None:
            stream.trace.since_ns = time.time_ns()
        self._relay.open(stream, client, now)
        self._deadlines.add(stream)
        self._add("opened")

    def _expire(self, stream: TcpStream | Asked, now: float) -> None:
        if isinstance(stream, Asked):
            self._forget_asked(stream)
            self._fail(stream.wish.slot, errno.ETIMEDOUT, int((now - stream.since) * 1e9))
            return
        if stream.phase is not Phase.DIALLING:
            self._relay.reset(stream, stream.expired())
            return
        if stream.trace is not None:
            self._span("dial", stream, os.strerror(errno.ETIMEDOUT), errno=errno.ETIMEDOUT)
        self._forget(stream)
        self._fail(stream.slot, errno.ETIMEDOUT, int((now - stream.active) * 1e9))

    def _fail(self, slot: int, code: int, took_ns: int) -> None:
        self._add(dial.kind(code))
        self._callers.over(slot, errno.errorcode.get(code, str(code)))
        self._pairing.say(DialFailed(slot, code, took_ns))

    def _forget(self, stream: TcpStream) -> None:
        """A stream that flow needs no `Closed` of."""
        self._deadlines.remove(stream)
        del self._slots[stream.slot]
        self._dialling -= stream.phase is Phase.DIALLING
        self._relay.release(stream)

    def _over(self, stream: TcpStream, reason: str) -> None:
        self._deadlines.remove(stream)
        del self._slots[stream.slot]
        self._dialling -= stream.phase is Phase.DIALLING
        up, down = stream.relayed()
        self._ended(stream.slot, reason, up, down)
        if stream.trace is not None and stream.phase is Phase.OPEN:
            status = "" if reason == Reason.FINISHED else reason
            self._span("relay", stream, status, reason=reason, bytes_up=up, bytes_down=down)

    def _ended(self, slot: int, reason: str, up: int, down: int) -> None:
        self._add("closed_" + reason)
        self._callers.over(slot, reason, up, down)
        self._pairing.say(Closed(slot, reason, up, down))

    def _span(self, name: str, stream: TcpStream, status: str, **attributes: str | int) -> None:
        trace = stream.trace
        assert trace is not None
        span = control.SpanEnded(
            name,
            trace.flow_id,
            trace.span_id,
            trace.since_ns,
            time.time_ns(),
            {"slot": stream.slot, "worker": self._setup.worker, **attributes},
            status,
        )
        self._tell(span)

    def _tell(self, span: control.SpanEnded) -> None:
        if not self._report(span):
            self._add("span_dropped")

    def _refused(self, reason: str, **fields: object) -> None:
        self._add("message_refused" if reason == "message" else "peer_refused")
        self._log.warning("flow_worker_refused", reason=reason, worker=self._setup.worker, **fields)

    def _add(self, name: str) -> None:
        self._count[self._index[name]] += 1

    def _publish(self) -> None:
        count, index, relay = self._count, self._index, self._relay
        count[index["streams"]] = len(self._slots) + len(self._asked) - self._dialling
        count[index["dialling"]] = self._dialling
        count[index["paired"]] = self._pairing.paired
        if relay.bytes_up:
            count[index["bytes_up"]] += relay.bytes_up
            relay.bytes_up = 0
        if relay.bytes_down:
            count[index["bytes_down"]] += relay.bytes_down
            relay.bytes_down = 0

    def close(self) -> None:
        """Reset every stream and close what is the worker's own."""
        for slot in (*self._asked, *self._slots):
            self._abort(slot)
        self._pairing.flush()
        self._pairing.close()
        self._lowering.close()
        self._callers.close()
        self._relay.close()
        for listener, _ in self._listeners.values():
            listener.close()
        self._epoll.close()


def raise_descriptor_limit() -> int:
    """Take as many descriptors as the kernel grants; how many streams that is."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return max(1, (hard - RESERVED) // 2)


def slots_of(worker: int, workers: int) -> Callable[[str], int]:
    """The slot of a client's address, negative or too large where it isn't one of this worker's."""
    slot_of = SlotPlan(workers).slot_of

    def find(address: str) -> int:
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        return slot_of(worker, socket.inet_pton(family, address))

    return find


def run(parent: socket.socket) -> None:
    """Everything, from the parent's Setup to the end of its pair."""
    poll = select.poll()
    poll.register(parent, select.POLLIN)
    while (received := seqpacket.receive(parent, control.MAX_DATAGRAM)) is None:
        poll.poll()
    data, fds = received
    if not data:
        return
    setup = control.TO_WORKER.decode(data)
    counters = Counters.attach(fds[0], control.COUNTERS)
    devices, helper = fds[1:5], socket.socket(fileno=fds[5])
    listeners = [socket.socket(fileno=fd) for fd in fds[6:]]
    for listener in listeners:
        listener.setblocking(False)
    path = Path(setup.path)
    worker = Worker(
        setup,
        listeners,
        slots_of(setup.worker, setup.workers),
        seqpacket.listen(path, setup.mode),
        devices,
        counters,
        lambda said: seqpacket.send(parent, control.encode(said)),
        raise_descriptor_limit(),
    )
    worker.helper(helper)
    woken, wake = socket.socketpair()
    with woken, wake:
        for sock in (woken, wake):
            sock.setblocking(False)
        signal.set_wakeup_fd(wake.fileno())
        signal.signal(signal.SIGTERM, lambda *_: None)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        worker.watch(parent.fileno())
        worker.watch(woken.fileno())
        gc.collect()
        gc.freeze()
        seqpacket.send(parent, control.encode(control.Ready()))
        deadline = 0.0
        while not worker.draining or (not worker.idle and time.monotonic() < deadline):
            ready = worker.turn(max(0.0, deadline - time.monotonic()) if worker.draining else -1.0)
            if woken.fileno() in ready and not worker.draining:
                woken.recv(64)
                worker.draining = True
                deadline = time.monotonic() + DRAIN_S
            if parent.fileno() in ready and not _listen(worker, parent):
                break
    # While the listener lives nobody else can have bound there; a moment later a successor may.
    path.unlink(missing_ok=True)
    worker.close()


def _listen(worker: Worker, parent: socket.socket) -> bool:
    """One message of the parent's; False where it is gone."""
    received = seqpacket.receive(parent, control.MAX_DATAGRAM)
    if received is None:
        return True
    data, fds = received
    if not data:
        return False
    match control.TO_WORKER.decode(data):
        case control.HelperPair():
            worker.helper(socket.socket(fileno=fds[0]))
        case control.Lower() as message:
            worker.lower(message, socket.socket(fileno=fds[0]))
    return True


def main(arguments: Sequence[str] | None = None) -> int:
    """The process; 0 after a drain or the parent's end."""
    parser = argparse.ArgumentParser(prog="falkirk.upgrader.worker", description=__doc__)
    parser.add_argument("--control-fd", type=int, required=True)
    with socket.socket(fileno=parser.parse_args(arguments).control_fd) as parent:
        parent.setblocking(False)
        scheduling.batch()
        run(parent)
    return 0


if __name__ == "__main__":
    sys.exit(main())
