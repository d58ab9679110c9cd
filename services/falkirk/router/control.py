"""What the router and its resolver say to each other over their inherited SEQPACKET pair.

The router says `Start` first, with the counters' descriptor, then `Load` for each snapshot and again whenever one changes, each with a
memory that holds it. The resolver answers `Ready` once devices can reach it, `Loaded` for what it took or why not, and `Spooled` when there are new
records of audit. The pair's end is the resolver's end.
"""

from __future__ import annotations

from typing import Final

import msgspec

from falkirk.router.settings import Settings

AUDIT_WORKER: Final = 2000
"""The resolver's number in ids of audit records; those below 1000 are the flow workers'."""
GAUGES: Final = ("connections", "waiting")
"""Numbers of the present: connections, questions that wait for other resolvers."""
DROPS: Final = (
    "dns_malformed",
    "dns_not_a_question",
    "dns_too_many",
    "dns_unsent",
    "asker_refused",
    "peer_refused",
    "accept_failed",
)
"""Questions, replies and connections that came to nothing, by reason: `falkirk_drops_total`."""
RCODES: Final = ("NOERROR", "FORMERR", "SERVFAIL", "NXDOMAIN", "NOTIMP", "REFUSED")
COUNTERS: Final = (
    *GAUGES,
    *DROPS,
    "questions_udp",
    "questions_tcp",
    *(f"answers_{rcode.lower()}" for rcode in RCODES),
    "answers_other",
    "hidden",
    "asked_upstream",
    "asked_forward",
    "asked_failed",
    "records",
)
"""Everything that the resolver counts, in the order of the shared memory."""


MAX_DATAGRAM: Final = 64 * 1024
"""Bytes; snapshots go by descriptor."""


class Message(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """Base of all messages."""


class Start(Message, frozen=True, tag=True):
    """All that the resolver must know. One descriptor: the counters."""

    node: str
    mesh_dir: str
    """Where its sockets are."""
    mode: int
    """Permission bits of those."""
    uids: tuple[int, ...]
    """Who may connect."""
    spool: str
    """The directory of its records."""
    settings: Settings
    log_level: str
    log_format: str


class Load(Message, frozen=True, tag=True):
    """A snapshot of "rules", "routes" or "names". One descriptor: a memory that holds it."""

    name: str


class Ready(Message, frozen=True, tag=True):
    """Its sockets are there."""


class Loaded(Message, frozen=True, tag=True):
    """A snapshot is in force; or isn't, and why."""

    name: str
    error: str = ""


class Spooled(Message, frozen=True, tag=True):
    """The spool has grown."""


TO_WORKER: Final = msgspec.msgpack.Decoder(Start | Load)
TO_PARENT: Final = msgspec.msgpack.Decoder(Ready | Loaded | Spooled)


def encode(message: Message) -> bytes:
    """One datagram."""
    return msgspec.msgpack.encode(message)
