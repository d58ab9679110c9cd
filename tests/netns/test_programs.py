"""The programs that people use, through a whole mesh: dig, ping, traceroute, mtr, nc, iperf3, QUIC; and what UDP sockets see."""

from __future__ import annotations

import errno
import json
import os
import re
import select
import socket
import subprocess
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from falkirk.api.flow.v1 import flow_service_pb2
from falkirk.api.net.v1 import net_pb2
from falkirk.linux import datagrams
from tests.netns.fidelity import DEADLINE_S, DENIED_PORT, NO_ROUTE, Way
from tools.netlab import wait_for

pytestmark = [
    pytest.mark.netns,
    # What one worker does is in there.
    pytest.mark.parametrize("world", [3], indirect=True, ids=["3-workers"]),
]
FALKIRK = {socket.AF_INET: "192.0.0.8", socket.AF_INET6: "fd66:616c:6b69:726b::1"}
QUIC = Path(__file__).with_name("quic_peer.py")


def run(way: Way, *command: str, **options: Any) -> subprocess.CompletedProcess[str]:
    """A command on the device, to its end."""

    def call() -> subprocess.CompletedProcess[str]:
        return subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE_S, check=False, **options)

    return way.client.call(call)


def number(way: Way) -> str:
    """The option that chooses the family."""
    return "-4" if way.family == socket.AF_INET else "-6"


def overhead(way: Way) -> int:
    """Bytes of IP and UDP headers."""
    return 28 if way.family == socket.AF_INET else 48


@pytest.fixture(autouse=True)
def errors_unlimited(way: Way) -> None:
    """The server says of each datagram that its port is closed, however often (RFC 1812 4.3.2.8 limits that otherwise)."""
    limits = ("ipv4/icmp_ratelimit", "ipv6/icmp/ratelimit")
    way.world.server.call(lambda: [Path("/proc/sys/net", name).write_text("0") for name in limits])


@pytest.fixture
def far(way: Way) -> Iterator[socket.socket]:
    """A UDP socket of the server's."""
    with server_socket(way) as sock:
        yield sock


def server_socket(way: Way, port: int = 0) -> socket.socket:
    def make() -> socket.socket:
        sock = socket.socket(way.family, socket.SOCK_DGRAM)
        sock.bind((way.server, port))
        sock.settimeout(DEADLINE_S)
        return sock

    return way.world.server.call(make)


@pytest.fixture
def near(way: Way, far: socket.socket) -> Iterator[socket.socket]:
    """A UDP socket of the device's, connected to it."""
    with way.client.socket(way.family, socket.SOCK_DGRAM) as sock:
        sock.settimeout(DEADLINE_S)
        sock.connect(far.getsockname()[:2])
        yield sock


# programs


def test_ping(way: Way) -> None:
    def answered() -> bool:
        """A network may lose a packet; ping sends none again."""
        done = run(way, "ping", "-n", "-c", "3", "-i", "0.2", way.server)
        return re.findall(r"icmp_seq=(\d) ttl=(\d+)", done.stdout) == [("1", "63"), ("2", "63"), ("3", "63")]

    wait_for("three answers in a row", answered, DEADLINE_S)


def test_ping_with_what_fills_a_packet_and_with_what_needs_several(way: Way) -> None:
    for size in (1500 - overhead(way), 4000):
        done = run(way, "ping", "-n", "-c", "1", "-s", str(size), way.server)
        assert "1 received" in done.stdout, done


def test_ping_of_nobody(way: Way) -> None:
    done = run(way, "ping", "-n", "-c", "1", "-W", "1", way.host(5))
    assert "0 received" in done.stdout, done
    assert done.returncode == 1


def test_ping_of_what_has_no_route(way: Way) -> None:
    done = run(way, "ping", "-n", "-c", "1", "-W", "5", NO_ROUTE[way.family])
    assert f"From {FALKIRK[way.family]}" in done.stdout, done
    assert "nreachable" in done.stdout


@pytest.mark.parametrize("method", ["-U", "-I"])
def test_traceroute(way: Way, method: str) -> None:
    done = run(way, "traceroute", number(way), "-n", "-q", "1", "-w", "5", method, way.server)
    hops = [line.split()[1] for line in done.stdout.splitlines()[1:]]
    assert hops == [FALKIRK[way.family], way.server], done


@pytest.mark.parametrize("how", [(), ("--udp",)], ids=["icmp", "udp"])
def test_mtr(way: Way, how: tuple[str, ...]) -> None:
    done = run(way, "mtr", number(way), "-n", "-r", "-c", "2", "-i", "0.3", "-G", "1", *how, way.server)
    hops = re.findall(r"(\d)\.\|-- (\S+) +(\S+)%", done.stdout)
    assert hops == [("1", FALKIRK[way.family], "0.0"), ("2", way.server, "0.0")], done


