"""The upgrader as a service: packets written to its TUN devices become a stream to a server; and what each death costs."""

from __future__ import annotations

import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from scapy.layers.inet import IP, TCP
from scapy.layers.inet6 import IPv6
from scapy.packet import Packet, Raw

from falkirk.api.upgrader.v1 import upgrader_service_pb2 as pb
from falkirk.api.upgrader.v1 import upgrader_service_pb2_grpc
from falkirk.linux import seqpacket, tun
from falkirk.wire import handover
from falkirk.wire.context import Framing
from falkirk.wire.handover import Closed, Connected, Devices, Hello, Message, Prepare
from falkirk.wire.slots import SlotPlan

pytestmark = pytest.mark.netns
DEADLINE_S = 15.0
HEADER = bytes(tun.VNET_HEADER_SIZE)
INDEX = 20
AS_USER = [sys.executable, str(Path(__file__).with_name("ordinary_user.py"))]


class Upgrader:
    """The service's processes, seen from outside."""

    def __init__(self, directory: Path, workers: int, wrapper: tuple[str, ...] = ()) -> None:
        self.run_dir = directory
        self.workers = workers
        config = directory / "falkirk.yaml"
        config.write_text(f"apiVersion: falkirk.dev/v1alpha1\nkind: Settings\nworkers: {workers}\n")
        self._command = [*wrapper, sys.executable, "-m", "falkirk.upgrader", "--config", str(config)]
        self._command += ["--run-dir", str(directory), "--data-dir", str(directory / "data")]
        self.channel = grpc.insecure_channel(
            f"unix:{directory}/read/upgrader.sock", options=[("grpc.max_reconnect_backoff_ms", 100)]
        )
        self.stub = upgrader_service_pb2_grpc.UpgraderServiceStub(self.channel)
        self.start()

    def start(self) -> None:
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
        self.process = subprocess.Popen(self._command, env=environment, stderr=subprocess.PIPE, text=True)

    def until_serving(self) -> None:
        health = health_pb2_grpc.HealthStub(self.channel)
        for answer in health.Watch(health_pb2.HealthCheckRequest(), timeout=DEADLINE_S, wait_for_ready=True):
            if answer.status == health_pb2.HealthCheckResponse.SERVING:
                return

    def stats(self) -> pb.StatsResponse:
        answer: pb.StatsResponse = self.stub.Stats(pb.StatsRequest(), timeout=DEADLINE_S)
        return answer

    def get(self) -> pb.GetResponse:
        answer: pb.GetResponse = self.stub.Get(pb.GetRequest(), timeout=DEADLINE_S)
        return answer

    def pid(self, name: str) -> int:
        """The process of that name, once it runs."""
        found: list[int] = []

        def there() -> bool:
            found[:] = [info.pid for info in self.stats().processes if info.name == name]
            return bool(found)

        until(there)
        return found[0]

    def close(self) -> None:
        self.channel.close()
        self.process.terminate()
        self.process.communicate(timeout=DEADLINE_S)


def until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline, "didn't come in time"
        time.sleep(0.01)  # a poll with a deadline


def wait_readable(what: socket.socket | int) -> None:
    assert select.select([what], [], [], DEADLINE_S)[0], "nothing came in time"


class Flow:
    """What a flow worker does, by hand: the pair, the devices, one TCP peer in packets."""

    def __init__(self, upgrader: Upgrader, worker: int, generation: int = 1) -> None:
        self.worker = worker
        self.plan = SlotPlan(upgrader.workers)
        self.devices: list[int] = []
        self.pair = seqpacket.connect(upgrader.run_dir / "mesh" / f"upgrader.worker.{worker}.sock")
        self.say(Hello("flow", worker, generation))
        hello, devices = self.hear(2)
        assert hello == Hello("upgrader", worker, hello.generation) if isinstance(hello, Hello) else False
        assert isinstance(devices, Devices)
        self.port = devices.listener_port

    def say(self, *messages: Message) -> None:
        assert seqpacket.send(self.pair, handover.encode(messages))

    def hear(self, count: int = 1) -> list[Message]:
        messages: list[Message] = []
        while len(messages) < count:
            wait_readable(self.pair)
            received = seqpacket.receive(self.pair, handover.MAX_DATAGRAM)
            assert received
            assert received[0], "the pair has ended"
            messages += handover.UPGRADER_TO_FLOW.decode(received[0])
            self.devices += received[1]
        return messages

    def open(self, server: socket.socket, framing: Framing, family: socket.AddressFamily) -> Peer:
        """Prepare a slot and shake hands from it."""
        host, port = server.getsockname()[:2]
        slot = self.plan.slot(framing, INDEX)
        self.say(Prepare(slot, bytes(16), socket.inet_pton(family, host), port, b"", 5000, 60, "l4"))
        (connected,) = self.hear()
        assert isinstance(connected, Connected)
        assert connected.slot == slot
        return Peer(self, framing, family)

    def close(self) -> None:
        self.pair.close()
        for fd in self.devices:
            os.close(fd)


