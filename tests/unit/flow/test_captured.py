"""What passes between a worker and whoever captures."""

from __future__ import annotations

import msgspec
import pytest

from falkirk.flow import captured
from falkirk.flow.captured import Begun, Captured

PACKET = Captured(
    1_700_000_000_123_456_789,
    captured.NAMESPACE,
    captured.DROPPED,
    "no_flow",
    bytes(range(16)),
    "acme",
    "laptop",
    7,
    "lift",
    "main/all",
    1400,
    True,
    60_000,
    bytes(60_000),
    3,
)


@pytest.mark.parametrize("message", [Begun(), Begun("the disk is full"), PACKET])
def test_a_datagram_is_one_message(message: captured.Datagram) -> None:
    assert captured.decode(captured.encode(message)) == message


@pytest.mark.parametrize("data", [b"", b"\x90", b"{}", captured.encode(PACKET)[:-1]])
def test_anything_else_is_refused(data: bytes) -> None:
    with pytest.raises(msgspec.DecodeError):
        captured.decode(data)
