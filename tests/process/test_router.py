"""The router as a process: from the registry's changes to answers and snapshots."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import grpc
import pytest

from falkirk.api.net.v1 import net_pb2
from falkirk.api.router.v1 import router_service_pb2 as pb
from falkirk.api.router.v1 import router_service_pb2_grpc
from falkirk.decide.routes import RouteTable
from falkirk.runtime.errors import FalkirkError, from_rpc
from tests.process import registry_fake, service_process
from tests.process.onramp_rig import eventually
from tests.process.registry_fake import RegistryFake, resource


def route(identity: str, prefix: str, network: str = "default", **target: Any) -> Any:
    return resource("route", identity, f"route-{identity}", virtual_network=network, prefix=prefix, target=target)


ROUTES = (
    route("1", "0.0.0.0/0", internet={}),
    route("2", "10.0.0.0/8", internet={"egress_address4": "127.0.0.1", "connect_timeout_ms": 250}),
    route("3", "10.1.0.0/16", blackhole={}),
    route("4", "192.0.2.0/24", internet={"egress_address4": "203.0.113.77"}),
    route("5", "::/0", "lab", internet={}),
    route("6", "172.16.0.0/12", connector={"connector": "not-built"}),
)


class Router:
    """The process, its registry and its stub."""

    def __init__(self, registry: RegistryFake, channel: grpc.Channel) -> None:
        self.registry = registry
        self.stub: Any = router_service_pb2_grpc.RouterServiceStub(channel)

    def resolve(self, destination: str, network: str = "", tenant: str = "acme") -> pb.ResolveResponse:
        request = pb.ResolveRequest(tenant=tenant, virtual_network=network, destination_address=destination)
        found: pb.ResolveResponse = self.stub.Resolve(request, timeout=5)
        return found

    def explain(self, destination: str, network: str = "") -> pb.ExplainResponse:
        request = pb.ExplainRequest(tenant="acme", virtual_network=network, destination_address=destination)
        found: pb.ExplainResponse = self.stub.Explain(request, timeout=5)
        return found

    def revision(self) -> int:
        return int(self.stub.Stats(pb.StatsRequest(), timeout=5).replicas[1].revision.number)


@pytest.fixture
def router(tmp_path: Path) -> Iterator[Router]:
    with registry_fake.serving(tmp_path) as registry, service_process.running("router", tmp_path, tmp_path / "data"):
        registry.commit(*ROUTES)
        service_process.until_serving("router", tmp_path)
        with service_process.channel("router", tmp_path) as channel:
            made = Router(registry, channel)
            eventually(lambda: made.revision() == registry.number)
            yield made


def refused(call: Callable[[], Any]) -> FalkirkError:
    with pytest.raises(grpc.RpcError) as caught:
        call()
    return from_rpc(caught.value)


def test_resolve_gives_the_longest_match(router: Router) -> None:
    found = router.resolve("10.2.3.4")
    assert (found.route.route_id, found.route.route, found.route.prefix) == ("2", "route-2", "10.0.0.0/8")
    assert (found.route.target.internet.egress_address4, found.route.target.internet.connect_timeout_ms) == (
        "127.0.0.1",
        250,
    )
    assert found.replica.revision == net_pb2.Revision(epoch="e", number=router.registry.number)
    assert (found.replica.live, found.replica.items, found.replica.source) == (True, 5, "owner")
    assert router.resolve("10.1.0.1").route.target.WhichOneof("target") == "blackhole"
    assert router.resolve("2001:db8::1", "lab").route.route_id == "5"


def test_what_can_not_be_resolved_says_why(router: Router) -> None:
    for call, code, reason in (
        (lambda: router.resolve("2001:db8::1"), grpc.StatusCode.NOT_FOUND, "NO_ROUTE"),
        (lambda: router.resolve("1.1.1.1", tenant="x"), grpc.StatusCode.NOT_FOUND, "UNKNOWN_TENANT"),
        (lambda: router.resolve("1.1.1.1", "moon"), grpc.StatusCode.NOT_FOUND, "UNKNOWN_VIRTUAL_NETWORK"),
        (lambda: router.resolve("example.org"), grpc.StatusCode.INVALID_ARGUMENT, "INVALID_ADDRESS"),
        (lambda: router.explain(""), grpc.StatusCode.INVALID_ARGUMENT, "INVALID_ADDRESS"),
    ):
        error = refused(call)
        assert (error.code, error.reason) == (code, reason)


@pytest.mark.parametrize(
    ("destination", "network", "routes", "says"),
    [
        ("10.1.0.1", "", ["3", "2", "1"], "blackhole"),
        ("10.2.0.1", "", ["2", "1"], "127.0.0.1, which is on this node"),
        ("192.0.2.1", "", ["4", "1"], "can't send from"),
        ("8.8.8.8", "default", ["1"], "within 10000 ms from an address that the kernel chooses"),
        ("127.0.0.1", "", ["1"], "loopback (RFC 6890"),
        ("8.8.8.8", "lab", [], "no route"),
    ],
)
def test_explain(router: Router, destination: str, network: str, routes: list[str], says: str) -> None:
    found = router.explain(destination, network)
    assert [entry.route_id for entry in found.routes] == routes
    assert says in found.off_ramp


def test_the_resolver_needs_no_route(router: Router) -> None:
    tenant = resource("tenant", "t", "acme", device_pool4="10.64.0.0/24")
    router.registry.commit(tenant)
    eventually(lambda: router.revision() == router.registry.number)
    found = router.resolve("10.64.0.53").route
    assert (found.route, found.prefix, found.resolver) == ("resolver", "10.64.0.53/32", True)
    assert not found.HasField("target")
    assert "port 53" in router.explain("10.64.0.53").off_ramp


def test_stats_count_routes_that_are_in_force(router: Router) -> None:
    found = router.stub.Stats(pb.StatsRequest(), timeout=5)
    assert [(counter.name, counter.value) for counter in found.routes] == [("acme", 5)]
    assert [process.name for process in found.processes] == ["router", "router.worker.0"]


def test_a_watch_gets_a_snapshot_then_each_new_one(router: Router) -> None:
    stream = router.stub.WatchRoutes(pb.WatchRoutesRequest(), timeout=20)

    def snapshot() -> tuple[int, RouteTable]:
        pieces = []
        for response in stream:
            pieces.append(response.chunk)
            if response.complete:
                return response.revision.number, RouteTable.loaded(b"".join(pieces))
        raise AssertionError("the stream has ended")

    number, table = snapshot()
    found = table.lookup("n", ip_address("10.1.0.1").packed)
    assert found is not None
    assert (number, table.routes, found.route_id) == (router.registry.number, 5, "3")
    router.registry.commit(route("3", "10.2.0.0/16", blackhole={}), removed=["1"])
    number, table = snapshot()
    assert (number, table.routes) == (router.registry.number, 4)
    assert table.lookup("n", ip_address("8.8.8.8").packed) is None
    current = net_pb2.Revision(epoch="e", number=number)
    second = router.stub.WatchRoutes(pb.WatchRoutesRequest(have=current), timeout=20)
    assert next(second).unchanged
    for watch in (stream, second):
        watch.cancel()


def test_a_renamed_network_keeps_its_routes(router: Router) -> None:
    router.registry.commit(
        resource("virtual_network", "m", "workshop"), route("5", "::/0", "workshop", internet={}), removed=["6"]
    )
    eventually(lambda: router.revision() == router.registry.number)
    assert router.resolve("2001:db8::1", "workshop").route.route_id == "5"
    assert refused(lambda: router.resolve("2001:db8::1", "lab")).reason == "UNKNOWN_VIRTUAL_NETWORK"


def test_it_answers_from_disk_while_the_registry_is_away(tmp_path: Path) -> None:
    data = tmp_path / "data"
    with registry_fake.serving(tmp_path) as registry, service_process.running("router", tmp_path, data):
        registry.commit(*ROUTES)
        service_process.until_serving("router", tmp_path)
        with service_process.channel("router", tmp_path) as channel:
            eventually(lambda: Router(registry, channel).revision() == registry.number)
    with service_process.running("router", tmp_path, data):
        service_process.until_serving("router", tmp_path)
        with service_process.channel("router", tmp_path) as channel:
            found = Router(registry, channel).resolve("10.1.0.1")
            assert (found.route.route_id, found.replica.source, found.replica.live) == ("3", "disk", False)


def test_without_a_registry_it_says_that_it_is_not_ready(tmp_path: Path) -> None:
    with service_process.running("router", tmp_path, tmp_path / "data"):
        eventually((tmp_path / "read" / "router.sock").exists)
        with service_process.channel("router", tmp_path) as channel:
            stub: Any = router_service_pb2_grpc.RouterServiceStub(channel)
            request = pb.ResolveRequest(tenant="acme", destination_address="1.1.1.1")
            error = refused(lambda: stub.Resolve(request, wait_for_ready=True, timeout=5))
            assert (error.code, error.reason) == (grpc.StatusCode.UNAVAILABLE, "NOT_READY")
        assert not service_process.serving("router", tmp_path)


def test_a_second_router_is_refused(router: Router, tmp_path: Path) -> None:
    with service_process.running("router", tmp_path, tmp_path / "data") as second:
        assert second.wait(15) == 1
    assert isinstance(second, subprocess.Popen)
    assert router.resolve("8.8.8.8").route.route_id == "1"