class Peer:
    """A client's TCP in packets, on one of the worker's devices."""

    def __init__(self, flow: Flow, framing: Framing, family: socket.AddressFamily) -> None:
        self.device = flow.devices[0 if framing is Framing.VNET else 1]
        address = flow.plan.address4 if family == socket.AF_INET else flow.plan.address6
        slot, own = (
            socket.inet_ntop(family, address(flow.worker, flow.plan.slot(framing, index))) for index in (INDEX, 1)
        )
        self._network = IP(src=slot, dst=own) if family == socket.AF_INET else IPv6(src=slot, dst=own)
        self._port = flow.port
        self.sequence, self.acknowledge = 1000, 0
        self.send("S")
        answer = self.receive()
        assert answer.flags == "SA"
        self.sequence, self.acknowledge = 1001, answer.seq + 1
        self.send("A")

    def send(self, flags: str, data: bytes = b"") -> None:
        segment = TCP(sport=4321, dport=self._port, flags=flags, seq=self.sequence, ack=self.acknowledge, window=65535)
        os.write(self.device, HEADER + bytes(self._network / segment / Raw(data) if data else self._network / segment))
        self.sequence += len(data) + ("F" in flags)

    def receive(self) -> Packet:
        """The next segment."""
        wait_readable(self.device)
        data = os.read(self.device, tun.MAX_READ)[len(HEADER) :]
        return (IP(data) if data[0] >> 4 == 4 else IPv6(data))[TCP]

    def receive_until(self, flag: str) -> bytes:
        """Payload up to a segment with this flag; what came is acknowledged."""
        data = b""
        while True:
            segment = self.receive()
            if segment.flags.R:
                assert flag == "R"
                return data
            payload = bytes(segment.payload)
            if segment.seq == self.acknowledge and (payload or segment.flags.F):
                data += payload
                self.acknowledge += len(payload) + bool(segment.flags.F)
                self.send("A")
            if flag in str(segment.flags):
                return data


@pytest.fixture
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("u")


@pytest.fixture(params=[1, 3], ids=["1worker", "3workers"])
def upgrader(request: pytest.FixtureRequest, directory: Path) -> Iterator[Upgrader]:
    made = Upgrader(directory, request.param)
    try:
        made.until_serving()
        yield made
    finally:
        made.close()


@pytest.fixture
def upgrader2(directory: Path) -> Iterator[Upgrader]:
    made = Upgrader(directory, 2)
    try:
        made.until_serving()
        yield made
    finally:
        made.close()


@pytest.fixture
def server() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as made:
        made.settimeout(DEADLINE_S)
        yield made


def accept(server: socket.socket) -> socket.socket:
    sock, _ = server.accept()
    sock.settimeout(DEADLINE_S)
    return sock


@pytest.mark.parametrize("framing", list(Framing))
@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_INET6], ids=["ipv4", "ipv6"])
def test_packets_become_a_stream(upgrader: Upgrader, framing: Framing, family: socket.AddressFamily) -> None:
    host = "127.0.0.1" if family == socket.AF_INET else "::1"
    flow = Flow(upgrader, upgrader.workers - 1)
    with socket.create_server((host, 0), family=family) as listener:
        peer = flow.open(listener, framing, family)
        with accept(listener) as upstream:
            peer.send("PA", b"request")
            assert upstream.recv(100) == b"request"
            upstream.sendall(b"response")
            upstream.shutdown(socket.SHUT_WR)
            assert peer.receive_until("F") == b"response"
            peer.send("PA", b"still here")
            peer.send("FA")
            assert upstream.recv(100) == b"still here"
            assert upstream.recv(100) == b""
    (closed,) = flow.hear()
    assert closed == Closed(flow.plan.slot(framing, INDEX), "finished", 17, 8)
    flow.close()
    stats = upgrader.stats().workers[flow.worker]
    counts = {counter.name: counter.value for counter in stats.counters}
    assert (counts["dial_connected"], counts["closed_finished"], counts["bytes_up"], counts["bytes_down"]) == (
        1,
        1,
        17,
        8,
    )
    assert stats.streams == 0


