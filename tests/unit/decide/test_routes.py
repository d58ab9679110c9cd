"""Compiled routes against a naive longest-prefix match, their shape when loaded, and martians."""

from __future__ import annotations

from ipaddress import ip_address, ip_network

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from falkirk.decide import routes
from falkirk.decide.routes import RouteConflict, RouteDataError, RouteEntry, RouteSource, RouteTable, martian


def source(prefix: str, network: str = "net", **more: object) -> RouteSource:
    entry = RouteEntry(route_id=f"id-{prefix}", name=f"r-{prefix}", prefix=prefix, target="internet")
    return RouteSource(network, RouteEntry(**{**{f: getattr(entry, f) for f in entry.__struct_fields__}, **more}))


def packed(text: str) -> bytes:
    return ip_address(text).packed


NESTED = ["0.0.0.0/0", "10.0.0.0/8", "10.1.0.0/16", "10.1.2.0/24", "10.1.2.3/32", "255.255.255.255/32"]
NESTED6 = ["::/0", "2001:db8::/32", "2001:db8:0:1::/64", "2001:db8:0:1:8000::/65", "2001:db8:0:1:8000::1/128"]


@pytest.mark.parametrize(
    ("destination", "prefix"),
    [
        ("10.1.2.3", "10.1.2.3/32"),
        ("10.1.2.4", "10.1.2.0/24"),
        ("10.1.2.2", "10.1.2.0/24"),
        ("10.1.3.0", "10.1.0.0/16"),
        ("10.255.255.255", "10.0.0.0/8"),
        ("11.0.0.0", "0.0.0.0/0"),
        ("0.0.0.0", "0.0.0.0/0"),
        ("255.255.255.255", "255.255.255.255/32"),
        ("255.255.255.254", "0.0.0.0/0"),
        ("2001:db8:0:1:8000::1", "2001:db8:0:1:8000::1/128"),
        ("2001:db8:0:1:8000::2", "2001:db8:0:1:8000::/65"),
        ("2001:db8:0:1:7fff::", "2001:db8:0:1::/64"),
        ("2001:db8:0:2::", "2001:db8::/32"),
        ("ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff", "::/0"),
    ],
)
def test_longest_prefix_wins(destination: str, prefix: str) -> None:
    table = RouteTable.loaded(routes.compile(source(p) for p in NESTED + NESTED6))
    found = table.lookup("net", packed(destination))
    assert found is not None
    assert found.prefix == prefix


def test_networks_are_apart_and_may_repeat_prefixes() -> None:
    table = RouteTable.loaded(
        routes.compile(
            [source("10.0.0.0/8", "a", name="one"), source("10.0.0.0/8", "b", name="two"), source("::/0", "b")]
        )
    )
    one, two = table.lookup("a", packed("10.9.9.9")), table.lookup("b", packed("10.9.9.9"))
    assert one is not None
    assert two is not None
    assert (one.name, two.name) == ("one", "two")
    assert table.lookup("a", packed("::1")) is None
    assert table.lookup("a", packed("9.255.255.255")) is None
    assert table.lookup("a", packed("11.0.0.0")) is None
    assert table.lookup("c", packed("10.9.9.9")) is None
    assert table.routes == 3


def test_entry_comes_back_whole() -> None:
    given_source = source(
        "0.0.0.0/0", target="blackhole", egress4=b"\x01\x02\x03\x04", egress6=bytes(16), connect_timeout_ms=5
    )
    table = RouteTable.loaded(routes.compile([given_source]))
    assert table.lookup("net", packed("8.8.8.8")) == given_source.entry
    assert table.lookup("net", packed("8.8.8.8")) is table.lookup("net", packed("9.9.9.9"))


def test_covering_lists_longest_first() -> None:
    table = RouteTable.loaded(routes.compile(source(p) for p in NESTED + NESTED6))
    assert [r.prefix for r in table.covering("net", packed("10.1.2.3"))] == NESTED[4::-1]
    assert [r.prefix for r in table.covering("net", packed("2001:db8:0:1:8000::1"))] == NESTED6[::-1]
    assert table.covering("other", packed("10.1.2.3")) == []


def test_order_of_routes_changes_nothing() -> None:
    sources = [source(p, n) for p in NESTED + NESTED6 for n in ("b", "a")]
    assert routes.compile(sources) == routes.compile(reversed(sources))


def test_same_prefix_twice_is_refused() -> None:
    with pytest.raises(RouteConflict, match="x and y"):
        routes.compile([source("10.0.0.0/8", route_id="1", name="x"), source("10.0.0.0/8", route_id="2", name="y")])


def test_host_bits_are_refused() -> None:
    with pytest.raises(ValueError, match="host bits"):
        routes.compile([source("10.0.0.1/8")])