def test_dig(way: Way, tmp_path: Path) -> None:
    hosts = tmp_path / "hosts"
    hosts.write_text("192.0.2.80 www.example\n2001:db8::80 www.example\n")
    text = ",".join(["x" * 250] * 12)
    command = [
        "dnsmasq",
        "--keep-in-foreground",
        "--no-resolv",
        "--no-hosts",
        "--conf-file=/dev/null",
        "--bind-interfaces",
    ]
    command += [f"--listen-address={way.server}", f"--addn-hosts={hosts}", "--edns-packet-max=4096", "--user=root"]
    command += ["--pid-file=", f"--txt-record=long.example,{text}"]
    server = way.world.server.popen(command)
    try:
        options = ("+tries=10", "+time=1", "+noall", "+answer")
        done = run(way, "dig", f"@{way.server}", "www.example", "A", "www.example", "AAAA", *options)
        assert "192.0.2.80" in done.stdout, done
        assert "2001:db8::80" in done.stdout
        # More than a packet holds: it comes in fragments.
        done = run(way, "dig", f"@{way.server}", "long.example", "TXT", "+bufsize=4096", "+ignore", *options)
        assert done.stdout.count("x" * 250) == 12, done
    finally:
        server.terminate()
        server.wait()


def test_nc(way: Way) -> None:
    port = server_socket(way)
    number_ = str(port.getsockname()[1])
    port.close()
    listener = way.world.server.popen(
        ["nc", number(way), "-u", "-l", way.server, number_], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )

    def talk() -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            ["nc", number(way), "-u", way.server, number_], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )

    def listens() -> bool:
        table = Path("/proc/thread-self/net", "udp" if way.family == socket.AF_INET else "udp6")
        return f":{int(number_):04X} " in way.world.server.call(table.read_text)

    # The client ends at the first refusal.
    wait_for("nc to listen", listens, DEADLINE_S)
    client = way.client.call(talk)
    try:
        for here, there in ((client, listener), (listener, client)):
            assert here.stdin is not None
            assert there.stdout is not None
            line = f"from {here.pid}\n".encode()

            def passes(here: Any = here, there: Any = there, line: bytes = line) -> bool:
                # UDP promises nothing.
                here.stdin.write(line)
                here.stdin.flush()
                return bool(select.select([there.stdout], [], [], 0.5)[0])

            wait_for("nc's line", passes, DEADLINE_S)
            assert there.stdout.readline() == line
    finally:
        for process in (client, listener):
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout):
                assert pipe is not None
                pipe.close()


@pytest.mark.parametrize("reverse", [(), ("-R",)], ids=["up", "down"])
def test_iperf3(way: Way, reverse: tuple[str, ...]) -> None:
    port = str(20000 + os.getpid() % 10000)
    server = way.world.server.popen(
        ["iperf3", "-s", "-1", "--forceflush", "-B", way.server, "-p", port], stdout=subprocess.PIPE, text=True
    )
    try:
        assert server.stdout is not None
        for line in server.stdout:
            if "listening" in line:
                break
        size = str(1500 - overhead(way))
        done = run(
            way, "iperf3", "-c", way.server, "-p", port, "-u", "-b", "20M", "-t", "1", "-l", size, "-J", *reverse
        )
        summary = json.loads(done.stdout)["end"]["sum"]
        assert summary["packets"] > 100, done
        assert summary["lost_packets"] < summary["packets"] / 2
    finally:
        server.kill()
        server.wait()


