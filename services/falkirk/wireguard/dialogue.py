"""Handshake messages in, answers out (5.4.2 to 5.4.4, 5.4.7, 5.3).

In the order of their cost: length, under load whether anything could come of it, mac1 (a hash), under load mac2 and the sender's rate (two hashes),
and only then a Diffie-Hellman for an initiation's static key, a cached secret for its timestamp, and three more to answer it. Nothing of a peer changes before its message
has proved to be new and its own.

A peer's endpoint doesn't move with an initiation: it is answered where it came from, and moves once the new session is used. So an initiation
that was recorded and is played to a node that has lost its memory of timestamps moves nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from falkirk.wireguard import handshake, messages
from falkirk.wireguard.cookies import Checker, cookie_key, mac1_key, open_reply, sign
from falkirk.wireguard.counters import Reason
from falkirk.wireguard.guard import Guard
from falkirk.wireguard.handshake import Claim, Identity
from falkirk.wireguard.messages import COOKIE, HEADER, INITIATION, RESPONSE, RESPONSE_HEADER
from falkirk.wireguard.outcome import Arrivals, Event
from falkirk.wireguard.peer import COOKIE_SECONDS, INF, REKEY_TIMEOUT, Endpoint, Peer, Pending
from falkirk.wireguard.primitives import LowOrderPoint, NotAuthentic, exchange, private_key, tai64n
from falkirk.wireguard.session import REJECT_AFTER_SECONDS, Session
from falkirk.wireguard.table import Table

INITIATION_INTERVAL: Final = 0.02
"""Seconds between two initiations of one peer that are answered."""
_INITIATION_BODY: Final = slice(8, messages.MAC_OFFSETS[INITIATION])
_MAC2: Final = slice(-messages.MAC_SIZE, None)
_RESPONSE_BODY: Final = slice(12, messages.MAC_OFFSETS[RESPONSE])


Find = Callable[[bytes], Peer | int | None]
"""Asked for the peer of a public key that isn't one yet; may add it to the node first.

