"""Settings of the flow tracker."""

from __future__ import annotations

import ipaddress

import msgspec


class FlowSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The `flow` section of the settings file."""

    slots: int = 524_288
    """NAT slots of each kind (vnet, raw) a worker, 16 bytes each; fewer where its prefix is smaller. A freed slot rests a minute,
    so this is also the most flows a minute."""
    lower_slots: int = 65_536
    """The same of streams that are lowered to a device, by the kind of its tunnel."""
    max_flows: int = 262_144
    """Live flows a worker."""
    device_flows: int = 16_384
    """Live flows a device, where the registry doesn't say otherwise."""
    device_held: int = 1_024
    """Flows of a device whose upstream is being dialled."""
    tenant_flows: int = 131_072
    """Live flows a tenant on this node, where the registry doesn't say otherwise."""
    connect_timeout_ms: int = 10_000
    """How long a dial may take where the route doesn't say, in milliseconds."""
    established_idle_s: int = 7_440
    """Idle time after which an established TCP flow ends, in seconds. RFC 5382 REQ-5: at least 2 h 4 min."""
    transitory_idle_s: int = 240
    """The same for one that is opening or closing, in seconds. RFC 5382 REQ-5: at least 4 min."""
    udp_idle_s: int = 300
    """Idle time after which a UDP flow ends, in seconds. RFC 4787 REQ-5: at least 2 min, 5 min recommended."""
    udp_dns_idle_s: int = 20
    """The same for a UDP session with port 53, in seconds: longer than resolvers wait for an answer."""
    echo_idle_s: int = 60
    """The same for ICMP echo. RFC 5508 REQ-2: at least 60 s."""
    other_idle_s: int = 600
    """The same for flows of any other protocol, which only their addresses tell apart (SCTP, GRE, ESP)."""
    tunnel_queue_bytes: int = 1_048_576
    """Bytes that wait for a tunnel whose reader is slow; more is dropped (tunnel_full). The same for another worker (sibling_full)."""
    coalesce: bool = True
    """Join segments of `raw` tunnels to super-packets before the kernel gets them. Off, each is written by itself, at a third of the speed."""
    fragment_bytes: int = 16_777_216
    """Bytes of memory a worker in which fragments wait for the rest of their packets; 0 drops every fragment."""
    fragment_tunnel_bytes: int = 1_048_576
    """The same for one tunnel, which also holds at most a quarter of what the worker has left."""
    fragment_tunnel_packets: int = 256
    """Packets of one tunnel that wait for fragments."""
    fragment_timeout_s: int = 15
    """Seconds that fragments wait, 1 to 60. RFC 791 3.2: 15; RFC 8200 4.5: at most 60."""
    icmp_source4: str = "192.0.0.8"
    """Address that ICMP errors come from. RFC 7600: the IPv4 dummy address."""
    icmp_source6: str = "fd66:616c:6b69:726b::1"
    """Address that ICMPv6 errors come from."""
    icmp_per_second: int = 1_000
    """ICMP errors a tunnel at most; 0 sends none (RFC 1812 4.3.2.8, RFC 4443 2.4 f)."""

    def __post_init__(self) -> None:
        for name in ("slots", "lower_slots"):
            if not 1 <= getattr(self, name) <= 1 << 23:
                raise ValueError(f"{name} must lie between 1 and 8388608")
        for field in msgspec.structs.fields(self):
            value = getattr(self, field.name)
            least = 0 if field.name in ("icmp_per_second", "fragment_bytes") else 1
            if isinstance(value, int) and not isinstance(value, bool) and value < least:
                raise ValueError(f"{field.name} must be at least {least}")
        if self.fragment_timeout_s > 60:
            raise ValueError("fragment_timeout_s must be at most 60")
        for name, least in (("udp_idle_s", 120), ("udp_dns_idle_s", 17), ("echo_idle_s", 60)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}")
        for name, kind in (("icmp_source4", ipaddress.IPv4Address), ("icmp_source6", ipaddress.IPv6Address)):
            try:
                kind(getattr(self, name))
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from error
