"""UpgraderService.Lower: what it refuses, and how a stream ends that a program holds. The device's end is a plain socket."""

from __future__ import annotations

import os
import queue
import signal
import socket
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
import typer

from falkirk.api.flow.v1 import flow_service_pb2, flow_service_pb2_grpc
from falkirk.api.upgrader.v1 import upgrader_service_pb2 as pb
from falkirk.api.upgrader.v1 import upgrader_service_pb2_grpc
from falkirk.cli.device import ping
from falkirk.runtime.errors import FalkirkError, from_rpc
from tests.netns.between_devices import Between, Peers
from tests.netns.fidelity import DEADLINE_S, open_world, receive
from tests.netns.test_between_killed import kill, serves, was_reset
from tools.netlab import wait_for

pytestmark = [pytest.mark.netns, pytest.mark.timeout(120)]


@pytest.fixture(scope="module")
def peers() -> Iterator[Peers]:
    with open_world(1) as world:
        yield Peers(world)


@pytest.fixture
def way(peers: Peers) -> Between:
    return peers.between(("vnet", "vnet"), socket.AF_INET)


class Call:
    """A call in progress; requests are sent as the test says."""

    def __init__(self, run_dir: Path, road: str = "admin") -> None:
        self._channel = grpc.insecure_channel(f"unix:{run_dir}/{road}/upgrader.sock")
        self._requests: queue.SimpleQueue[pb.LowerRequest | None] = queue.SimpleQueue()
        stub = upgrader_service_pb2_grpc.UpgraderServiceStub(self._channel)
        self._call = stub.Lower(iter(self._requests.get, None), timeout=DEADLINE_S)

    def open(self, way: Between, port: int, **fields: object) -> None:
        """Ask for a stream."""
        target = {"tenant": "acme", "device": way.server.device, "port": port, "actor": "test"}
        self.send(open=pb.LowerTarget(**(target | fields)))  # type: ignore[arg-type]

    def send(self, **content: object) -> None:
        self._requests.put(pb.LowerRequest(**content))  # type: ignore[arg-type]

    def half_close(self) -> None:
        """No more requests."""
        self._requests.put(None)

    def next(self) -> pb.LowerResponse:
        answer: pb.LowerResponse = next(self._call)
        return answer

    def cancel(self) -> None:
        self._call.cancel()

    def failure(self) -> FalkirkError:
        """How the call fails; an end in order is none."""
        with pytest.raises(grpc.RpcError) as caught:
            list(self._call)
        return from_rpc(caught.value)

    def rest(self) -> list[pb.LowerResponse]:
        """What comes until the end, which is one in order."""
        return list(self._call)

    def close(self) -> None:
        self._call.cancel()
        self._channel.close()


@pytest.fixture
def call(peers: Peers) -> Iterator[Call]:
    made = Call(peers.world.mesh.run_dir)
    yield made
    made.close()


@pytest.fixture
def device(way: Between, call: Call) -> Iterator[socket.socket]:
    """The device's end of a stream that is open."""
    with way.listener() as listener:
        call.open(way, listener.getsockname()[1])
        assert len(call.next().opened.flow_id) == 32
        sock, _ = listener.accept()
        with sock:
            sock.settimeout(DEADLINE_S)
            yield sock


@pytest.mark.parametrize(
    ("request_", "reason"),
    [
        ({"data": b"first"}, "OPEN_FIRST"),
        ({"open": pb.LowerTarget(tenant="acme", device="peer0", port=0)}, "BAD_PORT"),
        ({"open": pb.LowerTarget(tenant="acme", device="peer0", port=65536)}, "BAD_PORT"),
        ({"open": pb.LowerTarget(tenant="acme", device="peer0", port=22, ip_version=5)}, "BAD_IP_VERSION"),
        ({"open": pb.LowerTarget(tenant="acme", device="peer0", port=22, actor="x" * 201)}, "BAD_ACTOR"),
        ({"open": pb.LowerTarget(tenant="other", device="peer0", port=22)}, "NO_TUNNEL"),
    ],
)
def test_what_is_refused(call: Call, request_: dict[str, object], reason: str) -> None:
    call.send(**request_)
    assert call.failure().reason == reason


def test_it_takes_the_administrators_road(peers: Peers, way: Between) -> None:
    for road in ("read", "mesh"):
        call = Call(peers.world.mesh.run_dir, road)
        call.open(way, 22)
        assert call.failure().reason == "ROAD_FORBIDDEN"
        call.close()


