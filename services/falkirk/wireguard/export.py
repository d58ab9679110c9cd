"""A peer's sessions as bytes, for a worker that takes over from another on the same machine (their monotonic clock is one).

Limit: a record is of this version of the engine; another version's is refused, and the sessions recover by handshake.
"""

from __future__ import annotations

from typing import Any, Final, Literal

import msgspec

from falkirk.wireguard.handshake import Keys
from falkirk.wireguard.peer import INF, Peer
from falkirk.wireguard.session import REJECT_AFTER_SECONDS, Session
from falkirk.wireguard.table import Table

VERSION: Final = 1
_WINDOW_BYTES: Final = 1024


class _Session(msgspec.Struct, array_like=True, forbid_unknown_fields=True):
    role: Literal["previous", "current", "next"]
    local: int
    remote: int
    initiator: bool
    created: float
    send_key: bytes
    receive_key: bytes
    counter: int
    highest: int
    missing: bytes


class _Record(msgspec.Struct, array_like=True, forbid_unknown_fields=True):
    version: int
    public_key: bytes
    static_secret: bytes
    timestamp: bytes
    endpoint: list[Any]
    keepalive: bool
    handshake_at: float
    handshake_wall_ns: int
    sessions: list[_Session]


_DECODER: Final = msgspec.msgpack.Decoder(_Record)
_ENCODER: Final = msgspec.msgpack.Encoder()


def dump(peer: Peer) -> bytes:
    """What goes on elsewhere."""
    sessions = [
        _Session(
            role,
            session.local,
            session.remote,
            session.initiator,
            session.created,
            session.send_key,
            session.receive_key,
            session.counter,
            session.window.highest,
            session.window.missing.to_bytes(_WINDOW_BYTES, "little").rstrip(b"\0"),
        )
        for role in ("previous", "current", "next")
        if (session := getattr(peer, role)) is not None
    ]
    return _ENCODER.encode(
        _Record(
            VERSION,
            peer.public_key,
            peer.static_secret,
            peer.timestamp,
            list(peer.endpoint or ()),
            peer.keepalive != INF,
            peer.handshake_at,
            peer.handshake_wall_ns,
            sessions,
        )
    )


def load(record: bytes, table: Table, now: float) -> Peer | None:
    """See `Node.import_peer`."""
    try:
        read = _DECODER.decode(record)
    except msgspec.MsgspecError as error:
        raise ValueError(f"not a peer's record: {error}") from error
    if read.version != VERSION:
        raise ValueError(f"a peer's record of version {read.version}, this engine's is {VERSION}")
    peer = table.peers.get(read.public_key)
    indices = [one.local for one in read.sessions]
    if peer is None or peer.sessions() or any(not table.may_have(index) for index in indices):
        return None
    peer.static_secret = read.static_secret
    peer.timestamp = max(peer.timestamp, read.timestamp)
    peer.endpoint = tuple(read.endpoint) or peer.endpoint
    peer.handshake_at = read.handshake_at
    peer.handshake_wall_ns = read.handshake_wall_ns
    for one in read.sessions:
        if now - one.created >= REJECT_AFTER_SECONDS:
            continue
        keys = Keys(one.send_key, one.receive_key)
        session = Session(
            peer,
            one.local,
            one.remote,
            keys if one.initiator else Keys(*keys[::-1]),
            initiator=one.initiator,
            created=one.created,
        )
        session.counter = one.counter
        session.window.highest = one.highest
        session.window.missing = int.from_bytes(one.missing, "little")
        table.sessions[session.local] = session
        setattr(peer, one.role, session)
        peer.erase = max(one.created + REJECT_AFTER_SECONDS, 0 if peer.erase == INF else peer.erase)
    if read.keepalive:
        peer.keepalive = now
    if peer.previous is not None:
        peer.forget = now
    table.arm(peer)
    return peer
