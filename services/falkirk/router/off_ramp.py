"""What an off-ramp would do with a destination, in words, from this node's point of view.

Limit: whether an address is this node's is asked of the kernel at the moment of the question, by binding a socket to it.
"""

from __future__ import annotations

import os
import socket
from ipaddress import ip_address

from falkirk.decide.routes import RouteEntry, martian


def described(route: RouteEntry | None, destination: bytes) -> str:
    """For people."""
    if route is None:
        return "no route: refused as unreachable"
    if route.target == "blackhole":
        return "blackhole: refused as unreachable"
    if route.target == "resolver":
        return "the tenant's resolver: DNS on port 53, by UDP and TCP; any other port looks closed"
    why = martian(destination)
    if why is not None:
        return f"{route.target}: refused, the destination is {why}, which no route may send there"
    if route.device is not None:
        name = route.device.device
        return f"device {name}: forwarded as packets into its newest tunnel; host unreachable while it has none"
    egress = route.egress4 if len(destination) == 4 else route.egress6
    dialled = f"internet: dialled within {route.connect_timeout_ms} ms from "
    if not egress:
        return dialled + "an address that the kernel chooses"
    return f"{dialled}{ip_address(egress)}, {_on_this_node(egress)}"


def _on_this_node(address: bytes) -> str:
    family = socket.AF_INET if len(address) == 4 else socket.AF_INET6
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.bind((str(ip_address(address)), 0))
    except OSError as error:
        return f"which this node can't send from ({os.strerror(error.errno or 0)}): dials fail"
    return "which is on this node"
