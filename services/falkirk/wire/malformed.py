"""What is wrong with a packet that can't be used.

Every reason is one of a closed set, so that each has its own counter before the first bad packet comes. The fault is
always the sender's: nothing here is an error of Falkirk.
"""

from __future__ import annotations

from typing import Final, Literal, get_args

Reason = Literal[
    "too_short",
    "bad_version",
    "bad_header_length",
    "bad_total_length",
    "bad_ip_checksum",
    "bad_ip_options",
    "source_route",
    "bad_extension_header",
    "fragment",
    "fragment_tiny",
    "fragment_length",
    "fragment_too_long",
    "fragment_ecn",
    "truncated_l4",
    "bad_tcp_offset",
    "bad_udp_length",
    "bad_l4_checksum",
    "icmp_not_error",
    "bad_icmp_quote",
    "icmp_mtu",
    "vnet_too_short",
    "vnet_flags",
    "vnet_gso_type",
    "vnet_gso_size",
    "vnet_checksum",
]

REASONS: Final[tuple[Reason, ...]] = get_args(Reason)
"""All reasons, in a fixed order (names of counters)."""


class PeerError(Exception):
    """Whoever sent this did wrong; what is done about it never depends on luck or load."""


class MalformedPacket(PeerError):
    """The packet is dropped and counted under `reason`."""

    def __init__(self, reason: Reason) -> None:
        super().__init__(reason)
        self.reason: Reason = reason
