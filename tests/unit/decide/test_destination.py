"""A destination's device travels in a route's entry, and says by itself that there is none."""

from __future__ import annotations

import msgspec

from falkirk.decide.destination import NO_DEVICE, DestinationDevice
from falkirk.decide.routes import RouteEntry

PHONE = DestinationDevice("d", "phone", "bob", ("ops", "staff"))


def test_an_entry_carries_it() -> None:
    entry = RouteEntry("r", "lab", "10.0.0.0/8", "device", device=PHONE)
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(entry), type=RouteEntry) == entry
    assert not entry.own_address


def test_a_device_s_own_address_has_no_route_id() -> None:
    assert RouteEntry("", "device/phone", "100.64.0.2/32", "device", device=PHONE).own_address
    assert not RouteEntry("", "x", "10.0.0.0/8", "internet").own_address


def test_nobody() -> None:
    assert (NO_DEVICE.device_id, NO_DEVICE.device, NO_DEVICE.user, NO_DEVICE.groups) == ("", "", "", ())
