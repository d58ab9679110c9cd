"""Messages between the on-ramp's parent and worker, and the file of an update."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from falkirk.onramp import control
from falkirk.onramp.control import Close, Ended, Opened, State, Update
from falkirk.onramp.tables import DeviceRow, NetworkRow, Row, TenantRow, UserRow
from falkirk.wire.context import Framing, TunnelContext

ROWS: list[Row] = [
    TenantRow("t", "acme", 3),
    UserRow("u", "t", "ann", ("g",), True),
    NetworkRow("n", "t", "lab", True),
    DeviceRow("d", "t", "laptop", "ann", ("g",), (b"\x01\x02\x03\x04",), "lab", {"a": "b"}, True, 9),
]


@pytest.mark.parametrize("message", [Update(True, "e", 1), Close(3, "x")])
def test_to_worker(message: control.Message) -> None:
    assert control.TO_WORKER.decode(control.encode(message)) == message


@pytest.mark.parametrize(
    "message",
    [
        State("e", 1, (True, False)),
        Ended(3, "x"),
        Opened(1, TunnelContext("t", "t", "d", "d", "n", "n", (b"1234",)), Framing.VNET, 1500, 0, 1, 2, 3, True),
    ],
)
def test_to_parent(message: control.Message) -> None:
    assert control.TO_PARENT.decode(control.encode(message)) == message


def test_an_update_comes_back_whole() -> None:
    data = b"".join(control.pack(ROWS * 100, ["x", "y"]))
    found = list(control.unpack(memoryview(data)))
    assert [row for chunk in found for row in chunk.changed] == ROWS * 100
    assert [chunk.removed for chunk in found] == [("x", "y"), *[()] * 4]


def test_an_empty_update() -> None:
    assert list(control.unpack(memoryview(b"".join(control.pack([], []))))) == []


@given(st.integers(1, 200), st.integers(0, 255))
def test_a_broken_update_is_refused_or_read(at: int, value: int) -> None:
    data = bytearray(b"".join(control.pack(ROWS, ["x"])))
    data[at % len(data)] = value
    try:
        list(control.unpack(memoryview(data)))
    except ValueError:
        return
    with pytest.raises(ValueError, match="cut off"):
        list(control.unpack(memoryview(data[:-1])))
