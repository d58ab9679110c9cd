"""What an interface is told: read back as it was written, and refused with the place of what is wrong, never with a secret."""

from __future__ import annotations

import json
from typing import Any

import pytest

from falkirk.linux.wireguard.request import InterfaceRequest, PeerRequest, decode, encode

SECRET = bytes(range(32))
GOOD = InterfaceRequest(
    private_key=SECRET,
    addresses=("100.96.0.7/32", "fd00::7/128"),
    peers=(PeerRequest(public_key=bytes(32), endpoints=("192.0.2.1:51820",), allowed=("100.96.0.0/12", "fd00::/48")),),
    dns=("100.96.0.53",),
    search=("acme.falkirk",),
)


def test_it_comes_back_as_it_was() -> None:
    assert decode(encode(GOOD)) == GOOD


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"private_key": "AAAA"}, "private_key: must have 32 bytes"),
        ({"name": ""}, "name: "),
        ({"name": "x" * 16}, "name: "),
        ({"mtu": 1279}, "mtu: 1279"),
        ({"mtu": 70000}, "mtu: 70000"),
        ({"addresses": ["100.96.0.7/33"]}, "100.96.0.7/33"),
        ({"dns": ["resolver"]}, "resolver"),
        ({"colour": 1}, "colour"),
        ({"peers": [{"public_key": "AAAA"}]}, r"peers\[0\]"),
        ({"peers": [{"public_key": "A" * 43 + "=", "allowed": ["10.0.0.1/8"]}]}, "10.0.0.1/8"),
        ({"peers": [{"public_key": "A" * 43 + "=", "endpoints": ["nowhere"]}]}, "nowhere"),
    ],
)
def test_what_is_wrong_is_named(change: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told) as caught:
        decode(json.dumps(json.loads(encode(GOOD)) | change).encode())
    assert json.loads(encode(GOOD))["private_key"] not in str(caught.value)
