"""Sums against RFC 1071's own example and against word-by-word addition."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from falkirk.wire import checksum
from tests.unit.wire import samples


def test_example_of_rfc_1071() -> None:
    assert checksum.residue(bytes.fromhex("0001f203f4f5f6f7")) == 0xDDF2
    assert checksum.checksum(bytes.fromhex("0001f203f4f5f6f7")) == 0x220D


@given(st.binary(max_size=5000))
def test_residue_is_the_sum_of_words(data: bytes) -> None:
    assert checksum.residue(data) == samples.slow_sum(data) % 0xFFFF


@given(st.integers(0, 1), st.sampled_from([1, 23, 24, 25, 191, 192, 193, 255, 1460, 9001, 65535, 65536, 70001]))
def test_long_runs_of_ones_and_sizes_around_the_folds(odd: int, size: int) -> None:
    data = b"\xff" * size + b"\x01" * odd
    assert checksum.residue(data) == samples.slow_sum(data) % 0xFFFF


@given(st.binary(min_size=2, max_size=200))
def test_checksum_makes_data_valid(data: bytes) -> None:
    data += b"\0" * (len(data) % 2)
    assert checksum.valid(data + checksum.checksum(data).to_bytes(2, "big"))


@given(st.binary(min_size=4, max_size=64), st.integers(0, 0xFFFF), st.integers(0, 31))
def test_update_equals_a_new_sum(data: bytes, word: int, where: int) -> None:
    data = b"\x12\x34" + data + b"\0" * (len(data) % 2)
    where = 2 + where * 2 % (len(data) - 2)
    changed = data[:where] + word.to_bytes(2, "big") + data[where + 2 :]
    old = int.from_bytes(data[where : where + 2], "big")
    assert checksum.update(checksum.checksum(data), old, word) == checksum.checksum(changed)


@given(st.binary(max_size=3000), st.booleans())
def test_a_partial_checksum_is_completed(payload: bytes, six: bool) -> None:
    make = samples.tcp6 if six else samples.tcp4
    start = 40 if six else 20
    partial = bytearray(b"vnet" + make(payload=payload, partial=True))
    checksum.complete(partial, 4 + start, 4 + start + 16, len(partial))
    assert bytes(partial[4:]) == make(payload=payload)


def test_partial_field_is_the_pseudo_header() -> None:
    expected = samples.slow_sum(samples.pseudo(samples.C6, samples.S6, 6, 40))
    assert checksum.partial_field(samples.C6, samples.S6, 6, 40) == expected
