"""`falkirk device enroll|up|status|down` with a real registry, and a node that is our engine behind a cable.

Limit: needs root.
"""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest

from falkirk.api.registry.v1 import (
    device_service_pb2,
    device_token_service_pb2,
    device_token_service_pb2_grpc,
    node_service_pb2,
    node_service_pb2_grpc,
    route_service_pb2,
    tenant_service_pb2,
)
from falkirk.cli.device_state import Enrolled, State
from falkirk.linux.wireguard import control
from falkirk.wireguard import primitives
from tests.netns.wireguard_rig import DEADLINE_S, PORT, Ours, Side, cabled, text, until
from tests.process import registry_process

pytestmark = pytest.mark.netns


class Device(Side):
    """A namespace where people type `falkirk device ...`."""

    def __init__(self, number: int, folder: Path, registry: registry_process.Registry) -> None:
        super().__init__(number, folder)
        self.state = State(folder / f"device{number}")
        self._environment = {
            **os.environ,
            "FALKIRK_RUN_DIR": str(registry.run_dir),
            "FALKIRK_DEVICE_DIR": str(self.state.folder),
            "PYTHONPATH": os.pathsep.join(sys.path),
        }

    def falkirk(self, *arguments: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
        """One command."""
        command = [sys.executable, "-m", "falkirk.cli.main", "device", *arguments]
        return self.call(
            lambda: subprocess.run(
                command,
                env=self._environment,
                input=stdin,
                capture_output=True,
                text=True,
                timeout=DEADLINE_S,
                check=False,
            )
        )

    def up(self, *arguments: str) -> dict[str, Any]:
        """Connect, and what is said."""
        done = self.falkirk("up", "--json", "--no-dns", "--interface", self.name, *arguments)
        assert done.returncode == 0, done.stderr
        said: dict[str, Any] = json.loads(done.stdout)
        return said

    def pid(self) -> int:
        """The interface's process; 0 where there is none."""
        try:
            return int(control.ask(self.state.socket, "status")["pid"])
        except control.NotRunning:
            return 0

    def enrolled(self) -> Enrolled:
        """What it keeps."""
        enrolled = self.state.read()
        assert enrolled is not None
        return enrolled

    def close(self) -> None:
        """Leave no interface behind."""
        self.falkirk("down")
        super().close()


def announce(registry: registry_process.Registry, node: Side) -> None:
    """Make a node known."""
    known = node_service_pb2.Node(public_key=text(node.public), endpoints=[f"{node.outer}:{PORT}"])
    known.metadata.name = "node-1"
    stub = node_service_pb2_grpc.NodeServiceStub(registry.channel("mesh"))
    stub.Announce(node_service_pb2.NodeServiceAnnounceRequest(node=known))


def token(registry: registry_process.Registry, **fields: Any) -> str:
    """The secret of a new enrolment token."""
    stub = device_token_service_pb2_grpc.DeviceTokenServiceStub(registry.channel())
    made = device_token_service_pb2.DeviceToken(tenant="acme", **fields)
    answer = stub.Create(device_token_service_pb2.DeviceTokenServiceCreateRequest(token=made))
    return str(answer.secret)


def tenant(registry: registry_process.Registry) -> None:
    """The tenant acme."""
    made = tenant_service_pb2.Tenant()
    made.metadata.name = "acme"
    registry.stubs().tenant.Create(tenant_service_pb2.TenantServiceCreateRequest(tenant=made))


def test_from_a_token_to_a_ping_and_back(tmp_path: Path) -> None:
    with registry_process.running(tmp_path) as registry:
        tenant(registry)
        device, node = Device(1, tmp_path, registry), Ours(2, tmp_path)
        with cabled(device, node):
            announce(registry, node)
            secret = token(registry)
            done = device.falkirk("enroll", "--token-file", "-", "--name", "laptop", "--fact", "team=sre", stdin=secret)
            assert done.returncode == 0, done.stderr
            enrolled = device.enrolled()
            assert stat.S_IMODE((device.state.folder / "device.json").stat().st_mode) == 0o600
            known = registry.stubs().device.List(device_service_pb2.DeviceServiceListRequest(tenant="acme")).devices[0]
            assert known.public_key == text(primitives.public_key(enrolled.private_key))
            assert known.posture["team"] == "sre"
            assert known.posture["hostname"]
            # The node knows the device by its key, and what addresses it has.
            device.public = primitives.public_key(enrolled.private_key)
            device.inner, device.inner6 = enrolled.tunnel.addresses
            node.inner, node.inner6 = "100.96.0.1", "fd77::2"
            node.start(device)
            # Without its registry a device connects by what it knows.
            registry.stop()
            said = device.up("--refresh", "0.2")
            assert [peer["connected"] for peer in said["peers"]] == [True]
            assert device.ping("100.96.0.1")
            told = device.falkirk("status")
            assert "connected" in told.stdout
            for secret_text in (text(enrolled.private_key), secret):
                assert secret_text not in told.stdout + done.stdout + json.dumps(said)
            assert "ALREADY_UP" in device.falkirk("up").stderr
            # An interface that is killed comes back.
            os.kill(said["pid"], signal.SIGKILL)
            until(lambda: device.pid() not in (0, said["pid"]), "another interface")
            until(lambda: device.ping("100.96.0.1"), "a ping by it")
            # A new route is taken up, once the registry is there to tell of it.
            registry.start()
            announce(registry, node)
            route = route_service_pb2.Route(prefix="192.0.2.0/24", target=route_service_pb2.RouteTarget(internet={}))
            route.metadata.tenant, route.metadata.name = "acme", "net"
            registry.stubs().route.Create(route_service_pb2.RouteServiceCreateRequest(route=route))
            until(lambda: "192.0.2.0/24" in device.run("ip", "route"), "the route")
            until(lambda: device.ping("100.96.0.1"), "a ping beside it")
            assert device.falkirk("down").returncode == 0
            assert interface_of(device) == ""


def interface_of(device: Device) -> str:
    """What the kernel says of the device's interface; empty where there is none."""
    return "\n".join(line for line in device.run("ip", "-o", "link").splitlines() if device.name in line)


def test_what_is_refused_is_told(tmp_path: Path) -> None:
    with registry_process.running(tmp_path) as registry:
        tenant(registry)
        device, node = Device(1, tmp_path, registry), Side(2, tmp_path)
        with cabled(device, node):
            assert "NOT_ENROLLED" in device.falkirk("up").stderr
            done = device.falkirk("enroll", "--token-file", "-", stdin="fkt_nonsense")
            assert done.returncode == 1
            assert device.enrolled().device_id == ""
            key = device.enrolled().private_key
            # The same key asks again: an answer that was lost leaves no second device.
            secret = token(registry, needs_approval=True)
            assert device.falkirk("enroll", "--token-file", "-", stdin=secret).returncode == 0
            assert device.enrolled().private_key == key
            assert "PENDING" in device.falkirk("up").stderr
            assert "ALREADY_ENROLLED" in device.falkirk("enroll", "--token-file", "-", stdin=secret).stderr
            assert "NOT_UP" in device.falkirk("down").stderr
            # Its key isn't the device's any more.
            device.state.write(msgspec.structs.replace(device.enrolled(), private_key=bytes(range(32))))
            done = device.falkirk("up")
            assert done.returncode == 1
            assert "taking what it said before" not in done.stderr


def test_a_default_route_goes_through_and_its_own_datagrams_around(tmp_path: Path) -> None:
    one, other = Ours(1, tmp_path), Ours(2, tmp_path)
    with cabled(one, other):
        other.run("ip", "address", "add", "203.0.113.5/32", "dev", "lo")
        other.run("ip", "address", "add", "2001:db8:ffff::5/128", "dev", "lo")
        # A default route of the machine's own, by gateways that don't answer.
        for family, gateway in (("-4", f"{one.outer[: one.outer.rindex('.')]}.200"), ("-6", f"{one.outer6}:dead")):
            one.run("ip", family, "route", "add", "default", "via", gateway, "dev", "eth0")
        other.start(one)
        process = one.start(other, endpoint=f"{other.outer}:{PORT}", allowed=("0.0.0.0/0", "::/0"))
        assert one.ping("203.0.113.5")
        assert one.ping("2001:db8:ffff::5")
        # What the machine reaches by itself stays outside.
        before = one.state()["peers"][0]["sent_bytes"]
        assert one.ping(other.outer)
        assert one.state()["peers"][0]["sent_bytes"] == before
        one.end(process)
        assert one.run("ip", "rule").count("\n") == 3
        assert not one.ping("203.0.113.5")


def test_a_node_that_does_not_answer_is_left_for_another_endpoint(tmp_path: Path) -> None:
    one, other = Ours(1, tmp_path), Ours(2, tmp_path)
    with cabled(one, other):
        other.start(one)
        one.start(other, before=f"{other.outer}:9", endpoint=f"{other.outer}:{PORT}", keepalive_s=1)
        until(lambda: one.state()["peers"][0]["connected"], "the other endpoint")


def test_an_endpoint_without_a_way_is_left_at_once(tmp_path: Path) -> None:
    one, other = Ours(1, tmp_path), Ours(2, tmp_path)
    with cabled(one, other):
        other.start(one)
        one.start(other, before="192.0.2.99:9", endpoint=f"{other.outer}:{PORT}", keepalive_s=1, patience_s=60.0)
        until(lambda: one.state()["peers"][0]["connected"], "the other endpoint")
