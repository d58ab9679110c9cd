"""Two devices of one tenant, each a namespace behind `falkirk lower`, and real programs between them.

`Pair.laptop` may talk to `Pair.nas` (but not to port 23), and nobody may talk to the laptop. A device of another tenant has the NAS'
addresses. With several workers the two devices' tunnels are on different ones.
"""

from __future__ import annotations

import contextlib
import ipaddress
import os
import socket
import subprocess
import sys
import zlib
from collections.abc import Iterator, Sequence
from typing import Any

import grpc

from falkirk.api.registry.v1 import device_service_pb2 as pb
from falkirk.api.registry.v1 import device_service_pb2_grpc
from tests.netns.fidelity import DEADLINE_S, Client, World
from tools.mesh import resource, rule
from tools.netlab import wait_for

TENANT, STRANGERS = "pairs", "strangers"
FRAMINGS = {"raw": ("raw", "raw"), "vnet": ("vnet", "vnet"), "raw-vnet": ("raw", "vnet"), "vnet-raw": ("vnet", "raw")}
FAMILIES = {4: socket.AF_INET, 6: socket.AF_INET6}
SITE = {4: "10.77.0.0/16", 6: "fd77::/64"}
"""Behind the NAS that speaks raw."""
BEHIND = {4: "10.77.0.1", 6: "fd77::1"}


class Devices:
    """The devices that pairs are made of, in a mesh."""

    def __init__(self, world: World) -> None:
        self.world = world
        names = [f"{kind}-{framing}" for kind in ("laptop", "nas") for framing in ("raw", "vnet")]
        rules = [
            rule("no-telnet", "net.port == 23", "deny"),
            rule("to-nas", 'net.dst_user == "nina" && "storage" in net.dst_groups && identity.user == "leo"', "allow"),
        ]
        documents = [
            resource("Tenant", TENANT),
            resource("User", "leo", TENANT),
            resource("User", "nina", TENANT, groups=["storage"]),
            resource("Policy", "access", TENANT, priority=10, rules=rules),
        ]
        world.apply(documents)
        # Which worker a device falls to is its id's to say: those on the wrong one are made anew.
        with grpc.insecure_channel(f"unix:{world.mesh.run_dir / 'admin' / 'registry.sock'}") as channel:
            stub = device_service_pb2_grpc.DeviceServiceStub(channel)
            self.addresses = {name: self._make(stub, name) for name in names}
        twin = [self.addresses["nas-raw"][family] for family in FAMILIES]
        world.apply(
            [
                resource(
                    "Route", f"site{family}", TENANT, prefix=SITE[family], target={"device": {"device": "nas-raw"}}
                )
                for family in FAMILIES
            ]
            + [
                resource("Tenant", STRANGERS),
                resource("Device", "nas", STRANGERS, addresses=twin),
                resource("Device", "spy", STRANGERS),
                resource("Policy", "all", STRANGERS, priority=1, rules=[rule("all", "true", "allow")]),
            ]
        )

    def wanted(self, name: str) -> int:
        """The worker that a device's tunnel should be on."""
        return 0 if name.startswith("laptop") else self.world.workers - 1

    def _make(self, stub: Any, name: str) -> dict[int, str]:
        """A device on the worker that is wanted; its addresses by version."""
        device = pb.Device(user="leo" if name.startswith("laptop") else "nina")
        device.metadata.name, device.metadata.tenant = name, TENANT
        while True:
            made = stub.Create(pb.DeviceServiceCreateRequest(device=device), timeout=DEADLINE_S).device
            if zlib.crc32(made.metadata.id.encode()) % self.world.workers == self.wanted(name):
                return {ipaddress.ip_address(text).version: text for text in made.addresses}
            stub.Delete(pb.DeviceServiceDeleteRequest(tenant=TENANT, name=name), timeout=DEADLINE_S)

    def pair(self, laptop: str, nas: str) -> Pair:
        """Two devices by framing."""
        return Pair(self, f"laptop-{laptop}", f"nas-{nas}")


class Host:
    """What happens on one of the two devices."""

    def __init__(self, devices: Devices, name: str) -> None:
        self.name = name
        self.address = devices.addresses[name]
        self.client: Client = devices.world.client(name.partition("-")[2], device=name, tenant=TENANT)

    def run(self, *command: str, seconds: float = DEADLINE_S) -> subprocess.CompletedProcess[str]:
        """A program, to its end."""
        return self.client.call(
            lambda: subprocess.run(command, capture_output=True, text=True, timeout=seconds, check=False)
        )

    @contextlib.contextmanager
    def serving(self, *command: str) -> Iterator[subprocess.Popen[bytes]]:
        """A program that is ended afterwards."""
        process = self.client.call(
            lambda: subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        )
        try:
            yield process
        finally:
            process.kill()
            process.wait()

    def listens(self, family: int, port: int, kind: str = "tcp") -> bool:
        """Whether somebody does on a port."""
        path = f"/proc/{os.getpid()}/net/{kind}{'6' if family == 6 else ''}"
        return any(
            line.split()[1].endswith(f":{port:04X}") and (kind != "tcp" or line.split()[3] == "0A")
            for table in ({path, f"/proc/{os.getpid()}/net/{kind}6"})
            for line in self.client.call(_read, table).splitlines()[1:]
        )

    def raw(self, family: int, protocol: int) -> socket.socket:
        """A raw socket."""
        sock = self.client.socket(FAMILIES[family], socket.SOCK_RAW, protocol)
        sock.settimeout(DEADLINE_S)
        return sock


class Pair:
    """The laptop and the NAS."""

    def __init__(self, devices: Devices, laptop: str, nas: str) -> None:
        self.world = devices.world
        self.laptop, self.nas = Host(devices, laptop), Host(devices, nas)

    @contextlib.contextmanager
    def server(self, family: int, port: int, *command: str) -> Iterator[None]:
        """A TCP server on the NAS that listens already."""
        with self.nas.serving(*command):
            wait_for(f"{command[0]} on port {port}", lambda: self.nas.listens(family, port), DEADLINE_S)
            yield


def web_server(address: str, port: int, directory: str) -> Sequence[str]:
    """A command that serves files."""
    return sys.executable, "-m", "http.server", "--bind", address, "--directory", directory, str(port)


def _read(path: str) -> str:
    # /proc/PID/net is the main thread's namespace; the calling thread's is what counts.
    with open(path.replace(f"/proc/{os.getpid()}/", "/proc/thread-self/")) as file:
        return file.read()


def payload(packet: bytes, family: int) -> bytes:
    """What a raw socket read, without an IPv4 header (IPv6 ones give none)."""
    return packet[(packet[0] & 15) * 4 :] if family == 4 else packet
