"""What is believed of an MTU that somebody tells."""

from __future__ import annotations

import pytest

from falkirk.wire import path_mtu
from falkirk.wire.malformed import MalformedPacket
from falkirk.wire.packet import parse
from tests.unit.wire import samples


def error4(kind: int, code: int, rest: int, options: bytes = b"") -> bytes:
    return b"##" + samples.ip4(1, samples.icmp4(kind, code, rest, bytes(28)), options=options)


def error6(kind: int, code: int, rest: int) -> bytes:
    return b"##" + samples.ip6(58, samples.icmp6(kind, code, rest, bytes(48)))


@pytest.mark.parametrize(
    ("data", "mtu"),
    [
        (error4(3, 4, 1400), 1400),
        (error4(3, 4, 0x12340000 | 1400), 1400),
        (error4(3, 4, 1400, b"\x01" * 4), 1400),
        (error4(3, 4, 0xFFFF), 65535),
        # RFC 1191 5: it doesn't say.
        (error4(3, 4, 0), 576),
        (error4(3, 1, 1400), None),
        (error4(11, 4, 1400), None),
        (error6(2, 0, 1400), 1400),
        (error6(2, 0, 0x10000), 65536),
        (error6(2, 0, 0), 0),
        # RFC 4443 3.2: the code is ignored by the receiver.
        (error6(2, 7, 1400), 1400),
        (error6(1, 4, 1400), None),
        (error6(3, 4, 1400), None),
    ],
)
def test_told(data: bytes, mtu: int | None) -> None:
    assert path_mtu.told(data, parse(data, 2, len(data) - 2)) == mtu


@pytest.mark.parametrize(
    ("data", "quoted_length", "believed"),
    [
        (error4(3, 4, 1400), 1500, True),
        (error4(3, 4, 1400), 1401, True),
        (error4(3, 4, 1400), 1400, False),
        (error4(3, 4, 1400), 40, False),
        (error4(3, 4, 68), 1500, True),
        (error4(3, 4, 67), 1500, False),
        (error4(3, 4, 1), 1500, False),
        (error4(3, 4, 0), 1500, True),
        (error4(3, 4, 0), 576, False),
        (error4(3, 1, 0), 40, True),
        (error4(11, 0, 0), 40, True),
        (error6(2, 0, 1280), 1500, True),
        (error6(2, 0, 1279), 1500, False),
        (error6(2, 0, 0), 1500, False),
        (error6(2, 0, 1280), 1280, False),
        (error6(2, 0, 1 << 31), 65575, False),
        (error6(1, 0, 0), 48, True),
    ],
)
def test_check(data: bytes, quoted_length: int, believed: bool) -> None:
    packet = parse(data, 2, len(data) - 2)
    if believed:
        path_mtu.check(data, packet, quoted_length)
        return
    with pytest.raises(MalformedPacket, match="icmp_mtu"):
        path_mtu.check(data, packet, quoted_length)
