"""Streams that come about: data, ends and resets reach the other side as TCP itself would bring them."""

from __future__ import annotations

import contextlib
import hashlib
import random
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.netns.fidelity import DEADLINE_S, Way, World, receive, reset, together
from tools.load import http_server
from tools.netlab import wait_for

pytestmark = [pytest.mark.netns, pytest.mark.timeout(300)]
MIB = 1 << 20
BIG = 64 * MIB
BESIDE = 32 * MIB
DOWNLOADS = 200
DOWNLOAD = 5 * MIB


def in_background(function: Callable[[], object]) -> threading.Thread:
    thread = threading.Thread(target=function)
    thread.start()
    return thread


def send_stream(sock: socket.socket, seed: int, size: int) -> str:
    """Send pseudo-random bytes and a FIN; their SHA-256."""
    block = random.Random(seed).randbytes(MIB)
    digest = hashlib.sha256()
    for number in range(size // MIB):
        chunk = block[number % 4096 :] + block[: number % 4096]
        digest.update(chunk)
        sock.sendall(chunk)
    sock.shutdown(socket.SHUT_WR)
    return digest.hexdigest()


def receive_stream(sock: socket.socket) -> tuple[int, str]:
    """Size and SHA-256 of everything up to the FIN."""
    digest, size = hashlib.sha256(), 0
    while chunk := sock.recv(MIB):
        digest.update(chunk)
        size += len(chunk)
    return size, digest.hexdigest()


def fill(sock: socket.socket) -> None:
    """Send until nothing is taken for a second."""
    sock.settimeout(1)
    with contextlib.suppress(TimeoutError):
        while True:
            sock.send(bytes(MIB))


@pytest.fixture(scope="module")
def web(world: World, tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """The port of an HTTP server."""
    log = tmp_path_factory.mktemp("web") / "log"
    with log.open("wb") as output:
        program = [sys.executable, str(Path(http_server.__file__).resolve())]
        process = world.server.popen(program, stdin=-3, stdout=output)
    wait_for("the HTTP server", lambda: log.read_text().startswith("ready"), DEADLINE_S)
    yield 80
    process.kill()


def test_the_client_ends_first_and_still_receives(way: Way) -> None:
    with way.pair() as (client, server):
        client.sendall(b"question")
        client.shutdown(socket.SHUT_WR)
        assert receive(server) == b"question"
        answer = bytes(3 * MIB)
        sender = in_background(lambda: server.sendall(answer))
        assert len(receive(client, len(answer))) == len(answer)
        sender.join()
        server.close()
        assert client.recv(1) == b""


SENDER = """
import socket, sys
with socket.create_connection((sys.argv[1], int(sys.argv[2])), timeout=20) as sock:
    sock.sendall(bytes(int(sys.argv[3])))
print("sent", flush=True)
"""


@pytest.mark.parametrize("framing", ["device", "vnet"])
def test_a_command_ends_when_a_slow_server_has_all_of_it(world: World, framing: str) -> None:
    """Its data are acknowledged long before, by Falkirk; the tunnel mustn't go away while they are on their way."""
    size = 64 * 1024
    with world.server.listener(socket.AF_INET, 0, 1) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        listener.settimeout(DEADLINE_S)
        command = [sys.executable, "-c", SENDER, world.server.host4(1), str(listener.getsockname()[1]), str(size)]
        lower = subprocess.Popen(
            world.mesh.lower(world.a_device, command, framing=framing, options=["--linger", "60"]),
            stdout=subprocess.PIPE,
        )
        try:
            assert lower.stdout is not None
            with listener.accept()[0] as server:
                assert lower.stdout.readline() == b"sent\n"
                # It would have ended by now, did it wait for nothing but acknowledgements.
                with pytest.raises(subprocess.TimeoutExpired):
                    lower.wait(1)
                assert len(receive(server)) == size
            assert lower.wait(DEADLINE_S) == 0
        finally:
            lower.kill()
            lower.communicate()


def test_a_connection_that_nobody_ends_is_given_up(world: World) -> None:
    with world.server.listener(socket.AF_INET, 0, 1) as listener:
        listener.settimeout(DEADLINE_S)
        command = [sys.executable, "-c", SENDER, world.server.host4(1), str(listener.getsockname()[1]), "1"]
        lower = subprocess.Popen(
            world.mesh.lower(world.a_device, command, options=["--linger", "0.2"]), stderr=subprocess.PIPE, text=True
        )
        with listener.accept()[0] as server:
            assert receive(server, 1) == b"\0"
            _, said = lower.communicate(timeout=DEADLINE_S)
    assert (lower.returncode, "1 connection of the command hadn't ended after 0.2 s (--linger)" in said) == (0, True), (
        said
    )


def test_the_server_ends_first_and_still_receives(way: Way) -> None:
    with way.pair() as (client, server):
        server.sendall(b"greeting")
        server.shutdown(socket.SHUT_WR)
        assert receive(client) == b"greeting"
        answer = bytes(3 * MIB)
        sender = in_background(lambda: client.sendall(answer))
        assert len(receive(server, len(answer))) == len(answer)
        sender.join()
        client.close()
        assert server.recv(1) == b""


def test_a_reset_of_the_client_reaches_the_server(way: Way) -> None:
    with way.pair() as (client, server):
        client.sendall(b"x")
        assert server.recv(1) == b"x"
        reset(client)
        with pytest.raises(ConnectionResetError):
            server.recv(1)


def test_a_reset_of_the_server_reaches_the_client(way: Way) -> None:
    with way.pair() as (client, server):
        client.sendall(b"x")
        assert server.recv(1) == b"x"
        reset(server)
        with pytest.raises(ConnectionResetError):
            client.recv(1)


def test_a_server_may_speak_first(way: Way) -> None:
    with way.pair() as (client, server):
        server.sendall(b"220 ready\r\n")
        assert client.recv(64) == b"220 ready\r\n"


def test_a_big_transfer_both_ways_at_once_is_whole(way: Way) -> None:
    with way.pair() as (client, server):
        sent: dict[str, str] = {}
        senders = [
            in_background(lambda: sent.update(up=send_stream(client, 1, BIG))),
            in_background(lambda: sent.update(down=send_stream(server, 2, BIG))),
        ]
        up, down = together(receive_stream, [server, client])
        for sender in senders:
            sender.join()
        assert up == (BIG, sent["up"])
        assert down == (BIG, sent["down"])


def test_many_downloads_at_once_are_whole(world: World, web: int) -> None:
    ways = world.ways()

    def download(number: int) -> str:
        way = ways[number % len(ways)]
        with way.connect(web) as sock:
            sock.sendall(b"GET /bytes/%d HTTP/1.0\r\n\r\n" % DOWNLOAD)
            return hashlib.sha256(receive(sock).partition(b"\r\n\r\n")[2]).hexdigest()

    assert set(together(download, range(DOWNLOADS))) == {http_server.digest(DOWNLOAD)}


def test_a_stalled_client_hinders_nobody(way: Way, record_property: Callable[[str, object], None]) -> None:
    def seconds() -> float:
        with way.pair() as (client, server):
            start = time.monotonic()
            sender = in_background(lambda: send_stream(server, 3, BESIDE))
            assert receive_stream(client)[0] == BESIDE
            sender.join()
            return time.monotonic() - start

    before = seconds()
    with way.pair() as (stalled, server):
        fill(server)
        record_property("throughput_beside_a_stalled_client", before / seconds())
        assert stalled.recv(1) == b"\0"
