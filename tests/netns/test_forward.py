"""Real programs between two devices: {IPv4, IPv6} x {raw, vnet, mixed}, by one worker and by three."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import signal
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from scapy.compat import raw
from scapy.layers.inet import IP, UDP
from scapy.layers.inet6 import IPv6
from scapy.layers.sctp import (
    SCTP,
    SCTPChunkCookieAck,
    SCTPChunkCookieEcho,
    SCTPChunkData,
    SCTPChunkInit,
    SCTPChunkInitAck,
    SCTPChunkParamStateCookie,
    SCTPChunkSACK,
)

from tests.netns.conftest import add_address
from tests.netns.device_pairs import BEHIND, FAMILIES, FRAMINGS, STRANGERS, TENANT, Devices, Pair, payload, web_server
from tests.netns.fidelity import DEADLINE_S, Client, World, begin, open_world, outcome, receive
from tools.netlab import wait_for

pytestmark = pytest.mark.netns
SCTP_PROTOCOL, GRE, ESP = 132, 47, 50
PORT = 5201


@pytest.fixture(scope="session")
def devices(world: World) -> Devices:
    """The devices, in the mesh that the other tests have too."""
    return Devices(world)


@pytest.fixture(params=list(FRAMINGS))
def pair(devices: Devices, request: pytest.FixtureRequest) -> Pair:
    """Each combination of framings."""
    return devices.pair(*FRAMINGS[request.param])


@pytest.fixture(params=list(FAMILIES), ids=["ipv4", "ipv6"])
def family(request: pytest.FixtureRequest) -> int:
    """4 or 6."""
    number: int = request.param
    return number


# what passes


def test_ping(pair: Pair, family: int) -> None:
    done = pair.laptop.run("ping", "-n", "-c", "3", "-i", "0.2", "-W", "5", pair.nas.address[family])
    assert done.returncode == 0, done.stdout + done.stderr
    assert " 0% packet loss" in done.stdout
    # One hop less than what a host begins with.
    assert "ttl=63" in done.stdout


def test_a_large_ping_goes_in_fragments(pair: Pair, family: int) -> None:
    done = pair.laptop.run("ping", "-n", "-c", "2", "-i", "0.2", "-W", "5", "-s", "4000", pair.nas.address[family])
    assert done.returncode == 0, done.stdout + done.stderr


def test_curl(pair: Pair, family: int, tmp_path: Path) -> None:
    content = os.urandom(3 << 20)
    (tmp_path / "file").write_bytes(content)
    address = pair.nas.address[family]
    host = f"[{address}]" if family == 6 else address
    with pair.server(family, 8080, *web_server(address, 8080, str(tmp_path))):
        done = pair.laptop.run("curl", "-gsS", "-o", str(tmp_path / "got"), f"http://{host}:8080/file")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "got").read_bytes() == content


TCP_WAYS = (["-n", "8M"], ["-n", "8M", "-R"])
UDP_WAYS = (["-u", "-b", "20M", "-k", "500"], ["-u", "-b", "20M", "-k", "500", "-R"])


@pytest.mark.parametrize("options", [*TCP_WAYS, *UDP_WAYS], ids=" ".join)
def test_iperf3(pair: Pair, family: int, options: list[str]) -> None:
    address = pair.nas.address[family]
    with pair.server(family, PORT, "iperf3", "-s", "-1", "-B", address, "-p", str(PORT)):
        done = pair.laptop.run("iperf3", "-c", address, "-p", str(PORT), "-J", *options)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(done.stdout)
    if "-u" in options:
        summed = report["end"]["sum"]
        assert summed["packets"] > 100
        assert summed["lost_percent"] < 50
    else:
        assert report["end"]["sum_received"]["bytes"] > 1 << 20


def test_sctp_shakes_hands_and_carries_data(pair: Pair, family: int) -> None:
    """This kernel may have no SCTP, so both ends are scapy's, which checks nothing but what is said here: each chunk as it left."""
    there, here = pair.nas.address[family], pair.laptop.address[family]
    with pair.laptop.raw(family, SCTP_PROTOCOL) as client, pair.nas.raw(family, SCTP_PROTOCOL) as server:
        to_server = {"sport": 40000, "dport": 9899}
        to_client = {"sport": 9899, "dport": 40000}
        exchange = [
            (client, there, server, SCTP(**to_server) / SCTPChunkInit(init_tag=7, a_rwnd=65535)),
            (server, here, client, SCTP(**to_client, tag=7) / SCTPChunkInitAck(init_tag=8, a_rwnd=65535, params=[SCTPChunkParamStateCookie(cookie=b"biscuit!")])),
            (client, there, server, SCTP(**to_server, tag=8) / SCTPChunkCookieEcho(cookie=b"biscuit!")),
            (server, here, client, SCTP(**to_client, tag=7) / SCTPChunkCookieAck()),
            (client, there, server, SCTP(**to_server, tag=8) / SCTPChunkData(tsn=1, data=b"x" * 1000)),
            (server, here, client, SCTP(**to_client, tag=7) / SCTPChunkSACK(cumul_tsn_ack=1)),
        ]  # fmt: skip
        for sender, address, receiver, packet in exchange:
            sent = raw(packet)
            sender.sendto(sent, (address, 0))
            assert payload(receiver.recv(65536), family) == sent


