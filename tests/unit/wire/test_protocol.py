"""The numbers are IANA's, as the C library has them."""

from __future__ import annotations

import socket

from falkirk.wire import protocol


def test_numbers() -> None:
    names = {
        "HOP_BY_HOP": "HOPOPTS",
        "ICMP": "ICMP",
        "TCP": "TCP",
        "UDP": "UDP",
        "ROUTING": "ROUTING",
        "FRAGMENT": "FRAGMENT",
        "ESP": "ESP",
        "AUTHENTICATION": "AH",
        "ICMPV6": "ICMPV6",
        "NO_NEXT_HEADER": "NONE",
        "DESTINATION_OPTIONS": "DSTOPTS",
    }
    assert {name for name in vars(protocol) if name.isupper()} == set(names)
    for name, theirs in names.items():
        assert getattr(protocol, name) == getattr(socket, f"IPPROTO_{theirs}")
