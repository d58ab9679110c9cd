"""`falkirk lower` against an on-ramp of the test's own: real kernel TCP comes out as packets, and back."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from scapy.layers.inet import IP, TCP
from scapy.layers.inet6 import IPv6

from falkirk.linux import seqpacket, sockets, tun
from falkirk.wire.context import Framing

pytestmark = pytest.mark.netns
DEADLINE_S = 20
AS_USER = [sys.executable, str(Path(__file__).with_name("ordinary_user.py"))]
CLI = """
import typer
from falkirk.cli.lower import register
app = typer.Typer()
app.callback()(lambda: None)
register(app)
app()
"""


class OnRamp:
    """The on-ramp's end: hands out addresses, in order, and the sockets of admitted tunnels."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._listener = seqpacket.listen(path, 0o666)
        self._listener.setblocking(True)
        self._listener.settimeout(DEADLINE_S)
        self._admitted = 0
        self.contexts: list[dict[str, Any]] = []
        self.tunnels: list[socket.socket] = []

    def accept(self) -> socket.socket:
        """The next tunnel, its context read; the socket has a deadline."""
        tunnel, _ = self._listener.accept()
        tunnel.settimeout(DEADLINE_S)
        self.tunnels.append(tunnel)
        self.contexts.append(json.loads(tunnel.recv(16384)))
        return tunnel

    def admit(self, mtu: int = 1500) -> socket.socket:
        tunnel = self.accept()
        self._admitted += 1
        number = self._admitted
        addresses = [f"100.96.0.{number}", f"fd00:96::{number}"]
        framing = self.contexts[-1]["framing"]
        admitted = {"tunnel_id": str(number), "addresses": addresses, "mtu": mtu, "framing": framing}
        tunnel.send(json.dumps({"admitted": admitted}).encode())
        return tunnel

    def close(self) -> None:
        for tunnel in self.tunnels:
            tunnel.close()
        self._listener.close()


@pytest.fixture
def onramp(tmp_path: Path) -> Iterator[OnRamp]:
    onramp = OnRamp(tmp_path / "tunnel.sock")
    yield onramp
    onramp.close()


