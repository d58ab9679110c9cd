"""Two namespaces, a cable between them, and a WireGuard interface in each: ours, or Debian's wireguard-go with its own tools.

Limit: needs root.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import ipaddress
import os
import random
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from falkirk.linux import netns
from falkirk.linux.netlink import Netlink
from falkirk.linux.wireguard import control
from falkirk.linux.wireguard.request import InterfaceRequest, PeerRequest, encode
from falkirk.wireguard import primitives
from tests.netns.conftest import add_address, in_namespace, in_thread

T = TypeVar("T")
DEADLINE_S = 20.0
PORT = 51820


class Side:
    """A namespace with one end of the cable and one end of the tunnel."""

    def __init__(self, number: int, folder: Path) -> None:
        self.number = number
        self.folder = folder
        self.namespace = in_thread(netns.unshare_network, lambda: netns.self_descriptor("net"))
        self.secret = hashlib.sha256(f"side {number}".encode()).digest()
        self.public = primitives.public_key(self.secret)
        self.outer = f"198.51.100.{number}"
        self.outer6 = f"2001:db8::{number}"
        self.inner = f"10.77.0.{number}"
        self.inner6 = f"fd77::{number}"
        self.name = f"fkw{random.getrandbits(36):09x}"
        self.processes: list[subprocess.Popen[bytes]] = []

    def call(self, function: Callable[[], T]) -> T:
        """In a thread inside."""
        return in_namespace(self.namespace, function)

    def run(self, *command: str) -> str:
        """A command inside, to its end; its output. Raises AssertionError where it fails."""
        done = self.call(
            lambda: subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE_S, check=False)
        )
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout

    def popen(self, *command: str, **options: Any) -> subprocess.Popen[bytes]:
        """A process inside, ended with the rig."""
        process = self.call(lambda: subprocess.Popen(command, **options))
        self.processes.append(process)
        return process

    def add_outer(self, address: str) -> None:
        """A further address at this end of the cable."""
        packed = ipaddress.ip_address(address).packed
        self.call(lambda: add_address("eth0", packed, 24 if len(packed) == 4 else 64))

    def ping(self, address: str, *, size: int = 56) -> bool:
        """Whether one echo comes back within two seconds."""
        command = ("ping", "-c1", "-W2", "-n", "-s", str(size), address)
        return (
            self.call(lambda: subprocess.run(command, capture_output=True, timeout=DEADLINE_S, check=False)).returncode
            == 0
        )

    def end(self, process: subprocess.Popen[bytes]) -> None:
        """End a process of ours as an administrator would."""
        process.terminate()
        process.wait(DEADLINE_S)

    def close(self) -> None:
        """End what runs inside."""
        for process in self.processes:
            if process.poll() is None:
                process.kill()
            process.wait()
            for stream in (process.stdout, process.stderr):
                if stream is not None:
                    stream.close()
        os.close(self.namespace)


class Ours(Side):
    """Our client, or our engine as a server: the same process."""

    def start(
        self,
        other: Side,
        *,
        endpoint: str = "",
        keepalive_s: float = 0,
        allowed: tuple[str, ...] = (),
        before: str = "",
        patience_s: float = 1.0,
    ) -> subprocess.Popen[bytes]:
        """Bring the interface up; it calls the other side where there is an endpoint. `allowed`: what the other side has, if not its own; `before`: an endpoint that is tried first."""
        peer = PeerRequest(
            public_key=other.public,
            endpoints=tuple(filter(None, (before, endpoint))),
            patience_s=patience_s,
            allowed=allowed or (f"{other.inner}/32", f"{other.inner6}/128"),
            keepalive_s=keepalive_s,
        )
        request = InterfaceRequest(
            private_key=self.secret,
            addresses=(f"{self.inner}/32", f"{self.inner6}/128"),
            peers=(peer,),
            name=self.name,
            listen_port=0 if endpoint else PORT,
            control=str(self.folder / f"{self.name}.sock"),
        )
        path = self.folder / f"{self.name}.json"
        path.write_bytes(encode(request))
        command = (sys.executable, "-m", "falkirk.linux.wireguard", str(path))
        process = self.popen(*command, stdout=subprocess.PIPE)
        assert process.stdout is not None
        assert process.stdout.readline() == b"up\n"
        return process

    def state(self) -> dict[str, Any]:
        """What it says of itself."""
        return control.ask(self.folder / f"{self.name}.sock", "status")


class Stock(Side):
    """wireguard-go, set up by `wg` and `ip` as its manual says."""

    program = "wireguard-go"

    def start(self, other: Side, *, endpoint: str = "", keepalive_s: float = 0) -> subprocess.Popen[bytes]:
        """Bring the interface up; it calls the other side where there is an endpoint."""
        environment = {**os.environ, "WG_PROCESS_FOREGROUND": "1", "LOG_LEVEL": "error"}
        process = self.popen(
            self.program, "-f", self.name, env=environment, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL
        )
        until(lambda: Path(f"/var/run/wireguard/{self.name}.sock").exists(), "wireguard-go's socket")
        key = self.folder / f"{self.name}.key"
        key.write_text(text(self.secret))
        peer = [text(other.public), "allowed-ips", f"{other.inner}/32,{other.inner6}/128"]
        if endpoint:
            peer += ["endpoint", endpoint]
        if keepalive_s:
            peer += ["persistent-keepalive", str(int(keepalive_s))]
        port = () if endpoint else ("listen-port", str(PORT))
        self.run("wg", "set", self.name, *port, "private-key", str(key), "peer", *peer)
        self.run("ip", "address", "add", f"{self.inner}/32", "dev", self.name)
        self.run("ip", "address", "add", f"{self.inner6}/128", "dev", self.name, "nodad")
        self.run("ip", "link", "set", self.name, "mtu", "1420", "up")
        self.run("ip", "route", "add", f"{other.inner}/32", "dev", self.name)
        self.run("ip", "route", "add", f"{other.inner6}/128", "dev", self.name)
        return process

    def handshake(self) -> int:
        """When the last handshake was, in seconds of wall time; 0: never."""
        return int(self.run("wg", "show", self.name, "latest-handshakes").split()[1])


def text(key: bytes) -> str:
    """A key as `wg` writes it."""
    return base64.b64encode(key).decode()


def until(condition: Callable[[], object], what: str, seconds: float = DEADLINE_S) -> None:
    """Wait for a condition; AssertionError when it is late."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"{what}: not within {seconds} s"
        time.sleep(0.01)


