"""A tunnel whose packets are carried by the producer's own TUN device: what is asked of it, and what it can't do with it."""

from __future__ import annotations

import fcntl
import json
import os
import select
import signal
import socket
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from falkirk.linux import netns, seqpacket, tun
from tests.netns.conftest import in_thread
from tests.netns.fidelity import DEADLINE_S, World, open_world, receive
from tools.netlab import run, wait_for

pytestmark = pytest.mark.netns
TUNSETVNETHDRSZ = 0x400454D8
CONTEXT: dict[str, Any] = {"v": 1, "tenant": "acme", "framing": "vnet", "transport": "device"}


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    """A mesh of this module's own: its services are killed."""
    with open_world(1) as opened:
        yield opened


class Producer:
    """A producer by hand."""

    def __init__(self, world: World, **more: Any) -> None:
        self.sock = seqpacket.connect(world.mesh.run_dir / "tunnel.sock")
        seqpacket.send(self.sock, json.dumps(CONTEXT | {"device": world.a_device} | more).encode())

    def word(self) -> dict[str, Any] | None:
        """What the node says next; None where it hangs up."""
        assert select.select([self.sock], [], [], DEADLINE_S)[0], "the node says nothing"
        received = seqpacket.receive(self.sock, 16384)
        assert received is not None
        return json.loads(received[0]) if received[0] else None

    def hand_over(self, *fds: int) -> dict[str, Any] | None:
        """The device; the answer."""
        seqpacket.send(self.sock, b'{"device":{}}', list(fds))
        return self.word()


def a_device(vnet: bool = True, size: int = 10) -> int:
    """A TUN device in a namespace of its own, up."""

    def make() -> int:
        fd = tun.open_tun("own0", vnet, tun.TCP_OFFLOADS if vnet else 0)
        if size != tun.VNET_HEADER_SIZE:
            fcntl.ioctl(fd, TUNSETVNETHDRSZ, struct.pack("=i", size))
        return fd

    return in_thread(netns.unshare_network, make)


@pytest.mark.parametrize("what", ["nothing", "two", "a file", "unattached", "no header", "another header"])
def test_what_is_no_such_device_is_refused(world: World, what: str, tmp_path: Path) -> None:
    producer = Producer(world)
    assert (producer.word() or {})["admitted"]["transport"] == "device"
    if what == "nothing":
        fds = []
    elif what == "two":
        fds = [a_device(), a_device()]
    elif what == "a file":
        fds = [os.open(tmp_path / "file", os.O_CREAT | os.O_RDWR)]
    elif what == "unattached":
        fds = [os.open(tun.DEVICE, os.O_RDWR)]
    else:
        fds = [a_device(vnet=what != "no header", size=12)] if what == "another header" else [a_device(vnet=False)]
    answer = producer.hand_over(*fds)
    assert answer is not None
    assert answer["error"]["code"] == "BAD_DEVICE"
    assert producer.word() is None
    for fd in fds:
        os.close(fd)


def test_a_device_that_is_made_blocking_stops_nobody(world: World) -> None:
    producer = Producer(world)
    producer.word()
    device = a_device()
    assert producer.hand_over(device) == {"attached": "device"}
    os.set_blocking(device, True)
    # What it can't be told in its changed framing is its own loss; everybody else's streams pass.
    fcntl.ioctl(device, TUNSETVNETHDRSZ, struct.pack("=i", 12))
    way = world.way("device", socket.AF_INET)
    with way.pair() as (client, server):
        client.sendall(b"through")
        assert server.recv(64) == b"through"
        client.shutdown(socket.SHUT_WR)
        server.sendall(b"x" * 1_000_000)
        server.shutdown(socket.SHUT_WR)
        assert len(receive(client)) == 1_000_000
    os.close(device)
    producer.sock.close()


def test_a_successor_asks_for_the_device(world: World) -> None:
    way = world.way("device", socket.AF_INET)
    with way.pair() as (client, _):
        (victim,) = (found.pid for found in world.stats("flow").processes if found.name == "flow.worker.0")
        os.kill(victim, signal.SIGKILL)
        assert select.select([client], [], [], DEADLINE_S)[0]
        with pytest.raises(ConnectionResetError):
            client.recv(1)

    def again() -> bool:
        try:
            with way.pair() as (client, server):
                client.sendall(b"again")
                return bool(server.recv(64) == b"again")
        except OSError:
            return False

    wait_for("the successor to carry on", again, DEADLINE_S)


def test_who_may_not_hand_a_device_over_uses_the_socket() -> None:
    with open_world(1, {"onramp": {"tunnels": [{"uid": os.getuid(), "devices": False}]}}) as strict:
        assert (Producer(strict).word() or {})["error"]["code"] == "TRANSPORT_FORBIDDEN"
        assert "admitted" in (Producer(strict, transport="socket").word() or {})
        # Where it isn't told what to use, `falkirk lower` falls back.
        command = strict.mesh.lower(strict.a_device, ["true"])
        at = command.index("--transport")
        run(command[:at] + command[at + 2 :])
