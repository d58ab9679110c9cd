"""Which messages are errors, which are echoes."""

from __future__ import annotations

import pytest

from falkirk.wire import icmp
from falkirk.wire.malformed import MalformedPacket


def test_errors_and_echoes() -> None:
    assert [kind for kind in range(256) if icmp.is_error(4, kind)] == [3, 4, 5, 11, 12]
    assert [kind for kind in range(256) if icmp.is_error(6, kind)] == [*range(128), 137]
    assert [kind for kind in range(256) if icmp.is_echo(4, kind)] == [0, 8]
    assert [kind for kind in range(256) if icmp.is_echo(6, kind)] == [128, 129]


def test_there_and_back() -> None:
    data = icmp.build(icmp.UNREACHABLE4, icmp.FRAGMENTATION_NEEDED4, 0x00050578)
    assert icmp.parse(data, 0, 8) == icmp.Icmp(3, 4, 0, 5, 1400)
    with pytest.raises(MalformedPacket, match="truncated_l4"):
        icmp.parse(data, 0, 7)
