"""A device's tunnel as WireGuard clients read it: wg-quick's file, JSON, or a QR code for phones.

A client of one peer takes the node that the registry names first, with its first endpoint; the JSON has all of them. Names, addresses and prefixes come from the
registry in canonical form, and nothing else is written, so no value can begin another line.
"""

from __future__ import annotations

import io
from typing import Any

from falkirk.api.registry.v1.device_service_pb2 import Device, TunnelConfig

FORMATS = ("wg-quick", "json", "qr")


def wg_quick(device: Device, tunnel: TunnelConfig, private_key: str) -> str:
    """The file that wg-quick(8) and the WireGuard apps take."""
    peer = tunnel.peers[0]
    lines = [
        f"# {device.metadata.name} of {device.metadata.tenant}",
        "[Interface]",
        f"PrivateKey = {private_key}",
        f"Address = {', '.join(_host(address) for address in device.addresses)}",
    ]
    if tunnel.dns_servers:
        # What isn't an address is a search domain to wg-quick.
        lines.append(f"DNS = {', '.join((*tunnel.dns_servers, *tunnel.search_domains))}")
    lines += [
        f"MTU = {tunnel.mtu}",
        "",
        f"# {peer.node}",
        "[Peer]",
        f"PublicKey = {peer.public_key}",
        f"AllowedIPs = {', '.join(peer.allowed_prefixes)}",
        f"Endpoint = {peer.endpoints[0]}",
        f"PersistentKeepalive = {peer.keepalive_s}",
        "",
    ]
    return "\n".join(lines)


def document(device: Device, tunnel: TunnelConfig, private_key: str) -> dict[str, Any]:
    """The same for programs, with every node."""
    return {
        "device": device.metadata.name,
        "tenant": device.metadata.tenant,
        "interface": {
            "privateKey": private_key,
            "addresses": [_host(address) for address in device.addresses],
            "dnsServers": list(tunnel.dns_servers),
            "searchDomains": list(tunnel.search_domains),
            "mtu": tunnel.mtu,
        },
        "peers": [
            {
                "node": peer.node,
                "publicKey": peer.public_key,
                "endpoints": list(peer.endpoints),
                "allowedPrefixes": list(peer.allowed_prefixes),
                "persistentKeepaliveSeconds": peer.keepalive_s,
            }
            for peer in tunnel.peers
        ],
    }


def qr(text: str) -> str:
    """A text as a QR code for a terminal, two rows of it a line."""
    import segno

    out = io.StringIO()
    # Level L: the largest text that a camera still reads from a screen; nothing smudges there.
    segno.make(text, error="l", boost_error=False, micro=False).terminal(out, compact=True)
    return out.getvalue()


def _host(address: str) -> str:
    """One address as a prefix: a device owns no more than that."""
    return f"{address}/{128 if ':' in address else 32}"
