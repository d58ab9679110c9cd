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
        "GRE": "GRE",
        "ESP": "ESP",
        "AUTHENTICATION": "AH",
        "ICMPV6": "ICMPV6",
        "NO_NEXT_HEADER": "NONE",
        "SCTP": "SCTP",
        "DESTINATION_OPTIONS": "DSTOPTS",
    }
    assert {name for name, value in vars(protocol).items() if name.isupper() and isinstance(value, int)} == set(names)
    for name, theirs in names.items():
        assert getattr(protocol, name) == getattr(socket, f"IPPROTO_{theirs}")


def test_every_number_has_a_name_that_leads_back() -> None:
    assert [protocol.number(protocol.name(number)) for number in range(256)] == list(range(256))
    assert (protocol.name(protocol.UDP), protocol.number("refused")) == ("udp", -1)
