"""What is equal is one object."""

from __future__ import annotations

import msgspec
import pytest

from falkirk.wire import sharing
from falkirk.wire.context import TunnelContext, shared

FIELDS = ("acme-id", "acme", "laptop-id", "laptop", "main-id", "main", (b"\x64\x60\x00\x01",))


def decoded() -> TunnelContext:
    context = TunnelContext(*FIELDS, "ann-id", "ann", ("eng", "ops"), {"os": "linux"}, {"onramp": "wireguard"})
    return msgspec.msgpack.decode(msgspec.msgpack.encode(context), type=TunnelContext)


def test_contexts_that_were_decoded_apart_share_what_is_equal_and_say_the_same() -> None:
    one, other = shared(decoded()), shared(decoded())
    assert one == other == decoded()
    for name in (
        "tenant_id",
        "tenant",
        "virtual_network_id",
        "virtual_network",
        "user_id",
        "user",
        "groups",
        "posture",
    ):
        assert getattr(one, name) is getattr(other, name), name
    assert one.attributes is other.attributes


def test_what_differs_stays_apart() -> None:
    assert sharing.words(("a", "b")) == ("a", "b")
    assert sharing.words(("b", "a")) == ("b", "a")
    assert sharing.facts({"a": "b"}) is not sharing.facts({"a": "c"})
    assert sharing.facts({"a": "1", "b": "2"}) is sharing.facts({"b": "2", "a": "1"})


def test_what_is_remembered_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sharing, "KEPT", 10)
    for number in range(100):
        assert sharing.words((str(number),)) == (str(number),)
        assert sharing.facts({"n": str(number)}) == {"n": str(number)}
        assert sharing.same(str(number)) == str(number)
    assert max(len(sharing._values), len(sharing._tuples), len(sharing._dicts)) <= 10
