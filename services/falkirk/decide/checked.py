"""Reads a checked CEL expression: the few fields of cel.expr.CheckedExpr that guards and diagnostics need. PURE.

cel-expr-python serialises an expression as a google.protobuf.Any around a CheckedExpr (cel/expr/checked.proto). The
protobuf library may not be imported here, and packet workers shouldn't carry it, so this is a reader of the protobuf
wire format (varint and length-delimited fields; others are skipped), run when rules are compiled, never on a packet.

Input is what our own compiler just made: malformed input raises `UnreadableExpression` and never loops, but isn't
expected. Nesting is bounded by the parser's limit of 32, which `parse` relies on.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import msgspec

Constant = None | bool | int | float | str | bytes
_VARINT: Final = 0
_FIXED64: Final = 1
_BYTES: Final = 2
_FIXED32: Final = 5

# Field numbers of cel.expr.Expr's oneof, and in each message those of a name and of sub-expressions.
_CONST: Final = 3
_STRUCT: Final = 8
_KINDS: Final = {4: "ident", 5: "select", 6: "call", 7: "list"}
_NAMES: Final = {(4, 1), (5, 2), (6, 2)}
_CHILDREN: Final = {(5, 1), (6, 1), (6, 3), (7, 1), (9, 2), (9, 4), (9, 5), (9, 6), (9, 7)}
"""select.operand, call.target, call.args, list.elements, and a comprehension's five parts"""


class UnreadableExpression(ValueError):
    """The serialised form isn't what this reader knows: another major version of the CEL library."""


class Node(msgspec.Struct, frozen=True):
    """One node of the tree. `kind` is const, ident, select, call, list or other; `children` are all sub-expressions, a
    method's target first; `name` is a variable, a field or a function (operators as `_&&_`, `_==_`, `@in`)."""

    id: int
    kind: str
    name: str = ""
    value: Constant = None
    children: tuple[Node, ...] = ()


class Checked(msgspec.Struct, frozen=True):
    """A checked expression: its tree, and where nodes stand in the source."""

    root: Node
    offsets: dict[int, int]
    """Node id -> offset in the source, in code points from 0."""


def parse(serialized: bytes) -> Checked:
    """The tree of a serialised expression. Raises UnreadableExpression."""
    try:
        wrapped = b"".join(_bytes(value) for number, value in _fields(serialized) if number == 2)
        root: Node | None = None
        offsets: dict[int, int] = {}
        for number, value in _fields(wrapped):
            if number == 4:
                root = _node(_bytes(value))
            elif number == 5:  # source_info.positions
                for field, position in _fields(_bytes(value)):
                    if field == 4:
                        node_id, offset = _entry(_bytes(position))
                        offsets[node_id] = _int(offset)
    except (IndexError, UnicodeDecodeError) as error:
        raise UnreadableExpression(f"not a checked CEL expression: {error}") from error
    if root is None:
        raise UnreadableExpression("not a checked CEL expression: it has no tree")
    return Checked(root, offsets)


def walk(node: Node) -> Iterator[Node]:
    """The node and all below it."""
    yield node
    for child in node.children:
        yield from walk(child)


def _node(data: bytes) -> Node:
    """A cel.expr.Expr."""
    node_id = 0
    kind = 0
    body = b""
    for number, value in _fields(data):
        if number == 2:
            node_id = _int(value)
        elif number >= 3:
            kind, body = number, _bytes(value)
    if kind == _CONST:
        return Node(node_id, "const", value=_constant(body))
    name = ""
    children: list[Node] = []
    for number, value in _fields(body):
        if (kind, number) in _NAMES:
            name = _bytes(value).decode()
        elif (kind, number) in _CHILDREN:
            children.append(_node(_bytes(value)))
        elif kind == _STRUCT and number == 2:  # entries: map_key 3, value 4
            children += [_node(_bytes(v)) for n, v in _fields(_bytes(value)) if n in (3, 4)]
    return Node(node_id, _KINDS.get(kind, "other"), name, children=tuple(children))


def _constant(data: bytes) -> Constant:
    """A cel.expr.Constant; kinds that guards don't use (double, duration, timestamp) come back as None."""
    for number, value in _fields(data):
        if number == 2:
            return bool(_int(value))
        if number == 3:
            number64 = _int(value)
            return number64 - (1 << 64) if number64 >> 63 else number64
        if number == 6:
            return _bytes(value).decode()
        if number == 7:
            return _bytes(value)
    return None


def _entry(data: bytes) -> tuple[int, int | bytes]:
    """A map entry with an integer key; absent fields are zero."""
    key: int | bytes = 0
    value: int | bytes = 0
    for number, field in _fields(data):
        if number == 1:
            key = field
        elif number == 2:
            value = field
    return _int(key), value


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Field numbers and values of one message; fixed-width values come as bytes."""
    at = 0
    while at < len(data):
        tag, at = _varint(data, at)
        wire = tag & 7
        if wire == _VARINT:
            number, at = _varint(data, at)
            yield tag >> 3, number
            continue
        if wire == _BYTES:
            size, at = _varint(data, at)
        elif wire == _FIXED64:
            size = 8
        elif wire == _FIXED32:
            size = 4
        else:
            raise UnreadableExpression(f"not a checked CEL expression: wire type {wire}")
        if at + size > len(data):
            raise UnreadableExpression("not a checked CEL expression: truncated")
        yield tag >> 3, data[at : at + size]
        at += size


def _varint(data: bytes, at: int) -> tuple[int, int]:
    result = shift = 0
    while True:
        byte = data[at]
        at += 1
        result |= (byte & 0x7F) << shift
        if byte < 0x80:
            return result, at
        shift += 7
        if shift > 63:
            raise UnreadableExpression("not a checked CEL expression: overlong varint")


def _int(value: int | bytes) -> int:
    if isinstance(value, int):
        return value
    raise UnreadableExpression("not a checked CEL expression: bytes where a number was expected")


def _bytes(value: int | bytes) -> bytes:
    if isinstance(value, bytes):
        return value
    raise UnreadableExpression("not a checked CEL expression: a number where bytes were expected")
