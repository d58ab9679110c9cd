"""Writes: identity, references, uniqueness, follow-ups."""

from __future__ import annotations

from typing import Any

import pytest

from falkirk.api.registry.v1.route_service_pb2 import BlackholeTarget, InternetTarget, RouteTarget
from falkirk.registry.refusal import Reason
from falkirk.registry.store import Transaction
from tests.unit.registry.conftest import Ledger, make, refused

INTERNET = RouteTarget(internet=InternetTarget())
BLACKHOLE = RouteTarget(blackhole=BlackholeTarget())


def names(transaction: Transaction) -> list[tuple[int, bool]]:
    """Kinds changed, and whether they are still there."""
    return [(change.kind, change.body is not None) for change in transaction.changes]


def test_a_tenant_comes_with_pools_and_a_default_network(ledger: Ledger) -> None:
    tenant = ledger.create("tenant", "acme", display_name="Acme Ltd")
    assert (tenant.device_pool4, tenant.device_pool6) == ("100.96.0.0/12", "fd01:203:405::/64")
    assert (tenant.metadata.revision, tenant.metadata.create_time.seconds) == (1, 1)
    network = ledger.get("virtual_network", "default", "acme")
    assert network.is_default
    assert network.metadata.tenant_id == tenant.metadata.id
    assert names(ledger.told[0]) == [(1, True), (4, True)]


def test_what_the_registry_gives_cannot_be_asked_for(ledger: Ledger) -> None:
    value = make("tenant", "acme")
    value.metadata.id = "x"
    assert (
        refused(lambda: ledger.write(lambda work: work.create(_kind("tenant"), value))).about["field"] == "metadata.id"
    )
    value = make("tenant", "acme")
    value.metadata.create_time.seconds = 0
    assert (
        refused(lambda: ledger.write(lambda work: work.create(_kind("tenant"), value))).about["field"]
        == "metadata.create_time"
    )


def test_names_are_unique_in_a_tenant_and_a_kind(acme: Ledger) -> None:
    acme.create("user", "ann", "acme")
    refusal = refused(lambda: acme.create("user", "ann", "acme"))
    assert (refusal.reason, refusal.about["name"]) == (Reason.NAME_TAKEN, "ann")
    acme.create("device", "ann", "acme")
    acme.create("tenant", "other")
    acme.create("user", "ann", "other")
    assert refused(lambda: acme.create("tenant", "acme")).reason is Reason.NAME_TAKEN


def test_references_are_by_name_or_id_within_the_tenant(acme: Ledger) -> None:
    ann = acme.create("user", "ann", "acme")
    assert acme.create("device", "one", "acme", user="ann").user == "ann"
    assert acme.create("device", "two", ann.metadata.tenant_id, user=ann.metadata.id).user == "ann"
    acme.create("tenant", "other")
    for given in ("ann", ann.metadata.id):
        refusal = refused(lambda given=given: acme.create("device", "three", "other", user=given))  # type: ignore[misc]
        assert (refusal.reason, refusal.about["field"]) == (Reason.NOT_FOUND, "user")


def test_a_rename_breaks_no_reference_and_tells_everyone_who_showed_the_name(acme: Ledger) -> None:
    network = acme.create("virtual_network", "blue", "acme")
    acme.create("route", "r", "acme", virtual_network="blue", prefix="10.0.0.0/8", target=INTERNET)
    acme.create("device", "d", "acme", virtual_network="blue")
    network.metadata.name = "green"
    acme.update("virtual_network", network)
    assert names(acme.told[-1]) == [(4, True), (3, True), (5, True)] or sorted(names(acme.told[-1])) == [
        (3, True),
        (4, True),
        (5, True),
    ]
    route = acme.get("route", "r", "acme")
    assert (route.virtual_network, route.metadata.revision) == ("green", acme.store.revision)
    assert acme.get("device", "d", "acme").virtual_network == "green"
    assert refused(lambda: acme.delete("virtual_network", "green", "acme")).reason is Reason.IN_USE


def test_a_tenants_rename_shows_in_all_it_has(acme: Ledger) -> None:
    tenant = acme.get("tenant", "acme")
    acme.create("user", "ann", "acme")
    tenant.metadata.name = "apex"
    acme.update("tenant", tenant)
    assert acme.get("user", "ann", "acme") is None
    ann = acme.get("user", "ann", "apex")
    assert (ann.metadata.tenant, ann.metadata.tenant_id) == ("apex", tenant.metadata.id)
    assert len(acme.told[-1].changes) == 3
    acme.create("tenant", "acme")
    acme.create("user", "ann", "acme")


