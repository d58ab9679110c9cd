"""Stock wireguard-go clients and a whole mesh: they come in, reach servers and each other, roam, and are cut off.

Limit: needs root, wireguard-go and wg.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from falkirk.api.flow.v1 import flow_service_pb2, flow_service_pb2_grpc
from falkirk.api.onramp.v1 import onramp_service_pb2 as pb
from falkirk.api.onramp.v1 import onramp_service_pb2_grpc
from falkirk.api.registry.v1 import presence_service_pb2, presence_service_pb2_grpc
from tests.netns.streams import connect, exchange, stream
from tools.mesh import Mesh, resource, rule
from tools.netlab import Lab, LabError, run, stop, wait_for
from tools.wg_device import StockDevice, key_pair

pytestmark = [pytest.mark.netns, pytest.mark.timeout(180)]
DEADLINE_S = 20.0
SERVER4, SERVER6 = "198.18.101.2", "fd12:101::2"
PORT = 51820


class Place:
    """A node with its mesh, a server, and two devices of one tenant whose owner differs, and one of another tenant with the first one's address."""

    def __init__(self, lab: Lab) -> None:
        self.lab, self.directory = lab, lab.directory()
        self.node, self.server = lab.namespace("node"), lab.namespace("server")
        lab.cable(self.node, self.server, ["198.18.101.1/24", "fd12:101::1/64"], [f"{SERVER4}/24", f"{SERVER6}/64"])
        self.node.sysctl("net.ipv4.ping_group_range", "0 2147483647")
        self.one, self.two, self.twin = (StockDevice(lab, name, self.directory) for name in ("one", "two", "twin"))
        for number, device in enumerate((self.one, self.two, self.twin), 102):
            near = [f"198.18.{number}.1/24", f"fd12:{number}::1/64"]
            lab.cable(
                self.node,
                device.namespace,
                near,
                [f"198.18.{number}.2/24", f"198.18.{number}.3/24", f"fd12:{number}::2/64"],
            )
        self.mesh = Mesh(lab, self.directory, self.node)
        self.mesh.start(
            {"onramp": {"adopt_timeout_ms": 1000, "wireguard": {"port": PORT, "endpoints": [f"198.18.102.1:{PORT}"]}}}
        )
        self.addresses = ["100.96.0.9", "fd00:96::9"]
        documents = []
        for tenant in ("acme", "other"):
            documents += [
                resource("Tenant", tenant, devicePool6="fd00:96::/64"),
                resource("Route", "four", tenant, prefix="0.0.0.0/0", target={"internet": {}}),
                resource("Route", "six", tenant, prefix="::/0", target={"internet": {}}),
            ]
        documents += [
            resource("User", "ann", "acme", groups=["staff"]),
            resource("Device", "one", "acme", user="ann", publicKey=self.one.public_key, addresses=self.addresses),
            resource("Device", "two", "acme", publicKey=self.two.public_key),
            resource("Device", "twin", "other", publicKey=self.twin.public_key, addresses=self.addresses),
            resource("Policy", "access", "acme", priority=10, rules=[
                rule("no-ssh", 'net.port == 22 && device.name == "one"', "deny"), rule("rest", "true", "allow")]),
            resource("Policy", "access", "other", priority=10, rules=[rule("all", 'app.attributes.onramp == "wireguard"', "allow")]),
        ]  # fmt: skip
        self.mesh.apply(documents)
        channel = grpc.insecure_channel(f"unix:{self.mesh.run_dir / 'read' / 'onramp.sock'}")
        lab.on_exit(channel.close)
        self.onramp = onramp_service_pb2_grpc.OnrampServiceStub(channel)
        self.key = self.status().public_key
        for number, device in enumerate((self.one, self.two, self.twin), 102):
            outside = f"198.18.{number}.1:{PORT}" if device is not self.two else f"[fd12:{number}::1]:{PORT}"
            device.join(self.key, outside, self.addresses_of(device))

    def addresses_of(self, device: StockDevice) -> list[str]:
        """As the registry has given them."""
        tenant = "other" if device is self.twin else "acme"
        found = json.loads(self.mesh.ask("device", "get", "--tenant", tenant, device.name, "--json"))
        return list(found["addresses"])

    def status(self) -> pb.WireGuardStatus:
        """What the on-ramp says."""
        return self.stats().wireguard

    def stats(self) -> pb.StatsResponse:
        """All of it."""
        answer: pb.StatsResponse = self.onramp.Stats(pb.StatsRequest())
        return answer

    def dropped(self) -> dict[str, int]:
        """Reasons that were counted."""
        return {counter.name: counter.value for counter in self.status().dropped if counter.value}

    def tunnels(self) -> dict[str, Any]:
        """Open ones by their devices."""
        return {tunnel.context.device: tunnel for tunnel in self.onramp.List(pb.ListRequest()).tunnels}

    def endpoints(self) -> dict[str, str]:
        """Of the devices that the registry says are here."""
        with grpc.insecure_channel(f"unix:{self.mesh.run_dir / 'read' / 'registry.sock'}") as channel:
            stub = presence_service_pb2_grpc.PresenceServiceStub(channel)
            found = stub.List(presence_service_pb2.PresenceServiceListRequest(tenant="acme"))
        return {presence.device: presence.endpoint for presence in found.presences}

    def parent(self) -> int:
        """The process id of the on-ramp itself."""
        return next(process.pid for process in self.stats().processes if process.name == "onramp")

    def worker(self) -> int:
        """The process id of the on-ramp's worker; 0 while there is none."""
        return next((process.pid for process in self.stats().processes if process.name == "onramp.worker.0"), 0)


