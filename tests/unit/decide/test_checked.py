"""The reader of checked expressions: trees, positions, and bytes that aren't one."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from falkirk.decide.cel import compile_expression
from falkirk.decide.checked import Checked, Node, UnreadableExpression, parse, walk


def shape(node: Node) -> object:
    if node.kind == "const":
        return node.value
    if not node.children:
        return node.name or node.kind
    return (node.name or node.kind, *(shape(child) for child in node.children))


@pytest.mark.parametrize(
    ("when", "tree"),
    [
        ("net.port == -5", ("_==_", "net.port", -5)),
        ('net.dst.inCidr("10.0.0.0/8")', ("inCidr", "net.dst", "10.0.0.0/8")),
        ("net.port in [1, 2]", ("@in", "net.port", ("list", 1, 2))),
        ('device.posture.os == "é"', ("_==_", ("os", "device.posture"), "é")),
        ('{"a": true}["a"]', ("_[_]", ("other", "a", True), "a")),
        ('b"x" == b"y"', ("_==_", b"x", b"y")),
        ("1.5 < 2.5", ("_<_", None, None)),
    ],
)
def test_trees(when: str, tree: object) -> None:
    assert shape(compile_expression(when).checked.root) == tree


def test_positions_count_code_points() -> None:
    checked = compile_expression('"é" == "e" && net.port == 7').checked
    seven = next(node for node in walk(checked.root) if node.value == 7)
    assert checked.offsets[seven.id] == 26


@pytest.mark.parametrize("data", [b"", b"\x12", b"\x12\x05ab", b"\xff" * 12, b"\x0b"])
def test_what_is_not_an_expression_is_refused(data: bytes) -> None:
    with pytest.raises(UnreadableExpression):
        parse(data)


@given(st.binary(max_size=60), st.integers(0, 600))
@settings(max_examples=500)
def test_any_bytes_are_read_or_refused(noise: bytes, at: int) -> None:
    good = compile_expression('net.dst.inCidr("10.0.0.0/8") && net.port == 443').serialized
    at %= len(good)
    try:
        assert isinstance(parse(good[:at] + noise + good[at + len(noise) :]), Checked)
    except UnreadableExpression:
        return
