"""The context is a value: equal by content, not to be changed, small where nothing is said."""

from __future__ import annotations

import msgspec
import pytest

from falkirk.wire.context import Framing, TunnelContext

BARE = TunnelContext("t", "acme", "d", "laptop", "v", "default", (bytes([100, 96, 0, 2]),))


def test_defaults() -> None:
    assert (BARE.user_id, BARE.groups, BARE.posture, BARE.attributes) == ("", (), {}, {})
    assert (BARE.device_max_flows, BARE.tenant_max_flows) == (0, 0)


def test_frozen() -> None:
    with pytest.raises(AttributeError):
        BARE.tenant = "other"  # type: ignore[misc]


def test_there_and_back_without_its_defaults() -> None:
    data = msgspec.msgpack.encode(BARE)
    assert b"posture" not in data
    assert msgspec.msgpack.decode(data, type=TunnelContext) == BARE


def test_framings_are_the_words_of_the_handshake() -> None:
    assert [framing.value for framing in Framing] == ["raw", "vnet"]
