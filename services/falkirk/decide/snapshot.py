"""The serialised form of compiled rules: what the policy service pushes and packet workers load. PURE.

    magic "FALKIRK-RULES" | version u16 | frame*          frame = length u32 | MessagePack of one tagged struct

Frames, in order: `Head`; `Expressions` (serialised CEL, each text once, numbered over all of these frames); then for each
tenant `Rules` (several of them for a tenant with many rules, in order); `End`. A frame holds at most `FRAME_ITEMS` items,
so a reader that takes one frame a turn never works longer than about a millisecond. Integers are big-endian.

Versions: a reader refuses any other version than its own (`UnreadableRules`); the owner pushes anew after an upgrade.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Final

import msgspec

from falkirk.decide.guards import Value

MAGIC: Final = b"FALKIRK-RULES"
VERSION: Final = 4
"""2: guards on the destination's device. 3: on ranges of ports, and on keys of maps. 4: on what a resolver is asked."""
FRAME_ITEMS: Final = 64

_HEAD: Final = struct.Struct("!13sH")
_LENGTH: Final = struct.Struct("!I")

EXACT: Final = -1
"""In `Rule.expression`: the guards say all, nothing is evaluated."""
BROKEN: Final = -2
"""In `Rule.expression`: it didn't compile; `Rule.when` still is its text and `Rule.problem` says why."""


class UnreadableRules(ValueError):
    """Bytes that aren't a snapshot of this version."""


class Frame(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Base of all frames."""


class Head(Frame, frozen=True, tag=True):
    """How much follows."""

    tenants: int
    rules: int
    expressions: int


class Expressions(Frame, frozen=True, tag=True):
    """Serialised expressions."""

    serialized: list[bytes]


class Rule(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """One rule; its place in the tenant's order is its place in the frames. (Without garbage collection: it holds no containers, and
    tens of thousands of them would make a full collection take milliseconds.)"""

    label: str
    """policy/rule"""
    when: str
    allow: bool
    treatment: str
    expression: int
    """Number of an expression, or EXACT or BROKEN."""
    problem: str = ""


class Rules(Frame, frozen=True, tag=True):
    """Rules of one tenant, in the order in which they are tried."""

    tenant_id: str
    rules: list[Rule]
    guards: list[dict[str, list[Value]]]
    """Of each rule: variable -> values, see `falkirk.decide.guards`."""


class End(Frame, frozen=True, tag=True):
    """Nothing follows."""


_AnyFrame = Head | Expressions | Rules | End
_decoder: Final = msgspec.msgpack.Decoder(_AnyFrame)
_encoder: Final = msgspec.msgpack.Encoder()


Guarded = tuple[Rule, dict[str, list[Value]]]


def write(expressions: list[bytes], tenants: dict[str, list[Guarded]]) -> bytes:
    """A snapshot; expressions are numbered by their place in the list."""
    frames: list[_AnyFrame] = [Head(len(tenants), sum(map(len, tenants.values())), len(expressions))]
    frames += [Expressions(expressions[at : at + FRAME_ITEMS]) for at in range(0, len(expressions), FRAME_ITEMS)]
    for tenant_id, rules in tenants.items():
        for at in range(0, len(rules), FRAME_ITEMS):
            some = rules[at : at + FRAME_ITEMS]
            frames.append(Rules(tenant_id, [rule for rule, _ in some], [guards for _, guards in some]))
    frames.append(End())
    parts = [_HEAD.pack(MAGIC, VERSION)]
    for frame in frames:
        encoded = _encoder.encode(frame)
        parts += [_LENGTH.pack(len(encoded)), encoded]
    return b"".join(parts)


def read(data: bytes) -> Iterator[_AnyFrame]:
    """The frames of a snapshot. Raises UnreadableRules where it isn't one, is of another version, or ends early."""
    if len(data) < _HEAD.size:
        raise UnreadableRules("not a snapshot of rules: too short")
    magic, version = _HEAD.unpack_from(data)
    if magic != MAGIC:
        raise UnreadableRules("not a snapshot of rules")
    if version != VERSION:
        raise UnreadableRules(f"rules of format version {version}; this program reads version {VERSION}")
    view = memoryview(data)
    at = _HEAD.size
    while True:
        if at + _LENGTH.size > len(data):
            raise UnreadableRules("the snapshot of rules ends early")
        (length,) = _LENGTH.unpack_from(data, at)
        at += _LENGTH.size
        if at + length > len(data):
            raise UnreadableRules("the snapshot of rules ends early")
        try:
            frame = _decoder.decode(view[at : at + length])
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            raise UnreadableRules(f"the snapshot of rules is damaged: {error}") from error
        at += length
        yield frame
        if isinstance(frame, End):
            return