class Lower:
    """A running `falkirk lower`."""

    def __init__(
        self, onramp: OnRamp, *command: str, options: tuple[str, ...] = (), wrapper: tuple[str, ...] = ()
    ) -> None:
        tool = [
            sys.executable,
            "-c",
            CLI,
            "lower",
            "--tunnel",
            str(onramp.path),
            "--tenant",
            "acme",
            "--transport",
            "socket",
        ]
        self.process = subprocess.Popen(
            [*wrapper, *tool, "--device", "laptop", *options, "--", *command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )

    def end(self) -> tuple[int, str, str]:
        """Exit code, standard output and standard error, once it has ended."""
        out, error = self.process.communicate(timeout=DEADLINE_S)
        return self.process.returncode, out.decode(), error.decode()


@pytest.fixture(autouse=True)
def no_leftovers() -> Iterator[None]:
    def children() -> set[str]:
        return set(Path(f"/proc/self/task/{os.getpid()}/children").read_text().split())

    before = children()
    yield
    assert children() <= before


def python(code: str) -> tuple[str, str, str]:
    return sys.executable, "-c", code


def test_a_real_syn_comes_out(onramp: OnRamp) -> None:
    for framing in Framing:
        for destination, source, layer in (
            ("203.0.113.7", "100.96.0.", IP),
            ("2001:db8::7", "fd00:96::", IPv6),
        ):
            connect = python(f"import socket; socket.create_connection(('{destination}', 80), timeout=20)")
            lower = Lower(onramp, *connect, options=("--framing", framing))
            tunnel = onramp.admit(mtu=1400)
            data = tunnel.recv(tun.MAX_READ)
            packet = layer(data[tun.VNET_HEADER_SIZE :] if framing is Framing.VNET else data)
            assert packet[TCP].flags == "S"
            assert packet.dst == destination
            assert packet.src == f"{source}{len(onramp.tunnels)}"
            assert dict(packet[TCP].options)["MSS"] == 1400 - (40 if layer is IP else 60)
            if framing is Framing.RAW:
                checksum = packet[TCP].chksum
                del packet[TCP].chksum
                assert layer(bytes(packet))[TCP].chksum == checksum
            lower.process.terminate()
            code, _, _ = lower.end()
            assert code == 128 + signal.SIGTERM


def test_says_who_it_is(onramp: OnRamp) -> None:
    options = ("--virtual-network", "lab", "--attribute", "app=x", "--attribute", "b=c=d")
    lower = Lower(onramp, "true", options=options)
    onramp.admit()
    assert lower.end()[0] == 0
    assert onramp.contexts == [
        {
            "v": 1,
            "tenant": "acme",
            "device": "laptop",
            "framing": "vnet",
            "virtual_network": "lab",
            "attributes": {"app": "x", "b": "c=d"},
        }
    ]


def test_the_command_has_a_network_of_its_own(onramp: OnRamp) -> None:
    code = """
import socket
from pathlib import Path
print([name for _, name in socket.if_nameindex()])
with socket.socket() as s:
    s.bind(("127.0.0.1", 0)); s.listen(); socket.create_connection(s.getsockname()).close()
with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as s:
    s.connect(("2001:db8::1", 9)); print(s.getsockname()[0])
print(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split())
"""
    lower = Lower(onramp, *python(code), options=("--sysctl", "net.ipv4.ip_local_port_range=2000 3000"))
    onramp.admit()
    status, out, _ = lower.end()
    assert (status, out.splitlines()) == (0, ["['lo', 'falkirk0']", "fd00:96::1", "['2000', '3000']"])


class Wire(threading.Thread):
    """Carries datagrams between two tunnels until one ends."""

    def __init__(self, *tunnels: socket.socket) -> None:
        super().__init__()
        self._tunnels = tunnels
        for tunnel in tunnels:
            sockets.raise_buffers(tunnel, 4 << 20)

    def run(self) -> None:
        other = {self._tunnels[0]: self._tunnels[1], self._tunnels[1]: self._tunnels[0]}
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            while True:
                for tunnel in select.select(self._tunnels, [], [], DEADLINE_S)[0]:
                    data = tunnel.recv(tun.MAX_READ)
                    if not data:
                        return
                    other[tunnel].send(data)


SERVE = """
import hashlib, socket
with socket.create_server(("{address}", 80), family=socket.{family}) as listener:
    print("listening", flush=True)
    stream, _ = listener.accept()
with stream:
    stream.sendall(b"first" + bytes(range(256)) * 20000)
    stream.shutdown(socket.SHUT_WR)
    digest = hashlib.sha256()
    while data := stream.recv(65536):
        digest.update(data)
    print(digest.hexdigest())
"""
FETCH = """
import hashlib, socket
digest = hashlib.sha256()
with socket.create_connection(("{address}", 80), timeout=20) as stream:
    while data := stream.recv(65536):
        digest.update(data)
    # Closed with megabytes still to send: they must arrive all the same.
    stream.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
    stream.sendall(digest.digest() * 40000)
print(digest.hexdigest())
"""


@pytest.mark.parametrize("framing", list(Framing))
@pytest.mark.parametrize(("family", "address"), [("AF_INET", "100.96.0.1"), ("AF_INET6", "fd00:96::1")])
def test_streams_pass_whole_both_ways(onramp: OnRamp, framing: Framing, family: str, address: str) -> None:
    options = ("--framing", framing, "--stats")
    server = Lower(onramp, *python(SERVE.format(address=address, family=family)), options=options)
    first = onramp.admit()
    assert server.process.stdout
    assert server.process.stdout.readline() == b"listening\n"
    client = Lower(onramp, *python(FETCH.format(address=address)), options=options)
    wire = Wire(first, onramp.admit())
    wire.start()
    status, fetched, counters = client.end()
    assert status == 0
    assert json.loads(counters.splitlines()[-1])["dropped"] == {}
    status, served, _ = server.end()
    wire.join(DEADLINE_S)
    assert status == 0
    down = hashlib.sha256(b"first" + bytes(range(256)) * 20000)
    assert fetched.strip() == down.hexdigest()
    assert served.strip() == hashlib.sha256(down.digest() * 40000).hexdigest()


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        (("sh", "-c", "exit 7"), 7),
        (("sh", "-c", "kill -9 $$"), 128 + 9),
        (("no-such-command",), 127),
        (("/etc/passwd",), 126),
    ],
)
def test_ends_as_its_command_does(onramp: OnRamp, command: tuple[str, ...], expected: int) -> None:
    lower = Lower(onramp, *command)
    onramp.admit()
    assert lower.end()[0] == expected


def test_refusal(onramp: OnRamp) -> None:
    lower = Lower(onramp, "true")
    onramp.accept().send(b'{"error":{"code":"UNKNOWN_DEVICE","message":"acme has no device laptop"}}')
    assert lower.end() == (3, "", "falkirk lower: UNKNOWN_DEVICE: acme has no device laptop\n")