def test_the_ping_tells_open_from_closed_and_silence_from_absence(
    peers: Peers, way: Between, device: socket.socket, capsys: pytest.CaptureFixture[str]
) -> None:
    """`falkirk device ping`: a refusal is an answer too."""
    run_dir = peers.world.mesh.run_dir
    (port,) = device.getsockname()[1:2]
    for at, said in ((port, "open"), (1, "closed")):
        ping(way.server.device, "acme", run_dir, count=2, port=at, wait=DEADLINE_S)
        lines = capsys.readouterr().out.splitlines()
        assert [f"port {at} {said}" in line for line in lines] == [True, True, False]
        assert lines[-1].startswith("2 of 2 answered")
    with pytest.raises(typer.Exit):
        ping("nobody", "acme", run_dir, count=1, port=port, wait=DEADLINE_S)
    assert "NO_TUNNEL" in capsys.readouterr().err


def test_both_ends_in_order(call: Call, device: socket.socket) -> None:
    call.send(data=b"question")
    call.send(end=pb.LowerEnd())
    assert receive(device) == b"question"
    device.sendall(b"answer")
    assert call.next().data == b"answer"
    device.shutdown(socket.SHUT_WR)
    assert call.next().HasField("end")
    assert call.rest() == []


def test_requests_that_end_are_no_end(call: Call, device: socket.socket) -> None:
    """Not before the device has ended: a program that was killed ends its requests too."""
    call.send(data=b"question")
    call.half_close()
    assert receive(device, 8) == b"question"
    device.sendall(b"answer")
    assert call.next().data == b"answer"
    device.setblocking(False)
    with pytest.raises(BlockingIOError):
        device.recv(1)
    device.settimeout(DEADLINE_S)
    device.shutdown(socket.SHUT_WR)
    assert call.next().HasField("end")
    assert receive(device) == b""
    assert call.rest() == []


def test_a_call_that_is_cancelled_is_a_reset(call: Call, device: socket.socket) -> None:
    call.send(data=b"half of ")
    assert receive(device, 8) == b"half of "
    call.cancel()
    assert was_reset(device)


def test_a_flow_that_is_ended_by_hand(peers: Peers, call: Call, device: socket.socket) -> None:
    with grpc.insecure_channel(f"unix:{peers.world.mesh.run_dir}/admin/flow.sock") as channel:
        stub = flow_service_pb2_grpc.FlowServiceStub(channel)
        (flow,) = stub.List(flow_service_pb2.ListRequest(page_size=10), timeout=DEADLINE_S).flows
        assert flow.key.source_address == "192.0.0.8"
        stub.Terminate(flow_service_pb2.TerminateRequest(id=flow.id, reason="enough"), timeout=DEADLINE_S)
    assert was_reset(device)
    failed = call.failure()
    assert (failed.code, failed.reason) == (grpc.StatusCode.ABORTED, "ABORTED")


@pytest.mark.parametrize(("service", "name"), [("upgrader", "upgrader.worker.0"), ("flow", "flow.worker.0")])
def test_a_death_is_told_as_one(peers: Peers, way: Between, call: Call, device: socket.socket, service: str, name: str) -> None:  # fmt: skip
    kill(peers, service, name)
    assert was_reset(device)
    failed = call.failure()
    assert failed.code is grpc.StatusCode.ABORTED
    assert failed.reason in ("WORKER_LOST", "ABORTED")
    serves(way)


def test_the_service_itself_is_killed(peers: Peers, way: Between, call: Call, device: socket.socket) -> None:
    """Its end of the stream is TCP that resets: nobody takes it for an end."""
    pid = next(process.pid for process in peers.world.stats("upgrader").processes if process.name == "upgrader")
    os.kill(pid, signal.SIGKILL)
    assert was_reset(device)
    assert call.failure().code is grpc.StatusCode.UNAVAILABLE
    serves(way)


def test_descriptors_return(peers: Peers, way: Between) -> None:
    wait_for("no flows", lambda: peers.world.active_slots() == 0, DEADLINE_S)

    def held() -> dict[str, int]:
        return {name: process.descriptors for name, process in peers.world.processes().items() if "upgrader" in name}

    before: dict[str, int] = {}
    for _ in range(6):
        with way.listener() as listener:
            call = Call(peers.world.mesh.run_dir)
            call.open(way, listener.getsockname()[1])
            call.next()
            sock, _ = listener.accept()
            sock.close()
            call.send(end=pb.LowerEnd())
            assert [response.WhichOneof("content") for response in call.rest()] == ["end"]
            call.close()
        # gRPC itself keeps some from the first call on.
        before = before or held()
    # What an earlier test has left may still be closing.
    wait_for("descriptors", lambda: all(count <= before.get(name, 0) for name, count in held().items()), DEADLINE_S)