@pytest.fixture(scope="module")
def place() -> Iterator[Place]:
    with Lab() as lab:
        yield Place(lab)


def test_devices_reach_servers_and_each_other(place: Place) -> None:
    """Echo and TCP, both families inside, one device outside by IPv6; and what one may do another mustn't."""
    mine, yours = place.addresses_of(place.one), place.addresses_of(place.two)
    assert mine == place.addresses
    for device in (place.one, place.two):
        for address in (SERVER4, SERVER6):
            assert device.ping(address, seconds=5)
            with stream(device.namespace, place.server, address) as ends:
                exchange(*ends)
    for from_, address in ((place.one, yours[0]), (place.two, mine[1])):
        assert from_.ping(address, seconds=5)
        to = place.two if from_ is place.one else place.one
        with stream(from_.namespace, to.namespace, address) as ends:
            exchange(*ends)
            assert ends[1].getpeername()[0] in (*mine, *yours)
    with pytest.raises(ConnectionRefusedError):
        connect(place.one.namespace, SERVER4, 22)
    tunnel = place.tunnels()["one"]
    assert (tunnel.context.tenant, tunnel.context.user, tunnel.mtu) == ("acme", "ann", 1420)
    wait_for("what is known of it", lambda: place.tunnels()["one"].wireguard.received_bytes > 1 << 20, DEADLINE_S)
    assert place.tunnels()["one"].wireguard.endpoint.startswith("198.18.102.2:")
    assert place.tunnels()["two"].wireguard.endpoint.startswith("[fd12:103::2]:")
    wait_for("presence", lambda: place.endpoints().get("one", "").startswith("198.18.102.2:"), DEADLINE_S)
    node = json.loads(place.mesh.ask("node", "get", "local", "--json"))
    assert (node["publicKey"], node["mtu"]) == (place.key, 1420)


def test_the_key_says_whose_packets_they_are(place: Place) -> None:
    """The same inner address in two tenants at once; neither sees the other, and an address that isn't its own is refused."""
    assert place.one.ping(SERVER4, seconds=5)
    assert place.twin.ping(SERVER4, seconds=5)
    with (
        stream(place.one.namespace, place.server, SERVER4) as one,
        stream(place.twin.namespace, place.server, SERVER4) as twin,
    ):
        exchange(*one)
        exchange(*twin)
        flows = json.loads(place.mesh.ask("flow", "list", "--json"))
        text = json.dumps(flows)
        assert '"acme"' in text
        assert '"other"' in text
    assert not place.twin.ping(place.addresses_of(place.two)[0], seconds=1)
    before = place.dropped().get("source_not_allowed", 0)
    place.one.namespace.run("ip", "address", "add", "100.96.0.77/32", "dev", place.one.interface)
    with pytest.raises(LabError):
        place.one.namespace.run("ping", "-c", "1", "-W", "1", "-I", "100.96.0.77", SERVER4)
    wait_for("the drop", lambda: place.dropped().get("source_not_allowed", 0) > before, DEADLINE_S)


def test_a_stranger_has_no_answer(place: Place) -> None:
    stranger = StockDevice(place.lab, "who", place.directory)
    place.lab.cable(place.node, stranger.namespace, ["198.18.110.1/24"], ["198.18.110.2/24"])
    stranger.join(place.key, f"198.18.110.1:{PORT}", ["100.96.0.9"])
    before = place.dropped().get("unknown_key", 0)
    assert not stranger.ping(SERVER4, seconds=1)
    assert stranger.handshake() == 0
    wait_for("the drop", lambda: place.dropped().get("unknown_key", 0) > before, DEADLINE_S)


