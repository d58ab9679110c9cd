"""Data messages: trains in, trains out (5.4.5, 5.4.6). The part of the engine that runs for every packet.

A train is what UDP_GRO gives: datagrams of one sender and one size, the last may be shorter. Its messages are mostly of one session and in
order, so what is looked up, checked and noted is so once a run of one session, and a packet costs its cipher and little else.

A packet is padded to 16 bytes, but not beyond the MTU (5.4.6). Empty ones are keepalives.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from cryptography.exceptions import InvalidTag

from falkirk.wireguard.counters import Reason
from falkirk.wireguard.messages import DATA, DATA_HEADER, DATA_HEADER_SIZE, DATA_OVERHEAD, MAX_PACKET, NONCE
from falkirk.wireguard.outcome import Arrivals, Event
from falkirk.wireguard.peer import INF, KEEPALIVE_TIMEOUT, REKEY_TIMEOUT, STRAGGLER_SECONDS, Endpoint, Peer
from falkirk.wireguard.primitives import Buffer
from falkirk.wireguard.session import REJECT_AFTER_MESSAGES, Session
from falkirk.wireguard.table import Table

MAX_QUEUED: Final = 128
"""Packets kept for a peer while there is no session with it; then the oldest goes."""
_PADDING: Final = tuple(bytes(size) for size in range(16))
_HEADER: Final = DATA_HEADER.unpack_from
_MAKE_HEADER: Final = DATA_HEADER.pack
_NONCE: Final = NONCE.pack
_IPV4: Final = 20
_IPV6: Final = 40


class Transport:
    """Everything of a node that carries packets."""

    def __init__(self, table: Table, mtu: int) -> None:
        self._table = table
        self.mtu = mtu
        """Of the inner network, in bytes; padding doesn't go beyond."""

    def receive(
        self, data: Buffer, at: int, segment: int, endpoint: Endpoint, now: float, wall_ns: int, arrivals: Arrivals
    ) -> tuple[int, Session | None]:
        """The run of data messages of one session that starts at `at`.

        Returns where it ends, and its session where something authentic came of it.
        """
        end = len(data)
        _, index, counter = _HEADER(data, at)
        session = self._table.sessions.get(index)
        if session is None or session.expired(now):
            stop = at + segment
            self._strange(session, index, data[at:stop], endpoint, arrivals)
            return stop, None
        peer = session.peer
        window = session.window
        highest = window.highest
        decrypt = session.open or session.opener()
        addresses = peer.allowed.addresses
        packets: list[bytes] = []
        authentic = size = 0
        while True:
            stop = at + segment
            if stop > end:
                stop = end
            # In order, and nothing missing below: the window is one number. Otherwise it has to be asked.
            ordered = counter == highest + 1 and not window.missing and counter < REJECT_AFTER_MESSAGES
            if ordered or self._may(session, counter):
                try:
                    packet = decrypt(_NONCE(counter), data[at + DATA_HEADER_SIZE : stop], None)
                except InvalidTag:
                    self._count("bad_packet")
                else:
                    authentic += 1
                    if ordered:
                        window.highest = highest = counter
                    else:
                        window.take(counter)
                        highest = window.highest
                    if packet:
                        length = len(packet)
                        version = packet[0] >> 4
                        if version == 4 and length >= _IPV4:
                            total = packet[2] << 8 | packet[3]
                            source = packet[12:16]
                            whole = _IPV4 <= total <= length
                        elif version == 6 and length >= _IPV6:
                            total = _IPV6 + (packet[4] << 8 | packet[5])
                            source = packet[8:24]
                            whole = total <= length
                        else:
                            whole = False
                        if not whole:
                            self._count("bad_inner")
                        elif source in addresses or peer.allowed.holds(source):
                            packets.append(packet if total == length else packet[:total])
                            size += total
                        else:
                            self._count("source_not_allowed")
            at = stop
            if end - at < DATA_OVERHEAD:
                break
            kind, index, counter = _HEADER(data, at)
            if kind != DATA or index != session.local:
                break
        if not authentic:
            return at, None
        if packets:
            if session.open is None:
                session.open = decrypt
                self._table.awake.add(session)
            peer.rx_packets += len(packets)
            peer.rx_bytes += size
            into = arrivals.packets.get(peer)
            if into is None:
                arrivals.packets[peer] = packets
            else:
                into += packets
        self._heard(session, bool(packets), endpoint, now, wall_ns, arrivals)
        return at, session

    def _strange(
        self, session: Session | None, index: int, message: Buffer, endpoint: Endpoint, arrivals: Arrivals
    ) -> None:
        """A message of a session that isn't here, or is too old."""
        worker = self._table.worker_of(index)
        if session is not None:
            self._count("session_expired")
        elif worker != self._table.worker:
            # It came behind an initiation, in one train.
            event = Event("other_worker", None, endpoint, datagram=bytes(message), worker=worker)
            arrivals.events.append(event)
        else:
            self._count("unknown_index")
            last = arrivals.events[-1] if arrivals.events else None
            if last is None or last.kind != "unknown_index" or last.endpoint != endpoint:
                arrivals.events.append(Event("unknown_index", None, endpoint))

    def _may(self, session: Session, counter: int) -> bool:
        """Whether a counter that isn't simply the next one may be looked at."""
        if counter >= REJECT_AFTER_MESSAGES:
            self._count("counter_limit")
        elif session.window.may(counter):
            return True
        else:
            self._count("replayed")
        return False

    def _heard(
        self, session: Session, carried: bool, endpoint: Endpoint, now: float, wall_ns: int, arrivals: Arrivals
    ) -> None:
        """Something authentic came by this session."""
        peer = session.peer
        session.used = peer.received_at = peer.passed_at = now
        peer.retry = INF
        arm = False
        if session is peer.next:
            self._table.confirm(session)
            peer.handshake_at = now
            peer.handshake_wall_ns = wall_ns
            arrivals.events.append(Event("handshake", peer, endpoint))
        if session is peer.current and peer.previous is not None and peer.forget == INF:
            peer.forget = now + STRAGGLER_SECONDS
            arm = True
        if endpoint != peer.endpoint:
            moved = peer.endpoint is not None
            peer.endpoint = endpoint
            if moved:
                arrivals.events.append(Event("moved", peer, endpoint))
        if carried:
            if peer.keepalive == INF:
                peer.keepalive = now + KEEPALIVE_TIMEOUT
                arm = True
            else:
                peer.keepalive_again = True
        if arm:
            self._table.arm(peer)

    def keep(self, peer: Peer, packets: Iterable[bytes | memoryview]) -> None:
        """Queue packets until there is a session."""
        queue = peer.queue
        if queue is None:
            queue = peer.queue = []
        queue += map(bytes, packets)
        excess = len(queue) - MAX_QUEUED
        if excess > 0:
            del queue[:excess]
            self._table.counters["queue_full"] += excess

    def give_up(self, peer: Peer) -> None:
        """Drop what is queued: the peer doesn't answer."""
        if peer.queue:
            self._table.counters["queue_given_up"] += sum(1 for packet in peer.queue if packet)
        peer.queue = None

    def send(self, peer: Peer, session: Session, packets: Iterable[bytes | memoryview], now: float) -> list[bytes]:
        """Data messages of packets, in their order, by a session that hasn't expired."""
        seal = session.seal or session.sealer()
        counter = session.counter
        remote = session.remote
        mtu = self.mtu
        made: list[bytes] = []
        size = count = 0
        for packet in packets:
            length = len(packet)
            if counter >= REJECT_AFTER_MESSAGES:
                self._count("counter_limit")
                break
            if length > MAX_PACKET:
                self._count("packet_too_long")
                continue
            if length:
                count += 1
                size += length
                padding = -length & 15
                if padding:
                    if length + padding > mtu:
                        padding = mtu - length if length < mtu else 0
                    packet = b"".join((packet, _PADDING[padding]))
            made.append(_MAKE_HEADER(DATA, remote, counter) + seal(_NONCE(counter), packet, None))
            counter += 1
        session.counter = counter
        if made:
            session.used = peer.passed_at = now
            peer.keepalive = INF
            if count:
                if session.seal is None:
                    session.seal = seal
                    self._table.awake.add(session)
                peer.tx_packets += count
                peer.tx_bytes += size
                if peer.retry == INF:
                    peer.retry = now + KEEPALIVE_TIMEOUT + REKEY_TIMEOUT + self._table.jitter()
                    self._table.arm(peer)
        return made

    def _count(self, reason: Reason) -> None:
        self._table.counters[reason] += 1
