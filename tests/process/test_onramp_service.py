"""The on-ramp's parent as a process: registry to admission, RPCs about tunnels, and restarts."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any
from zlib import crc32

import grpc
import pytest
from google.protobuf.timestamp_pb2 import Timestamp

from falkirk.api.net.v1 import net_pb2
from falkirk.api.onramp.v1 import onramp_service_pb2 as pb
from falkirk.api.onramp.v1 import onramp_service_pb2_grpc
from falkirk.linux import seqpacket
from falkirk.runtime.errors import FalkirkError, from_rpc
from falkirk.wire.handover import Adopt, Held, TunnelClosed
from tests.process import registry_fake, service_process
from tests.process.onramp_rig import CONTEXT, FlowFake, datagram, eventually
from tests.process.registry_fake import RegistryFake, resource

EXPLAIN = pb.ExplainRequest(tenant=CONTEXT["tenant"], device=CONTEXT["device"])


def device(**fields: Any) -> Any:
    return resource("device", "d", "laptop", **{"addresses": ["100.96.0.2", "fd00::2"], "user": "ann", **fields})


class Onramp:
    """The process, with this one as its registry, flow worker and producers."""

    def __init__(self, run_dir: Path, registry: RegistryFake, flow: FlowFake, channel: grpc.Channel) -> None:
        self.run_dir, self.registry, self.flow = run_dir, registry, flow
        self.stub: Any = onramp_service_pb2_grpc.OnrampServiceStub(channel)
        self.kept: list[socket.socket] = []

    def producer(self, **context: Any) -> socket.socket:
        sock = seqpacket.connect(self.run_dir / "tunnel.sock")
        self.kept.append(sock)
        sock.send(json.dumps(CONTEXT | context).encode())
        return sock

    def opened(self, **context: Any) -> tuple[socket.socket, Adopt, socket.socket]:
        producer = self.producer(**context)
        message, tunnel = self.flow.adopt()
        self.kept.append(tunnel)
        assert b"admitted" in datagram(producer)
        eventually(lambda: message.tunnel in self.open())
        return producer, message, tunnel

    def open(self) -> list[int]:
        return [tunnel.id for tunnel in self.stub.List(pb.ListRequest(), timeout=5).tunnels]

    def stats(self) -> pb.StatsResponse:
        found: pb.StatsResponse = self.stub.Stats(pb.StatsRequest(), timeout=5)
        return found

    def worker(self) -> int:
        found: list[int] = [process.pid for process in self.stats().processes if process.name == "onramp.worker.0"]
        return found[0] if found else 0


@contextlib.contextmanager
def running(run_dir: Path, registry: RegistryFake, flow: FlowFake, *, accept: bool = True) -> Iterator[Onramp]:
    with service_process.running("onramp", run_dir, run_dir / "data"):
        flow.accept()
        if accept:
            service_process.until_serving("onramp", run_dir)
        with service_process.channel("onramp", run_dir) as channel:
            made = Onramp(run_dir, registry, flow, channel)
            try:
                yield made
            finally:
                for sock in made.kept:
                    sock.close()


@contextlib.contextmanager
def neighbours(run_dir: Path) -> Iterator[tuple[RegistryFake, FlowFake]]:
    with registry_fake.serving(run_dir) as registry:
        registry.commit(resource("user", "u", "ann", groups=["eng"]), device())
        flow = FlowFake(run_dir / "mesh" / "flow.worker.0.sock")
        try:
            yield registry, flow
        finally:
            flow.close()


@pytest.fixture
def onramp(tmp_path: Path) -> Iterator[Onramp]:
    with neighbours(tmp_path) as (registry, flow), running(tmp_path, registry, flow) as made:
        yield made


def refused(call: Callable[[], Any]) -> FalkirkError:
    with pytest.raises(grpc.RpcError) as caught:
        call()
    return from_rpc(caught.value)


def test_a_tunnel_is_listed_while_it_is_open(onramp: Onramp) -> None:
    producer, message, _ = onramp.opened(framing="vnet", attributes={"a": "b"})
    found = onramp.stub.Get(pb.GetRequest(id=message.tunnel), timeout=5).tunnel
    assert (found.id, found.framing, found.mtu, found.flow_worker) == (message.tunnel, net_pb2.FRAMING_VNET, 1500, 0)
    assert (found.peer_uid, found.peer_pid) == (os.getuid(), os.getpid())
    assert found.admitted_at.seconds > 0
    assert found.context == net_pb2.TunnelContext(
        tenant_id="t",
        tenant="acme",
        device_id="d",
        device="laptop",
        user_id="u",
        user="ann",
        groups=["eng"],
        virtual_network_id="n",
        virtual_network="default",
        attributes={"a": "b"},
        addresses=["100.96.0.2", "fd00::2"],
    )
    stats = onramp.stats()
    assert (stats.open, stats.admitted) == (1, 1)
    assert {process.name for process in stats.processes} == {"onramp", "onramp.worker.0"}
    producer.close()
    eventually(lambda: onramp.open() == [])
    error = refused(lambda: onramp.stub.Get(pb.GetRequest(id=message.tunnel)))
    assert (error.code, error.reason) == (grpc.StatusCode.NOT_FOUND, "TUNNEL_NOT_FOUND")


def test_pages(onramp: Onramp) -> None:
    numbers = [onramp.opened()[1].tunnel for _ in range(5)]
    found, token = [], ""
    for expected in (2, 2, 1):
        page = onramp.stub.List(pb.ListRequest(tenant="acme", page_size=2, page_token=token), timeout=5)
        assert len(page.tunnels) == expected
        found += [tunnel.id for tunnel in page.tunnels]
        token = page.next_page_token
    assert (found, token) == (numbers, "")
    assert not onramp.stub.List(pb.ListRequest(tenant="other"), timeout=5).tunnels
    for wrong in (pb.ListRequest(page_size=1001), pb.ListRequest(page_token="x")):
        assert refused(partial(onramp.stub.List, wrong)).code is grpc.StatusCode.INVALID_ARGUMENT


def test_close_returns_when_the_tunnel_is_closed(onramp: Onramp) -> None:
    producer, message, _ = onramp.opened()
    onramp.stub.Close(pb.CloseRequest(id=message.tunnel, reason="maintenance"), timeout=5)
    assert onramp.open() == []
    assert onramp.flow.expect(TunnelClosed) == TunnelClosed(message.tunnel, "maintenance")
    assert datagram(producer) == b""
    assert refused(lambda: onramp.stub.Close(pb.CloseRequest(id=message.tunnel))).reason == "TUNNEL_NOT_FOUND"
    long = pb.CloseRequest(id=1, reason="x" * 201)
    assert refused(lambda: onramp.stub.Close(long)).reason == "INVALID_FIELD"


def test_close_is_for_administrators_only(onramp: Onramp) -> None:
    with service_process.channel("onramp", onramp.run_dir, "read") as channel:
        stub: Any = onramp_service_pb2_grpc.OnrampServiceStub(channel)
        assert refused(lambda: stub.Close(pb.CloseRequest(id=1))).code is grpc.StatusCode.PERMISSION_DENIED
        assert stub.Stats(pb.StatsRequest(), timeout=5).open == 0


@pytest.mark.parametrize(
    ("request_", "code"),
    [
        (pb.ExplainRequest(tenant="acme", device="laptop"), ""),
        (pb.ExplainRequest(tenant="acme", device="laptop", virtual_network="lab", uid=0), ""),
        (pb.ExplainRequest(tenant="acme", device="toaster"), "UNKNOWN_DEVICE"),
        (pb.ExplainRequest(tenant="nobody", device="laptop"), "UNKNOWN_TENANT"),
        (pb.ExplainRequest(tenant="acme", device="laptop", uid=54321), "UID_FORBIDDEN"),
    ],
)
def test_explain(onramp: Onramp, request_: pb.ExplainRequest, code: str) -> None:
    found = onramp.stub.Explain(request_, timeout=5)
    assert (found.admitted, found.code, found.context.device) == (not code, code, "" if code else "laptop")
    assert found.message
    assert found.replica.revision.number == onramp.registry.number


def test_a_device_ends_by_itself_when_its_time_has_come(onramp: Onramp) -> None:
    """The registry said when, once, and says nothing more."""
    _, message, _ = onramp.opened()
    ends = Timestamp()
    ends.FromNanoseconds(time.time_ns() + 700_000_000)
    onramp.registry.commit(device(expire_time=ends))
    assert onramp.flow.expect(TunnelClosed) == TunnelClosed(message.tunnel, "device_disabled")
    assert time.time_ns() >= ends.ToNanoseconds()
    answer = json.loads(datagram(onramp.producer()))
    assert answer["error"] == {"code": "DEVICE_DISABLED", "message": "device laptop has expired"}


def test_a_device_that_waits_for_approval_stays_out_until_it_has_it(onramp: Onramp) -> None:
    onramp.registry.commit(device(pending=True))
    eventually(lambda: "waits for approval" in onramp.stub.Explain(EXPLAIN, timeout=5).message)
    # Who is explained is known to the parent; a worker admits by what it has applied.
    eventually(lambda: onramp.stats().replicas[1].revision.number == onramp.registry.number)
    answer = json.loads(datagram(onramp.producer()))
    assert answer["error"] == {"code": "DEVICE_DISABLED", "message": "device laptop waits for approval"}
    onramp.registry.commit(device(pending=False))
    eventually(lambda: onramp.stub.Explain(EXPLAIN, timeout=5).admitted)
    onramp.opened()


def test_a_change_in_the_registry_closes_the_tunnel(onramp: Onramp) -> None:
    producer, message, _ = onramp.opened()
    onramp.registry.commit(device(disabled=True))
    assert onramp.flow.expect(TunnelClosed) == TunnelClosed(message.tunnel, "device_disabled")
    assert datagram(producer) == b""
    assert b"DEVICE_DISABLED" in datagram(onramp.producer())
    eventually(lambda: {c.name: c.value for c in onramp.stats().refused}["DEVICE_DISABLED"] == 1)
    onramp.registry.commit(device())
    eventually(lambda: onramp.stats().replicas[1].revision.number == onramp.registry.number)
    onramp.opened()


def test_a_killed_worker_is_replaced_and_tunnels_go_on(onramp: Onramp) -> None:
    producer, message, tunnel = onramp.opened()
    before = onramp.stub.Get(pb.GetRequest(id=message.tunnel), timeout=5).tunnel
    old = onramp.worker()
    os.kill(old, signal.SIGKILL)
    waiting = onramp.producer()  # the listening socket is the parent's
    onramp.flow.die()
    onramp.flow.accept()
    held = Held(message.tunnel, message.context, message.framing, message.mtu)
    onramp.flow.send(held, fds=(tunnel.fileno(),))
    second, end = onramp.flow.adopt()
    assert second.tunnel > message.tunnel
    assert b"admitted" in datagram(waiting)
    eventually(lambda: onramp.worker() not in (0, old))
    assert onramp.stub.Get(pb.GetRequest(id=message.tunnel), timeout=5).tunnel == before
    producer.close()
    assert onramp.flow.expect(TunnelClosed) == TunnelClosed(message.tunnel, "producer_closed")
    end.close()


def test_a_killed_parent_takes_its_worker_along_and_tunnels_go_on(tmp_path: Path) -> None:
    with neighbours(tmp_path) as (registry, flow):
        with running(tmp_path, registry, flow) as first:
            producer, message, tunnel = first.opened()
            first.kept.clear()
            parent = next(process.pid for process in first.stats().processes if process.name == "onramp")
            os.kill(parent, signal.SIGKILL)
            assert flow.link is not None
            assert datagram(flow.link) == b""
        producer.send(b"packet")
        assert datagram(tunnel) == b"packet"
        flow.die()
        with running(tmp_path, registry, flow) as second:
            flow.send(Held(message.tunnel, message.context, message.framing, message.mtu), fds=(tunnel.fileno(),))
            eventually(lambda: second.open() == [message.tunnel])
            assert second.opened()[1].tunnel > message.tunnel
            producer.close()
            assert flow.expect(TunnelClosed) == TunnelClosed(message.tunnel, "producer_closed")
        tunnel.close()


def test_a_restart_without_a_registry_admits_from_disk(tmp_path: Path) -> None:
    with neighbours(tmp_path) as (registry, flow):
        with running(tmp_path, registry, flow) as first:
            first.opened()
        registry.stop()
        flow.die()
        with running(tmp_path, registry, flow) as second:
            second.opened()
            assert second.stats().replicas[0].source == "disk"
            assert not second.stats().replicas[0].live
        registry.start()


def test_of_two_workers_each_has_its_own_tunnels(tmp_path: Path) -> None:
    """The gate is the first one's. The other one's death is nothing to its tunnels; ready are both or none."""
    config = tmp_path / "settings.yaml"
    config.write_text("apiVersion: falkirk.dev/v1alpha1\nkind: Settings\nworkers: 2\n")
    with contextlib.ExitStack() as stack:
        registry, first = stack.enter_context(neighbours(tmp_path))
        second = FlowFake(tmp_path / "mesh" / "flow.worker.1.sock", 1)
        stack.callback(second.close)
        path = tmp_path / "nowhere"
        links = [FlowFake(path, flow.worker, flow.listener) for flow in (first, second) for _ in range(2)]
        for link in links:
            stack.callback(link.die)
        stack.enter_context(service_process.running("onramp", tmp_path, tmp_path / "data", config))
        by = {(link.accept().worker, link.worker): link for link in links}
        assert set(by) == {(0, 0), (0, 1), (1, 0), (1, 1)}
        service_process.until_serving("onramp", tmp_path)
        channel = stack.enter_context(service_process.channel("onramp", tmp_path))
        onramp = Onramp(tmp_path, registry, by[0, crc32(b"d") % 2], channel)
        tunnels = [onramp.opened()[1].tunnel for _ in range(2)]
        assert [tunnel % 2 for tunnel in tunnels] == [0, 0]
        processes = {process.name: process.pid for process in onramp.stats().processes}
        assert set(processes) == {"onramp", "onramp.worker.0", "onramp.worker.1"}
        os.kill(processes["onramp.worker.1"], signal.SIGKILL)
        eventually(lambda: not service_process.serving("onramp", tmp_path))
        for flow in range(2):
            by[1, flow].die()
            assert by[1, flow].accept().worker == 1
        service_process.until_serving("onramp", tmp_path)
        assert onramp.open() == tunnels
        onramp.stub.Close(pb.CloseRequest(id=tunnels[0], reason="maintenance"), timeout=5)
        assert onramp.flow.expect(TunnelClosed) == TunnelClosed(tunnels[0], "maintenance")
        # Counts of both, those of a worker that was replaced included.
        os.kill(processes["onramp.worker.0"], signal.SIGKILL)
        for flow in range(2):
            by[0, flow].die()
            assert by[0, flow].accept().worker == 0
        service_process.until_serving("onramp", tmp_path)
        assert onramp.opened()[1].tunnel > tunnels[1]
        assert onramp.stats().admitted == 3
        for sock in onramp.kept:
            sock.close()


def test_health_follows_the_flow_workers(onramp: Onramp) -> None:
    onramp.flow.die()
    eventually(lambda: not service_process.serving("onramp", onramp.run_dir))
    onramp.flow.accept()
    service_process.until_serving("onramp", onramp.run_dir)


def test_an_unknown_parser_is_told_at_the_start(tmp_path: Path) -> None:
    config = tmp_path / "settings.yaml"
    config.write_text("apiVersion: falkirk.dev/v1alpha1\nkind: Settings\nonramp: {context_parser: nothing}\n")
    with service_process.running("onramp", tmp_path, tmp_path, config) as process:
        assert process.wait(15) == 1
