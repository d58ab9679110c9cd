"""Where a UDP peer is, as people write it: host:port or [address]:port. PURE."""

from __future__ import annotations

from typing import Any

_MAPPED = "::ffff:"
"""How a socket of both families gives IPv4 addresses."""


def host_and_port(endpoint: str) -> tuple[str, int]:
    """An endpoint's two parts. Raises ValueError."""
    host, _, port = endpoint.rpartition(":")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    elif ":" in host:
        host = ""
    if not host or not port.isdecimal() or not 0 < int(port) < 65_536:
        raise ValueError(f"endpoint {endpoint!r} isn't host:port or [address]:port")
    return host, int(port)


def endpoint_text(address: tuple[Any, ...] | None) -> str:
    """A socket address as `host_and_port` takes it; empty for none."""
    if address is None:
        return ""
    host, port = str(address[0]).removeprefix(_MAPPED), address[1]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
