"""TCP from one device to another that is lifted, relayed and lowered again: for both it is as if nothing were between them."""

from __future__ import annotations

import errno
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.netns.between_devices import FRAMINGS, Between, Peers, address
from tests.netns.fidelity import DEADLINE_S, begin, open_world, outcome, receive, reset, together
from tests.netns.test_fidelity_streams import in_background, receive_stream, send_stream
from tools.netlab import wait_for

MANY = 16 << 20
"""Bytes each way; the lift is tested with more."""
pytestmark = [pytest.mark.netns, pytest.mark.timeout(300)]
FAMILIES = (socket.AF_INET, socket.AF_INET6)
HELLO = b"SSH-2.0-OpenSSH_9.2\r\n"


@pytest.fixture(scope="module", params=[1, 3], ids=["1-worker", "3-workers"])
def peers(request: pytest.FixtureRequest) -> Iterator[Peers]:
    with open_world(request.param, {"flow": {"connect_timeout_ms": 2000}}) as world:
        yield Peers(world)


@pytest.fixture(
    params=[(framings, family) for framings in FRAMINGS for family in FAMILIES],
    ids=lambda param: f"{'-'.join(param[0])}-{'ipv4' if param[1] == socket.AF_INET else 'ipv6'}",
)
def way(peers: Peers, request: pytest.FixtureRequest) -> Between:
    return peers.between(*request.param)


@pytest.fixture
def plain(peers: Peers) -> Between:
    """One of them."""
    return peers.between(("vnet", "vnet"), socket.AF_INET)


def test_the_server_sees_the_client_itself(way: Between) -> None:
    with way.pair() as (client, server):
        assert server.getpeername()[:2] == (way.here, client.getsockname()[1])
        assert server.getsockname()[:2] == (way.there, client.getpeername()[1])
        server.sendall(HELLO)
        assert receive(client, len(HELLO)) == HELLO
        client.sendall(b"question")
        assert receive(server, 8) == b"question"


@pytest.mark.parametrize("first", ["client", "server"])
def test_a_half_closed_connection_still_carries(way: Between, first: str) -> None:
    with way.pair() as (client, server):
        one, other = (client, server) if first == "client" else (server, client)
        one.sendall(b"last")
        one.shutdown(socket.SHUT_WR)
        assert receive(other) == b"last"
        other.sendall(b"more")
        other.shutdown(socket.SHUT_WR)
        assert receive(one) == b"more"


@pytest.mark.parametrize("who", ["client", "server"])
def test_a_reset_is_a_reset(way: Between, who: str) -> None:
    with way.pair() as (client, server):
        one, other = (client, server) if who == "client" else (server, client)
        one.sendall(b"before")
        assert receive(other, 6) == b"before"
        reset(one)
        with pytest.raises(ConnectionResetError):
            other.recv(1)


def test_a_closed_port_is_refused_at_once(way: Between) -> None:
    with way.listener() as listener:
        port = listener.getsockname()[1]
    assert way.attempt(port) == (errno.ECONNREFUSED, 0)


def test_a_device_that_does_not_answer_times_out(plain: Between) -> None:
    """Its queue of streams to be accepted is full: after as many seconds as a dial may take there is an ICMP error."""
    with plain.listener(backlog=0) as listener:
        port = listener.getsockname()[1]
        with plain.server.socket(plain.family) as first, plain.server.socket(plain.family) as second:
            for sock in (first, second):
                begin(sock, plain.there, port)
            assert plain.attempt(port).error == errno.EHOSTUNREACH
    assert plain.world.recorded("ended", port, plain.there)["reason"] == "upstream_timeout"


def test_a_device_without_a_tunnel_is_unreachable(peers: Peers, plain: Between) -> None:
    with plain.client.socket(socket.AF_INET) as sock:
        begun = begin(sock, address(peers.idle, socket.AF_INET), 22)
        assert outcome(sock, begun).error == errno.EHOSTUNREACH


def test_datagrams(way: Between) -> None:
    with (
        way.server.socket(way.family, socket.SOCK_DGRAM) as server,
        way.client.socket(way.family, socket.SOCK_DGRAM) as client,
    ):
        server.bind((way.there, 0))
        port = server.getsockname()[1]
        for sock in (server, client):
            sock.settimeout(DEADLINE_S)
        client.connect((way.there, port))
        for size in (0, 1, 1400):
            client.send(bytes(size))
            data, peer = server.recvfrom(2000)
            assert (data, peer[:2]) == (bytes(size), (way.here, client.getsockname()[1]))
            server.sendto(data + b"!", peer)
            assert client.recv(2000) == data + b"!"
        server.close()
        client.send(b"?")
        with pytest.raises(ConnectionRefusedError):
            client.recv(1)


@pytest.mark.slow
def test_many_mebibytes_both_ways(way: Between) -> None:
    with way.pair() as (client, server):
        sent: list[str] = []
        threads = [
            in_background(lambda sock=sock, seed=seed: sent.append(send_stream(sock, seed, MANY)))  # type: ignore[misc]
            for sock, seed in ((client, 1), (server, 2))
        ]
        received = together(receive_stream, [server, client])
        for thread in threads:
            thread.join()
        assert [size for size, _ in received] == [MANY, MANY]
        assert {digest for _, digest in received} == set(sent)


