"""Devices and zones of the registry as the resolver's names."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from falkirk.api.registry.v1 import registry_service_pb2 as registry
from falkirk.decide.routes import RouteEntry, RouteSource
from falkirk.router import name_table
from falkirk.router.devices import DeviceBook
from falkirk.router.name_book import NameBook
from falkirk.router.name_table import Local, NameTable

POOL = "100.96.0.0/12"


def resource(kind: str, identity: str, name: str, **fields: Any) -> registry.Resource:
    of_tenant = {} if kind == "tenant" else {"tenant": "acme", "tenant_id": "t"}
    return registry.Resource(**{kind: {"metadata": {"id": identity, "name": name, **of_tenant}, **fields}})


class Books(NameBook):
    """Both books, which hear of the same transactions."""

    def __init__(self) -> None:
        self.devices = DeviceBook()
        super().__init__(self.devices)

    def apply(self, changed: Iterable[registry.Resource], removed: Iterable[registry.Tombstone]) -> None:
        changed, removed = list(changed), list(removed)
        self.devices.apply(changed, removed)
        super().apply(changed, removed)


def book(*more: registry.Resource) -> NameBook:
    made = Books()
    made.apply(
        [
            resource("tenant", "t", "acme", device_pool4=POOL, device_pool6="fd01::/64"),
            resource("virtual_network", "n", "default", is_default=True),
            resource("virtual_network", "m", "lab"),
            *more,
        ],
        [],
    )
    return made


def known(made: NameBook, network: str, name: str) -> list[str]:
    found = NameTable.load(name_table.encode(made.networks())).find(network, name)
    return [record.value for record in found.records] if isinstance(found, Local) else ["elsewhere"]


def test_a_device_is_named_where_it_is() -> None:
    made = book(
        resource("device", "1", "nas", addresses=["100.96.0.2"]),
        resource("device", "2", "rig", addresses=["100.96.0.3"], virtual_network="lab"),
    )
    assert known(made, "n", "nas.acme.falkirk") == ["100.96.0.2"]
    assert known(made, "m", "nas.acme.falkirk") == []
    assert known(made, "m", "rig.acme.falkirk") == ["100.96.0.3"]
    # Another default takes along whoever leaves it to that.
    made.apply(
        [resource("virtual_network", "m", "lab", is_default=True), resource("virtual_network", "n", "default")], []
    )
    assert known(made, "m", "nas.acme.falkirk") == ["100.96.0.2"]
    # A tenant's new name is in all of its devices' names.
    made.apply([resource("tenant", "t", "acorn", device_pool4=POOL)], [])
    assert known(made, "m", "nas.acorn.falkirk") == ["100.96.0.2"]
    made.apply([], [registry.Tombstone(kind="KIND_DEVICE", id="1")])
    assert known(made, "m", "nas.acorn.falkirk") == []


def test_who_may_not_connect_has_no_name() -> None:
    made = book(
        resource("device", "1", "off", addresses=["100.96.0.2"], disabled=True),
        resource("device", "2", "new", addresses=["100.96.0.3"], pending=True),
    )
    assert known(made, "n", "off.acme.falkirk") == known(made, "n", "new.acme.falkirk") == []


def test_what_changes_no_name_is_no_change() -> None:
    made = book()

    def changed(*resources: registry.Resource, removed: int = 0) -> bool:
        tombstones = [registry.Tombstone(kind=registry.Kind.Name(removed), id="1")] if removed else []
        made.apply(resources, tombstones)
        was = made.changed
        made.networks()
        return was

    assert changed(resource("device", "1", "nas", addresses=["100.96.0.2"]))
    same: list[dict[str, Any]] = [{}, {"posture": {"os": "linux"}}, {"groups": ["lab"]}, {"max_flows": 7}]
    for more in same:
        assert not changed(resource("device", "1", "nas", addresses=["100.96.0.2"], **more))
    assert not changed(resource("user", "1", "ann"), removed=registry.KIND_ROUTE)
    others: list[dict[str, Any]] = [{"disabled": True}, {"virtual_network": "lab"}, {"addresses": ["100.96.0.4"]}]
    for more in others:
        assert changed(resource("device", "1", "nas", **more))
    assert changed(resource("zone", "1", "corp", domain="corp"))
    assert changed(removed=registry.KIND_DEVICE)


def test_a_zone_is_its_networks_own() -> None:
    records = [
        {"name": "@", "type": 1, "value": "10.1.0.1"},
        {"name": "www", "type": 2, "value": "fd00::1", "ttl_s": 7},
    ]
    made = book(
        resource("zone", "z", "corp", virtual_network="lab", domain="corp.internal", records=records),
        resource("zone", "y", "branch", virtual_network="lab", domain="branch", forward_to=["10.1.0.2"]),
    )
    assert known(made, "m", "corp.internal") == ["10.1.0.1"]
    assert known(made, "n", "corp.internal") == ["elsewhere"]
    (lab,) = (network for network in made.networks() if network.id == "m")
    ttls = {record.name: record.ttl for zone in lab.zones for record in zone.records}
    assert ttls == {"corp.internal": name_table.ZONE_TTL, "www.corp.internal": 7}
    assert {zone.domain: zone.forward_to for zone in lab.zones}["branch"] == ["10.1.0.2"]


def test_a_way_leads_to_the_resolver_in_each_network_but_where_another_one_is() -> None:
    taken = RouteSource("m", RouteEntry("r", "ours", "fd01::53/128", "blackhole")).place
    ways = {(source.virtual_network_id, source.entry.prefix) for source in book().sources({taken})}
    assert ways == {("n", "100.96.0.53/32"), ("n", "fd01::53/128"), ("m", "100.96.0.53/32")}
