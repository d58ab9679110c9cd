"""The device that a destination leads to, as rules see it. PURE.

The router writes it into the routes that lead to a device, from the registry's devices and users; so whoever has the route knows
whom the flow is for, whether or not that device has a tunnel now.

Limit: names and groups only; rules don't see the destination's posture.
"""

from __future__ import annotations

from typing import Final

import msgspec


class DestinationDevice(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """A device at the other end; all empty where there is none."""

    device_id: str = ""
    device: str = ""
    user: str = ""
    """The owner's name; empty for a device without one."""
    groups: tuple[str, ...] = ()
    """Of the owner and of the device, sorted."""


NO_DEVICE: Final = DestinationDevice()
"""The destination isn't a device."""
