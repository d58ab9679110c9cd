"""What a flow worker counts. Every packet received is forwarded, answered, held or dropped with a reason; at rest nothing is held.
A fragment that waits isn't received yet (`falkirk.flow.fragments`).

`received` counts packets from tunnels, from the TUN devices and from sessions' sockets alike (there also what their error queues tell), so the sum holds over both directions.
"""

from __future__ import annotations

from typing import Final

from falkirk.flow import reassembly
from falkirk.wire.malformed import REASONS

DROP_REASONS: Final = (
    *REASONS,
    *reassembly.REASONS,
    "empty_datagram",
    "short_datagram",
    "unknown_tunnel",
    "second_context",
    "spoofed_source",
    "bad_tcp_flags",
    "syn_too_large",
    "icmp_not_carried",
    "protocol_not_built",
    "icmp_error_unmatched",
    "icmp_error_taken",
    "descriptors_exhausted",
    "ports_exhausted",
    "socket_full",
    "upstream_error",
    "dns_malformed",
    "syn_held",
    "held",
    "not_ready",
    "audit_unwritable",
    "device_limit",
    "device_held_limit",
    "tenant_limit",
    "slots_exhausted",
    "lower_slots_exhausted",
    "ports_in_use",
    "table_full",
    "reset_of_nothing",
    "no_flow",
    "not_tcp",
    "tunnel_full",
    "tunnel_closed",
    "onramp_away",
    "sibling_full",
    "tun_write_error",
    "icmp_rate_limit",
    "unanswerable",
)
DROPS: Final = {reason: place for place, reason in enumerate(DROP_REASONS, start=12)}

RECEIVED: Final = 0
FORWARDED: Final = 1
ANSWERED: Final = 2
FLOWS: Final = 3
SLOTS_ACTIVE: Final = 4
SLOTS_RESTING: Final = 5
SLOTS_TOTAL: Final = 6
TUNNELS: Final = 7
STARTED: Final = 8
DENIED: Final = 9
ENDED: Final = 10
PAIRED: Final = 11
NAMES: Final = (
    "received",
    "forwarded",
    "answered",
    "flows",
    "slots_active",
    "slots_resting",
    "slots_total",
    "tunnels",
    "started",
    "denied",
    "ended",
    "paired",
    *(f"drop_{reason}" for reason in DROP_REASONS),
)
