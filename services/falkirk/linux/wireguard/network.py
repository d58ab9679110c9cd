"""Addresses and routes of an interface, and the way around it for its own outer packets. Everything goes with the device, but for rules.

Prefixes are routes in the main table. A default route would catch the outer packets too, so it lies in a table of its own, which everybody
uses but who has the mark; before it the main table is asked for whatever it knows better than by a default route (as wg-quick does it).

Limit: Linux; takes CAP_NET_ADMIN.
"""

from __future__ import annotations

import contextlib
import ipaddress
import socket
from collections.abc import Iterable
from typing import Any, Final

from pyroute2 import IPRoute
from pyroute2.netlink.exceptions import NetlinkError

from falkirk.linux.netlink import Netlink

MARK: Final = 0xFA1C
"""Of outer packets, and the number of the table for default routes."""
_PRIORITIES: Final = (0x7F1C, 0x7F1D)
"""Of the rules: before the main table's 32766, whose own default route would be taken otherwise."""
_INVERT: Final = 2
"""FIB_RULE_INVERT."""
_QUEUE: Final = 4000


class Network:
    """What is set up for one device in the namespace of the caller."""

    def __init__(self, device: str) -> None:
        self._index = socket.if_nametoindex(device)
        self._ruled: list[int] = []

    def set_up(self, addresses: Iterable[str], mtu: int, prefixes: Iterable[str]) -> None:
        """Addresses, MTU, routes; the device is up afterwards. Raises OSError, with what the kernel said."""
        with Netlink() as links:
            # Nobody else is on this link; an address of the kernel's own would only send what no peer takes.
            links.no_generated_addresses(self._index)
        with IPRoute() as routes:
            self._do(f"MTU {mtu}", routes.link, "set", index=self._index, mtu=mtu, txqlen=_QUEUE, state="up")
            for text in addresses:
                address = ipaddress.ip_interface(text)
                # IPv6: no duplicate address detection, whose seconds nobody else on this link could use.
                flags: dict[str, Any] = {"flags": 0x02} if address.version == 6 else {}
                self._do(
                    f"address {text}",
                    routes.addr,
                    "replace",
                    index=self._index,
                    address=str(address.ip),
                    prefixlen=address.network.prefixlen,
                    **flags,
                )
            for text in sorted(set(prefixes)):
                network = ipaddress.ip_network(text)
                family = socket.AF_INET if network.version == 4 else socket.AF_INET6
                where: dict[str, Any] = {"dst": str(network), "family": family}
                if not network.prefixlen:
                    self._rule(routes, family)
                    where["table"] = MARK
                self._do(f"route {text}", routes.route, "replace", oif=self._index, **where)

    def tear_down(self) -> None:
        """Remove the rules; all else goes with the device."""
        if not self._ruled:
            return
        with IPRoute() as routes:
            for family in self._ruled:
                for priority in _PRIORITIES:
                    with contextlib.suppress(NetlinkError):
                        routes.rule("del", family=family, priority=priority)
        self._ruled.clear()

    def _rule(self, routes: Any, family: int) -> None:
        for priority in _PRIORITIES:
            # Left by one that was killed.
            with contextlib.suppress(NetlinkError):
                routes.rule("del", family=family, priority=priority)
        main, own = _PRIORITIES
        what = "rules for a default route"
        self._ruled.append(family)
        self._do(what, routes.rule, "add", family=family, priority=main, table=254, FRA_SUPPRESS_PREFIXLEN=0)
        self._do(
            what,
            routes.rule,
            "add",
            family=family,
            priority=own,
            table=MARK,
            fwmark=MARK,
            fwmask=0xFFFFFFFF,
            flags=_INVERT,
        )

    @staticmethod
    def _do(what: str, function: Any, *args: Any, **kwargs: Any) -> None:
        try:
            function(*args, **kwargs)
        except NetlinkError as error:
            raise OSError(error.code, f"{what}: {error.args[1] if len(error.args) > 1 else error}") from None
