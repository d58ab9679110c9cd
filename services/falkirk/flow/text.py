"""Addresses as text. PURE."""

from __future__ import annotations

import ipaddress


def address_text(address: bytes) -> str:
    """A packed address in text form (RFC 5952)."""
    if len(address) == 4:
        return f"{address[0]}.{address[1]}.{address[2]}.{address[3]}"
    return str(ipaddress.IPv6Address(address))
