"""Those whom the bench compares: each runs a command behind itself, towards the same server.

All but loopback reach the server over one veth from the node's namespace. Peers run as their makers advise: unprivileged,
with their own default or advised MTU (pasta 65520 is its default, slirp4netns 65520 is its manual's). Their client
sockets use the same congestion control as everyone's; a peer that isn't installed doesn't take part.

sing-box and tun2socks take whole namespaces, by a TUN device in each: sing-box with its own two stacks (`system` lets the kernel's TCP
do the work, as Falkirk does; `gvisor` brings one), tun2socks with gVisor's. Both dial from the node's namespace, like everyone.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from ipaddress import ip_network
from pathlib import Path

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


def sing_box(lab: Lab, node: Namespace, addresses: tuple[str, ...], path: Path, stack: str) -> Contestant | None:
    """sing-box from a TUN device to its `direct` outbound; `stack` is system or gvisor."""
    client = lab.namespace(f"sing-box-{stack}")
    config = {
        "log": {"level": "error"},
        "network_namespaces": [{"type": "default", "tag": "node", "path": f"/proc/{node.pid}/ns/net"}],
        "inbounds": [
            {
                "type": "tun",
                "tag": "tun",
                "interface_name": "tun0",
                "address": ["172.19.0.1/30"],
                "mtu": 65535,
                "auto_route": False,
                "stack": stack,
            }
        ],
        "outbounds": [{"type": "direct", "tag": "direct", "netns": "node"}],
        "route": {"final": "direct"},
    }
    file = lab.directory() / f"sing-box-{stack}.json"
    file.write_text(json.dumps(config))
    client.start(str(path), "run", "-c", str(file))
    return _behind_tun(client, f"sing-box-{stack}", addresses)


def tun2socks(lab: Lab, node: Namespace, addresses: tuple[str, ...], path: Path) -> Contestant | None:
    """tun2socks from a TUN device to its `direct` proxy. The device is made where it dials from, and moved."""
    client = lab.namespace("tun2socks")
    node.start(str(path), "-device", "tun://t2s", "-mtu", "65535", "-proxy", "direct://", "-loglevel", "error")
    try:
        wait_for("tun2socks", lambda: "t2s" in node.run("ip", "-brief", "link"), READY_S)
        node.run("ip", "link", "set", "t2s", "netns", str(client.pid))
        client.run("ip", "link", "set", "t2s", "name", "tun0")
        client.run("ip", "address", "add", "172.19.0.1/30", "dev", "tun0")
        client.run("ip", "link", "set", "tun0", "up")
    except LabError:
        return None
    return _behind_tun(client, "tun2socks", addresses)


def _behind_tun(client: Namespace, name: str, addresses: tuple[str, ...]) -> Contestant | None:
    """A namespace whose way to the server is `tun0`, once that is there. No default route: when that changes, sing-box ends all connections."""
    network = ip_network(f"{addresses[0]}/24", strict=False)

    def routed() -> bool:
        try:
            client.run("ip", "route", "replace", str(network), "via", "172.19.0.2", "dev", "tun0")
        except LabError:
            return False
        return True

    try:
        wait_for(name, routed, READY_S)
    except LabError:
        return None
    return Contestant(name, lambda command: client.command(*command), addresses)
