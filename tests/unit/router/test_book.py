"""The route book: names to ids, conversions, and what is left out."""

from __future__ import annotations

from typing import Any

import pytest

from falkirk.api.registry.v1 import registry_service_pb2 as pb
from falkirk.decide.destination import DestinationDevice
from falkirk.decide.routes import RouteEntry, RouteTable, compile
from falkirk.router.book import RouteBook


def resource(kind: str, identity: str, name: str, **fields: Any) -> pb.Resource:
    of_tenant = {} if kind == "tenant" else {"tenant": "acme", "tenant_id": "t"}
    return pb.Resource(**{kind: {"metadata": {"id": identity, "name": name, **of_tenant}, **fields}})


def route(identity: str, prefix: str = "10.0.0.0/8", network: str = "default", **target: Any) -> pb.Resource:
    fields = {"virtual_network": network, "prefix": prefix, "target": target or {"internet": {}}}
    return resource("route", identity, f"r{identity}", **fields)


def gone(kind: pb.Kind, identity: str) -> pb.Tombstone:
    return pb.Tombstone(kind=kind, id=identity)


def device(identity: str, name: str, *addresses: str, **fields: Any) -> pb.Resource:
    return resource("device", identity, name, addresses=addresses, **fields)


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


def own(book: RouteBook) -> dict[str, tuple[str, DestinationDevice | None]]:
    """Devices' own addresses: prefix to virtual network and device."""
    return {s.entry.prefix: (s.virtual_network_id, s.entry.device) for s in book.sources() if s.entry.own_address}


def test_a_device_s_addresses_lead_to_it_in_its_own_network(book: RouteBook) -> None:
    alice = resource("user", "u", "alice", groups=["staff"])
    book.apply(
        [
            device("a", "laptop", "100.96.0.2", "fd00::2", user="alice", groups=["mobile"]),
            device("b", "nas", "100.96.0.3", virtual_network="lab"),
            alice,
        ],
        [],
    )
    laptop = DestinationDevice("a", "laptop", "alice", ("mobile", "staff"))
    assert own(book) == {
        "100.96.0.2/32": ("n", laptop),
        "fd00::2/128": ("n", laptop),
        "100.96.0.3/32": ("m", DestinationDevice("b", "nas")),
    }
    assert {source.entry.name for source in book.sources()} == {"device/laptop", "device/nas"}
    book.apply([resource("user", "u", "alice", groups=["guests"])], [])
    assert own(book)["fd00::2/128"] == ("n", DestinationDevice("a", "laptop", "alice", ("guests", "mobile")))
    book.apply([], [gone(pb.KIND_DEVICE, "a")])
    assert list(own(book)) == ["100.96.0.3/32"]


def test_devices_follow_the_default_mark_where_they_selected_none(book: RouteBook) -> None:
    book.apply([device("a", "laptop", "100.96.0.2"), device("b", "nas", "100.96.0.3", virtual_network="default")], [])
    book.apply(
        [resource("virtual_network", "m", "lab", is_default=True), resource("virtual_network", "n", "default")], []
    )
    assert {prefix: network for prefix, (network, _) in own(book).items()} == {
        "100.96.0.2/32": "m",
        "100.96.0.3/32": "n",
    }


def test_a_device_waits_for_its_network_and_its_owner() -> None:
    book = RouteBook(5000)
    book.apply([device("a", "laptop", "100.96.0.2", user="alice", virtual_network="lab")], [])
    book.apply([TENANT, *NETWORKS], [])
    assert own(book) == {}
    book.apply([resource("user", "u", "alice")], [])
    assert own(book) == {"100.96.0.2/32": ("m", DestinationDevice("a", "laptop", "alice"))}


def test_a_written_route_takes_the_place_of_a_device_s_address(book: RouteBook) -> None:
    book.apply([device("a", "laptop", "100.96.0.2"), route("1", "100.96.0.2/32", blackhole={})], [])
    assert [source.entry.route_id for source in book.sources()] == ["1"]
    book.apply([route("1", "100.96.0.2/32", "lab", blackhole={})], [])
    assert set(own(book)) == {"100.96.0.2/32"}
    book.apply([], [gone(pb.KIND_ROUTE, "1")])
    assert set(own(book)) == {"100.96.0.2/32"}


def test_a_route_to_a_device(book: RouteBook) -> None:
    to_gateway = route("1", "10.9.0.0/16", device={"device": "gateway"})
    book.apply([to_gateway], [])
    assert (compiled(book), book.left_out()) == ({}, 1)
    book.apply([device("g", "gateway", groups=["site"])], [])
    (source,) = book.sources()
    assert (source.entry.target, source.entry.device) == ("device", DestinationDevice("g", "gateway", "", ("site",)))
    assert not source.entry.own_address
    # A rename of the device comes with the route that shows its name.
    renamed = route("1", "10.9.0.0/16", device={"device": "gate"})
    book.apply([device("g", "gate"), renamed], [])
    assert [source.entry.device for source in book.sources()] == [DestinationDevice("g", "gate")]
    book.apply([device("g", "gate", groups=["x"])], [])
    assert [source.entry.device for source in book.sources()] == [DestinationDevice("g", "gate", "", ("x",))]
    assert book.routes_by_tenant() == {"acme": 1}


def test_two_devices_may_swap_names_and_addresses(book: RouteBook) -> None:
    book.apply([device("a", "one", "100.96.0.2"), device("b", "two", "100.96.0.3")], [])
    book.apply([device("a", "two", "100.96.0.3"), device("b", "one", "100.96.0.2")], [])
    assert own(book) == {
        "100.96.0.2/32": ("n", DestinationDevice("b", "one")),
        "100.96.0.3/32": ("n", DestinationDevice("a", "two")),
    }
    RouteTable.loaded(compile(book.sources()))
