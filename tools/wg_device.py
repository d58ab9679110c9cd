"""A device with stock WireGuard, in a namespace of its own: wireguard-go and `wg`, set up as wg-quick would.

Used by the demo, the bench and tests. wg-quick itself isn't called where it would change the machine's own DNS: it does the same steps.

Limit: needs root, wireguard-go and wireguard-tools.
"""

from __future__ import annotations

import base64
import ipaddress
import os
import subprocess
from collections.abc import Sequence
from pathlib import Path

from falkirk.wireguard.primitives import public_key
from tools.netlab import Lab, Namespace, run, wait_for

UP_S = 10.0


def key_pair() -> tuple[str, str]:
    """A private key and its public one, as `wg` writes them."""
    secret = os.urandom(32)
    return base64.b64encode(secret).decode(), base64.b64encode(public_key(secret)).decode()


def start(lab: Lab, namespace: Namespace, interface: str, program: str = "wireguard-go") -> subprocess.Popen[bytes]:
    """A wireguard-go with this interface, ready to be set up; the lab ends it. Raises LabError."""
    environment = {**os.environ, "WG_PROCESS_FOREGROUND": "1", "LOG_LEVEL": "error"}
    process = lab.start(namespace.command(program, "-f", interface), env=environment)
    wait_for("wireguard-go's socket", Path(f"/var/run/wireguard/{interface}.sock").exists, UP_S)
    return process


def secret_file(path: Path, secret: str | bytes) -> Path:
    """A file that only its owner may read."""
    path.touch(mode=0o600)
    path.write_bytes(secret.encode() if isinstance(secret, str) else secret)
    return path


class StockDevice:
    """A namespace with a wireguard-go interface `wg0`-like in it. `program` may be another build of wireguard-go."""

    def __init__(self, lab: Lab, name: str, directory: Path, program: str = "wireguard-go") -> None:
        self.namespace: Namespace = lab.namespace(name)
        self.name = name
        self.private_key, self.public_key = key_pair()
        self._lab, self._directory, self._program = lab, directory, program
        self.interface = f"fk{os.getpid() % 100_000}{name[:6]}"

    def join(
        self,
        server_key: str,
        endpoint: str,
        addresses: Sequence[str],
        *,
        allowed: Sequence[str] = ("0.0.0.0/0", "::/0"),
        mtu: int = 1420,
        keepalive_s: int = 0,
    ) -> None:
        """Bring the interface up; its handshake begins with the first packet. Raises LabError."""
        peer = ["peer", server_key, "endpoint", endpoint, "allowed-ips", ",".join(allowed)]
        if keepalive_s:
            peer += ["persistent-keepalive", str(keepalive_s)]
        key = secret_file(self._directory / f"{self.name}.key", self.private_key)
        self._start()
        self.namespace.run("wg", "set", self.interface, "private-key", str(key), *peer)
        self._up(addresses, allowed, mtu)

    def join_by(self, file: Path) -> None:
        """The same by wg-quick's file, its name ending in .conf; `DNS` is left to the caller. Raises LabError."""
        said: dict[str, list[str]] = {}
        for line in file.read_text().splitlines():
            name, equals, value = line.partition("=")
            if equals and not name.startswith("#"):
                said.setdefault(name.strip(), []).extend(one.strip() for one in value.split(","))
        stripped = secret_file(self._directory / f"{self.name}.stripped", run(["wg-quick", "strip", str(file)]))
        self._start()
        self.namespace.run("wg", "setconf", self.interface, str(stripped))
        self._up([one.partition("/")[0] for one in said["Address"]], said["AllowedIPs"], int(said["MTU"][0]))

    def _start(self) -> None:
        start(self._lab, self.namespace, self.interface, self._program)

    def _up(self, addresses: Sequence[str], allowed: Sequence[str], mtu: int) -> None:
        """Addresses, MTU and routes, as wg-quick sets them."""
        run = self.namespace.run
        for address in addresses:
            version = ipaddress.ip_address(address).version
            run(
                "ip",
                "address",
                "add",
                f"{address}/{32 if version == 4 else 128}",
                "dev",
                self.interface,
                *(["nodad"] if version == 6 else []),
            )
        run("ip", "link", "set", self.interface, "mtu", str(mtu), "up")
        for prefix in allowed:
            network = ipaddress.ip_network(prefix)
            # A default route by its halves: the way outside stays, without a routing table of its own.
            for half in network.subnets() if network.prefixlen == 0 else (network,):
                run("ip", f"-{network.version}", "route", "replace", str(half), "dev", self.interface)

    def handshake(self) -> int:
        """When the last one was, seconds of wall time; 0: never."""
        return int(self.namespace.run("wg", "show", self.interface, "latest-handshakes").split()[1])

    def ping(self, address: str, *, seconds: int = 2) -> bool:
        """Whether an echo comes back in time."""
        return self.namespace.ping(address, seconds=seconds)
