"""TCP options by table."""

from __future__ import annotations

import pytest

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
