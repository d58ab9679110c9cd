"""Which tunnel a device has now, on whatever worker of this node. PURE.

Each worker has the whole directory: its own tunnels it knows first hand, those of others from its parent. A device may have several
tunnels at once; the newest is taken (numbers count up as tunnels are admitted, `falkirk.onramp.tunnel_ids`), and an older one again
when that has closed.

Limit: what a parent says of another worker's tunnels is a message behind; whoever finds a tunnel gone says so (`closed`), and asks again.
"""

from __future__ import annotations

import msgspec

from falkirk.wire.context import Framing


class Attachment(msgspec.Struct, frozen=True, gc=False):
    """An open tunnel, as far as those must know it who forward into it."""

    tunnel: int
    worker: int
    tenant_id: str
    device_id: str
    virtual_network_id: str
    framing: Framing
    mtu: int


class Directory:
    """All open tunnels of the node, by device."""

    def __init__(self) -> None:
        self._tunnels: dict[int, Attachment] = {}
        self._devices: dict[str, tuple[int, ...]] = {}

    def __len__(self) -> int:
        return len(self._tunnels)

    def opened(self, attachment: Attachment) -> None:
        """A tunnel is read from now on; said twice it counts once, the last word is right."""
        self.closed(attachment.tunnel)
        self._tunnels[attachment.tunnel] = attachment
        numbers = self._devices.get(attachment.device_id, ())
        self._devices[attachment.device_id] = tuple(sorted((*numbers, attachment.tunnel)))

    def closed(self, tunnel: int) -> None:
        """A tunnel is over, or was never known."""
        attachment = self._tunnels.pop(tunnel, None)
        if attachment is None:
            return
        numbers = tuple(number for number in self._devices[attachment.device_id] if number != tunnel)
        if numbers:
            self._devices[attachment.device_id] = numbers
        else:
            del self._devices[attachment.device_id]

    def get(self, tunnel: int) -> Attachment | None:
        """An open tunnel, by its number."""
        return self._tunnels.get(tunnel)

    def lost(self, worker: int) -> None:
        """A worker has ended, and nobody reads its tunnels until its successor says so."""
        for attachment in [found for found in self._tunnels.values() if found.worker == worker]:
            self.closed(attachment.tunnel)

    def find(self, tenant_id: str, device_id: str, virtual_network_id: str = "") -> Attachment | None:
        """The device's newest tunnel; in one virtual network only where that is given. A tenant finds its own devices only."""
        for number in reversed(self._devices.get(device_id, ())):
            attachment = self._tunnels[number]
            if attachment.tenant_id != tenant_id:
                continue
            if not virtual_network_id or attachment.virtual_network_id == virtual_network_id:
                return attachment
        return None
