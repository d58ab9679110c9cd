"""What may stand in a field."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from falkirk.registry import fields
from falkirk.registry.refusal import Reason, Refused
from tests.unit.registry.conftest import refused


@pytest.mark.parametrize("name", ["a", "a-b", "0", "x" * 63, "a--b", "10-1-0-0"])
def test_label_takes_rfc1123_labels(name: str) -> None:
    assert fields.label(name, "metadata.name") == name


@pytest.mark.parametrize(
    "name",
    ["", "-a", "a-", "A", "a_b", "a.b", "x" * 64, "é", "a\n", " a", "0b6f2a3c-9d1e-4f5a-8b7c-1234567890ab"],
)
def test_label_refuses_others(name: str) -> None:
    refusal = refused(lambda: fields.label(name, "metadata.name"))
    assert refusal.reason is Reason.INVALID_NAME
    assert refusal.about["field"] == "metadata.name"


@pytest.mark.parametrize(
    ("given_text", "canonical"),
    [
        ("10.1.0.0/16", "10.1.0.0/16"),
        ("0.0.0.0/0", "0.0.0.0/0"),
        ("::/0", "::/0"),
        ("2001:DB8:0:0::/32", "2001:db8::/32"),
        ("192.0.2.7", "192.0.2.7/32"),
        ("10.0.0.0/255.0.0.0", "10.0.0.0/8"),
    ],
)
def test_prefix_is_brought_to_canonical_form(given_text: str, canonical: str) -> None:
    assert fields.prefix(given_text, "prefix") == canonical


def test_prefix_with_host_bits_is_refused_with_what_was_meant() -> None:
    refusal = refused(lambda: fields.prefix("10.1.2.3/16", "prefix"))
    assert (refusal.reason, refusal.about) == (Reason.HOST_BITS_SET, {"field": "prefix", "suggestion": "10.1.0.0/16"})


@pytest.mark.parametrize("text", ["", "10.0.0.0/33", "10.0/8", "example.com", "fe80::%eth0/64", "1.2.3.4/", "/8"])
def test_prefix_refuses_what_is_none(text: str) -> None:
    assert refused(lambda: fields.prefix(text, "prefix")).reason is Reason.INVALID_FIELD


@given(st.text(max_size=50))
def test_prefix_and_address_never_fail_otherwise(text: str) -> None:
    for judge in (fields.prefix, fields.address, fields.label, fields.email, fields.pool4, fields.pool6):
        with contextlib.suppress(Refused):
            judge(text, "f")


@pytest.mark.parametrize(
    ("text", "version", "canonical"),
    [("100.96.0.2", 4, "100.96.0.2"), ("2001:DB8::0:1", 6, "2001:db8::1"), ("fd00::5", 0, "fd00::5")],
)
def test_address_is_brought_to_canonical_form(text: str, version: int, canonical: str) -> None:
    assert fields.address(text, "a", version) == canonical


@pytest.mark.parametrize(
    ("text", "version"),
    [
        ("10.0.0.1", 6),
        ("fd00::1", 4),
        ("127.0.0.1", 0),
        ("0.0.0.0", 0),
        ("0.1.2.3", 0),
        ("224.0.0.1", 0),
        ("255.255.255.255", 0),
        ("240.0.0.1", 0),
        ("169.254.1.1", 0),
        ("::1", 0),
        ("::", 0),
        ("ff02::1", 0),
        ("fe80::1", 0),
        ("fe80::1%eth0", 0),
        ("::ffff:10.0.0.1", 0),
        ("10.0.0.1/32", 0),
        ("", 0),
    ],
)
def test_address_refuses_what_no_device_can_have(text: str, version: int) -> None:
    assert refused(lambda: fields.address(text, "a", version)).reason is Reason.INVALID_FIELD


@pytest.mark.parametrize(
    ("judge", "good", "bad"),
    [
        (
            fields.pool4,
            "10.20.0.0/16",
            ["10.0.0.0/7", "10.0.0.0/30", "224.0.0.0/8", "127.0.0.0/8", "fd00::/64", "10.0.0.1/16"],
        ),
        (fields.pool6, "fd01:203:405::/64", ["fc00::/64", "2001:db8::/64", "fd00::/48", "10.0.0.0/8", "fd00::1/64"]),
        (fields.email, "a@example.com", ["a", "@", "a@", "a b@c", "a@b@c", "x" * 251 + "@y.z", "a@b\x00"]),
    ],
)
def test_pools_and_mail_addresses(judge: Callable[[str, str], str], good: str, bad: list[str]) -> None:
    assert judge(good, "f") == good
    for text in bad:
        refused(lambda text=text: judge(text, "f"))  # type: ignore[misc]


def test_words_are_kept_in_order_and_refused_by_position() -> None:
    assert fields.words(["ops", "eng"], "groups") == ["ops", "eng"]
    for bad, place in [
        (["a", "a"], "groups[1]"),
        ([""], "groups[0]"),
        (["x", " y"], "groups[1]"),
        (["x" * 129], "groups[0]"),
    ]:
        assert refused(lambda bad=bad: fields.words(bad, "groups")).about["field"] == place  # type: ignore[misc]
    assert refused(lambda: fields.words([str(n) for n in range(65)], "groups")).about["field"] == "groups"


def test_pairs_text_and_numbers_have_limits() -> None:
    fields.pairs({"os": "linux", "note": "two\nlines"}, "posture")
    assert refused(lambda: fields.pairs({"os": "x" * 1025}, "posture")).about["field"] == "posture[os]"
    assert refused(lambda: fields.pairs({"": "x"}, "posture")).about["field"] == "posture[]"
    assert refused(lambda: fields.pairs({str(n): "" for n in range(65)}, "posture")).about["field"] == "posture"
    assert refused(lambda: fields.text("bell\x07", "comment")).about["field"] == "comment"
    assert refused(lambda: fields.at_most(5, "max", 4)).about["field"] == "max"
    assert refused(lambda: fields.empty("x", "metadata.id")).about["field"] == "metadata.id"


def test_a_public_key_is_canonical_base64_of_32_bytes_and_is_not_shown() -> None:
    good = "xTIBA5rboUvnH4htodjb6e697QjLERt1NAB4mZqp8Dg="
    assert fields.public_key(good, "public_key") == good
    assert fields.public_key("", "public_key") == ""
    for bad in (good[:-1], good[:-2] + "h=", good + "A", good + "\n", "a" * 44, "A" * 43 + "=", good.replace("x", "é")):
        refusal = refused(lambda text=bad: fields.public_key(text, "public_key"))  # type: ignore[misc]
        assert refusal.reason is Reason.INVALID_FIELD
        assert good[:8] not in refusal.message


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ("192.0.2.1:51820", "192.0.2.1:51820"),
        ("[2001:DB8::1]:51820", "[2001:db8::1]:51820"),
        ("VPN.example.com:443", "vpn.example.com:443"),
    ],
)
def test_endpoints_are_kept_in_one_form(given: str, kept: str) -> None:
    assert fields.endpoints([given], "endpoints") == [kept]


@pytest.mark.parametrize(
    "given",
    [
        "192.0.2.1",
        "192.0.2.1:0",
        "192.0.2.1:65536",
        "2001:db8::1:443",
        "[192.0.2:443",
        "[::z]:1",
        "999.1.1.1:1",
        "a_b:1",
        ":1",
        "host:x",
    ],
)
def test_what_isn_t_an_endpoint_is_refused(given: str) -> None:
    with pytest.raises(Refused) as caught:
        fields.endpoints(["192.0.2.9:1", given], "endpoints")
    assert caught.value.about["field"] == "endpoints[1]"


def test_endpoints_stand_once_and_are_few() -> None:
    with pytest.raises(Refused, match="twice"):
        fields.endpoints(["h:1", "H:1"], "endpoints")
    with pytest.raises(Refused, match="at most 8"):
        fields.endpoints([f"h{number}:1" for number in range(9)], "endpoints")


@pytest.mark.parametrize(("seconds", "nanos"), [(0, 0), (-1, 0), (253_402_300_800, 0), (1, -1), (1, 1_000_000_000)])
def test_a_time_must_be_one(seconds: int, nanos: int) -> None:
    with pytest.raises(Refused):
        fields.instant(seconds, nanos, "expire_time")


def test_a_time_counts_nanoseconds() -> None:
    assert fields.instant(2, 5, "expire_time") == 2_000_000_005