def test_an_on_ramp_that_hangs_up(onramp: OnRamp) -> None:
    lower = Lower(onramp, "true")
    onramp.accept().close()
    status, _, error = lower.end()
    assert status == 3
    assert error.startswith("falkirk lower: TUNNEL_UNAVAILABLE: ")


def test_no_on_ramp(onramp: OnRamp) -> None:
    onramp.path.unlink()
    status, _, error = Lower(onramp, "true").end()
    assert status == 3
    assert error.startswith("falkirk lower: TUNNEL_UNAVAILABLE: no on-ramp answers at ")


def test_the_tunnel_ends_first(onramp: OnRamp) -> None:
    lower = Lower(onramp, "sh", "-c", "trap 'echo hung up; exit 1' HUP; echo on; while :; do read x || exit 9; done")
    tunnel = onramp.admit()
    assert lower.process.stdout
    assert lower.process.stdout.readline() == b"on\n"
    tunnel.shutdown(socket.SHUT_RDWR)
    assert lower.process.stdin
    status, out, error = lower.process.wait(DEADLINE_S), *(stream.read() for stream in _outputs(lower))
    assert (status, out) == (4, b"hung up\n")
    assert error == b"falkirk lower: TUNNEL_CLOSED: the on-ramp ended the tunnel\n"
    lower.end()


def _outputs(lower: Lower) -> Any:
    return lower.process.stdout, lower.process.stderr


def test_signals_go_on_to_the_command(onramp: OnRamp) -> None:
    for number in (signal.SIGTERM, signal.SIGHUP):
        name = number.name.removeprefix("SIG")
        lower = Lower(onramp, "sh", "-c", f"trap 'exit 5' {name}; echo on; while :; do read x || exit 9; done")
        onramp.admit()
        assert lower.process.stdout
        assert lower.process.stdout.readline() == b"on\n"
        lower.process.send_signal(number)
        assert lower.process.wait(DEADLINE_S) == 5
        lower.end()


def test_a_killed_tool_takes_its_command_along(onramp: OnRamp) -> None:
    lower = Lower(onramp, "sh", "-c", "echo on; exec cat")
    onramp.admit()
    assert lower.process.stdout
    assert lower.process.stdout.readline() == b"on\n"
    lower.process.kill()
    # The command holds the other end of standard output: its end shows that it is gone.
    assert select.select([lower.process.stdout], [], [], DEADLINE_S)[0]
    assert lower.process.stdout.read() == b""
    lower.end()


def test_garbage_from_the_tunnel_is_counted_and_survived(onramp: OnRamp) -> None:
    for framing, garbage, reasons in (
        (Framing.RAW, [b"\x45\0\0\0" + bytes(30), b"\xff", b"\x45\0\0\x28" + bytes(3)], 3),
        (Framing.VNET, [b"\xff" * 60, b"x", bytes(10)], 3),
    ):
        lower = Lower(onramp, "cat", options=("--framing", framing, "--stats"))
        tunnel = onramp.admit()
        for datagram in garbage:
            tunnel.send(datagram)
        lower_input = lower.process.stdin
        assert lower_input
        # Read before it ends: the tunnel's queue is empty once the pump has taken all.
        lower_input.close()
        lower.process.stdin = None
        status, _, error = lower.end()
        counters = json.loads(error.splitlines()[-1])
        assert status == 0
        assert counters["received_datagrams"] == 3
        assert sum(counters["dropped"].values()) == reasons, counters


def test_an_ordinary_user(onramp: OnRamp) -> None:
    lower = Lower(onramp, "id", "-u", wrapper=tuple(AS_USER))
    onramp.admit()
    assert lower.end()[:2] == (0, "0\n")


def test_an_ordinary_user_without_the_device_is_told_what_to_do(onramp: OnRamp) -> None:
    lower = Lower(onramp, "true", wrapper=(*AS_USER, "--no-tun"))
    onramp.admit()
    status, _, error = lower.end()
    assert status == 5
    assert error.startswith("falkirk lower: TUN_UNAVAILABLE: /dev/net/tun may not be opened")
    assert "chmod 0666 /dev/net/tun" in error


def test_the_command_line_is_checked(onramp: OnRamp) -> None:
    lower = Lower(onramp, "true", options=("--attribute", "novalue"))
    status, _, error = lower.end()
    assert status == 2
    assert "isn't key=value" in error
