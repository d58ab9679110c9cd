"""Addresses as text. PURE."""

from __future__ import annotations

import ipaddress


def address_text(address: bytes) -> str:
    """A packed address in text form (RFC 5952)."""
    if len(address) == 4:
        return "%d.%d.%d.%d" % tuple(address)
    return str(ipaddress.IPv6Address(address))