def test_it_says_what_it_has(upgrader: Upgrader) -> None:
    answer = upgrader.get()
    assert [device.name for device in answer.devices if device.framing == 2] == [
        f"lift{worker}v" for worker in range(upgrader.workers)
    ]
    assert answer.settings["net.ipv4.tcp_no_metrics_save"] == "1"
    helper = upgrader.pid("upgrader.helper")
    assert Path(f"/proc/{helper}/ns/net").stat().st_ino == answer.namespace_inode
    names = {info.name for info in upgrader.stats().processes}
    assert names == {
        "upgrader",
        "upgrader.helper",
        "upgrader.lower_helper",
        *(f"upgrader.worker.{n}" for n in range(upgrader.workers)),
    }


def test_a_killed_helper_costs_nothing(upgrader2: Upgrader, server: socket.socket) -> None:
    flow = Flow(upgrader2, 0)
    peer = flow.open(server, Framing.RAW, socket.AF_INET)
    inode = upgrader2.get().namespace_inode
    old = upgrader2.pid("upgrader.helper")
    with accept(server) as upstream:
        os.kill(old, signal.SIGKILL)
        until(lambda: upgrader2.pid("upgrader.helper") != old)
        joined = f"/proc/{upgrader2.pid('upgrader.helper')}/ns/net"
        until(lambda: Path(joined).stat().st_ino == inode)
        upgrader2.until_serving()
        peer.send("PA", b"through")
        assert upstream.recv(100) == b"through"
        upstream.sendall(b"and back")
        assert b"and back" in peer.receive_until("P")
    flow.close()


def test_a_killed_worker_resets_its_streams_and_serves_again(upgrader2: Upgrader, server: socket.socket) -> None:
    flows = [Flow(upgrader2, worker) for worker in (0, 1)]
    peers = [flow.open(server, Framing.VNET, socket.AF_INET) for flow in flows]
    with accept(server) as first, accept(server) as second:
        first.sendall(b"part of a download")
        assert peers[0].receive_until("P") == b"part of a download"
        old = upgrader2.pid("upgrader.worker.0")
        os.kill(old, signal.SIGKILL)
        with pytest.raises(ConnectionResetError):
            first.recv(1)
        assert peers[0].receive_until("R") == b""
        peers[1].send("PA", b"untouched")
        assert second.recv(100) == b"untouched"
    until(lambda: upgrader2.pid("upgrader.worker.0") != old)
    upgrader2.until_serving()
    flows[0].close()
    again = Flow(upgrader2, 0)
    peer = again.open(server, Framing.VNET, socket.AF_INET)
    with accept(server) as upstream:
        peer.send("PA", b"again")
        assert upstream.recv(100) == b"again"
    again.close()
    flows[1].close()


def test_a_killed_parent_takes_everything_along_and_is_made_anew(upgrader2: Upgrader, server: socket.socket) -> None:
    flow = Flow(upgrader2, 0)
    flow.open(server, Framing.VNET, socket.AF_INET)
    pids = [info.pid for info in upgrader2.stats().processes]
    with accept(server) as upstream:
        upgrader2.process.kill()
        upgrader2.process.communicate()
        with pytest.raises(ConnectionResetError):
            upstream.recv(1)
    flow.close()
    until(lambda: not any(alive(pid) for pid in pids))
    upgrader2.start()
    upgrader2.until_serving()
    flow = Flow(upgrader2, 0)
    peer = flow.open(server, Framing.VNET, socket.AF_INET)
    with accept(server) as upstream:
        peer.send("PA", b"again")
        assert upstream.recv(100) == b"again"
    flow.close()


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_a_drain_leaves_no_process_and_no_socket(directory: Path) -> None:
    upgrader = Upgrader(directory, 2)
    upgrader.until_serving()
    pids = [info.pid for info in upgrader.stats().processes]
    upgrader.close()
    assert upgrader.process.returncode == 0
    assert not any(alive(pid) for pid in pids)
    assert not list((directory / "mesh").glob("*.worker.*"))


def test_an_ordinary_user_is_served_too(directory: Path) -> None:
    upgrader = Upgrader(directory, 1, tuple(AS_USER))
    try:
        upgrader.until_serving()
        assert len(upgrader.get().devices) == 2
    finally:
        upgrader.close()


def test_without_a_tun_device_it_says_what_is_missing(directory: Path) -> None:
    upgrader = Upgrader(directory, 1, (*AS_USER, "--no-tun"))
    try:
        with pytest.raises(grpc.RpcError) as caught:
            upgrader.stub.Get(pb.GetRequest(), timeout=DEADLINE_S, wait_for_ready=True)
        assert caught.value.code() == grpc.StatusCode.UNAVAILABLE
        assert upgrader.process.stderr is not None
        while "helper_failed" not in (line := upgrader.process.stderr.readline()):
            assert line
        assert "tun_unavailable" in line
    finally:
        upgrader.close()
