"""Those whom the bench compares: each runs a command behind itself, towards the same server.

All but loopback reach the server over one veth from the node's namespace. Peers run as their makers advise: unprivileged,
with their own default or advised MTU (pasta 65520 is its default, slirp4netns 65520 is its manual's). Their client
sockets use the same congestion control as everyone's; a peer that isn't installed doesn't take part.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass

from tools.netlab import Lab, LabError, Namespace, wait_for

READY_S = 10.0


@dataclass(frozen=True)
class Contestant:
    """A way to the server."""

    name: str
    command: Callable[[list[str]], list[str]]
    """Wraps a command line so that it runs behind this one."""
    addresses: tuple[str, ...]
    """Where the server is, seen from there."""


def direct(node: Namespace, addresses: tuple[str, ...]) -> Contestant:
    """Nothing between: one veth, one hop of kernel TCP."""
    return Contestant("veth", lambda command: node.command(*command), addresses)


def loopback(node: Namespace) -> Contestant:
    """Client and server on the loopback of one namespace."""
    return Contestant(
        "loopback", lambda command: node.command(*command), ("127.0.0.1", "127.0.0.2", "127.0.0.3", "127.0.0.4")
    )


def pasta(node: Namespace, addresses: tuple[str, ...]) -> Contestant | None:
    """passt's `pasta`: a namespace a command."""
    if shutil.which("pasta") is None:
        return None
    # It drops its capabilities before it maps ids, which the kernel refuses for uid 0 since 5.12: give it another.
    prefix = [
        "unshare",
        "--user",
        "--map-user=1000",
        "--map-group=1000",
        "--",
        "pasta",
        "--config-net",
        "--quiet",
        "--",
    ]
    return Contestant("pasta", lambda command: node.command(*prefix, *command), addresses)


def slirp4netns(lab: Lab, node: Namespace, addresses: tuple[str, ...]) -> Contestant | None:
    """slirp4netns on a namespace that stays."""
    if shutil.which("slirp4netns") is None:
        return None
    holder = node.start("unshare", "--user", "--map-root-user", "--net", "--", "sleep", "infinity")
    own = os.readlink(f"/proc/{node.pid}/ns/net")  # noqa: PTH115 - a magic link, not a path
    wait_for("slirp4netns's namespace", lambda: os.readlink(f"/proc/{holder.pid}/ns/net") != own, READY_S)  # noqa: PTH115
    node.start("slirp4netns", "--configure", "--mtu=65520", str(holder.pid), "tap0")
    enter = ["nsenter", "--target", str(holder.pid), "--user", "--net", "--preserve-credentials", "--"]

    def routed() -> bool:
        shown = subprocess.run(
            [*enter, "ip", "route", "show", "default"], capture_output=True, text=True, timeout=5, check=False
        )
        return "tap0" in shown.stdout

    try:
        wait_for("slirp4netns", routed, READY_S)
    except LabError:
        return None
    return Contestant("slirp4netns", lambda command: [*enter, *command], addresses)