def test_quic_at_full_size(way: Way, tmp_path: Path) -> None:
    size, full = 256 * 2000, str(1500 - overhead(way))
    port = server_socket(way)
    where = (way.server, str(port.getsockname()[1]), str(size), full)
    port.close()
    server = way.world.server.popen(
        [sys.executable, str(QUIC), "serve", *where, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert server.stdout is not None
        assert server.stdout.readline() == "ready\n"
        done = run(way, sys.executable, str(QUIC), "get", *where)
        assert done.stdout.split() == [str(size), str(zlib.crc32(bytes(range(256)) * 2000))], done
    finally:
        server.kill()
        server.wait()


# sockets


def test_the_largest_datagram_of_a_packet_passes_whole(way: Way, near: socket.socket, far: socket.socket) -> None:
    six = way.family == socket.AF_INET6
    for sock in (near, far):
        datagrams.may_fragment(sock, six=six, allowed=False)
    full = os.urandom(1500 - overhead(way))
    near.send(full)
    data, peer = far.recvfrom(2000)
    assert data == full
    far.sendto(full[::-1], peer)
    assert near.recv(2000) == full[::-1]
    with pytest.raises(OSError, match="too long"):
        near.send(full + b"x")


def test_trains_pass_both_ways(way: Way, near: socket.socket, far: socket.socket) -> None:
    """UDP_SEGMENT at one end is UDP at the other, and one packet in between where the tunnel takes super-packets."""
    near.send(b"hello")
    peer = far.recvfrom(100)[1]
    for sender, receiver in ((near, far), (far, near)):
        receiver.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
        datagrams.set_segment(sender, 1000)
        train = os.urandom(40_500)
        sender.sendto(train, peer) if sender is far else sender.send(train)
        assert b"".join(receiver.recv(2000) for _ in range(41)) == train
    found = way.world.live(far.getsockname()[1], way.client.device)
    wait_for("its counts", lambda: way.world.live(far.getsockname()[1], way.client.device).packets_down, DEADLINE_S)
    found = way.world.live(far.getsockname()[1], way.client.device)
    # The header in front of the first is the only one, where super-packets pass.
    assert (found.packets_up, found.packets_down) == ((42, 41) if way.client.framing == "raw" else (2, 1))


def test_one_external_port_for_one_of_the_clients(way: Way, far: socket.socket) -> None:
    with server_socket(way) as other, way.client.socket(way.family, socket.SOCK_DGRAM) as near:
        near.settimeout(DEADLINE_S)
        seen = []
        for sock in (far, other, far):
            near.sendto(b"x", sock.getsockname()[:2])
            seen.append(sock.recvfrom(10)[1])
        assert len(set(seen)) == 1
        for sock in (far, other):
            sock.sendto(b"y", seen[0])
            assert near.recvfrom(10)[1][:2] == sock.getsockname()[:2]


def refused(way: Way, host: str, port: int) -> int:
    """What the device's socket is told of a datagram."""
    with way.client.socket(way.family, socket.SOCK_DGRAM) as sock:
        sock.settimeout(DEADLINE_S)
        # Without it a socket hears only of errors that no later packet could mend (RFC 1122 4.2.3.9).
        if way.family == socket.AF_INET:
            sock.setsockopt(socket.IPPROTO_IP, datagrams.IP_RECVERR, 1)
        else:
            sock.setsockopt(socket.IPPROTO_IPV6, datagrams.IPV6_RECVERR, 1)
        sock.connect((host, port))
        sock.send(b"x")
        with pytest.raises(OSError) as caught:
            sock.recv(1)
        assert caught.value.errno is not None
        return caught.value.errno


def test_what_sockets_are_told(way: Way) -> None:
    with server_socket(way) as closed:
        port = closed.getsockname()[1]
    assert refused(way, way.server, port) == errno.ECONNREFUSED
    assert refused(way, way.server, DENIED_PORT) in (errno.EHOSTUNREACH, errno.EACCES)
    assert refused(way, NO_ROUTE[way.family], 53) in (errno.ENETUNREACH, errno.EHOSTUNREACH)
    record = way.world.recorded("denied", DENIED_PORT, way.server, way.client.device)
    assert record["reason"] == "denied"


def test_ttl_and_traffic_class(way: Way, near: socket.socket, far: socket.socket) -> None:
    six = way.family == socket.AF_INET6
    for sock in (near, far):
        level = socket.IPPROTO_IPV6 if six else socket.IPPROTO_IP
        for option in (
            (datagrams.IPV6_RECVHOPLIMIT, datagrams.IPV6_RECVTCLASS)
            if six
            else (
                datagrams.IP_RECVTTL,
                datagrams.IP_RECVTOS,
            )
        ):
            sock.setsockopt(level, option, 1)
    datagrams.set_ttl(near, 20, six=six)
    datagrams.set_traffic_class(near, 0xB9, six=six)
    near.send(b"x")
    _, ancillary, _, peer = far.recvmsg(10, 200)
    assert sorted(data[0] for _, _, data in ancillary) == [19, 0xB9]
    datagrams.set_ttl(far, 30, six=six)
    datagrams.set_traffic_class(far, 0x2A, six=six)
    far.sendto(b"y", peer)
    _, ancillary, _, _ = near.recvmsg(10, 200)
    assert sorted(data[0] for _, _, data in ancillary) == [29, 0x2A]


def test_a_session_is_a_flow_like_any_other(way: Way, near: socket.socket, far: socket.socket) -> None:
    near.send(b"0123456789")
    peer = far.recvfrom(100)[1]
    far.sendto(b"01234", peer)
    assert near.recv(100) == b"01234"
    port = far.getsockname()[1]
    flow = way.world.live(port, way.client.device)
    assert (flow.key.protocol, flow.state) == (net_pb2.PROTOCOL_UDP, flow_service_pb2.FLOW_STATE_ESTABLISHED)
    way.world.mesh.ask("flow", "kill", flow.id, "--reason", "enough")
    ended = way.world.recorded("ended", port, way.server, way.client.device)
    assert (ended["reason"], ended["protocol"]) == ("terminated: enough", "udp")
    assert (ended["bytes_up"], ended["bytes_down"]) == (10 + overhead(way), 5 + overhead(way))
    assert near.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) in (errno.EHOSTUNREACH, errno.EACCES)
