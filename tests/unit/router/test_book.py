"""The route book: names to ids, conversions, and what is left out."""

from __future__ import annotations

from typing import Any

import pytest

from falkirk.api.registry.v1 import registry_service_pb2 as pb
from falkirk.decide.routes import RouteEntry
from falkirk.router.book import RouteBook


def resource(kind: str, identity: str, name: str, **fields: Any) -> pb.Resource:
    of_tenant = {} if kind == "tenant" else {"tenant": "acme", "tenant_id": "t"}
    return pb.Resource(**{kind: {"metadata": {"id": identity, "name": name, **of_tenant}, **fields}})


def route(identity: str, prefix: str = "10.0.0.0/8", network: str = "default", **target: Any) -> pb.Resource:
    fields = {"virtual_network": network, "prefix": prefix, "target": target or {"internet": {}}}
    return resource("route", identity, f"r{identity}", **fields)


def gone(kind: pb.Kind, identity: str) -> pb.Tombstone:
    return pb.Tombstone(kind=kind, id=identity)


TENANT = resource("tenant", "t", "acme")
NETWORKS = [resource("virtual_network", "n", "default", is_default=True), resource("virtual_network", "m", "lab")]


@pytest.fixture
def book() -> RouteBook:
    made = RouteBook(5000)
    made.apply([TENANT, *NETWORKS], [])
    return made


def compiled(book: RouteBook) -> dict[str, tuple[str, str]]:
    return {source.entry.route_id: (source.virtual_network_id, source.entry.prefix) for source in book.sources()}


def test_routes_may_come_before_their_network() -> None:
    book = RouteBook(5000)
    book.apply([route("1"), route("2", network="lab"), *NETWORKS, TENANT], [])
    assert compiled(book) == {"1": ("n", "10.0.0.0/8"), "2": ("m", "10.0.0.0/8")}
    assert book.routes_by_tenant() == {"acme": 2}


def test_entries() -> None:
    book = RouteBook(5000)
    internet = {"egress_address4": "192.0.2.1", "egress_address6": "2001:db8::1"}
    timed = {"connect_timeout_ms": 100}
    book.apply([*NETWORKS, route("1", internet=internet), route("2", blackhole={}), route("3", internet=timed)], [])
    found = {source.entry.route_id: source.entry for source in book.sources()}
    address6 = b"\x20\x01\x0d\xb8" + bytes(11) + b"\x01"
    assert found["1"] == RouteEntry("1", "r1", "10.0.0.0/8", "internet", b"\xc0\x00\x02\x01", address6, 5000)
    assert found["2"] == RouteEntry("2", "r2", "10.0.0.0/8", "blackhole", connect_timeout_ms=5000)
    assert found["3"].connect_timeout_ms == 100


def test_changes_and_removals(book: RouteBook) -> None:
    book.apply([route("1"), route("2", "11.0.0.0/8")], [])
    book.apply([route("1", "12.0.0.0/8", "lab")], [gone(pb.KIND_ROUTE, "2")])
    assert compiled(book) == {"1": ("m", "12.0.0.0/8")}


def test_names_may_swap(book: RouteBook) -> None:
    book.apply(
        [resource("virtual_network", "m", "default"), resource("virtual_network", "n", "lab", is_default=True)], []
    )
    assert (book.network_id("acme", "default"), book.network_id("acme", "lab")) == ("m", "n")
    assert book.network_id("acme", "") == "n"


def test_the_default_mark_moves(book: RouteBook) -> None:
    book.apply(
        [resource("virtual_network", "m", "lab", is_default=True), resource("virtual_network", "n", "default")], []
    )
    assert book.network_id("acme", "") == "m"


def test_a_renamed_or_removed_tenant(book: RouteBook) -> None:
    book.apply([resource("tenant", "t", "acme-2")], [])
    assert book.network_id("acme-2", "") == "n"
    with pytest.raises(KeyError):
        book.network_id("acme", "")
    book.apply([], [gone(pb.KIND_TENANT, "t"), gone(pb.KIND_VIRTUAL_NETWORK, "n"), gone(pb.KIND_VIRTUAL_NETWORK, "m")])
    with pytest.raises(KeyError):
        book.network_id("acme-2", "")


@pytest.mark.parametrize(
    "wrong",
    [
        route("1", connector={"connector": "x"}),
        route("1", "10.0.0.1/8"),
        route("1", "ten"),
        route("1", network="moon"),
        route("1", internet={"egress_address4": "x"}),
    ],
)
def test_what_can_not_be_compiled_is_left_out_until_it_is_mended(book: RouteBook, wrong: pb.Resource) -> None:
    book.apply([route("1"), route("2", "11.0.0.0/8")], [])
    book.apply([wrong], [])
    assert (set(compiled(book)), book.left_out()) == ({"2"}, 1)
    book.apply([route("1")], [])
    assert (set(compiled(book)), book.left_out()) == ({"1", "2"}, 0)