def _port(place: Place, outer: str) -> str:
    place.one.namespace.run("wg", "set", place.one.interface, "listen-port", "40404")
    return "198.18.102.2:40404"


def _interface(place: Place, outer: str) -> str:
    """From one network to another, as from wifi to mobile data."""
    place.lab.cable(place.node, place.one.namespace, ["198.18.112.1/24"], ["198.18.112.2/24"])
    place.one.namespace.run("ip", "link", "set", outer, "down")
    place.one.namespace.run("ip", "route", "add", "198.18.102.1/32", "via", "198.18.112.1")
    return f"198.18.112.2:{_listens(place.one)}"


def _addresses_and_port(place: Place, outer: str) -> str:
    """All its addresses are taken from it and it gets another one. Debian's wireguard-go goes on sending from an address that is gone, to no avail (ENETUNREACH),
    until it has heard nothing for 15 seconds, whoever the server is; with a port of its own choice it forgets the address at once, as newer ones do by themselves."""
    run = place.one.namespace.run
    run("ip", "address", "flush", "dev", outer, "scope", "global")
    run("ip", "address", "add", "198.18.102.4/24", "dev", outer)
    run("wg", "set", place.one.interface, "listen-port", "40405")
    return "198.18.102.4:40405"


@pytest.mark.parametrize("roam", [_port, _interface, _addresses_and_port], ids=lambda roam: roam.__name__.strip("_"))
def test_a_device_that_roams_keeps_its_connections(place: Place, roam: Callable[[Place, str], str]) -> None:
    """And its session: the first datagram from elsewhere moves it. Had one side waited for a timer of the protocol, there would be another handshake."""
    assert place.one.ping(SERVER4, seconds=5)
    outer = _outer(place.one)
    try:
        with stream(place.one.namespace, place.server, SERVER4) as ends:
            exchange(*ends, size=65536)
            session = place.one.handshake()
            endpoint = roam(place, outer)
            exchange(*ends, size=65536)
            assert place.one.handshake() == session
            wait_for("its new endpoint", lambda: place.tunnels()["one"].wireguard.endpoint == endpoint, DEADLINE_S)
    finally:
        run = place.one.namespace.run
        run("ip", "link", "set", outer, "up")
        for address in ("198.18.102.2/24", "198.18.102.3/24", "fd12:102::2/64"):
            run("ip", "address", "replace", address, "dev", outer)
        run("ip", "route", "replace", "198.18.102.1/32", "dev", outer)
        # What came by the other network came from the node's address there, which is where the client has sent to since.
        run("wg", "set", place.one.interface, "peer", place.key, "endpoint", f"198.18.102.1:{PORT}")


def _listens(device: StockDevice) -> str:
    return device.namespace.run("wg", "show", device.interface, "listen-port").strip()


def _outer(device: StockDevice) -> str:
    found = json.loads(device.namespace.run("ip", "-j", "route", "get", "198.18.102.1"))
    return str(found[0]["dev"])


def test_a_node_answers_from_the_address_that_was_asked(place: Place) -> None:
    """A client takes the address that it is answered from for its node's, so it shows; a NAT or a firewall on the way would let nothing else in."""
    device, second = place.one, f"198.18.102.9:{PORT}"
    found = json.loads(place.node.run("ip", "-j", "address", "show", "to", "198.18.102.1"))
    interface = found[0]["ifname"]

    def at() -> str:
        return device.namespace.run("wg", "show", device.interface, "endpoints").split()[1]

    first = at()
    place.node.run("ip", "address", "add", "198.18.102.9/24", "dev", interface)
    device.namespace.run("wg", "set", device.interface, "peer", place.key, "endpoint", second)
    assert device.ping(SERVER4, seconds=5)
    assert at() == second
    place.node.run("ip", "address", "del", "198.18.102.9/24", "dev", interface)
    device.namespace.run("wg", "set", device.interface, "peer", place.key, "endpoint", first)
    assert device.ping(SERVER4, seconds=5)
    assert at() == first


