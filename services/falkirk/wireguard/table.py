"""Who is who in one node: peers by key, sessions and handshakes by index, timers by time, counters by reason.

Indices are random, and are the node's alone: where several workers share a port by SO_REUSEPORT, the first byte of an index on the wire,
modulo the number of workers, says whose it is (`falkirk.linux.trains` has the filter).

The heap has one live entry a peer, `Peer.armed`, at or before what is due for it; others are stale and skipped.
"""

from __future__ import annotations

from collections.abc import Callable
from heapq import heappop, heappush
from typing import Final

from falkirk.wireguard.counters import REASONS
from falkirk.wireguard.peer import INF, Peer, Pending
from falkirk.wireguard.session import Session

MAX_WORKERS: Final = 256


class Table:
    """The state that all of a node's parts share."""

    __slots__ = (
        "_entries",
        "_heap",
        "_workers",
        "awake",
        "counters",
        "handshakes",
        "peers",
        "rng",
        "sessions",
        "worker",
    )

    def __init__(self, rng: Callable[[int], bytes], worker: int = 0, workers: int = 1) -> None:
        if not 0 <= worker < workers <= MAX_WORKERS:
            raise ValueError(f"worker {worker} of {workers}: workers count from 0 and are at most {MAX_WORKERS}")
        self.rng = rng
        self.worker: Final = worker
        """Which of the node's workers this is."""
        self._workers = workers
        self.peers: dict[bytes, Peer] = {}
        self.sessions: dict[int, Session] = {}
        self.handshakes: dict[int, Peer] = {}
        """By the index of its `pending`."""
        self.awake: set[Session] = set()
        """Those that have ciphers."""
        self.counters: dict[str, int] = dict.fromkeys(REASONS, 0)
        self._heap: list[tuple[float, int, Peer]] = []
        self._entries = 0

    def new_index(self) -> int:
        """An index of this worker's that nothing has."""
        while True:
            first, *rest = self.rng(4)
            mine = first - first % self._workers + self.worker
            if mine > 0xFF:
                continue
            index = int.from_bytes(bytes((mine, *rest)), "little")
            if index not in self.sessions and index not in self.handshakes:
                return index

    def may_have(self, index: int) -> bool:
        """Whether an index is of this worker's and free."""
        return self.worker_of(index) == self.worker and index not in self.sessions and index not in self.handshakes

    def worker_of(self, index: int) -> int:
        """Whose an index is, be it in use or not."""
        return index % 256 % self._workers

    def jitter(self) -> float:
        """Up to 333 ms, so that two sides that begin at once don't go on so (6.1)."""
        return int.from_bytes(self.rng(2), "little") % 334 / 1000

    def arm(self, peer: Peer) -> None:
        """See to it that the peer's timers are looked at when they are due."""
        due = peer.due
        if due < peer.armed:
            peer.armed = due
            self._entries += 1
            heappush(self._heap, (due, self._entries, peer))

    def next_due(self) -> float:
        """When `pop_due` may have something, INF for never."""
        heap = self._heap
        while heap:
            time, _, peer = heap[0]
            if time == peer.armed and self.peers.get(peer.public_key) is peer:
                return time
            heappop(heap)
        return INF

    def pop_due(self, now: float) -> Peer | None:
        """A peer with a timer that is due, disarmed: whoever serves it arms it again."""
        while self.next_due() <= now:
            peer = heappop(self._heap)[2]
            peer.armed = INF
            if peer.due <= now:
                return peer
            self.arm(peer)
        return None

    def drop_session(self, session: Session | None) -> None:
        """Forget a session and its keys."""
        if session is not None:
            del self.sessions[session.local]
            self.awake.discard(session)
            session.rest()
            session.send_key = session.receive_key = b""

    def drop_pending(self, peer: Peer) -> None:
        """Forget an initiation that waits for its response."""
        if peer.pending is not None:
            del self.handshakes[peer.pending.local]
            peer.pending = None

    def drop_keys(self, peer: Peer) -> None:
        """Forget every session and handshake of a peer."""
        for session in peer.sessions():
            self.drop_session(session)
        peer.current = peer.previous = peer.next = None
        self.drop_pending(peer)

    def expect(self, peer: Peer, pending: Pending) -> None:
        """An initiation is on its way; it replaces one before."""
        self.drop_pending(peer)
        peer.pending = pending
        self.handshakes[pending.local] = peer

    def begin(self, session: Session) -> None:
        """A handshake came to this session; its peer's others move up (as the reference implementations do)."""
        peer = session.peer
        self.sessions[session.local] = session
        if session.initiator:
            self.drop_session(peer.previous)
            if peer.next is not None:
                # Ours is newer than the one that we answered and that the peer never used.
                self.drop_session(peer.current)
                peer.previous, peer.next = peer.next, None
            else:
                peer.previous = peer.current
            peer.current = session
        else:
            self.drop_session(peer.next)
            self.drop_session(peer.previous)
            peer.previous = None
            peer.next = session

    def confirm(self, session: Session) -> None:
        """The peer has used the session that we answered."""
        peer = session.peer
        self.drop_session(peer.previous)
        peer.previous, peer.current, peer.next = peer.current, session, None
        if peer.pending is None:
            # Our last handshake message has arrived: no cookie can come for it.
            peer.last_mac1 = b""
