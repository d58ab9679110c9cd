"""What `falkirk lower` is asked to do, and how it says that it couldn't."""

from __future__ import annotations

from enum import IntEnum
from typing import Final

import msgspec

from falkirk.wire.context import Framing, Transport

PROGRAM: Final = "falkirk lower"


class Exit(IntEnum):
    """Exit codes of the tool itself; otherwise it ends as its command does (128 + n for signal n)."""

    REFUSED = 3
    """The on-ramp refused the tunnel, or there is none."""
    TUNNEL_CLOSED = 4
    """The tunnel ended while the command ran."""
    UNAVAILABLE = 5
    """No TUN device or no namespace can be had here."""
    NOT_EXECUTABLE = 126
    NOT_FOUND = 127


class Stopped(Exception):
    """The tool can't go on: `code` and text for people, and the exit code."""

    def __init__(self, exit_code: Exit, code: str, message: str) -> None:
        super().__init__(f"{code}: {message}")
        self.exit_code = exit_code
        self.code = code


class LowerRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One run of the tool."""

    tunnel: str
    """Path of the on-ramp's SEQPACKET socket."""
    tenant: str
    device: str
    command: tuple[str, ...]
    """Program and arguments."""
    virtual_network: str = ""
    """Name; empty takes the device's own."""
    framing: Framing = Framing.VNET
    transport: Transport | None = None
    """None: a device where this uid may hand one over, else the socket."""
    packed: bool = True
    """With raw framing: several packets in one datagram, each way. Off, each has its own."""
    attributes: dict[str, str] = {}
    mtu: int = 0
    """Bytes; 0 takes what the on-ramp admits, and more than that is never used."""
    congestion: str = "cubic"
    """TCP congestion control of the command's connections."""
    settings: dict[str, str] = {}
    """Further sysctls of the namespace, by name ("net.ipv4.ip_local_port_range")."""
    linger_s: float = 5.0
    """Seconds to go on for connections that the command closed and the other side has not."""
    stats: bool = False
    """Print the pump's counters as one JSON line on standard error at the end."""


REQUEST: Final = msgspec.json.Decoder(LowerRequest)
