"""WireGuard clients: datagrams of a UDP socket in, a tunnel for each device that has a session out.

    socket ──train──► Node.receive ──packets by peer──► trunk, by the tunnel's number ──► flow worker
           ◄─train─── Node.send ◄──packets of a tunnel── trunk ◄─────────────────────────

The key is what tells whose packets they are: `Tables.device_by_key`, whatever address they come from. A key that is no device's, or that of a
device or user which isn't let in, costs one Diffie-Hellman and has no answer. A device that has proved its key, by the first packet of a session, is
admitted as a producer with a context would be, and from then on there is no difference but one: its packets go by the trunk of its flow worker, beside
those of others, and it has no descriptor. Whatever closes a tunnel (a device that is disabled, removed or moved; an operator) ends its sessions in the same turn.

Of a device that may still come, but not as it was (another address or network), a handshake is asked at once, and the tunnel is made anew.

With several workers a device is one worker's, by its key (`control.owner`), from whatever address it comes: so its sessions, its tunnel and the timestamp that makes a replay
known are in one place. What came to another one is passed on (`neighbours`), and answered from its own worker's socket.

Data of a session that isn't here any more come to the worker that its index names. Where a device was last heard from is known to that one as long as there are as many workers as
before; else all of them know it from the start, and the one asks the device's.

Sessions end with the process, tunnels don't: flow workers tell the next one of them, and it asks each device for a handshake, those with flows first. Otherwise a device's next
packet would be lost by which it is found out that its session is gone: for a new connection that is a second, for a name that is looked up five.

Limits: 64 KiB a datagram of packets; `HELD` packets of a device wait until its flow worker reads its tunnel.
"""

from __future__ import annotations

import os
import select
import socket
import time
from collections import deque
from collections.abc import Callable, Iterable
from typing import Final

from falkirk.linux import sieve, trains
from falkirk.onramp import admission
from falkirk.onramp.admission import Admission
from falkirk.onramp.context import Refusal
from falkirk.onramp.control import WIREGUARD, Asked, Passed, owner
from falkirk.onramp.neighbours import Neighbours
from falkirk.onramp.reactor import Reactor, Timer
from falkirk.onramp.tables import DeviceRow, Tables, Touched
from falkirk.onramp.trunk import Trunk
from falkirk.wire.endpoint import host_and_port
from falkirk.wire.malformed import MalformedPacket
from falkirk.wire.packet import split
from falkirk.wire.trunk import DATAGRAM
from falkirk.wireguard.allowed import Allowed
from falkirk.wireguard.counters import REASONS
from falkirk.wireguard.guard import let_in
from falkirk.wireguard.node import Node
from falkirk.wireguard.outcome import Arrivals
from falkirk.wireguard.peer import Endpoint, Peer

BUDGET: Final = 64
"""Trains of the socket, and datagrams of one trunk, a turn."""
HELD: Final = 64
PLACES: Final = 100_000
"""Endpoints that are remembered; beyond, the oldest are forgotten, and their devices come back by their own timers."""
REPORT_S: Final = 1.0
"""How often the parent hears of what has changed about devices."""
PLACE_S: Final = 0.05
"""How soon it hears where a device is that has come or moved: whoever takes over from this process asks it for a handshake there."""
SIFT_S: Final = 0.1
"""How often it is looked how much of a flood is to be read, while there is one."""
ASKED: Final = 10
ASK_S: Final = 0.02
"""After a restart so many devices are asked for a handshake in so many seconds: a tenth of a processor."""
PATIENCE_S: Final = 3.0
"""How long one that has no flows may take to answer that; it isn't asked again, as the protocol would after 5 s: many may be gone."""
_ASKED: Final = ("no_cookie", "handshake_rate")
"""Why initiations without a cookie come to nothing under load."""
AWAITED_S: Final = 180.0
"""How long a device whose tunnel is older than this process may take to agree on a session: no session of before carries longer."""
Admit = Callable[[Admission], int]
"""Asks the device's flow worker to read a tunnel; its number. Raises Refusal."""
Close = Callable[[int, str], None]
Heard = Callable[[int, Peer], None]
"""Something is new about the device of a tunnel: its endpoint, its last handshake, its bytes."""


