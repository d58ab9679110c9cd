"""An on-ramp's worker process: WireGuard, admission tables, tunnels and links in one loop, and in worker 0 the gate.

    python -m falkirk.onramp.worker --control-fd N

It waits for `Setup`, accepts producers once the first `Update` is applied (or a second later, to tell them NOT_READY), and exits when its parent's end closes, on SIGTERM, and on
nothing that a producer or a flow worker sends. It leaves tunnels as they are: flow workers read on, and the next
on-ramp gets them back.

Long work is done in slices: an update is decoded `CHUNKS_A_TURN` chunks a turn and then applied at once; of the tunnels that it
touches `REVIEWS_A_TURN` are reviewed a turn.

Limit: reports that the parent doesn't read are kept; past `MAX_REPORTS` the gate refuses with NOT_READY until it does.
"""

from __future__ import annotations

import argparse
import mmap
import os
import resource
import select
import signal
import socket
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from falkirk.linux import seqpacket
from falkirk.linux.seqpacket import Peer
from falkirk.onramp import admission, control, gate, keys, parsers
from falkirk.onramp.admission import Admission, Grants
from falkirk.onramp.board import Board
from falkirk.onramp.context import Code, ContextRequest, Refusal
from falkirk.onramp.control import Changed, Close, Ended, Neighbour, Opened, Places, Setup, State, Update
from falkirk.onramp.gate import Gate
from falkirk.onramp.links import FlowLink
from falkirk.onramp.neighbours import Neighbours
from falkirk.onramp.reactor import Reactor
from falkirk.onramp.tables import Row, Tables
from falkirk.onramp.tunnels import Tunnel, TunnelTable
from falkirk.onramp.wireguard import WireGuard
from falkirk.runtime.counters import Counters
from falkirk.runtime.log import Log
from falkirk.wire import handover
from falkirk.wire.context import Transport
from falkirk.wire.endpoint import endpoint_text
from falkirk.wire.handover import Adopted, AdoptRefused, Held, TunnelClosed
from falkirk.wireguard.peer import Peer as WireGuardPeer

CHUNKS_A_TURN: Final = 8
REVIEWS_A_TURN: Final = 200
PATIENCE_S: Final = 1.0
MAX_REPORTS: Final = 50_000
_CONTROL_BYTES: Final = 256 * 1024
_OURSELVES: Final = Peer(os.getpid(), os.getuid(), os.getgid())
"""Who is at the other end of a WireGuard device's tunnel."""


