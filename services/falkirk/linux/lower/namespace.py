"""The namespace in which the command runs: loopback, one TUN device, the admitted addresses, default routes.

The congestion control is the namespace's default where the kernel allows that; one that the machine doesn't allow
everybody is set on the routes instead, which works for the owner of a namespace.
"""

from __future__ import annotations

import socket
import sys
from typing import Final

from falkirk.linux import netns, tun
from falkirk.linux.lower.admission import Admitted
from falkirk.linux.lower.request import PROGRAM, Exit, LowerRequest, Stopped
from falkirk.linux.netlink import Netlink
from falkirk.wire.context import Framing

DEVICE: Final = "falkirk0"


def enter(request: LowerRequest, admitted: Admitted) -> int:
    """Move this process into a namespace made for the tunnel; the TUN device's descriptor.

    Raises Stopped. Settings that can't be made are named on standard error, and the run goes on.
    """
    try:
        netns.unshare_user_and_network(wide=True)
        vnet = request.framing is Framing.VNET
        device = tun.open_tun(DEVICE, vnet=vnet, offloads=tun.TCP_OFFLOADS if vnet else tun.NO_OFFLOADS)
        if vnet:
            tun.take_uso(device)
        _configure(request, admitted)
    except netns.NamespaceUnavailable as error:
        raise Stopped(Exit.UNAVAILABLE, "NAMESPACE_UNAVAILABLE", str(error)) from error
    except tun.TunUnavailable as error:
        raise Stopped(Exit.UNAVAILABLE, "TUN_UNAVAILABLE", str(error)) from error
    except OSError as error:
        raise Stopped(Exit.UNAVAILABLE, "NETWORK_SETUP_FAILED", error.strerror or str(error)) from error
    return device


def device_mtu(request: LowerRequest, admitted: Admitted) -> int:
    """Bytes: what was asked for, but no more than was admitted."""
    return min(request.mtu or admitted.mtu, admitted.mtu)


def _configure(request: LowerRequest, admitted: Admitted) -> None:
    report = netns.write_settings(request.settings)
    for name, why in report.refused.items():
        print(f"{PROGRAM}: {name} couldn't be set ({why})", file=sys.stderr)
    by_route = "" if netns.choose_congestion(request.congestion) else request.congestion
    index = socket.if_nametoindex(DEVICE)
    with Netlink() as links:
        links.set_link(socket.if_nametoindex("lo"))
        if netns.has_ipv6():
            links.no_generated_addresses(index)
        links.set_link(index, mtu=device_mtu(request, admitted), queue=tun.TX_QUEUE_LENGTH)
        for address in admitted.packed():
            links.add_address(index, address, 8 * len(address))
        for zeros in sorted({bytes(len(address)) for address in admitted.packed()}):
            _default_route(links, index, zeros, by_route)


def _default_route(links: Netlink, index: int, zeros: bytes, congestion: str) -> None:
    try:
        links.add_route(index, zeros, 0, congestion)
    except OSError as error:
        if not congestion:
            raise
        print(f"{PROGRAM}: congestion control {congestion} isn't to be had ({error.strerror})", file=sys.stderr)
        links.add_route(index, zeros, 0, "")
