"""Layouts against the paper's figures (5.4.2 to 5.4.7)."""

from __future__ import annotations

import pytest

from falkirk.wireguard import messages


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        (messages.INITIATION, (1, 3, 4, 32, 32 + 16, 12 + 16, 16, 16)),
        (messages.RESPONSE, (1, 3, 4, 4, 32, 0 + 16, 16, 16)),
        (messages.COOKIE, (1, 3, 4, 24, 16 + 16)),
    ],
)
def test_sizes_are_the_sums_of_their_fields(kind: int, fields: tuple[int, ...]) -> None:
    assert messages.SIZES[kind] == sum(fields)
    if kind in messages.MAC_OFFSETS:
        assert messages.MAC_OFFSETS[kind] == sum(fields[:-2])


def test_headers_are_little_endian_and_reserved_bytes_zero() -> None:
    assert messages.HEADER.pack(messages.INITIATION, 0x04030201) == b"\1\0\0\0\1\2\3\4"
    assert messages.RESPONSE_HEADER.pack(messages.RESPONSE, 1, 2) == b"\2\0\0\0\1\0\0\0\2\0\0\0"
    made = messages.DATA_HEADER.pack(messages.DATA, 1, 0x0102)
    assert made == b"\4\0\0\0\1\0\0\0\2\1\0\0\0\0\0\0"
    assert len(made) == messages.DATA_HEADER_SIZE


def test_a_nonce_is_four_zeros_and_the_counter() -> None:
    assert messages.NONCE.pack(0x0102) == bytes(4) + b"\2\1" + bytes(6)


def test_the_longest_packet_fits_a_datagram() -> None:
    padded = -(-messages.MAX_PACKET // 16) * 16
    assert padded + messages.DATA_OVERHEAD <= 65_507