A number is another worker's of the node, who has this peer: its initiations go there as an event. None: nobody's, and they are dropped.
"""


class Dialogue:
    """Everything of a node that handshakes."""

    def __init__(self, identity: Identity, table: Table, guard: Guard, find: Find) -> None:
        self._identity = identity
        self._table = table
        self._guard = guard
        self._find = find
        self._checker = Checker(identity.public, table.rng)

    def receive(self, message: bytes, endpoint: Endpoint, now: float, wall_ns: int, arrivals: Arrivals) -> Peer | None:
        """A datagram that isn't data. Returns the peer with whom we, as initiator, now have a session."""
        kind = int.from_bytes(message[:4], "little")
        size = messages.SIZES.get(kind)
        if size != len(message):
            known = size is not None or kind == messages.DATA
            self._count("bad_length" if known or len(message) < HEADER.size else "bad_type")
            return None
        if kind == COOKIE:
            if not self._elsewhere(int.from_bytes(message[4:8], "little"), message, endpoint, arrivals):
                self._take_cookie(message, now)
            return None
        if kind == INITIATION and self._hopeless(message, now):
            self._count("handshake_rate")
            return None
        if not self._checker.mac1_holds(message, kind):
            self._count("bad_mac1")
            return None
        if kind == RESPONSE:
            if self._elsewhere(int.from_bytes(message[8:12], "little"), message, endpoint, arrivals):
                return None
            return self._receive_response(message, endpoint, now, wall_ns, arrivals)
        if self._may_cost(message, endpoint, now, arrivals):
            self._receive_initiation(message, endpoint, now, arrivals)
        return None

    def _elsewhere(self, index: int, message: bytes, endpoint: Endpoint, arrivals: Arrivals) -> bool:
        """Whether another worker has asked for this, who is given it: it came behind a datagram of another kind, in one train."""
        worker = self._table.worker_of(index)
        if worker == self._table.worker:
            return False
        arrivals.events.append(Event("other_worker", None, endpoint, datagram=message, worker=worker))
        return True

    def _hopeless(self, message: bytes, now: float) -> bool:
        """Whether nothing could come of an initiation whatever else it holds: most of a flood ends here, for no hash at all."""
        if not self._guard.under_load(now) or message[_MAC2] != messages.NO_MAC or self._guard.could_reply(now):
            return False
        self._guard.loaded(now)
        return True

    def _may_cost(self, message: bytes, endpoint: Endpoint, now: float, arrivals: Arrivals) -> bool:
        """Whether an initiation or response whose mac1 holds may have its Diffie-Hellmans."""
        if not self._guard.loaded(now):
            return True
        cookie = message[_MAC2] != messages.NO_MAC
        if cookie and self._checker.mac2_holds(message, endpoint, now):
            if self._guard.may_ask(endpoint, now):
                return True
            self._count("handshake_rate")
        elif self._guard.may_reply(now):
            self._count("bad_mac2" if cookie else "no_cookie")
            arrivals.datagrams.append((endpoint, self._checker.reply(message, endpoint, now)))
        else:
            self._count("handshake_rate")
        return False

    def _receive_initiation(self, message: bytes, endpoint: Endpoint, now: float, arrivals: Arrivals) -> None:
        body = message[_INITIATION_BODY]
        try:
            claimed = handshake.claim(self._identity, body)
        except NotAuthentic:
            self._count("bad_static")
            return
        except LowOrderPoint:
            self._count("low_order_point")
            return
        peer = self._table.peers.get(claimed.public) or self._find(claimed.public)
        if isinstance(peer, int):
            # Who knows this peer's last timestamp must judge it, and who answers it must have its session.
            arrivals.events.append(Event("other_worker", None, endpoint, claimed.public, message, peer, claimed))
        else:
            self._answer(message, claimed, peer, endpoint, now, arrivals)

    def receive_claimed(
        self, message: bytes, claimed: Claim, endpoint: Endpoint, now: float, arrivals: Arrivals
    ) -> None:
        """An initiation that another worker gave us. Its macs were checked there, and its first Diffie-Hellman is made."""
        # It counts as a handshake of ours, so that who comes to us directly is asked for a cookie sooner; who was asked elsewhere isn't asked again.
        self._guard.loaded(now)
        peer = self._table.peers.get(claimed.public) or self._find(claimed.public)
        # Workers that don't agree drop it: it never goes round.
        self._answer(message, claimed, None if isinstance(peer, int) else peer, endpoint, now, arrivals)

    def _answer(
        self, message: bytes, claimed: Claim, peer: Peer | None, endpoint: Endpoint, now: float, arrivals: Arrivals
    ) -> None:
        """An initiation of a peer of ours, or of nobody's."""
        if peer is None:
            self._count("unknown_key")
            arrivals.events.append(Event("unknown_key", None, endpoint, claimed.public))
            return
        try:
            timestamp, state = handshake.prove(claimed, self._static_secret(peer), message[_INITIATION_BODY])
        except NotAuthentic:
            self._count("bad_timestamp")
            return
        except LowOrderPoint:
            self._count("low_order_point")
            return
        if timestamp <= peer.timestamp:
            self._count("old_timestamp")
            return
        if now - peer.consumed_at < INITIATION_INTERVAL:
            self._count("early_initiation")
            return
        try:
            ephemeral = private_key(self._table.rng(messages.KEY_SIZE))
            answer, keys, _ = handshake.respond(state, peer.public_key, peer.preshared, ephemeral)
        except LowOrderPoint:
            self._count("low_order_point")
            return
        peer.timestamp = timestamp
        peer.consumed_at = now
        local = self._table.new_index()
        remote = int.from_bytes(message[4:8], "little")
        self._begin(Session(peer, local, remote, keys, initiator=False, created=now), now)
        if peer.endpoint is None:
            peer.endpoint = endpoint
        datagram = self._signed(peer, RESPONSE_HEADER.pack(RESPONSE, local, remote) + answer, now)
        arrivals.datagrams.append((endpoint, datagram))

    def initiate(self, peer: Peer, now: float, wall_ns: int, *, again: bool = False) -> bytes | None:
        """An initiation to the peer's endpoint, or None where one was sent less than 5 s ago or there is nowhere to send it.

        `again`: for want of an answer, which counts towards the 90 s after which we give up.
        """
        if peer.endpoint is None or now - peer.initiated_at < REKEY_TIMEOUT:
            return None
        since = peer.pending.since if again and peer.pending is not None else now
        try:
            secret = self._static_secret(peer)
            ephemeral = private_key(self._table.rng(messages.KEY_SIZE))
            body, state = handshake.initiate(self._identity, peer.public_key, secret, ephemeral, tai64n(wall_ns))
        except LowOrderPoint:
            self._count("low_order_point")
            return None
        local = self._table.new_index()
        self._table.expect(peer, Pending(local, state, since, now + REKEY_TIMEOUT + self._table.jitter()))
        return self._signed(peer, HEADER.pack(INITIATION, local) + body, now)

    def _receive_response(
        self, message: bytes, endpoint: Endpoint, now: float, wall_ns: int, arrivals: Arrivals
    ) -> Peer | None:
        _, remote, local = RESPONSE_HEADER.unpack_from(message)
        peer = self._table.handshakes.get(local)
        if peer is None or peer.pending is None:
            self._count("unknown_handshake")
            return None
        # Only who has seen our initiation comes so far. Under load it may cost nothing without a cookie, unless it comes from where we sent that: a device
        # that is here, whose own initiations don't get through a flood, isn't made to wait for one of ours again.
        if (
            endpoint != peer.endpoint
            and self._guard.under_load(now)
            and not self._may_cost(message, endpoint, now, arrivals)
        ):
            return None
        try:
            _, keys, _ = handshake.finish(self._identity, peer.pending.state, peer.preshared, message[_RESPONSE_BODY])
        except NotAuthentic:
            self._count("bad_response")
            return None
        except LowOrderPoint:
            self._count("low_order_point")
            return None
        self._table.drop_pending(peer)
        self._begin(Session(peer, local, remote, keys, initiator=True, created=now), now)
        peer.handshake_at = now
        peer.handshake_wall_ns = wall_ns
        arrivals.events.append(Event("handshake", peer, endpoint))
        return peer

    def _take_cookie(self, message: bytes, now: float) -> None:
        index = int.from_bytes(message[4:8], "little")
        session = self._table.sessions.get(index)
        peer = session.peer if session is not None else self._table.handshakes.get(index)
        if peer is None:
            self._count("unknown_handshake")
            return
        try:
            peer.cookie = open_reply(message, cookie_key(peer.public_key), peer.last_mac1)
            peer.cookie_at = now
        except NotAuthentic:
            self._count("bad_cookie_reply")

    def _begin(self, session: Session, now: float) -> None:
        peer = session.peer
        self._table.begin(session)
        peer.erase = now + REJECT_AFTER_SECONDS
        peer.forget = INF
        self._table.arm(peer)

    def _signed(self, peer: Peer, message: bytes, now: float) -> bytes:
        """With macs, and noted as sent."""
        cookie = peer.cookie if now - peer.cookie_at < COOKIE_SECONDS else b""
        signed = sign(message, mac1_key(peer.public_key), cookie)
        at = len(message)
        peer.last_mac1 = signed[at : at + messages.MAC_SIZE]
        peer.initiated_at = peer.passed_at = now
        peer.keepalive = INF
        self._table.arm(peer)
        return signed

    def _static_secret(self, peer: Peer) -> bytes:
        """Raises LowOrderPoint."""
        if not peer.static_secret:
            peer.static_secret = exchange(self._identity.secret, peer.public_key)
        return peer.static_secret

    def _count(self, reason: Reason) -> None:
        self._table.counters[reason] += 1
