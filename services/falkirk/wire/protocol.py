"""Protocol numbers (IANA) that Falkirk tells apart, and their names in records."""

from __future__ import annotations

from typing import Final

HOP_BY_HOP: Final = 0
ICMP: Final = 1
TCP: Final = 6
UDP: Final = 17
ROUTING: Final = 43
FRAGMENT: Final = 44
GRE: Final = 47
ESP: Final = 50
AUTHENTICATION: Final = 51
ICMPV6: Final = 58
NO_NEXT_HEADER: Final = 59
DESTINATION_OPTIONS: Final = 60
SCTP: Final = 132

NAMES: Final = {
    ICMP: "icmp",
    TCP: "tcp",
    UDP: "udp",
    GRE: "gre",
    ESP: "esp",
    AUTHENTICATION: "ah",
    ICMPV6: "icmpv6",
    SCTP: "sctp",
}
_NUMBERS: Final = {name: number for number, name in NAMES.items()}


def name(number: int) -> str:
    """A protocol's name; its number in decimal where it has none here."""
    return NAMES.get(number) or str(number)


def number(text: str) -> int:
    """The protocol of a name that `name` gave; -1 where it isn't one."""
    found = _NUMBERS.get(text)
    if found is not None:
        return found
    return int(text) if text.isdecimal() else -1
