"""A node: one static key, its peers, and what its owner calls. See the package's docstring for the picture.

Its owner sends what `send`, `receive` and `poll` return, calls `poll` no later than `next_deadline`, and delivers `arrivals`.

Cost: 0.4 kB an idle peer, and 0.8 kB more while it has a session that rests (5.3 kB while that carries packets).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Final

from falkirk.wireguard import export
from falkirk.wireguard.allowed import Allowed, Prefix
from falkirk.wireguard.dialogue import Dialogue, Find
from falkirk.wireguard.guard import Guard
from falkirk.wireguard.handshake import Claim, Identity
from falkirk.wireguard.messages import DATA, DATA_OVERHEAD, HEADER, KEY_SIZE
from falkirk.wireguard.outcome import Arrivals, Event
from falkirk.wireguard.peer import INF, KEEPALIVE_TIMEOUT, REKEY_ATTEMPT_SECONDS, REKEY_TIMEOUT, Endpoint, Peer
from falkirk.wireguard.primitives import Buffer
from falkirk.wireguard.session import REJECT_AFTER_SECONDS, REKEY_AFTER_MESSAGES, REKEY_AFTER_SECONDS, Session
from falkirk.wireguard.table import Table
from falkirk.wireguard.transport import Transport

NO_PRESHARED_KEY: Final = bytes(KEY_SIZE)
REST_SECONDS: Final = 5.0
"""A session that carried nothing for so long drops its ciphers, at the next look; looks are as far apart."""
_LAST_MINUTE_SECONDS: Final = REJECT_AFTER_SECONDS - KEEPALIVE_TIMEOUT - REKEY_TIMEOUT


def _nobody(_public_key: bytes) -> None:
    return None


class Node:
    """The engine. Time (`now`: monotonic seconds), wall time (`wall_ns`: since 1970) and randomness are arguments."""

    def __init__(
        self,
        private_key: bytes,
        *,
        rng: Callable[[int], bytes],
        mtu: int = 1420,
        worker: int = 0,
        workers: int = 1,
        find: Find = _nobody,
        guard: Guard | None = None,
    ) -> None:
        """`private_key`: 32 bytes. `rng(n)`: n unpredictable bytes. `mtu`: of the inner network.

        `worker` of `workers`: the first byte on the wire of every index of ours, modulo `workers`, is `worker`. `find` is asked for
        keys that aren't peers. Raises ValueError where the key or the numbers aren't such.
        """
        self._identity = Identity(private_key)
        self._table = Table(rng, worker, workers)
        self.guard: Final = guard or Guard()
        self._transport = Transport(self._table, mtu)
        self._dialogue = Dialogue(self._identity, self._table, self.guard, find)
        self._rest_at = INF

    @property
    def public_key(self) -> bytes:
        """Ours, 32 bytes."""
        return self._identity.public

    @property
    def counters(self) -> dict[str, int]:
        """What came to nothing so far, by `counters.REASONS`."""
        return self._table.counters

    @property
    def peers(self) -> dict[bytes, Peer]:
        """By public key; to be read only."""
        return self._table.peers

    def add_peer(
        self,
        public_key: bytes,
        *,
        preshared: bytes = NO_PRESHARED_KEY,
        allowed: Allowed | Iterable[Prefix] = (),
        keepalive_seconds: float = 0,
        endpoint: Endpoint | None = None,
    ) -> Peer:
        """A new peer. Its packets are taken from `allowed` inner sources only.

        Raises ValueError where the key isn't 32 bytes or is a peer's already, or a prefix isn't one.
        """
        if len(public_key) != KEY_SIZE or len(preshared) != KEY_SIZE:
            raise ValueError(f"a public and a preshared key have {KEY_SIZE} bytes")
        if public_key in self._table.peers:
            raise ValueError("the public key is a peer's already; remove that first")
        if not isinstance(allowed, Allowed):
            allowed = Allowed(allowed)
        peer = Peer(public_key, preshared, allowed, keepalive_seconds, endpoint)
        self._table.peers[public_key] = peer
        self._table.arm(peer)
        return peer

    def remove_peer(self, public_key: bytes) -> bool:
        """Forget a peer, its sessions and its keys, at once. False where it wasn't one."""
        peer = self._table.peers.pop(public_key, None)
        if peer is None:
            return False
        self._table.drop_keys(peer)
        self._transport.give_up(peer)
        peer.armed = INF
        return True

    def drop_sessions(self, peer: Peer) -> None:
        """Forget the sessions with a peer, not the peer: it needs a new handshake."""
        self._table.drop_keys(peer)

    def receive(
        self, data: Buffer, endpoint: Endpoint, now: float, wall_ns: int, arrivals: Arrivals, segment: int = 0
    ) -> None:
        """A datagram, or a train of datagrams of `segment` bytes each, from `endpoint`; what comes of it goes to `arrivals`.

        `data` isn't kept. Nothing is raised, whatever it holds.
        """
        end = len(data)
        if segment <= 0 or segment > end:
            segment = end
        at = 0
        while at < end:
            if end - at >= DATA_OVERHEAD and segment >= DATA_OVERHEAD and HEADER.unpack_from(data, at)[0] == DATA:
                at, session = self._transport.receive(data, at, segment, endpoint, now, wall_ns, arrivals)
                if session is not None:
                    self._after_data(session, now, wall_ns, arrivals)
            else:
                message = bytes(data[at : at + segment])
                peer = self._dialogue.receive(message, endpoint, now, wall_ns, arrivals)
                if peer is not None:
                    self._session_begun(peer, endpoint, now, wall_ns, arrivals)
                at += segment
        if end == 0:
            self._table.counters["bad_length"] += 1
        if self._rest_at == INF and self._table.awake:
            self._rest_at = now + REST_SECONDS

    def receive_claimed(
        self, datagram: bytes, claim: Claim, endpoint: Endpoint, now: float, arrivals: Arrivals
    ) -> None:
        """An initiation that another worker of this node got and gave to us, whose peer it is (`Event` "other_worker")."""
        self._dialogue.receive_claimed(datagram, claim, endpoint, now, arrivals)

    def _after_data(self, session: Session, now: float, wall_ns: int, arrivals: Arrivals) -> None:
        peer = session.peer
        if peer.queue and session is peer.current:
            self._flush(peer, now, wall_ns, arrivals)
        # 6.2: who only receives must see to a new session before this one ends.
        if session.initiator and not session.last_minute and now - session.created >= _LAST_MINUTE_SECONDS:
            session.last_minute = True
            self._initiate(peer, now, wall_ns, arrivals)

    def _session_begun(self, peer: Peer, endpoint: Endpoint, now: float, wall_ns: int, arrivals: Arrivals) -> None:
        """Our initiation was answered: the peer waits for our first packet, an empty one where there is nothing else."""
        peer.received_at = peer.passed_at = now
        peer.retry = INF
        if endpoint != peer.endpoint:
            peer.endpoint = endpoint
            arrivals.events.append(Event("moved", peer, endpoint))
        if not peer.queue:
            peer.queue = [b""]
        self._flush(peer, now, wall_ns, arrivals)

    def _flush(self, peer: Peer, now: float, wall_ns: int, arrivals: Arrivals) -> None:
        """Send what was queued."""
        packets, peer.queue = peer.queue or [], None
        self._to(peer, self.send(peer, packets, now, wall_ns), arrivals)

    def send(self, peer: Peer, packets: Iterable[bytes | memoryview], now: float, wall_ns: int) -> list[bytes]:
        """Datagrams for `peer.endpoint`: the packets', or an initiation where there is no session, the packets being kept for it.

        Packets are whole IP packets of at most `messages.MAX_PACKET` bytes, an empty one is a keepalive. Datagrams of packets of one size
        have one size. Nothing is returned, and the packets are counted, where no endpoint is known.
        """
        session = peer.current
        if session is None or session.expired(now):
            self._transport.keep(peer, packets)
            initiation = self._dialogue.initiate(peer, now, wall_ns)
            if peer.endpoint is None:
                self._table.counters["no_endpoint"] += sum(1 for packet in peer.queue or () if packet)
                peer.queue = None
            return [] if initiation is None else [initiation]
        datagrams = self._transport.send(peer, session, packets, now)
        # 5.4.5 and 6.2: the initiator renews, while the old session goes on carrying.
        old = now - session.created >= REKEY_AFTER_SECONDS and session.initiator
        if old or session.counter >= REKEY_AFTER_MESSAGES:
            initiation = self._dialogue.initiate(peer, now, wall_ns)
            if initiation is not None:
                datagrams.append(initiation)
        if self._rest_at == INF:
            self._rest_at = now + REST_SECONDS
        return datagrams

    def initiate(self, peer: Peer, now: float, wall_ns: int) -> list[bytes]:
        """Begin a handshake; nothing where one was begun less than 5 s ago, or no endpoint is known."""
        initiation = self._dialogue.initiate(peer, now, wall_ns)
        return [] if initiation is None else [initiation]

    def withdraw(self, peer: Peer) -> None:
        """Don't wait for an answer to our initiation, nor ask again, where no packet waits for that."""
        if not peer.queue:
            self._table.drop_pending(peer)

    def next_deadline(self) -> float:
        """When `poll` has something to do at the latest: monotonic seconds, infinite for never."""
        return min(self._table.next_due(), self._rest_at)

    def poll(self, now: float, wall_ns: int, arrivals: Arrivals, limit: int = 256) -> None:
        """Serve the timers of at most `limit` peers that are due."""
        for _ in range(limit):
            peer = self._table.pop_due(now)
            if peer is None:
                break
            self._serve(peer, now, wall_ns, arrivals)
            self._table.arm(peer)
        if now >= self._rest_at:
            self._rest(now)

    def _serve(self, peer: Peer, now: float, wall_ns: int, arrivals: Arrivals) -> None:
        if now >= peer.forget:
            peer.forget = INF
            self._table.drop_session(peer.previous)
            peer.previous = None
        if now >= peer.erase:
            peer.erase = peer.keepalive = INF
            for session in peer.sessions():
                self._table.drop_session(session)
            peer.current = peer.previous = peer.next = None
            arrivals.events.append(Event("expired", peer, peer.endpoint))
        if peer.pending is not None and now >= peer.pending.due:
            self._ask_again(peer, now, wall_ns, arrivals)
        if now >= peer.retry:
            peer.retry = INF
            self._initiate(peer, now, wall_ns, arrivals)
        if now >= peer.keepalive:
            again, peer.keepalive_again = peer.keepalive_again, False
            peer.keepalive = INF
            if peer.usable(now):
                self._to(peer, self.send(peer, (b"",), now, wall_ns), arrivals)
                if again:
                    peer.keepalive = now + KEEPALIVE_TIMEOUT
        if peer.keepalive_seconds and now >= peer.passed_at + peer.keepalive_seconds:
            peer.passed_at = now
            self._to(peer, self.send(peer, (b"",), now, wall_ns), arrivals)

    def _ask_again(self, peer: Peer, now: float, wall_ns: int, arrivals: Arrivals) -> None:
        """No response so far."""
        assert peer.pending is not None
        if now - peer.pending.since >= REKEY_ATTEMPT_SECONDS:
            self._table.drop_pending(peer)
            self._transport.give_up(peer)
            arrivals.events.append(Event("silent", peer, peer.endpoint))
            return
        initiation = self._dialogue.initiate(peer, now, wall_ns, again=True)
        if initiation is None:
            # A response of ours to the peer's own initiation is younger than 5 s: if it comes to nothing, ask then.
            peer.pending = peer.pending._replace(due=max(now, peer.initiated_at + REKEY_TIMEOUT) + self._table.jitter())
        else:
            self._to(peer, [initiation], arrivals)

    def _initiate(self, peer: Peer, now: float, wall_ns: int, arrivals: Arrivals) -> None:
        self._to(peer, self.initiate(peer, now, wall_ns), arrivals)

    def _to(self, peer: Peer, datagrams: list[bytes], arrivals: Arrivals) -> None:
        endpoint = peer.endpoint
        if endpoint is not None:
            arrivals.datagrams += [(endpoint, datagram) for datagram in datagrams]

    def _rest(self, now: float) -> None:
        """Sessions that carry nothing drop their ciphers."""
        idle = [session for session in self._table.awake if now - session.used >= REST_SECONDS]
        for session in idle:
            session.rest()
        self._table.awake.difference_update(idle)
        self._rest_at = now + REST_SECONDS if self._table.awake else INF

    def export_peer(self, peer: Peer) -> bytes:
        """Everything that goes on elsewhere: sessions, counters, windows, timestamp, endpoint; and forget the sessions here.

        It holds keys: for a socket pair, never for a disk. Only one process may import it, and only once: a counter that is used twice
        gives the sessions' plaintext away.
        """
        record = export.dump(peer)
        self._table.drop_keys(peer)
        return record

    def import_peer(self, record: bytes, now: float) -> Peer | None:
        """Go on with what `export_peer` of another worker gave, `now` being of the same clock. The key must be a peer's.

        Returns that peer; None where it isn't one, or a session's index is taken or isn't this worker's. Raises ValueError where
        the record isn't one.
        """
        return export.load(record, self._table, now)