@pytest.mark.parametrize("protocol", [GRE, ESP], ids=["gre", "esp"])
def test_tunnels_of_other_kinds_pass_by_their_addresses(pair: Pair, family: int, protocol: int) -> None:
    inner = raw(IP(src="192.0.2.1", dst="192.0.2.2") / UDP(dport=9)) if family == 4 else raw(IPv6() / UDP(dport=9))
    sent = (b"\0\0\x08\0" if protocol == GRE else b"\0\0\0\x01\0\0\0\x01") + inner
    with pair.laptop.raw(family, protocol) as client, pair.nas.raw(family, protocol) as server:
        for _ in range(3):
            client.sendto(sent, (pair.nas.address[family], 0))
            assert payload(server.recv(65536), family) == sent
            server.sendto(sent[::-1], (pair.laptop.address[family], 0))
            assert payload(client.recv(65536), family) == sent[::-1]


def test_a_refused_port_is_the_other_host_s_word(pair: Pair, family: int) -> None:
    """TCP gets its RST, UDP the ICMP error that the other host sends."""
    with pair.laptop.client.socket(FAMILIES[family]) as sock:
        assert outcome(sock, begin(sock, pair.nas.address[family], 9)).error == errno.ECONNREFUSED
    with pair.laptop.client.socket(FAMILIES[family], socket.SOCK_DGRAM) as sock:
        sock.settimeout(DEADLINE_S)
        sock.connect((pair.nas.address[family], 9))
        sock.send(b"anybody?")
        with pytest.raises(ConnectionRefusedError):
            sock.recv(1)


def test_traceroute_sees_falkirk_as_a_hop(pair: Pair, family: int) -> None:
    done = pair.laptop.run("ping", "-n", "-c", "1", "-t", "1", "-W", "5", pair.nas.address[family])
    assert "Time to live exceeded" in done.stdout or "Hop limit" in done.stdout, done.stdout + done.stderr


def test_both_devices_stand_in_the_audit_log(devices: Devices, family: int) -> None:
    pair = devices.pair("raw", "vnet")
    address = pair.nas.address[family]
    port = 31000 + family
    with pair.laptop.client.socket(FAMILIES[family]) as sock:
        outcome(sock, begin(sock, address, port))
    record = pair.world.recorded("started", port, address, pair.laptop.name)
    assert (record["destination_device"], record["rule"], record["treatment"]) == (
        pair.nas.name, "access/to-nas", "l3",
    )  # fmt: skip
    assert pair.world.recorded("ended", port, address, pair.laptop.name)["reason"] == "upstream_reset"


# what doesn't


def test_policy_holds_both_ways(pair: Pair, family: int) -> None:
    """The NAS begins nothing, nor does the laptop where a rule denies it, whatever is open between the two meanwhile."""
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(pair.nas.client.socket(FAMILIES[family]))
        listener.bind(("", 0))
        listener.listen()
        open_one = stack.enter_context(pair.laptop.client.socket(FAMILIES[family]))
        open_one.settimeout(DEADLINE_S)
        open_one.connect((pair.nas.address[family], listener.getsockname()[1]))
        for host, to, port in ((pair.laptop, pair.nas, 23), (pair.nas, pair.laptop, open_one.getsockname()[1])):
            with host.client.socket(FAMILIES[family]) as sock:
                refused = outcome(sock, begin(sock, to.address[family], port))
            assert refused == (errno.ECONNREFUSED, 0)
        done = pair.nas.run("ping", "-n", "-c", "1", "-W", "5", pair.laptop.address[family])
        assert done.returncode != 0
        assert "Packet filtered" in done.stdout or "prohibited" in done.stdout, done.stdout
        open_one.sendall(b"still")
        accepted, _ = listener.accept()
        with accepted:
            assert receive(accepted, 5) == b"still"


def test_another_tenant_s_device_with_the_same_address_is_not_reached(devices: Devices, family: int) -> None:
    pair = devices.pair("raw", "raw")
    address = pair.nas.address[family]
    twin: Client = devices.world.client("raw", device="nas", tenant=STRANGERS)
    spy: Client = devices.world.client("raw", device="spy", tenant=STRANGERS)
    with (
        pair.nas.client.socket(FAMILIES[family], socket.SOCK_DGRAM) as ours,
        twin.socket(FAMILIES[family], socket.SOCK_DGRAM) as theirs,
        pair.laptop.client.socket(FAMILIES[family], socket.SOCK_DGRAM) as laptop,
        spy.socket(FAMILIES[family], socket.SOCK_DGRAM) as stranger,
    ):
        for sock in (ours, theirs):
            sock.settimeout(DEADLINE_S)
            sock.bind(("", 7777))
        laptop.sendto(b"from leo", (address, 7777))
        stranger.sendto(b"from a stranger", (address, 7777))
        assert ours.recv(100) == b"from leo"
        assert theirs.recv(100) == b"from a stranger"
        for sock in (ours, theirs):
            sock.setblocking(False)
            with pytest.raises(BlockingIOError):
                sock.recv(100)