class Worker:
    """Everything of one worker, wired together."""

    def __init__(
        self,
        reactor: Reactor,
        parent: socket.socket,
        setup: Setup,
        counters: Counters,
        board: Board,
        listener: socket.socket | None,
        outside: socket.socket | None = None,
        neighbours: Neighbours | None = None,
    ) -> None:
        """`listener` is the gate's, in worker 0; `outside` and `neighbours` are there where WireGuard is on: its UDP socket, and the other workers."""
        self._reactor, self._parent, self._counters = reactor, parent, counters
        self._number = setup.worker
        self._log = Log("onramp", setup.log_level, setup.log_format)
        self._tables = Tables()
        self._revision = ("", 0)
        self._updates: deque[Iterator[None]] = deque()
        self._reviews: deque[int] = deque()
        self._reports: deque[bytes] = deque()
        self._held: list[tuple[Tunnel, int, bool]] = []
        """WireGuard devices' tunnels of before this process, and their flow workers: to be taken up once it is known whose they are."""
        self._trunked: set[int] = set()
        """Flow workers that have told of all of theirs: their trunks are to be read behind that."""
        self._blocked = False
        self._loaded = False
        generation = time.time_ns()
        self._generations = [0] * setup.flow_workers
        self._links = [
            FlowLink(
                reactor,
                f"{setup.mesh_dir}/flow.worker.{number}.sock",
                number,
                setup.worker,
                generation,
                setup.peer_uids,
                self._log,
                self._on_link_up,
                self._on_flow,
                self._on_link_down,
            )
            for number in range(setup.flow_workers)
        ]
        self._tunnels = TunnelTable(
            reactor,
            self._links,
            board,
            self._on_opened,
            self._on_changed,
            self._on_ended,
            self._on_refused,
            self._on_taken,
            self._on_gone,
            mtu=setup.mtu,
            adopt_timeout_s=setup.adopt_timeout_ms / 1000,
            max_tunnels=setup.max_tunnels,
            max_per_device=setup.max_tunnels_per_device,
        )
        self._gate = (
            None
            if listener is None
            else Gate(
                reactor,
                listener,
                parsers.load(setup.parser),
                Grants(setup.grants, setup.device_uids),
                self._admit,
                self._on_refused,
                timeout_s=setup.context_timeout_ms / 1000,
                max_pending=setup.max_pending,
                max_pending_per_uid=setup.max_pending_per_uid,
            )
        )
        self._wireguard: WireGuard | None = None
        self._wireguard_mtu = setup.wireguard_mtu
        self._neighbours = neighbours
        if outside is not None and neighbours is not None:
            self._wireguard = WireGuard(
                reactor,
                outside,
                keys.read(Path(setup.wireguard_key)),
                setup.wireguard_mtu,
                setup.worker,
                setup.workers,
                lambda: self._tables if self._loaded else None,
                self._admit_device,
                self._tunnels.close,
                self._on_heard,
                neighbours,
                self._counters.add,
            )

    def start(self) -> None:
        """Join the loop."""
        self._reactor.add(self._parent.fileno(), select.EPOLLIN, self._on_parent)
        self._reactor.after += [self._update, self._review, *(link.flush for link in self._links), self._flush_reports]
        # Who has waited while a worker was replaced needn't be sent away.
        self._reactor.later(PATIENCE_S, self._open)
        for link in self._links:
            link.connect()
        if self._wireguard is not None:
            self._wireguard.start()
        self._report_state()

    def _open(self) -> None:
        if self._gate is not None:
            self._gate.open()

    # From the parent.

    def _on_parent(self, mask: int) -> None:
        if mask & select.EPOLLOUT:
            self._blocked = False
            self._reactor.mask(self._parent.fileno(), select.EPOLLIN)
        received = seqpacket.receive(self._parent, _CONTROL_BYTES)
        if received is None:
            return
        data, descriptors = received
        if not data:
            self._reactor.stop()
            return
        match control.TO_WORKER.decode(data):
            case Update() as update:
                self._updates.append(self._load(update, descriptors[0]))
            case Neighbour(worker) if self._neighbours is not None:
                self._neighbours.know(worker, socket.socket(fileno=descriptors[0]))
            case Places(places):
                if self._wireguard is not None:
                    self._wireguard.remember(places)
            case Close(tunnel, reason):
                self._tunnels.close(tunnel, reason)

    def _restore(self) -> None:
        """Take up the WireGuard devices of the process before, once it is known who they are."""
        if not self._loaded:
            return
        held, self._held = self._held, []
        for tunnel, worker, busy in held:
            device_id = tunnel.context.device_id
            wireguard = self._wireguard
            if tunnel.id not in self._tunnels:
                continue
            reason = (
                wireguard.restore(tunnel.id, device_id, worker, busy=busy) if wireguard is not None else "wireguard_off"
            )
            if reason:
                self._tunnels.close(tunnel.id, reason)
        trunked, self._trunked = self._trunked, set()
        for worker in trunked:
            if self._wireguard is not None:
                self._wireguard.listen(worker)

    def _load(self, update: Update, descriptor: int) -> Iterator[None]:
        """Decode an update in slices, then apply it at once."""
        size = os.fstat(descriptor).st_size
        content = memoryview(mmap.mmap(descriptor, size, prot=mmap.PROT_READ) if size else b"")
        os.close(descriptor)
        tables = Tables() if update.full else self._tables
        staged: list[Row] = []
        removed: list[str] = []
        for count, chunk in enumerate(control.unpack(content)):
            removed += chunk.removed
            if update.full:
                tables.apply(chunk.changed)
            else:
                staged += chunk.changed
            if count % CHUNKS_A_TURN == 0:
                yield
        touched = tables.apply(staged, removed)
        self._tables = tables
        self._reviews.extend(self._tunnels.ids() if update.full else self._tunnels.touched_by(touched))
        self._revision = (update.epoch, update.number)
        if not self._loaded:
            self._loaded = True
            self._open()
        self._restore()
        if self._wireguard is not None:
            self._wireguard.review(tables, None if update.full else touched)
        self._report_state()

    def _update(self) -> bool:
        if not self._updates:
            return False
        try:
            next(self._updates[0])
        except StopIteration:
            self._updates.popleft()
        return bool(self._updates)

    def _review(self) -> bool:
        for _ in range(min(REVIEWS_A_TURN, len(self._reviews))):
            self._tunnels.review(self._reviews.popleft(), self._tables)
        return bool(self._reviews)

    # From producers.

    def _admit(self, sock: socket.socket, peer: Peer, request: ContextRequest) -> None:
        try:
            if not self._loaded:
                raise Refusal(Code.NOT_READY, "the on-ramp knows no devices yet; try again")
            if len(self._reports) > MAX_REPORTS:
                raise Refusal(Code.NOT_READY, "the on-ramp's parent doesn't answer; try again")
            admitted = admission.admit(self._tables, request)
            self._tunnels.admit(sock, peer, admitted, request, time.time_ns())
        except Refusal as refusal:
            self._on_refused(refusal.code)
            gate.refuse(sock, refusal.answer())

    def _admit_device(self, admitted: Admission) -> int:
        """A WireGuard device has proved its key."""
        try:
            if len(self._reports) > MAX_REPORTS:
                raise Refusal(Code.NOT_READY, "the on-ramp's parent doesn't answer; try again")
            context = admitted.context
            request = ContextRequest(context.tenant, context.device, packed=True, transport=Transport.TRUNK)
            return self._tunnels.admit(None, _OURSELVES, admitted, request, time.time_ns(), self._wireguard_mtu)
        except Refusal as refusal:
            self._on_refused(refusal.code)
            raise

    def _on_refused(self, code: Code) -> None:
        self._counters.add(code.value)

    # From flow workers.

    def _on_link_up(self, worker: int, generation: int) -> None:
        self._generations[worker] = generation
        if self._wireguard is not None:
            self._links[worker].send(handover.Trunk(), self._wireguard.connect(worker))
        self._tunnels.link_up(worker, generation)
        self._report_state()

    def _on_link_down(self, worker: int) -> None:
        if self._wireguard is not None:
            self._trunked.discard(worker)
            self._wireguard.disconnect(worker)
        self._report_state()

    def _on_flow(self, worker: int, message: handover.Message, descriptor: int | None) -> None:
        match message:
            case Adopted(tunnel):
                self._tunnels.adopted(tunnel, self._generations[worker])
            case AdoptRefused(tunnel, code, text):
                self._tunnels.adopt_refused(tunnel, code, text)
            case TunnelClosed(tunnel, reason):
                self._tunnels.close(tunnel, reason, tell_flow=False)
            case handover.Traced(tunnel, trace_id, span_id, at):
                self._report(control.Traced(tunnel, trace_id, span_id, at))
            case Held() as held:
                self._on_held(worker, held, descriptor)
            case handover.Trunked():
                self._trunked.add(worker)
                self._restore()

    def _on_held(self, worker: int, held: Held, descriptor: int | None) -> None:
        sock, peer = None, _OURSELVES
        if descriptor is not None:
            sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET, 0, fileno=descriptor)
            peer = seqpacket.peer(sock)
        tunnel = self._tunnels.hold(worker, self._generations[worker], held, sock, peer, time.time_ns())
        if tunnel is not None and sock is None:
            self._held.append((tunnel, worker, held.busy))
            self._restore()
        if self._loaded:
            self._reviews.append(held.tunnel)

    def _on_taken(self, tunnel: Tunnel) -> None:
        if self._wireguard is not None:
            self._wireguard.taken(tunnel.id, tunnel.worker)

    def _on_gone(self, tunnel: Tunnel) -> None:
        if self._wireguard is not None:
            self._wireguard.closed(tunnel.id)

    # To the parent.

    def _on_opened(self, tunnel: Tunnel, resumed: bool) -> None:
        if not resumed:
            self._counters.add("admitted")
        self._report(
            Opened(
                tunnel=tunnel.id,
                context=tunnel.context,
                framing=tunnel.framing,
                mtu=tunnel.mtu,
                transport=tunnel.transport,
                flow_worker=tunnel.worker,
                uid=tunnel.peer.uid,
                pid=tunnel.peer.pid,
                admitted_at=tunnel.admitted_at,
                resumed=resumed,
                worker=self._number,
            )
        )

    def _on_heard(self, tunnel: int, peer: WireGuardPeer) -> None:
        endpoint = endpoint_text(peer.endpoint)
        self._report(control.Heard(tunnel, endpoint, peer.handshake_wall_ns, peer.rx_bytes, peer.tx_bytes))

    def _on_changed(self, tunnel: Tunnel) -> None:
        self._report(Changed(tunnel.id, tunnel.context))

    def _on_ended(self, tunnel: Tunnel, reason: str) -> None:
        self._counters.add("closed")
        self._report(Ended(tunnel.id, reason))

    def _report_state(self) -> None:
        epoch, number = self._revision
        self._report(State(epoch, number, tuple(link.up for link in self._links)))

    def _report(self, message: control.Message) -> None:
        self._reports.append(control.encode(message))

    def _flush_reports(self) -> bool:
        try:
            while self._reports and not self._blocked:
                if seqpacket.send(self._parent, self._reports[0]):
                    self._reports.popleft()
                else:
                    self._blocked = True
                    self._reactor.mask(self._parent.fileno(), select.EPOLLIN | select.EPOLLOUT)
        except (BrokenPipeError, ConnectionResetError):
            self._reactor.stop()
        return False


