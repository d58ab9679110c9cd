"""Names of virtual networks."""

from __future__ import annotations

import pytest

from falkirk.router import name_table
from falkirk.router.name_table import Elsewhere, Local, NameTable, Network, Record, UnreadableNames, Zone

POOLS = ["100.96.0.0/12", "fd01:203:405::/64"]
ZONES = [
    Zone("corp.internal", [Record("a.b.corp.internal", "A", "10.1.0.1", 300)], []),
    Zone("lab.corp.internal", [], ["10.1.0.2"]),
    Zone("1.10.in-addr.arpa", [Record("2.0.1.10.in-addr.arpa", "PTR", "www.corp.internal", 300)], []),
]
NETWORKS = [
    Network("n1", "acme", POOLS, [("nas", ("100.96.0.7", "fd01:203:405::7"))], ZONES),
    Network("n2", "acme", POOLS, [("printer", ("100.96.0.8",))], []),
    Network("n3", "other", POOLS, [("nas", ("100.96.0.9",))], []),
]
TABLE = NameTable.load(name_table.encode(NETWORKS))


def found(name: str, network: str = "n1") -> Local | Elsewhere:
    answer = TABLE.find(network, name)
    assert answer is not None
    return answer


def values(name: str, network: str = "n1") -> list[str] | bool:
    """The values of its records; else whether it exists."""
    answer = found(name, network)
    assert isinstance(answer, Local)
    return [record.value for record in answer.records] or answer.exists


@pytest.mark.parametrize(
    ("network", "name", "expected"),
    [
        ("n1", "nas.acme.falkirk", ["100.96.0.7", "fd01:203:405::7"]),
        ("n1", "7.0.96.100.in-addr.arpa", ["nas.acme.falkirk"]),
        ("n1", "acme.falkirk", True),
        ("n1", "falkirk", True),
        ("n1", "x.nas.acme.falkirk", False),
        # In another network of the tenant, and in another tenant with the same addresses.
        ("n1", "printer.acme.falkirk", False),
        ("n2", "printer.acme.falkirk", ["100.96.0.8"]),
        ("n2", "nas.acme.falkirk", False),
        ("n3", "nas.other.falkirk", ["100.96.0.9"]),
        ("n1", "nas.other.falkirk", False),
        ("n1", "other.falkirk", False),
        # The world doesn't hear of private addresses, the pools' among them.
        ("n1", "9.0.96.100.in-addr.arpa", False),
        ("n1", "1.0.168.192.in-addr.arpa", False),
        # What only has names below it exists.
        ("n1", "a.b.corp.internal", ["10.1.0.1"]),
        ("n1", "b.corp.internal", True),
        ("n1", "c.corp.internal", False),
        ("n1", "corp.internal", True),
        ("n1", "2.0.1.10.in-addr.arpa", ["www.corp.internal"]),
        ("n1", "3.0.1.10.in-addr.arpa", False),
        # Ways around the resolver.
        ("n1", "_dns.resolver.arpa", False),
        ("n1", "use-application-dns.net", True),
        ("n1", "printer.local", False),
    ],
)
def test_names_of_our_own(network: str, name: str, expected: list[str] | bool) -> None:
    assert values(name, network) == expected


@pytest.mark.parametrize(
    ("network", "name", "forward_to"),
    [
        ("n1", "x.lab.corp.internal", ("10.1.0.2",)),
        ("n1", "example.com", ()),
        ("n1", "notcorp.internal", ()),
        ("n1", "falkirk.example", ()),
        ("n1", "notfalkirk", ()),
        ("n2", "a.b.corp.internal", ()),
        ("n1", "8.8.8.8.in-addr.arpa", ()),
        ("n1", "x.8.8.8.in-addr.arpa", ()),
        ("n1", "", ()),
    ],
)
def test_names_that_others_know(network: str, name: str, forward_to: tuple[str, ...]) -> None:
    assert found(name, network) == Elsewhere(forward_to)


def test_a_network_that_is_not_known_has_no_names() -> None:
    assert TABLE.find("n9", "example.com") is None
    assert not TABLE.knows("n9")


@pytest.mark.parametrize("data", [b"", b"\x00", name_table.encode(NETWORKS)[:-1], b"\x92\x63\x90"])
def test_what_is_no_snapshot_is_refused(data: bytes) -> None:
    with pytest.raises(UnreadableNames):
        NameTable.load(data)