def test_curl_of_a_page(plain: Between, tmp_path: Path) -> None:
    (tmp_path / "page").write_bytes(b"a page" * 10_000)
    command = [sys.executable, "-m", "http.server", "8080", "--directory", str(tmp_path)]
    log = (tmp_path / "log").open("wb")

    def start() -> subprocess.Popen[bytes]:
        return subprocess.Popen(command, stdout=log, stderr=log, env={"PYTHONUNBUFFERED": "1"})

    server = plain.server.call(start)
    try:
        wait_for("the web server", lambda: plain.server.call(_listens, 8080), DEADLINE_S)

        def curl() -> subprocess.CompletedProcess[bytes]:
            url = f"http://{plain.there}:8080/page"
            return subprocess.run(["curl", "-sS", "-m", "30", url], capture_output=True, check=True)

        assert plain.client.call(curl).stdout == b"a page" * 10_000
        wait_for("the server's log", lambda: plain.here.encode() in (tmp_path / "log").read_bytes(), DEADLINE_S)
    finally:
        server.kill()
        server.wait()
        log.close()


def _listens(port: int) -> bool:
    with socket.socket() as sock:
        return sock.connect_ex(("127.0.0.1", port)) == 0


def test_both_directions_at_once(peers: Peers) -> None:
    there, back = (peers.between(("raw", "vnet"), socket.AF_INET, back=swapped) for swapped in (False, True))
    with there.pair() as (one, two), back.pair() as (three, four):
        for client, server in ((one, two), (three, four)):
            client.sendall(b"ping")
            assert receive(server, 4) == b"ping"


def test_what_is_recorded(plain: Between) -> None:
    with plain.listener() as listener:
        port = listener.getsockname()[1]
        with plain.connect(port) as client:
            server, _ = listener.accept()
            with server:
                client.sendall(b"x" * 1000)
                client.shutdown(socket.SHUT_WR)
                assert receive(server) == b"x" * 1000
    ended = plain.world.recorded("ended", port, plain.there)
    assert (ended["rule"], ended["treatment"], ended["reason"]) == ("peers/l4", "l4", "finished")
    assert (ended["device"], ended["destination_device"]) == (plain.client.device, plain.server.device)
    assert ended["bytes_up"] > 1000


# an administrator's connection


def administer(way: Between, device: str, port: int, *options: str, text: str = "") -> subprocess.CompletedProcess[str]:
    """`falkirk connect`, in a process of its own: it reads and writes descriptors."""
    command = [sys.executable, "-m", "falkirk.cli.main", "connect", "--run-dir", str(way.world.mesh.run_dir)]
    command += ["--tenant", "acme", "--device", device, "--port", str(port), *options]
    return subprocess.run(command, input=text, capture_output=True, text=True, timeout=DEADLINE_S, check=False)


def test_an_administrator_connects(way: Between) -> None:
    family = "-4" if way.family == socket.AF_INET else "-6"
    with way.listener() as listener:
        port = listener.getsockname()[1]
        said: list[bytes] = []
        peers: list[str] = []

        def serve() -> None:
            sock, peer = listener.accept()
            with sock:
                sock.sendall(HELLO)
                said.append(receive(sock))
                peers.append(peer[0])

        thread = in_background(serve)
        done = administer(way, way.server.device, port, family, text="hello\n")
        assert (done.returncode, done.stdout, done.stderr) == (0, HELLO.decode().replace("\r\n", "\n"), "")
        thread.join()
    assert said == [b"hello\n"]
    assert peers == ["192.0.0.8" if way.family == socket.AF_INET else "fd66:616c:6b69:726b::1"]
    started = way.world.recorded("started", port, way.there, way.server.device)
    assert started["why"].startswith("an administrator's connection: root (uid 0")
    assert started["device"] == way.server.device


def test_an_administrator_is_refused(plain: Between) -> None:
    with plain.listener() as listener:
        port = listener.getsockname()[1]
    refused = administer(plain, plain.server.device, port, "-4")
    assert (refused.returncode, "CONNECTION_REFUSED" in refused.stderr) == (1, True)
    unknown = administer(plain, "nobody", port)
    assert (unknown.returncode, "NO_TUNNEL" in unknown.stderr) == (1, True)


def test_an_administrator_is_reset(plain: Between) -> None:
    """A stream that breaks off is no end in order."""
    with plain.listener() as listener:
        port = listener.getsockname()[1]

        def serve() -> None:
            sock, _ = listener.accept()
            sock.sendall(b"half of ")
            assert receive(sock, 1) == b"."
            reset(sock)

        thread = in_background(serve)
        done = administer(plain, plain.server.device, port, text=".")
        thread.join()
    assert (done.returncode, done.stdout) == (1, "half of ")
    assert "UPSTREAM_RESET" in done.stderr
