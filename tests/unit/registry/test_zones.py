"""Private DNS zones, and the address that the registry keeps for resolvers."""

from __future__ import annotations

from typing import Any

import pytest

from falkirk.registry.refusal import Reason
from tests.unit.registry.conftest import Ledger, refused

A, AAAA, CNAME, PTR, SRV, TXT = range(1, 7)


def record(name: str, kind: int, value: str) -> dict[str, Any]:
    return {"name": name, "type": kind, "value": value}


def test_a_zone_is_kept_in_its_canonical_form(acme: Ledger) -> None:
    given = [
        record("WWW", A, "10.1.0.2"),
        record("@", AAAA, "FD00:0::2"),
        record("_ldap._tcp", SRV, "00 5  389 Dc.Corp.Internal."),
        record("gone", SRV, "0 0 0 ."),
        record("mail", CNAME, "Www.Example.com."),
        record("note", TXT, "as Written"),
    ]
    zone = acme.create("zone", "corp", "acme", domain="Corp.Internal.", records=given)
    assert zone.domain == "corp.internal"
    assert zone.virtual_network == "default"
    assert [(found.name, found.value) for found in zone.records] == [
        ("www", "10.1.0.2"),
        ("@", "fd00::2"),
        ("_ldap._tcp", "0 5 389 dc.corp.internal"),
        ("gone", "0 0 0 ."),
        ("mail", "www.example.com"),
        ("note", "as Written"),
    ]


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ("10.1.0.2", "10.1.0.2"),
        ("10.1.0.2:5353", "10.1.0.2:5353"),
        ("FD00::0:1", "fd00::1"),
        ("[fd00::1]:53", "[fd00::1]:53"),
    ],
)
def test_a_forwarder_is_an_address_with_a_port_or_without(acme: Ledger, given: str, kept: str) -> None:
    assert list(acme.create("zone", "corp", "acme", domain="corp", forward_to=[given]).forward_to) == [kept]


@pytest.mark.parametrize(
    ("values", "field"),
    [
        ({"domain": ""}, "domain"),
        ({"domain": "a..b"}, "domain"),
        ({"domain": "-a.b"}, "domain"),
        ({"domain": "x" * 64}, "domain"),
        ({"domain": ".".join(["x" * 63] * 4)}, "domain"),
        ({"domain": "falkirk"}, "domain"),
        ({"domain": "nas.other.Falkirk."}, "domain"),
        ({"domain": "c", "records": [record("", A, "10.0.0.1")]}, "records[0].name"),
        ({"domain": "c", "records": [record("*", A, "10.0.0.1")]}, "records[0].name"),
        ({"domain": "c", "records": [record("w", 0, "10.0.0.1")]}, "records[0].type"),
        ({"domain": "c", "records": [record("w", A, "fd00::1")]}, "records[0].value"),
        ({"domain": "c", "records": [record("w", AAAA, "10.0.0.1")]}, "records[0].value"),
        ({"domain": "c", "records": [record("w", SRV, "1 2 65536 x")]}, "records[0].value"),
        ({"domain": "c", "records": [record("w", SRV, "1 2 x")]}, "records[0].value"),
        ({"domain": "c", "records": [record("w", A, "10.0.0.1") | {"ttl_s": 604_801}]}, "records[0].ttl_s"),
        ({"domain": "c", "records": [record("w", CNAME, "a"), record("W", A, "10.0.0.1")]}, "records[1]"),
        ({"domain": "c", "records": [record("w", CNAME, "a"), record("w", CNAME, "b")]}, "records[1]"),
        ({"domain": "c", "forward_to": ["10.0.0.1:0"]}, "forward_to[0]"),
        ({"domain": "c", "forward_to": ["127.0.0.1"]}, "forward_to[0]"),
        ({"domain": "c", "forward_to": ["[fd00::1]"]}, "forward_to[0]"),
        ({"domain": "c", "forward_to": [f"10.0.0.{last}" for last in range(1, 6)]}, "forward_to"),
        ({"domain": "c", "forward_to": ["10.0.0.1"], "records": [record("w", A, "10.0.0.1")]}, "forward_to"),
    ],
)
def test_what_no_zone_can_say_is_refused_by_field(acme: Ledger, values: dict[str, Any], field: str) -> None:
    refusal = refused(lambda: acme.create("zone", "z", "acme", **values))
    assert (refusal.reason, refusal.about["field"]) == (Reason.INVALID_FIELD, field)


def test_a_domain_stands_once_in_a_virtual_network(acme: Ledger) -> None:
    acme.create("zone", "one", "acme", domain="corp.internal")
    refusal = refused(lambda: acme.create("zone", "two", "acme", domain="Corp.internal."))
    assert (refusal.reason, refusal.about["domain"]) == (Reason.NAME_TAKEN, "corp.internal")
    acme.create("virtual_network", "blue", "acme")
    acme.create("zone", "two", "acme", domain="corp.internal", virtual_network="blue")


def test_no_device_takes_the_resolvers_address(acme: Ledger) -> None:
    for address in ("100.96.0.53", "fd01:203:405::53"):
        refusal = refused(lambda address=address: acme.create("device", "nas", "acme", addresses=[address]))  # type: ignore[misc]
        assert (refusal.reason, refusal.about["address"]) == (Reason.ADDRESS_TAKEN, address)
    acme.create("device", "nas", "acme", addresses=["100.96.0.54"])