def test_no_routes() -> None:
    table = RouteTable.loaded(routes.compile([]))
    assert table.lookup("net", packed("8.8.8.8")) is None
    assert table.routes == 0


def test_lookups_see_the_old_routes_until_loading_is_through() -> None:
    table = RouteTable.loaded(routes.compile([source("0.0.0.0/0", name="old")]))
    loading = table.load(routes.compile([source("0.0.0.0/0", name="new")]))
    next(loading)
    old = table.lookup("net", packed("8.8.8.8"))
    assert old is not None
    assert old.name == "old"
    for _ in loading:
        pass
    new = table.lookup("net", packed("8.8.8.8"))
    assert new is not None
    assert new.name == "new"


def test_broken_data_is_refused_and_old_routes_stay() -> None:
    good = routes.compile(source(p) for p in NESTED + NESTED6)
    table = RouteTable.loaded(good)
    for bad in (b"", good[:20], b"X" + good[1:], good[:7] + b"\x63" + good[8:], good[:90]):
        with pytest.raises(RouteDataError):
            for _ in table.load(bad):
                pass
    assert table.lookup("net", packed("8.8.8.8")) is not None


@settings(max_examples=300)
@given(st.data())
def test_any_change_of_one_byte_loads_or_is_refused(data: st.DataObject) -> None:
    """Whatever the index says after loading stays inside the arrays."""
    good = routes.compile(source(p) for p in NESTED + NESTED6)
    at = data.draw(st.integers(0, len(good) - 1))
    bad = good[:at] + bytes([data.draw(st.integers(0, 255))]) + good[at + 1 :]
    try:
        table = RouteTable.loaded(bad)
        table.covering("net", packed("10.1.2.3"))
        table.covering("net", packed("2001:db8:0:1:8000::1"))
    except ValueError:  # RouteDataError, or an entry that no longer decodes; SHA-256 is the carrier's
        return


prefixes4 = st.builds(
    lambda number, length: str(ip_network((number >> (32 - length) << (32 - length), length))),
    st.integers(0, 2**32 - 1),
    st.integers(0, 32),
)
prefixes6 = st.builds(
    lambda number, length: (
        str(ip_network((number >> (128 - length) << (128 - length) | 0, length))) if number >> 32 else "::/0"
    ),
    st.integers(2**32, 2**128 - 1),
    st.integers(0, 64).map(lambda n: n + 32),
)


@settings(max_examples=200, deadline=None)
@given(st.sets(prefixes4 | prefixes6, max_size=40), st.data())
def test_same_as_naive(prefixes: set[str], data: st.DataObject) -> None:
    table = RouteTable.loaded(routes.compile(source(p) for p in prefixes))
    networks = [ip_network(p) for p in prefixes]
    edges = [
        a for n in networks for a in (int(n.network_address), int(n.broadcast_address) + 1, int(n.broadcast_address))
    ]
    numbers = edges + data.draw(st.lists(st.integers(0, 2**128 - 1), max_size=10))
    for number in numbers:
        for size in (4, 16):
            address = ip_address((number % 2 ** (8 * size)).to_bytes(size, "big"))
            covers = sorted((n for n in networks if address in n), key=lambda n: -n.prefixlen)
            assert [r.prefix for r in table.covering("net", address.packed)] == [str(n) for n in covers]
            found = table.lookup("net", address.packed)
            assert (found and found.prefix) == (str(covers[0]) if covers else None)


@pytest.mark.parametrize(
    ("address", "reason"),
    [
        ("0.0.0.0", "this_network"),
        ("0.1.2.3", "this_network"),
        ("127.0.0.1", "loopback"),
        ("127.255.255.255", "loopback"),
        ("169.254.169.254", "link_local"),
        ("224.0.0.1", "multicast"),
        ("239.255.255.250", "multicast"),
        ("240.0.0.1", "reserved"),
        ("255.255.255.255", "limited_broadcast"),
        ("::", "unspecified"),
        ("::1", "loopback"),
        ("::7f00:1", "v4_compatible"),
        ("::ffff:127.0.0.1", "v4_mapped"),
        ("fe80::1", "link_local"),
        ("febf::1", "link_local"),
        ("ff02::1", "multicast"),
        ("1.1.1.1", None),
        ("10.0.0.1", None),
        ("192.168.1.1", None),
        ("192.0.2.1", None),
        ("126.255.255.255", None),
        ("223.255.255.255", None),
        ("2001:db8::1", None),
        ("fd00::1", None),
        ("::1:0:0", None),
    ],
)
def test_martians(address: str, reason: str | None) -> None:
    why = martian(packed(address))
    assert (why.split()[0] if why else None) == reason
    assert why is None or "RFC" in why
