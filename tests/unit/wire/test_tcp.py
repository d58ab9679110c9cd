"""TCP options by table."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from falkirk.wire import tcp
from tests.unit.wire import samples


@pytest.mark.parametrize(
    ("data", "kinds"),
    [
        (b"", []),
        (b"\x02\x04\x05\xb4\x01\x03\x03\x07\x04\x02\x00\x00", [2, 3, 4]),
        (b"\x00\x02\x04\x05\xb4", []),
        (b"\x01\x01\x02\x00\x05\xb4", []),
        (b"\x04\x02\x02\x01", [4]),
        (b"\x02\x04\x05", []),
        (b"\x01\x01\x01\x02", []),
    ],
)
def test_options(data: bytes, kinds: list[int]) -> None:
    assert [kind for kind, _, _ in tcp.options(b"##" + data, 2, 2 + len(data))] == kinds


@pytest.mark.parametrize(
    ("options", "size"), [(b"\x02\x04\x05\xb4", 1460), (b"\x02\x03\x05\x00", None), (b"\x01" * 4, None), (b"", None)]
)
def test_maximum_segment_size(options: bytes, size: int | None) -> None:
    data = samples.tcp(samples.C4, samples.S4, options=options)
    header = tcp.parse(data, 0, len(data))
    assert header.header_length == 20 + len(options)
    assert tcp.maximum_segment_size(data, 0, header.header_length) == size


MSS = b"\x02\x04\x05\xb4"
NEVERTHELESS = b"\x01\x02\x04\x05\xb4\x01\x01\x01"
"""The same at an odd place."""


@pytest.mark.parametrize(
    ("options", "most", "lowered", "after"),
    [
        (MSS, 1360, True, b"\x02\x04\x05\x50"),
        (MSS, 1459, True, b"\x02\x04\x05\xb3"),
        (MSS, 1460, False, MSS),
        (MSS, 65495, False, MSS),
        (MSS, 536, True, b"\x02\x04\x02\x18"),
        (NEVERTHELESS, 1360, True, b"\x01\x02\x04\x05\x50\x01\x01\x01"),
        (b"\x01\x01" + MSS + b"\x04\x02", 1220, True, b"\x01\x01\x02\x04\x04\xc4\x04\x02"),
        (MSS + MSS, 1220, True, b"\x02\x04\x04\xc4" * 2),
        (b"\x02\x04\x00\x00", 1220, False, b"\x02\x04\x00\x00"),
        (b"", 1220, False, b""),
        (b"\x02\x03\x05\xb4", 1220, False, b"\x02\x03\x05\xb4"),
        (b"\x03\x03\x07\x00" + MSS, 1220, False, b"\x03\x03\x07\x00" + MSS),
        (b"\x01\x01\x02\x04", 1220, False, b"\x01\x01\x02\x04"),
    ],
)
@pytest.mark.parametrize("payload", [b"", b"odd"])
def test_clamp_segment_size(options: bytes, most: int, lowered: bool, after: bytes, payload: bytes) -> None:
    def syn(options: bytes, partial: bool = False) -> bytes:
        return samples.tcp(samples.C4, samples.S4, flags=2, options=options, payload=payload, partial=partial)

    for partial in (False, True):
        buffer = bytearray(b"#" * 5 + syn(options, partial))
        end = len(buffer)
        buffer += b"behind"
        assert tcp.clamp_segment_size(buffer, 5, end, most, partial=partial) is lowered
        assert bytes(buffer) == b"#" * 5 + syn(after, partial) + b"behind"


def test_a_header_longer_than_its_segment_is_not_clamped() -> None:
    data = bytearray(samples.tcp(samples.C4, samples.S4, flags=2, options=MSS))
    before = bytes(data)
    assert not tcp.clamp_segment_size(data, 0, len(data) - 1, 536, partial=False)
    assert data == before


@given(
    before=st.integers(0, 5),
    size=st.integers(0, 65535),
    most=st.integers(0, 65535),
    payload=st.binary(max_size=3),
    ports=st.tuples(*[st.integers(0, 65535)] * 2),
)
def test_a_clamped_checksum_is_the_one_made_anew(
    before: int, size: int, most: int, payload: bytes, ports: tuple[int, int]
) -> None:
    def syn(size: int) -> bytes:
        options = b"\x01" * before + b"\x02\x04" + size.to_bytes(2, "big")
        options += b"\x01" * (-len(options) % 4)
        return samples.tcp(
            samples.C6, samples.S6, sport=ports[0], dport=ports[1], flags=18, options=options, payload=payload
        )

    data = bytearray(syn(size))
    assert tcp.clamp_segment_size(data, 0, len(data), most, partial=False) is (size > most)
    assert data == syn(min(size, most))