def test_a_killed_worker_costs_no_connection(place: Place) -> None:
    """The tunnels stay, and a stock client that goes on sending is asked for a new session."""
    with (
        stream(place.two.namespace, place.server, SERVER4) as ends,
        stream(place.one.namespace, place.two.namespace, place.addresses_of(place.two)[0]) as across,
    ):
        exchange(*ends)
        exchange(*across)
        known = {name: tunnel.id for name, tunnel in place.tunnels().items()}
        wait_for("what is known of it", lambda: all(t.wireguard.endpoint for t in place.tunnels().values()), DEADLINE_S)
        worker = place.worker()
        os.kill(worker, signal.SIGKILL)
        wait_for("another worker", lambda: place.worker() not in (0, worker), DEADLINE_S)
        exchange(*ends)
        exchange(*across)
        assert {name: tunnel.id for name, tunnel in place.tunnels().items()} == known


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_a_restarted_onramp_costs_no_connection(place: Place, how: signal.Signals) -> None:
    """The whole service, parent and worker: the tunnels stay with the flow tracker, and where devices are is on disk."""
    with (
        stream(place.two.namespace, place.server, SERVER4) as ends,
        stream(place.one.namespace, place.two.namespace, place.addresses_of(place.two)[0]) as across,
    ):
        exchange(*ends)
        exchange(*across)
        known = {name: tunnel.id for name, tunnel in place.tunnels().items()}
        endpoints = place.mesh.data_dir / "onramp" / "endpoints"
        wait_for(
            "endpoints on disk",
            lambda: all(t.wireguard.endpoint in endpoints.read_text() for t in place.tunnels().values()),
            DEADLINE_S,
        )
        parent = place.parent()
        os.kill(parent, how)
        wait_for("another on-ramp", lambda: _running(place, parent), DEADLINE_S)
        exchange(*ends)
        exchange(*across)
        assert {name: tunnel.id for name, tunnel in place.tunnels().items()} == known


def _running(place: Place, before: int) -> bool:
    with contextlib.suppress(grpc.RpcError):
        return place.parent() != before and len(place.tunnels()) > 0
    return False


def test_a_flood_of_strangers_costs_no_session(place: Place) -> None:
    """Initiations of keys that are nobody's, far more than are answered: a live connection goes on, whole, and whoever is here stays here."""
    attacker = place.lab.namespace("attacker")
    place.lab.cable(place.node, attacker, ["198.18.111.1/24"], ["198.18.111.2/24"])
    assert place.one.ping(SERVER4, seconds=5)
    with stream(place.one.namespace, place.server, SERVER4) as ends:
        exchange(*ends, size=4096)
        before, tunnels = place.dropped(), {name: tunnel.id for name, tunnel in place.tunnels().items()}
        options = (place.key, "198.18.111.1", str(PORT), "--seconds", "60")
        flood = attacker.start(sys.executable, "-m", "tools.load.wireguard_flood", *options)

        def more(reason: str) -> int:
            return place.dropped().get(reason, 0) - before.get(reason, 0)

        wait_for("load", lambda: more("no_cookie") > 100 and more("unread") > 1000, DEADLINE_S)
        exchange(*ends)
        assert flood.poll() is None
        stop(flood)
        exchange(*ends)
    # Cookies for the few, nothing for the many, most of them unread; and nobody was let in.
    assert more("unknown_key") < more("handshake_rate") + more("no_cookie") < more("unread")
    assert {name: tunnel.id for name, tunnel in place.tunnels().items()} == tunnels


def test_sessions_are_renewed_under_a_connection(place: Place) -> None:
    """Two more handshakes of a stock client that has forgotten its session each time, bytes on their way."""
    device = place.one
    assert device.ping(SERVER4, seconds=5)
    with stream(device.namespace, place.server, SERVER4) as ends:
        tunnel = place.tunnels()["one"].id
        for _ in range(2):
            exchange(*ends)
            shown = device.namespace.run("wg", "show", device.interface, "endpoints").split()
            allowed = ("endpoint", shown[1], "allowed-ips", "0.0.0.0/0,::/0")
            device.namespace.run("wg", "set", device.interface, "peer", place.key, "remove")
            device.namespace.run("wg", "set", device.interface, "peer", place.key, *allowed)
            assert device.handshake() == 0
            exchange(*ends)
            assert device.handshake() > 0
        assert place.tunnels()["one"].id == tunnel


