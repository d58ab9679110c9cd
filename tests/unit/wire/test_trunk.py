"""What a trunk's datagram looks like."""

from __future__ import annotations

from falkirk.wire import trunk
from falkirk.wire.packet import split
from tests.unit.wire import samples


def test_a_number_and_packets() -> None:
    packets = [samples.tcp4(), samples.tcp4()]
    data = trunk.NUMBER.pack(0x01020304) + b"".join(packets)
    assert data[: trunk.HEADER] == bytes([1, 2, 3, 4])
    found = [data[at : at + size] for at, size in split(data, len(data), trunk.HEADER)]
    assert found == packets