@contextlib.contextmanager
def cabled(one: Side, other: Side) -> Iterator[None]:
    """A cable between the two, with addresses of both families; both namespaces end with it."""
    device = f"fkc{random.getrandbits(36):09x}"

    def set_up() -> None:
        with Netlink() as links:
            links.set_link(socket.if_nametoindex("lo"))
            links.set_link(socket.if_nametoindex("eth0"))

    def make() -> None:
        with Netlink() as links:
            links.add_veth(device, "eth0", other.namespace)
        subprocess.run(("ip", "link", "set", device, "name", "eth0"), check=True)

    try:
        one.call(make)
        for side in (one, other):
            side.call(set_up)
            side.add_outer(side.outer)
            side.add_outer(side.outer6)
        yield
    finally:
        one.close()
        other.close()


def pour(sender: Side, receiver: Side, address: str, megabytes: int) -> tuple[str, str]:
    """TCP from one to the other; the SHA-256 of what was sent and of what came."""
    listener = receiver.call(lambda: socket.create_server((address, 0), family=_family(address)))
    chunk = random.Random(7).randbytes(1 << 20)
    sent, came = hashlib.sha256(), hashlib.sha256()
    with listener:
        listener.settimeout(DEADLINE_S)
        port = listener.getsockname()[1]
        there = sender.call(lambda: socket.create_connection((address, port), timeout=DEADLINE_S))
        here, _ = listener.accept()
    with there, here:
        here.settimeout(DEADLINE_S)

        def send() -> None:
            for number in range(megabytes):
                piece = number.to_bytes(4, "big") + chunk[4:]
                sent.update(piece)
                there.sendall(piece)
            there.shutdown(socket.SHUT_WR)

        thread = threading.Thread(target=send)
        thread.start()
        while piece := here.recv(1 << 18):
            came.update(piece)
        thread.join()
    return sent.hexdigest(), came.hexdigest()


def _family(address: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in address else socket.AF_INET