def test_an_update_with_a_stale_revision_is_refused(acme: Ledger) -> None:
    first = acme.create("user", "ann", "acme")
    second = acme.get("user", "ann", "acme")
    second.email = "ann@example.com"
    acme.update("user", second)
    first.email = "other@example.com"
    refusal = refused(lambda: acme.update("user", first))
    assert (refusal.reason, refusal.about["current"]) == (Reason.REVISION_CONFLICT, "3")
    first.metadata.revision = 0
    assert acme.update("user", first).email == "other@example.com"
    assert refused(lambda: acme.delete("user", "ann", "acme", revision=2)).reason is Reason.REVISION_CONFLICT


def test_an_update_of_another_tenants_resource_is_not_found(acme: Ledger) -> None:
    ann = acme.create("user", "ann", "acme")
    acme.create("tenant", "other")
    stolen = make("user", "ann", "other")
    stolen.metadata.id = ann.metadata.id
    assert refused(lambda: acme.update("user", stolen)).reason is Reason.NOT_FOUND
    assert refused(lambda: acme.delete("user", ann.metadata.id, "other")).reason is Reason.NOT_FOUND


def test_an_equal_update_changes_nothing(acme: Ledger) -> None:
    acme.create("device", "d", "acme")
    before = acme.get("device", "d", "acme")
    assert acme.update("device", make("device", "d", "acme")) == before
    assert len(acme.told) == 2


def test_addresses_come_from_the_pools_and_rest_after_use(acme: Ledger) -> None:
    first = acme.create("device", "one", "acme")
    assert list(first.addresses) == ["100.96.0.2", "fd01:203:405::2"]
    acme.delete("device", "one", "acme")
    assert acme.create("device", "two", "acme").addresses[0] == "100.96.0.3"


def test_a_public_key_is_unique_over_the_mesh(acme: Ledger) -> None:
    key = "xTIBA5rboUvnH4htodjb6e697QjLERt1NAB4mZqp8Dg="
    acme.create("device", "one", "acme", public_key=key)
    acme.create("tenant", "other")
    refusal = refused(lambda: acme.create("device", "two", "other", public_key=key))
    assert (refusal.reason, refusal.about["field"]) == (Reason.KEY_TAKEN, "public_key")
    # Nothing of the other tenant is told.
    assert "acme" not in refusal.message
    acme.delete("device", "one", "acme")
    assert acme.create("device", "two", "other", public_key=key).public_key == key


def test_addresses_are_unique_in_a_tenant_only(acme: Ledger) -> None:
    acme.create("device", "one", "acme", addresses=["fd00:0::7", "10.9.9.9"])
    assert list(acme.get("device", "one", "acme").addresses) == ["10.9.9.9", "fd00::7"]
    refusal = refused(lambda: acme.create("device", "two", "acme", addresses=["fd00::7"]))
    assert (refusal.reason, refusal.about["address"]) == (Reason.ADDRESS_TAKEN, "fd00::7")
    acme.create("tenant", "other")
    acme.create("device", "two", "other", addresses=["fd00::7"])
    bad = refused(lambda: acme.create("device", "x", "acme", addresses=["10.0.0.5", "10.0.0.6"]))
    assert bad.about["field"] == "addresses[1]"


def test_an_exhausted_pool_refuses_and_a_removal_makes_room(ledger: Ledger) -> None:
    ledger.create("tenant", "tiny", device_pool4="10.0.0.0/29")
    for number in range(5):
        ledger.create("device", f"d{number}", "tiny")
    assert refused(lambda: ledger.create("device", "more", "tiny")).reason is Reason.POOL_EXHAUSTED
    ledger.delete("device", "d3", "tiny")
    assert ledger.create("device", "more", "tiny").addresses[0] == "10.0.0.5"


def test_a_prefix_stands_once_in_a_virtual_network(acme: Ledger) -> None:
    acme.create("route", "a", "acme", prefix="10.1.0.0/16", target=INTERNET)
    assert acme.get("route", "a", "acme").virtual_network == "default"
    refusal = refused(lambda: acme.create("route", "b", "acme", prefix="10.1.0.0/16", target=BLACKHOLE))
    assert (refusal.reason, refusal.about["code"]) == (Reason.PREFIX_TAKEN, "1014")
    acme.create("virtual_network", "blue", "acme")
    acme.create("route", "b", "acme", prefix="10.1.0.0/16", target=BLACKHOLE, virtual_network="blue")
    acme.create("route", "c", "acme", prefix="10.1.0.0/17", target=BLACKHOLE)


