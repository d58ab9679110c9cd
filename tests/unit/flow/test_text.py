"""Addresses as text, against the standard library."""

from __future__ import annotations

import ipaddress

from hypothesis import given
from hypothesis import strategies as st

from falkirk.flow.text import address_text


@given(st.one_of(st.binary(min_size=4, max_size=4), st.binary(min_size=16, max_size=16)))
def test_as_the_standard_library_writes_it(address: bytes) -> None:
    assert address_text(address) == str(ipaddress.ip_address(address))