def _receive_setup(parent: socket.socket) -> tuple[Setup, list[int]] | None:
    """The parent's first message; None where it is gone."""
    with select.epoll() as epoll:
        epoll.register(parent.fileno(), select.EPOLLIN)
        received = None
        while received is None:
            epoll.poll()
            received = seqpacket.receive(parent, _CONTROL_BYTES)
    data, descriptors = received
    if not data:
        return None
    setup = control.TO_WORKER.decode(data)
    if not isinstance(setup, Setup):
        raise ValueError(f"the parent's first message is {type(setup).__name__}, not Setup")
    return setup, descriptors


def main(argv: list[str] | None = None) -> None:
    """Run until the parent is gone."""
    arguments = argparse.ArgumentParser(prog="falkirk.onramp.worker")
    arguments.add_argument("--control-fd", type=int, required=True)
    control_fd: int = arguments.parse_args(argv).control_fd
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    parent = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET, 0, fileno=control_fd)
    parent.setblocking(False)
    os.set_inheritable(control_fd, False)
    first = _receive_setup(parent)
    if first is None:
        return
    setup, (counters_fd, board_fd, *others) = first
    reactor = Reactor()
    signal.signal(signal.SIGTERM, lambda *_: reactor.stop())
    # A terminal's ^C goes to the whole group; the parent decides what it means.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    sockets = [socket.socket(fileno=descriptor) for descriptor in others]
    for sock in sockets:
        sock.setblocking(False)
    listener = sockets.pop(0) if setup.worker == 0 else None
    counters = Counters.attach(counters_fd, control.COUNTERS)
    board = Board(board_fd, setup.worker, setup.workers, setup.first_tunnel)
    outside, neighbours = None, None
    if sockets:
        outside, inbox = sockets
        neighbours = Neighbours(reactor, inbox, counters.add)
    Worker(reactor, parent, setup, counters, board, listener, outside, neighbours).start()
    reactor.run()


if __name__ == "__main__":
    main()