def test_a_tunnel_that_no_flow_worker_takes_leaves_nothing(place: Place) -> None:
    """The device is refused, again and again, while nobody reads; then it is back, and no descriptor is left over."""
    assert place.one.ping(SERVER4, seconds=5)
    before = {pid: _descriptors(pid) for pid in (place.parent(), place.worker())}
    refused = _refused(place)
    flow = _flow_worker(place)
    os.kill(flow, signal.SIGSTOP)
    try:
        with grpc.insecure_channel(f"unix:{place.mesh.run_dir / 'admin' / 'onramp.sock'}") as channel:
            onramp_service_pb2_grpc.OnrampServiceStub(channel).Close(pb.CloseRequest(id=place.tunnels()["one"].id))
        wait_for("a refusal", lambda: not place.one.ping(SERVER4, seconds=1) and _refused(place) > refused, DEADLINE_S)
    finally:
        os.kill(flow, signal.SIGCONT)
    wait_for("it is back", lambda: place.one.ping(SERVER4, seconds=1), DEADLINE_S)
    wait_for("its tunnel", lambda: "one" in place.tunnels(), DEADLINE_S)
    wait_for(
        "the descriptors of before",
        lambda: all(_descriptors(pid) <= count for pid, count in before.items()),
        DEADLINE_S,
    )


def _descriptors(pid: int) -> int:
    return len(list(Path(f"/proc/{pid}/fd").iterdir()))


def _refused(place: Place) -> int:
    return sum(counter.value for counter in place.stats().refused if counter.name == "NOT_READY")


def _flow_worker(place: Place) -> int:
    with grpc.insecure_channel(f"unix:{place.mesh.run_dir / 'read' / 'flow.sock'}") as channel:
        stats = flow_service_pb2_grpc.FlowServiceStub(channel).Stats(flow_service_pb2.StatsRequest())
    return next(int(process.pid) for process in stats.processes if process.name == "flow.worker.0")


def test_a_change_takes_effect_at_once(place: Place) -> None:
    """Disabled, its live connection ends and nothing passes; enabled it comes back; with another key the old one is nobody's."""
    device = place.two
    assert device.ping(SERVER4, seconds=5)
    with stream(device.namespace, place.server, SERVER4) as (there, here):
        exchange(there, here, size=4096)
        place.mesh.ask("device", "update", "--tenant", "acme", "two", "--disabled")
        with pytest.raises(ConnectionResetError):
            here.recv(1)
    assert not device.ping(SERVER4, seconds=1)
    assert "two" not in place.tunnels()
    place.mesh.ask("device", "update", "--tenant", "acme", "two", "--enabled")
    wait_for("it is back", lambda: device.ping(SERVER4, seconds=1), DEADLINE_S)
    place.mesh.ask("device", "update", "--tenant", "acme", "two", "--public-key", key_pair()[1])
    wait_for("the old key is out", lambda: "two" not in place.tunnels(), DEADLINE_S)
    assert not device.ping(SERVER4, seconds=1)


def test_a_configuration_of_ours_is_all_that_a_stock_client_needs(place: Place) -> None:
    """`falkirk device rotate --format wg-quick`: the old key's session ends at once, the new file brings the device back."""
    one, file = place.one, place.directory / "one.conf"
    wait_for("an answer", lambda: one.ping(SERVER4, seconds=1), DEADLINE_S)
    place.mesh.ask("device", "rotate", "one", "--tenant", "acme", "--out", str(file))
    wait_for("the old key's end", lambda: not one.ping(SERVER4, seconds=1), DEADLINE_S)
    stripped = place.directory / "one.stripped"
    stripped.touch(mode=0o600)
    stripped.write_text(run(["wg-quick", "strip", str(file)]))
    one.namespace.run("wg", "setconf", one.interface, str(stripped))
    wait_for("an answer by the new key", lambda: one.ping(SERVER4, seconds=1), DEADLINE_S)
    shown = one.namespace.run("wg", "show", one.interface, "dump").splitlines()
    assert (
        shown[0].split()[1]
        == json.loads(place.mesh.ask("device", "get", "--tenant", "acme", "one", "--json"))["publicKey"]
    )
    wait_for("presence", lambda: place.endpoints().get("one", "").startswith("198.18.102."), DEADLINE_S)
    listed = place.mesh.ask("device", "list", "--tenant", "acme")
    assert "198.18.102." in next(line for line in listed.splitlines() if " one " in line)


def test_the_private_key_is_nobody_elses(place: Place) -> None:
    key = place.mesh.data_dir / "onramp" / "wireguard.key"
    assert key.stat().st_mode & 0o777 == 0o600
    secret = key.read_text().strip()
    everything = [place.mesh.log, *Path(place.mesh.data_dir).rglob("*.ndjson")]
    assert all(secret not in path.read_text(errors="replace") for path in everything)
    assert secret not in Path(f"/proc/{place.worker()}/cmdline").read_text()