class Link:
    """A device that is known to the engine: its tunnel."""

    __slots__ = ("device_id", "held", "trunk", "tunnel")

    def __init__(self, device_id: str) -> None:
        self.device_id = device_id
        self.tunnel = 0
        """0 where it has none: before its first packet, and after its tunnel is closed."""
        self.trunk: Trunk | None = None
        """Where its packets go; None before its flow worker reads the tunnel."""
        self.held: list[bytes] | None = None
        """Packets that wait for that."""


class WireGuard:
    """Everything of one UDP socket, that of worker number `worker` of `workers`. `tables` gives what is known at present, None while that is nothing."""

    def __init__(
        self,
        reactor: Reactor,
        sock: socket.socket,
        private_key: bytes,
        mtu: int,
        worker: int,
        workers: int,
        tables: Callable[[], Tables | None],
        admit: Admit,
        close: Close,
        heard: Heard,
        neighbours: Neighbours,
        count: Callable[[str, int], None],
    ) -> None:
        self._reactor, self._sock, self._tables = reactor, sock, tables
        self._admit, self._close, self._heard, self._count = admit, close, heard, count
        self._worker, self._workers, self._neighbours = worker, workers, neighbours
        self._node = Node(private_key, rng=os.urandom, mtu=mtu, worker=worker, workers=workers, find=self._find)
        self._arrivals = Arrivals()
        self._train = memoryview(bytearray(trains.MAX_RECEIVE))
        self._buffer = memoryview(bytearray(DATAGRAM))
        self._trunks: dict[int, Trunk] = {}
        """By flow worker."""
        self._peers: dict[str, Peer] = {}
        """By device id."""
        self._by_tunnel: dict[int, Peer] = {}
        self._places: dict[Endpoint, str] = {}
        """Where a device was heard from, authentically: its id, by endpoint."""
        self._last: dict[str, Endpoint] = {}
        """The other way round, of devices that haven't come since this process started."""
        self._awaited: deque[tuple[float, int]] = deque()
        """Until when the devices of which tunnels are awaited."""
        self._asking: deque[Peer] = deque()
        """Whom to ask for a handshake after a restart."""
        self._asking_once: deque[Peer] = deque()
        """And then whom, once."""
        self._asked_once: deque[tuple[float, Peer]] = deque()
        """Who was, and until when it may answer."""
        self._news: set[Peer] = set()
        self._elsewhere: set[Peer] = set()
        """Those of them that have come or moved."""
        self._timer: Timer | None = None
        self._due = float("inf")
        self._counted: dict[str, int] = dict.fromkeys(REASONS, 0)
        self._unread = sieve.unread(sock)
        self._asked = 0
        self._looked = time.monotonic()
        self._let_in = 1.0
        """The share of initiations without a cookie that the kernel lets in."""

    def start(self) -> None:
        """Join the loop."""
        # The socket is the parent's: a process that was killed under a flood has left its sieve there.
        sieve.let_in(self._sock, self._let_in)
        self._reactor.add(self._sock.fileno(), select.EPOLLIN, self._from_socket)
        self._neighbours.start(self._from_neighbours)
        self._reactor.after.append(self._after)
        self._reactor.later(REPORT_S, self._report)

    # who may come

    def _find(self, public_key: bytes) -> Peer | int | None:
        """The engine asks for a key that it doesn't know."""
        tables = self._tables()
        if tables is None:
            self._drop("not_ready")
            return None
        row = tables.device_by_key(public_key)
        if row is None:
            return None
        if _unwelcome(tables, row, public_key):
            self._drop("not_admitted")
            return None
        whose = owner(public_key, self._workers)
        return self._add(row, None) if whose == self._worker else whose

    def _add(self, row: DeviceRow, endpoint: Endpoint | None) -> Peer:
        endpoint = self._last.pop(row.id, None) if endpoint is None else endpoint
        peer = self._node.add_peer(row.public_key, allowed=Allowed.only(row.addresses), endpoint=endpoint)
        peer.owner = Link(row.id)
        self._peers[row.id] = peer
        return peer

    def review(self, tables: Tables, touched: Touched | None) -> None:
        """The tables have changed, in what was touched (None: in everything). A tunnel whose context is another one is closed by its own review."""
        if touched is None:
            self._last = {device: place for device, place in self._last.items() if self._ours(tables, device)}
        if touched is None or touched.tenants:
            devices = list(self._peers)
        else:
            devices = [device for device in touched.devices if device in self._peers]
        for device in devices:
            peer, row = self._peers[device], tables.device_by_id(device)
            reason = _unwelcome(tables, row, peer.public_key)
            if reason:
                self._forget(peer, reason)
            elif row is not None and set(peer.allowed.addresses) != set(row.addresses):
                self._again(peer, "context_changed")

    def _ours(self, tables: Tables, device_id: str) -> bool:
        row = tables.device_by_id(device_id)
        return row is not None and owner(row.public_key, self._workers) == self._worker

    def _forget(self, peer: Peer, reason: str) -> None:
        """It has no session and no tunnel from now on."""
        link: Link = peer.owner
        self._node.remove_peer(peer.public_key)
        self._peers.pop(link.device_id, None)
        self._news.discard(peer)
        self._elsewhere.discard(peer)
        self._close_tunnel(peer, reason)

    def _again(self, peer: Peer, reason: str) -> None:
        """It begins anew, where it may."""
        endpoint, link = peer.endpoint, peer.owner
        self._forget(peer, reason)
        tables = self._tables()
        row = tables.device_by_id(link.device_id) if tables is not None else None
        if tables is None or row is None or _unwelcome(tables, row, peer.public_key):
            return
        fresh = self._add(row, endpoint)
        if endpoint is not None:
            self._send(fresh, self._node.initiate(fresh, time.monotonic(), time.time_ns()))

    # from devices

    def _from_socket(self, _: int) -> None:
        now, wall = time.monotonic(), time.time_ns()
        receive, arrivals = self._node.receive, self._arrivals
        for _ in range(BUDGET):
            got = trains.receive(self._sock, self._train)
            if got is None:
                break
            length, segment, address = got
            receive(self._train[:length], address, now, wall, arrivals, segment)
        if now >= self._looked + SIFT_S and self._node.guard.under_load(now):
            self._sift(now)
        self._deliver(now, wall)

    def _from_neighbours(self, messages: list[Passed | Asked]) -> None:
        now, wall, arrivals = time.monotonic(), time.time_ns(), self._arrivals
        for message in messages:
            if isinstance(message, Asked):
                self._recover(message.endpoint, asked=True)
            elif message.claim is not None:
                self._node.receive_claimed(message.datagram, message.claim, message.endpoint, now, arrivals)
            else:
                self._node.receive(message.datagram, message.endpoint, now, wall, arrivals)
        self._deliver(now, wall)

    def _deliver(self, now: float, wall: int) -> None:
        arrivals = self._arrivals
        for event in arrivals.events:
            if event.kind == "unknown_index" and event.endpoint is not None:
                self._recover(event.endpoint)
            elif event.kind == "other_worker" and event.endpoint is not None:
                self._neighbours.give(event.worker, Passed(event.endpoint, event.datagram, event.claim))
            elif event.peer is not None:
                self._news.add(event.peer)
                if event.kind in ("handshake", "moved"):
                    self._tell_soon(event.peer)
                if event.kind == "handshake":
                    self._open(event.peer)
                elif event.kind == "silent":
                    self._close_tunnel(event.peer, "silent")
        for peer, packets in arrivals.packets.items():
            self._news.add(peer)
            self._up(peer, packets)
        for endpoint, datagram in arrivals.datagrams:
            self._lost(trains.send(self._sock, endpoint, (datagram,)))
        arrivals.clear()

    def _open(self, peer: Peer) -> None:
        """It has proved its key: its tunnel, where it has none."""
        link: Link = peer.owner
        tables = self._tables()
        row = tables.device_by_id(link.device_id) if tables is not None else None
        if link.tunnel or tables is None or row is None:
            return
        try:
            link.tunnel = self._admit(admission.admit_device(tables, row))
        except Refusal:
            self._drop("not_admitted")
        else:
            self._by_tunnel[link.tunnel] = peer

    def _up(self, peer: Peer, packets: list[bytes]) -> None:
        """Packets to the flow worker."""
        link: Link = peer.owner
        if not link.tunnel:
            self._open(peer)
        if not link.tunnel:
            self._drop("no_tunnel", len(packets))
        elif link.trunk is None:
            held = link.held or []
            link.held = (held + packets)[:HELD]
            self._drop("tunnel_full", len(held) + len(packets) - len(link.held))
        else:
            full, lost = link.trunk.send(link.tunnel, packets)
            self._drop("tunnel_full", full)
            self._drop("no_tunnel", lost)

    def _recover(self, endpoint: Endpoint, *, asked: bool = False) -> None:
        """Data of a session that isn't here: of the process before this one, or of before a device was let in again. Whoever was heard from there is asked for a
        handshake; nobody else is, as the datagram proves nothing. `asked`: by another worker, to whom it isn't handed back."""
        tables, device = self._tables(), self._places.get(trains.sender(endpoint))
        row = tables.device_by_id(device) if tables is not None and device is not None else None
        if tables is None or row is None or not row.public_key or _unwelcome(tables, row, row.public_key):
            return
        whose = owner(row.public_key, self._workers)
        if whose != self._worker:
            if not asked:
                self._neighbours.give(whose, Asked(endpoint))
            return
        peer = self._peers.get(row.id) or self._add(row, endpoint)
        if not peer.usable(time.monotonic()):
            self._send(peer, self._node.initiate(peer, time.monotonic(), time.time_ns()))

    # to devices

    def _from_trunk(self, worker: int, trunk: Trunk) -> None:
        buffer = self._buffer
        packets: dict[Peer, list[bytes]] = {}
        for _ in range(BUDGET):
            try:
                tunnel, size = trunk.receive(buffer)
            except BlockingIOError:
                break
            except EOFError:
                self.disconnect(worker)
                break
            peer = self._by_tunnel.get(tunnel)
            if peer is None:
                # Closed a moment ago, of which the flow worker hasn't heard yet.
                self._drop("no_tunnel")
                continue
            try:
                found = [bytes(buffer[at : at + length]) for at, length in split(buffer, size)]
            except MalformedPacket:
                self._drop("bad_packet_of_ours")
                continue
            packets[peer] = packets[peer] + found if peer in packets else found
        now, wall = time.monotonic(), time.time_ns()
        for peer, some in packets.items():
            self._news.add(peer)
            self._send(peer, self._node.send(peer, some, now, wall))

    def _send(self, peer: Peer, datagrams: list[bytes]) -> None:
        if datagrams and peer.endpoint is not None:
            self._lost(trains.send(self._sock, peer.endpoint, datagrams))

    # its tunnels

    def connect(self, worker: int) -> socket.socket:
        """A new pair with a flow worker, in place of the one before: the end to be handed over, which stays this object's."""
        self.disconnect(worker)
        trunk = self._trunks[worker] = Trunk()
        return trunk.far

    def listen(self, worker: int) -> None:
        """The flow worker has told of all tunnels that may have packets there: they can be read."""
        trunk = self._trunks[worker]
        trunk.handed_over()
        self._reactor.add(trunk.fileno(), select.EPOLLIN, lambda _: self._from_trunk(worker, trunk))

    def disconnect(self, worker: int) -> None:
        """The flow worker is away; what comes for it is dropped until it is back and reads its tunnels again."""
        trunk = self._trunks.get(worker)
        if trunk is not None and trunk.fileno() >= 0:
            self._reactor.remove(trunk.fileno())
            trunk.close()

    def taken(self, tunnel: int, worker: int) -> None:
        """A flow worker reads a tunnel from now on."""
        peer = self._by_tunnel.get(tunnel)
        if peer is None:
            return
        link: Link = peer.owner
        link.trunk = self._trunks[worker]
        # Whatever was reported of it before had no tunnel yet that the parent knew; a device that only keeps alive has no other news.
        self._tell_soon(peer)
        held, link.held = link.held, None
        if held:
            self._up(peer, held)

    def closed(self, tunnel: int) -> None:
        """A tunnel was closed by somebody else: so are its device's sessions."""
        peer = self._by_tunnel.get(tunnel)
        if peer is not None:
            self._detach(peer)
            self._again(peer, "closed")

    def _close_tunnel(self, peer: Peer, reason: str) -> None:
        """End its tunnel, where it has one: others are told that it isn't there, until it comes again."""
        tunnel = self._detach(peer)
        if tunnel:
            self._close(tunnel, reason)

    def _detach(self, peer: Peer) -> int:
        link: Link = peer.owner
        tunnel, link.tunnel = link.tunnel, 0
        self._by_tunnel.pop(tunnel, None)
        self._drop("no_tunnel", len(link.held or ()))
        link.trunk = link.held = None
        return tunnel

    # what was there before this process

    def remember(self, places: Iterable[tuple[str, str]]) -> None:
        """Where devices were last heard from: id and endpoint."""
        for device_id, endpoint in places:
            try:
                place = trains.destination(self._sock, *host_and_port(endpoint))
            except ValueError:
                # The socket has another family since.
                continue
            self._places[place], self._last[device_id] = device_id, place

    def restore(self, tunnel: int, device_id: str, worker: int, *, busy: bool) -> str:
        """Take up a device's tunnel that its flow worker reads already; its session begins anew: at once where the device's endpoint is known, sooner where it is
        `busy`, else with the next packet either way. Why it can't be taken up; empty where it is."""
        tables = self._tables()
        row = tables.device_by_id(device_id) if tables is not None else None
        if tables is None or row is None or not row.public_key:
            return "device_removed" if row is None else "key_replaced"
        reason = _unwelcome(tables, row, row.public_key)
        if reason or owner(row.public_key, self._workers) != self._worker:
            return reason or "other_worker"
        peer = self._peers.get(device_id) or self._add(row, None)
        link: Link = peer.owner
        if link.tunnel and link.trunk is not None and link.tunnel > tunnel:
            return "superseded"
        # One that it got since, and that isn't read yet, has no flows: these are told of before any of that is.
        if link.tunnel:
            held, link.held = link.held, None
            self._close_tunnel(peer, "superseded")
            link.held = held
        link.tunnel = tunnel
        self._by_tunnel[tunnel] = peer
        self._awaited.append((time.monotonic() + AWAITED_S, tunnel))
        self.taken(tunnel, worker)
        if not self._asking and not self._asking_once:
            self._reactor.later(0, self._ask)
        (self._asking if busy else self._asking_once).append(peer)
        return ""

    def _ask(self) -> None:
        """Ask some of those for a handshake who had a tunnel when the process before ended."""
        now = time.monotonic()
        for _ in range(min(ASKED, len(self._asking) + len(self._asking_once))):
            once = not self._asking
            peer = (self._asking_once if once else self._asking).popleft()
            if self._peers.get(peer.owner.device_id) is peer and not peer.usable(now) and peer.pending is None:
                self._send(peer, self._node.initiate(peer, now, time.time_ns()))
                if once:
                    self._asked_once.append((now + PATIENCE_S, peer))
        if self._asking or self._asking_once:
            self._reactor.later(ASK_S, self._ask)

    def _withdraw(self, now: float) -> None:
        """Whoever was asked once and didn't answer."""
        while self._asked_once and self._asked_once[0][0] <= now:
            self._node.withdraw(self._asked_once.popleft()[1])

    def _give_up(self, now: float) -> None:
        """Who hasn't come for too long won't."""
        while self._awaited and self._awaited[0][0] <= now:
            peer = self._by_tunnel.get(self._awaited.popleft()[1])
            if peer is not None and not peer.handshake_wall_ns:
                self._forget(peer, "silent")

    # time

    def _after(self) -> bool:
        now = time.monotonic()
        due = self._node.next_deadline()
        if now >= due:
            wall = time.time_ns()
            self._node.poll(now, wall, self._arrivals)
            self._deliver(now, wall)
            due = self._node.next_deadline()
        if due < self._due or now >= self._due:
            if self._timer is not None:
                self._timer.cancel()
            self._due = due
            self._timer = self._reactor.later(max(due - now, 0), _nothing) if due != float("inf") else None
        return False

    def _report(self) -> None:
        self._reactor.later(REPORT_S, self._report)
        self._give_up(time.monotonic())
        self._withdraw(time.monotonic())
        news, self._news = self._news, set()
        self._tell(news)
        self._sift(time.monotonic())
        for reason, count in self._node.counters.items():
            more = count - self._counted[reason]
            if more:
                self._counted[reason] = count
                self._count(WIREGUARD + reason, more)

    def _tell_soon(self, peer: Peer) -> None:
        self._news.add(peer)
        if not self._elsewhere:
            self._reactor.later(PLACE_S, self._tell_places)
        self._elsewhere.add(peer)

    def _tell_places(self) -> None:
        elsewhere, self._elsewhere = self._elsewhere, set()
        self._news -= elsewhere
        self._tell(elsewhere)

    def _tell(self, peers: Iterable[Peer]) -> None:
        """The parent, and ourselves, where they are."""
        for peer in peers:
            if peer.owner.tunnel:
                self._heard(peer.owner.tunnel, peer)
            if peer.endpoint is not None and peer.handshake_wall_ns:
                place = trains.sender(peer.endpoint)
                self._places.pop(place, None)
                self._places[place] = peer.owner.device_id
        while len(self._places) > PLACES:
            del self._places[next(iter(self._places))]

    def _sift(self, now: float) -> None:
        """Under a flood, have the kernel keep out what nothing would come of."""
        seconds, self._looked = max(now - self._looked, SIFT_S), now
        before, self._unread = self._unread, sieve.unread(self._sock)
        unread = self._unread - before & 0xFFFFFFFF
        if unread:
            self._drop("unread", unread)
        counters = self._node.counters
        before, self._asked = self._asked, sum(counters[reason] for reason in _ASKED)
        share = let_in(self._asked - before, unread, seconds)
        if share != self._let_in:
            self._let_in = share
            sieve.let_in(self._sock, share)

    def _drop(self, reason: str, packets: int = 1) -> None:
        if packets:
            self._count(WIREGUARD + reason, packets)

    def _lost(self, datagrams: int) -> None:
        self._drop("socket_full", datagrams)


def _unwelcome(tables: Tables, row: DeviceRow | None, public_key: bytes) -> str:
    """Why the device with this key isn't let in any more; empty where it is."""
    if row is None:
        return "device_removed"
    if row.public_key != public_key:
        return "key_replaced"
    try:
        admission.admit_device(tables, row)
    except Refusal as refusal:
        return refusal.code.lower()
    return ""


def _nothing() -> None:
    """The loop's turn is all that is wanted."""
