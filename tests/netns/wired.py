"""A client whose cable is in the test's hands: what passes between its kernel and the mesh can be seen, dropped and added to.

A `WiredClient` is a `Client` of `fidelity` (its sockets are made by `socket` and `call`), but its packets are moved by a thread of the test
and not by `falkirk lower`. Its device may have a larger MTU than the tunnel, which no well-behaved producer has.

Packets are shown behind their virtio-net headers, which are zero where the framing is `raw`.
"""

from __future__ import annotations

import ipaddress
import os
import select
import socket
import threading
from collections.abc import Callable

from falkirk.linux import netns, tun
from falkirk.linux.lower.admission import Admitted, admit
from falkirk.linux.lower.request import LowerRequest
from falkirk.linux.netlink import Netlink
from falkirk.wire import vnet
from falkirk.wire.context import Framing, Transport
from falkirk.wire.packet import split
from tests.netns.conftest import in_thread
from tests.netns.fidelity import Client
from tools.mesh import Mesh

DEVICE = "wired0"
HEADER = vnet.SIZE


def on_the_wire(data: bytes) -> int:
    """Bytes of the packet behind its virtio-net header, or of the largest of those that a super-packet stands for."""
    head = vnet.unpack(data, 0, len(data))
    if not head.gso_type:
        return len(data) - HEADER
    length = head.csum_start + (data[HEADER + head.csum_start + 12] >> 4 << 2) + head.gso_size
    return min(length, len(data) - HEADER)


class WiredClient(Client):
    """A device's network stack in a namespace of its own."""

    def __init__(self, mesh: Mesh, device: str, framing: str, *, mtu: int = 0, tenant: str = "acme") -> None:
        """`mtu` is the device's; 0 takes the tunnel's."""
        self.tenant, self.device, self.framing = tenant, device, framing
        self._tunnel, admitted = admit(self._request(mesh))
        self._tunnel.setblocking(True)
        self.mtu = admitted.mtu
        """The tunnel's."""
        self.addresses = {len(address): address for address in admitted.packed()}
        """By their length in bytes."""
        self.namespace = in_thread(netns.unshare_network, lambda: netns.self_descriptor("net"))
        self._raw = framing == Framing.RAW
        self._device = self.call(self._configure, admitted, mtu or admitted.mtu)
        self.up: Callable[[bytes], bool] = lambda data: True
        """Whether a packet to the mesh passes."""
        self.down: Callable[[bytes], bool] = lambda data: True
        """Whether a packet from the mesh passes."""
        self._woken, self._wake = os.pipe()
        self._thread = threading.Thread(target=self._carry)
        self._thread.start()

    def _request(self, mesh: Mesh) -> LowerRequest:
        path, framing = str(mesh.run_dir / "tunnel.sock"), Framing(self.framing)
        return LowerRequest(path, self.tenant, self.device, (), framing=framing, transport=Transport.SOCKET)

    def inject(self, packet: bytes) -> None:
        """Send a packet to the mesh that no kernel has made; its checksums are complete."""
        self._tunnel.send(packet if self._raw else vnet.ZERO + packet)

    def close(self) -> None:
        """End the tunnel and the namespace."""
        os.close(self._wake)
        self._thread.join()
        self._tunnel.close()
        for descriptor in (self._device, self._woken, self.namespace):
            os.close(descriptor)

    def _configure(self, admitted: Admitted, mtu: int) -> int:
        vnet_device = not self._raw
        device = tun.open_tun(DEVICE, vnet_device, tun.TCP_OFFLOADS if vnet_device else tun.NO_OFFLOADS)
        index = socket.if_nametoindex(DEVICE)
        with Netlink() as links:
            links.set_link(socket.if_nametoindex("lo"))
            links.no_generated_addresses(index)
            links.set_link(index, mtu=mtu, queue=tun.TX_QUEUE_LENGTH)
            for address in admitted.packed():
                links.add_address(index, address, 8 * len(address))
                links.add_route(index, bytes(len(address)), 0)
        return device

    def _carry(self) -> None:
        poll = select.poll()
        tunnel = self._tunnel.fileno()
        for descriptor in (self._device, tunnel, self._woken):
            poll.register(descriptor, select.POLLIN)
        while True:
            for descriptor, _ in poll.poll():
                if descriptor == self._woken:
                    return
                if descriptor == self._device:
                    self._take()
                elif not self._give():
                    poll.unregister(tunnel)

    def _take(self) -> None:
        data = os.read(self._device, tun.MAX_READ)
        shown = vnet.ZERO + data if self._raw else data
        if self.up(shown):
            self._tunnel.send(data)

    def _give(self) -> bool:
        data = self._tunnel.recv(2 * tun.MAX_READ)
        if not data:
            return False
        packets = [data[at : at + size] for at, size in split(data, len(data))] if self._raw else [data]
        for packet in packets:
            if self.down(vnet.ZERO + packet if self._raw else packet):
                os.write(self._device, packet)
        return True


def packed(address: str) -> bytes:
    """An address as 4 or 16 bytes."""
    return ipaddress.ip_address(address).packed