def test_a_device_that_is_not_there_is_unreachable(devices: Devices, family: int) -> None:
    from tools.mesh import resource

    devices.world.apply([resource("Device", "off", TENANT, user="nina")])
    (off,) = devices.world.mesh.ask_json("device", "device", "get", "--tenant", TENANT, "off")
    (address,) = [text for text in off["addresses"] if (":" in text) == (family == 6)]
    laptop = devices.pair("raw", "raw").laptop
    with laptop.client.socket(FAMILIES[family]) as sock:
        assert outcome(sock, begin(sock, address, 80)).error == errno.EHOSTUNREACH
    record = devices.world.recorded("denied", 80, address)
    assert (record["reason"], record["destination_device"]) == ("device_offline", "off")
    said = devices.world.mesh.ask(
        "explain", "--tenant", TENANT, "--device", laptop.name, "--dst", address, "--port", "80", accept=(1,)
    )
    assert "device off has no open tunnel" in said


def test_a_spoofed_source_goes_nowhere(devices: Devices, family: int) -> None:
    pair = devices.pair("raw", "raw")
    before = devices.world.drops("spoofed_source")
    layer = IP(src=BEHIND[4], dst=pair.nas.address[4]) if family == 4 else IPv6(src=BEHIND[6], dst=pair.nas.address[6])
    with (
        pair.nas.client.socket(FAMILIES[family], socket.SOCK_DGRAM) as server,
        pair.laptop.client.socket(FAMILIES[family], socket.SOCK_RAW, socket.IPPROTO_RAW) as sock,
    ):
        server.bind(("", 7778))
        server.setblocking(False)
        sock.sendto(raw(layer / UDP(sport=1, dport=7778) / b"spoofed"), (pair.nas.address[family], 0))
        wait_for("the drop to be counted", lambda: devices.world.drops("spoofed_source") > before, DEADLINE_S)
        with pytest.raises(BlockingIOError):
            server.recv(100)


# a route to a device


def test_a_route_leads_to_what_is_behind_a_device(devices: Devices, family: int) -> None:
    pair = devices.pair("vnet", "raw")
    behind = BEHIND[family]

    packed = socket.inet_pton(FAMILIES[family], behind)
    pair.nas.client.call(add_address, "lo", packed, 8 * len(packed))
    with pair.nas.client.socket(FAMILIES[family]) as listener, pair.laptop.client.socket(FAMILIES[family]) as client:
        listener.bind((behind, 0))
        listener.listen()
        client.settimeout(DEADLINE_S)
        client.connect((behind, listener.getsockname()[1]))
        accepted, _ = listener.accept()
        with accepted:
            accepted.sendall(b"behind the nas")
            assert receive(client, 14) == b"behind the nas"


# what a kill costs


@pytest.fixture(scope="module")
def killable() -> Iterator[Devices]:
    """A mesh of its own, with two workers."""
    with open_world(2) as opened:
        yield Devices(opened)


@pytest.mark.parametrize("victim", [0, 1], ids=["the-laptops-worker", "the-nas-worker"])
def test_a_killed_worker_resets_its_connections_and_new_ones_pass(killable: Devices, victim: int, family: int) -> None:
    pair = killable.pair("vnet", "raw")
    world = killable.world
    address = pair.nas.address[family]
    with pair.nas.client.socket(FAMILIES[family]) as listener:
        listener.bind(("", 0))
        listener.listen()
        port = listener.getsockname()[1]
        with pair.laptop.client.socket(FAMILIES[family]) as client:
            client.settimeout(DEADLINE_S)
            client.connect((address, port))
            server, _ = listener.accept()
            server.settimeout(DEADLINE_S)
            client.sendall(b"hello")
            assert receive(server, 5) == b"hello"
            (process,) = [p for p in world.stats("flow").processes if p.name == f"flow.worker.{victim}"]
            os.kill(process.pid, signal.SIGKILL)
            with server:
                for sock in (client, server):
                    with pytest.raises(ConnectionResetError):
                        _talk(sock)
        reason = "tracker_lost" if victim == 0 else "device_offline"
        assert world.recorded("ended", port, address)["reason"] == reason

        def again() -> bool:
            with pair.laptop.client.socket(FAMILIES[family]) as sock:
                return outcome(sock, begin(sock, address, port)).error == 0

        wait_for("a new connection", again, DEADLINE_S)


def _talk(sock: socket.socket) -> None:
    """Speak now and then, until the other end is heard of. Raises what becomes of it."""
    sock.settimeout(1)
    for _ in range(int(DEADLINE_S)):
        sock.sendall(b"?")
        with contextlib.suppress(TimeoutError):
            if not sock.recv(100):
                raise AssertionError("a crash must not look like a clean end")
    raise AssertionError(f"nothing was heard within {DEADLINE_S} s")
