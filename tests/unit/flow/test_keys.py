"""Keys: every signature is told from every other, and reads back."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from falkirk.flow.keys import Signature, key_of, lift_key, signature

PORTS = st.integers(0, 65535)


@given(st.sampled_from([4, 16]), st.data(), st.integers(0, 255), PORTS, PORTS)
def test_a_key_reads_back(
    size: int, data: st.DataObject, protocol: int, source_port: int, destination_port: int
) -> None:
    source, destination = (data.draw(st.binary(min_size=size, max_size=size)) for _ in range(2))
    key = key_of(protocol, source, destination, source_port, destination_port)
    assert signature(key) == Signature(protocol, source, destination, source_port, destination_port)
    lifted = lift_key(source, destination, source_port, destination_port)
    assert signature(lifted) == Signature(6, source, destination, source_port, destination_port)


@pytest.mark.parametrize(("size", "lengths"), [(4, (12, 13)), (16, (36, 37))])
def test_no_other_flow_has_a_key_as_long_as_a_lifted_ones(size: int, lengths: tuple[int, int]) -> None:
    ends = bytes(size), bytes(size), 1, 2
    assert (len(lift_key(*ends)), len(key_of(6, *ends))) == lengths
