"""Settings of the upgrader."""

from __future__ import annotations

from falkirk.linux.namespace_messages import HelperSettings, Purpose
from falkirk.runtime.settings import Section


class Settings(Section, frozen=True, kw_only=True):
    """Section `upgrader`."""

    mtu: int = 1500
    """Of the TUN devices, in bytes; bounds the segments that clients are offered. 1280 to 65535."""
    congestion: str = "cubic"
    """TCP congestion control towards clients, and towards devices to which streams are lowered; "reno" where the kernel hasn't it."""
    upstream_congestion: str = "cubic"
    """TCP congestion control towards upstreams; empty keeps the machine's own, and so does one that the machine doesn't grant.
    Set because the machine's own may be BBR, whose pacing costs a relay twice the CPU time a byte."""
    open_timeout_s: float = 30.0
    """How long a connected upstream waits for its client's handshake, in seconds."""
    tx_queue: int = 4000
    """Packets that wait in a TUN device for flow to read them."""
    backlog: int = 4096
    """Streams that wait in a listener to be accepted."""
    tcp_buffer_max: int = 8 * 1024 * 1024
    """Bytes that a client-side socket's send or receive buffer may grow to."""

    def __post_init__(self) -> None:
        # RFC 8200 5: no IPv6 below 1280.
        for name, low, high in (
            ("mtu", 1280, 65535),
            ("open_timeout_s", 0.1, 600.0),
            ("tx_queue", 1, 1_000_000),
            ("backlog", 1, 1_000_000),
            ("tcp_buffer_max", 65536, 1 << 30),
        ):
            if not low <= getattr(self, name) <= high:
                raise ValueError(f"{name} must lie between {low} and {high}")

    def helper(self, workers: int, purpose: Purpose) -> HelperSettings:
        """What a namespace helper must know."""
        return HelperSettings(
            purpose=purpose,
            workers=workers,
            congestion=self.congestion,
            vnet_mtu=self.mtu,
            raw_mtu=self.mtu,
            tx_queue=self.tx_queue,
            backlog=self.backlog,
            tcp_buffer_max=self.tcp_buffer_max,
        )