def test_the_default_mark_moves_and_is_never_lost(acme: Ledger) -> None:
    acme.create("virtual_network", "blue", "acme", is_default=True)
    assert names(acme.told[-1]) == [(4, True), (4, True)]
    assert not acme.get("virtual_network", "default", "acme").is_default
    assert refused(lambda: acme.delete("virtual_network", "blue", "acme")).reason is Reason.IS_DEFAULT
    assert acme.update("virtual_network", make("virtual_network", "blue", "acme", comment="x")).is_default
    acme.delete("virtual_network", "default", "acme")
    assert acme.create("route", "r", "acme", prefix="::/0", target=INTERNET).virtual_network == "blue"


def test_what_is_in_use_stays_and_says_by_what(acme: Ledger) -> None:
    acme.create("user", "ann", "acme")
    for number in range(7):
        acme.create("device", f"d{number}", "acme", user="ann")
    refusal = refused(lambda: acme.delete("user", "ann", "acme"))
    assert (refusal.reason, refusal.about["left"]) == (Reason.IN_USE, "devices=7")
    refusal = refused(lambda: acme.delete("tenant", "acme"))
    assert refusal.about["left"] == "devices=7,users=1"
    assert refusal.message == (
        "tenant acme still has 7 devices, 1 user: user/ann, device/d0, device/d1, device/d2, device/d3, …"
    )


def test_an_empty_tenant_goes_with_its_default_network(acme: Ledger) -> None:
    acme.delete("tenant", "acme")
    assert sorted(names(acme.told[-1])) == [(1, False), (4, False)]
    assert acme.store.snapshot((1, 2, 3, 4, 5, 6)).result().bodies == []
    acme.create("tenant", "acme")


def test_apply_takes_any_order_and_is_idempotent(ledger: Ledger) -> None:
    values = [
        make("device", "d", "acme", user="ann", virtual_network="blue"),
        make("route", "r", "acme", prefix="10.0.0.0/8", virtual_network="blue", target=INTERNET),
        make("user", "ann", "acme"),
        make("virtual_network", "blue", "acme"),
        make("virtual_network", "default", "acme", comment="the first"),
        make("tenant", "acme"),
    ]
    results, outcomes = ledger.apply(*values)
    assert outcomes == ["created", "created", "created", "created", "updated", "created"]
    assert [value.metadata.name for value in results] == ["d", "r", "ann", "blue", "default", "acme"]
    assert len(ledger.told) == 1
    again, outcomes = ledger.apply(*values)
    assert outcomes == ["unchanged"] * 6
    assert again == results
    assert len(ledger.told) == 1


def test_apply_is_all_or_nothing_and_names_the_one_at_fault(acme: Ledger) -> None:
    values = [make("user", "ann", "acme"), make("device", "d", "acme", user="bob")]
    refusal = refused(lambda: acme.apply(*values))
    assert (refusal.reason, refusal.about["index"], refusal.about["field"]) == (Reason.NOT_FOUND, "1", "user")
    assert acme.get("user", "ann", "acme") is None
    twice = refused(lambda: acme.apply(make("user", "ann", "acme"), make("user", "ann", "acme")))
    assert (twice.reason, twice.about["index"]) == (Reason.DUPLICATE, "1")


def test_apply_lets_two_routes_swap_their_prefixes(acme: Ledger) -> None:
    acme.apply(
        make("route", "a", "acme", prefix="10.1.0.0/16", target=INTERNET),
        make("route", "b", "acme", prefix="10.2.0.0/16", target=INTERNET),
    )
    swapped = [
        make("route", "a", "acme", prefix="10.2.0.0/16", target=INTERNET),
        make("route", "b", "acme", prefix="10.1.0.0/16", target=INTERNET),
    ]
    assert acme.apply(*swapped)[1] == ["updated", "updated"]
    assert (
        refused(lambda: acme.create("route", "c", "acme", prefix="10.1.0.0/16", target=INTERNET)).reason
        is Reason.PREFIX_TAKEN
    )
    clash = [
        make("route", "a", "acme", prefix="10.1.0.0/16", target=INTERNET),
        make("route", "b", "acme", prefix="10.1.0.0/16", target=INTERNET),
    ]
    assert refused(lambda: acme.apply(*clash)).reason is Reason.PREFIX_TAKEN


def test_apply_moves_the_default_mark_and_answers_with_the_end(acme: Ledger) -> None:
    values = [make("virtual_network", "default", "acme"), make("virtual_network", "blue", "acme", is_default=True)]
    results, outcomes = acme.apply(*values)
    assert [value.is_default for value in results] == [False, True]
    assert outcomes == ["updated", "created"]
    assert acme.apply(*values)[1] == ["unchanged", "unchanged"]


@pytest.mark.parametrize(
    ("kind", "values", "reason", "field"),
    [
        ("route", {"prefix": "10.0.0.1/8", "target": INTERNET}, Reason.HOST_BITS_SET, "prefix"),
        ("route", {"prefix": "10.0.0.0/8"}, Reason.INVALID_FIELD, "target"),
        ("route", {"prefix": "::/0", "target": RouteTarget(internet=InternetTarget(egress_address4="::1"))}, Reason.INVALID_FIELD, "target.internet.egress_address4"),
        ("route", {"prefix": "::/0", "target": RouteTarget(connector={"connector": "x"})}, Reason.TARGET_NOT_BUILT, "target.connector"),
        ("route", {"prefix": "::/0", "target": RouteTarget(internet={"connect_timeout_ms": 600_001})}, Reason.INVALID_FIELD, "target.internet.connect_timeout_ms"),
        ("user", {"email": "nobody"}, Reason.INVALID_FIELD, "email"),
        ("tenant", {"device_pool6": "2001:db8::/64"}, Reason.INVALID_FIELD, "device_pool6"),
        ("policy", {"rules": [{"name": "r", "when": "true"}]}, Reason.INVALID_FIELD, "rules[0].action"),
        ("policy", {"rules": [{"name": "r", "when": "true", "action": 1, "treatment": 3}]}, Reason.TREATMENT_NOT_BUILT, "rules[0].treatment"),
        ("policy", {"rules": [{"name": "r", "when": "", "action": 1}]}, Reason.INVALID_FIELD, "rules[0].when"),
        ("policy", {"rules": [{"name": "R", "when": "true", "action": 1}]}, Reason.INVALID_NAME, "rules[0].name"),
        ("policy", {"rules": [{"name": "r", "when": "true", "action": 1}] * 2}, Reason.INVALID_FIELD, "rules[1].name"),
    ],
)  # fmt: skip
def test_illegal_values_are_refused_by_field(
    acme: Ledger, kind: str, values: dict[str, Any], reason: Reason, field: str
) -> None:
    refusal = refused(lambda: acme.create(kind, "x", "" if kind == "tenant" else "acme", **values))
    assert (refusal.reason, refusal.about["field"]) == (reason, field)


def test_a_rule_that_does_not_compile_is_refused_with_its_place(acme: Ledger) -> None:
    rules = [{"name": "good", "when": "true", "action": 1}, {"name": "bad", "when": "net.port ==\n  'x'", "action": 2}]
    refusal = refused(lambda: acme.create("policy", "p", "acme", rules=rules))
    assert refusal.reason is Reason.RULE_INVALID
    assert (refusal.about["field"], refusal.about["rule"]) == ("rules[1].when", "bad")
    assert int(refusal.about["line"]) >= 1
    assert int(refusal.about["column"]) >= 1


def _kind(name: str) -> Any:
    from falkirk.registry.kinds import BY_NAME

    return BY_NAME[name]


def test_a_route_to_a_device_names_one_that_is_there_and_keeps_it(acme: Ledger) -> None:
    def to(name: str) -> RouteTarget:
        return RouteTarget(device={"device": name})

    for given, reason in (("", Reason.INVALID_FIELD), ("nas", Reason.NOT_FOUND)):
        refusal = refused(lambda given=given: acme.create("route", "r", "acme", prefix="10.0.0.0/8", target=to(given)))  # type: ignore[misc]
        assert (refusal.reason, refusal.about["field"]) == (reason, "target.device.device")
    acme.create("tenant", "other")
    theirs = acme.create("device", "nas", "other")
    elsewhere = to(theirs.metadata.id)
    assert (
        refused(lambda: acme.create("route", "r", "acme", prefix="10.0.0.0/8", target=elsewhere)).reason
        is Reason.NOT_FOUND
    )
    nas = acme.create("device", "nas", "acme")
    made = acme.create("route", "r", "acme", prefix="10.0.0.0/8", target=to(nas.metadata.id))
    assert made.target.device.device == "nas"
    nas.metadata.name = "storage"
    acme.update("device", nas)
    assert acme.get("route", "r", "acme").target.device.device == "storage"
    refusal = refused(lambda: acme.delete("device", "storage", "acme"))
    assert (refusal.reason, refusal.about["left"]) == (Reason.IN_USE, "routes=1")
    assert "route/r" in refusal.message
    route = acme.get("route", "r", "acme")
    route.target.CopyFrom(INTERNET)
    acme.update("route", route)
    acme.delete("device", "storage", "acme")
