"""The tunnels of a worker: adopted from on-ramps, written to with a bounded queue, closed with their flows.

A tunnel that is full makes its own packets wait, up to `tunnel_queue_bytes`; more are dropped and counted. It never makes anyone else's
wait: nothing here blocks, and no TUN device is paused for it.
"""

from __future__ import annotations

import contextlib
import os
import re
import select
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

import msgspec

from falkirk.flow import control, peers
from falkirk.flow.bearers import DeviceBearer, SocketBearer
from falkirk.flow.lane import ZERO_HEADER
from falkirk.flow.siblings import PACKET
from falkirk.flow.table import NOBODY, Bearer, DeviceCounts, Distant, Flow, Tunnel
from falkirk.linux import seqpacket, tun
from falkirk.wire.context import Framing, Transport, TunnelContext, shared
from falkirk.wire.handover import Adopt, Held, Message, Traced, TunnelClosed, encode

if TYPE_CHECKING:
    from falkirk.flow.worker import Worker

MIN_MTU: Final = 576
MAX_MTU: Final = 65535
TENANT_ID: Final = re.compile("[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
FIXED: Final = ("tenant_id", "device_id", "virtual_network_id", "addresses", "packed")
"""What never changes in a tunnel's context."""
MAX_TRACED: Final = 1024
"""Datagrams waiting for an on-ramp, beyond which it isn't told of sampled flows."""
MAX_WORD: Final = 1024
"""Bytes of what a producer says beside its device."""
WANTED: Final = b'{"wanted":"device"}'
"""A worker that took the tunnel over asks for the device again."""
ATTACHED: Final = b'{"attached":"device"}'


def tell(link: int, word: bytes) -> None:
    """Say something on a tunnel's connection. A producer that doesn't read, or is gone, is found out by its hang-up."""
    with contextlib.suppress(OSError):
        os.write(link, word)


class Tunnels(dict[int, Tunnel]):
    """By number."""

    def __init__(self, worker: Worker) -> None:
        super().__init__()
        self._worker = worker
        self.devices: dict[str, DeviceCounts] = {}
        """What each device has, over all its tunnels."""

    def reach(self, number: int) -> Tunnel | None:
        """A tunnel of this worker, or what stands for another's; None where nobody has it open."""
        if (tunnel := self.get(number)) is not None:
            return tunnel
        found = self._worker.forward.directory.get(number)
        return self._worker.lowering.tunnel_of(found) if found is not None else None

    def say(self, tunnel: Tunnel, packet: bytes, *, counted: bool = True) -> bool:
        """Send a packet of our own to a tunnel."""
        return self.deliver(tunnel, packet if tunnel.framing is Framing.RAW else ZERO_HEADER + packet, counted=counted)

    def deliver(self, tunnel: Tunnel, data: bytes | memoryview, *, counted: bool = True, packets: int = 1) -> bool:
        """Send a datagram to a tunnel; what it doesn't take waits, up to the queue's bound; more is dropped.

        `counted` where it stands for packets that were received: one that nobody sent us isn't a drop.
        """
        worker = self._worker
        bearer = tunnel.bearer
        if not bearer.open:
            if isinstance(tunnel, Distant):
                # What nobody sent us doesn't wait, as it mustn't be counted where it is dropped.
                return (counted or not tunnel.sibling.backlog) and tunnel.sibling.packet(
                    PACKET, tunnel.id, 0, memoryview(data)
                )
            if counted:
                worker.drop("tunnel_closed", packets)
            return False
        if not tunnel.queue:
            try:
                bearer.write(tunnel, data)
            except BlockingIOError:
                pass
            except OSError:
                if counted:
                    worker.drop("tunnel_closed", packets)
                return False
            else:
                return True
        if tunnel.queued + len(data) > worker.settings.tunnel_queue_bytes or not bearer.room(len(data)):
            if counted:
                worker.drop(bearer.full, packets)
            return False
        bearer.keep(tunnel, bytes(data))
        return True

    def adopt(self, link: peers.OnrampLink, message: Adopt, fd: int) -> tuple[str, str] | None:
        """Read a tunnel from now on; or why not (code, message). `fd` is negative where it comes by the link's trunk."""
        worker = self._worker
        context = shared(message.context)
        if not (
            0 < message.tunnel < 1 << 32
            and MIN_MTU <= message.mtu <= MAX_MTU
            and TENANT_ID.fullmatch(context.tenant_id)
        ):
            return "INVALID", "the tunnel's number, its MTU or its tenant's id can't be one"
        trunk = worker.trunks.get(link.onramp) if message.transport is Transport.TRUNK else None
        if message.transport is Transport.TRUNK:
            if trunk is None:
                return "NO_TRUNK", "the on-ramp worker has no trunk"
            if message.framing is not Framing.RAW:
                return "INVALID", "a trunk carries plain packets"
        elif not peers.grow(fd):
            return "INVALID", "the descriptor isn't a SEQPACKET socket"
        row = worker.tenants.row(bytes.fromhex(context.tenant_id.replace("-", "")))
        if row is None:
            return "LIMIT", "this node carries as many tenants as it can"
        device = self.devices.setdefault(context.device_id, DeviceCounts())
        device.tunnels += 1
        bearer: Bearer
        if trunk is not None:
            bearer = trunk
        else:
            os.set_blocking(fd, False)
            bearer = DeviceBearer(worker, fd) if message.transport is Transport.DEVICE else SocketBearer(worker, fd)
        tunnel = Tunnel(message.tunnel, context, message.framing, message.mtu, bearer, row, device)
        tunnel.onramp = link.onramp
        self[message.tunnel] = tunnel
        worker.forward.tunnel_opened(tunnel)
        worker.orphans.remember(message.tunnel, context)
        if isinstance(bearer, DeviceBearer):
            worker.watch(fd, peers.READ, lambda mask: self._attach(tunnel, bearer))
            tell(fd, message.greeting or WANTED)
        elif isinstance(bearer, SocketBearer):
            worker.watch(fd, peers.READ, self._readable(tunnel, bearer))
            if message.greeting:
                self.deliver(tunnel, message.greeting, counted=False)
        worker.tell(control.TunnelOpened(message.tunnel, context, message.framing, message.mtu))
        return None

    def _readable(self, tunnel: Tunnel, bearer: SocketBearer) -> Callable[[int], None]:
        lane = self._worker.lane(tunnel.framing)

        def ready(mask: int) -> None:
            if mask & select.EPOLLOUT:
                bearer.serve(tunnel)
            if mask & ~select.EPOLLOUT:
                gone = mask & (select.EPOLLHUP | select.EPOLLRDHUP | select.EPOLLERR) != 0
                if not lane.from_tunnel(tunnel, gone):
                    self.close(tunnel.id, "closed by the producer")

        return ready

    def _attach(self, tunnel: Tunnel, bearer: DeviceBearer) -> None:
        """The producer says something on the connection of a device tunnel: here is the device, or nothing any more."""
        link = bearer.descriptor
        try:
            received = seqpacket.receive(link, MAX_WORD)
        except OSError:
            received = b"", []
        if received is None:
            return
        data, fds = received
        fault = "the tunnel has its device already" if bearer.open else ""
        fault = fault or ("" if len(fds) == 1 else f"expected one descriptor, got {len(fds)}")
        fault = fault or tun.fault(fds[0], vnet=tunnel.framing is Framing.VNET)
        if data and not fault:
            bearer.attach(fds[0])
            self._worker.watch(fds[0], select.EPOLLIN, self._readable(tunnel, bearer))
            tell(link, ATTACHED)
            return
        for fd in fds:
            os.close(fd)
        if not data:
            self.close(tunnel.id, "closed by the producer")
            return
        tell(link, msgspec.json.encode({"error": {"code": "BAD_DEVICE", "message": fault}}))
        self.close(tunnel.id, f"no device: {fault}")

    def carries(self, number: int) -> bool:
        """Whether a tunnel's packets can be written, here or by another worker: a device may still be awaited."""
        tunnel = self.reach(number)
        return tunnel is not None and (tunnel.bearer.open or isinstance(tunnel, Distant))

    def recontext(self, number: int, context: TunnelContext) -> None:
        """A tunnel's device or user has changed: what is known of it holds for new flows, and live ones are reviewed."""
        worker = self._worker
        tunnel = self.get(number)
        if tunnel is None or tunnel.context == context:
            return
        if any(getattr(context, name) != getattr(tunnel.context, name) for name in FIXED):
            # The on-ramp closes a tunnel whose device is another one or lies elsewhere; who doesn't is not to be believed.
            self.close(number, "context_refused")
            return
        tunnel.recontext(shared(context))
        worker.orphans.remember(number, context)
        worker.taps.forget()
        worker.review.tunnel(tunnel)
        worker.tell(control.TunnelOpened(number, context, tunnel.framing, tunnel.mtu))

    def close(self, number: int, reason: str) -> None:
        """End a tunnel and its flows."""
        worker = self._worker
        tunnel = self.pop(number, None)
        if tunnel is None:
            return
        for flow in list(tunnel.flows.values()):
            flow.owner.cut(flow, "tunnel_closed")
        worker.forward.tunnel_closed(tunnel)
        worker.fragments.close(tunnel)
        tunnel.bearer.close(tunnel)
        tunnel.bearer = NOBODY
        tunnel.device.tunnels -= 1
        if not tunnel.device.tunnels:
            self.devices.pop(tunnel.context.device_id, None)
        for link in self._onramps(tunnel):
            link.send([TunnelClosed(number, reason)])
        worker.tell(control.TunnelEnded(number))
        worker.log.info("tunnel_closed", tunnel=number, reason=reason)

    def onramp_arrived(self, link: peers.OnrampLink) -> None:
        """A (new) on-ramp worker said hello: tell it what is its own and read here, with copies of what has descriptors."""
        link.send([self._worker.hello()])
        others: list[Message] = []
        for tunnel in [tunnel for tunnel in self.values() if tunnel.onramp == link.onramp]:
            bearer = tunnel.bearer
            held = Held(
                tunnel.id,
                tunnel.context,
                tunnel.framing,
                tunnel.mtu,
                bearer.transport,
                descriptors=int(bearer.descriptor >= 0),
                busy=bool(tunnel.flows or tunnel.passages),
            )
            if held.descriptors:
                link.send_data(encode([held]), [bearer.descriptor])
            else:
                others.append(held)
        link.send(others)

    def trace(self, flow: Flow, flow_id: bytes, wall: int) -> None:
        """A sampled flow began, at `wall` nanoseconds: let the on-ramp add its span."""
        for link in self._onramps(flow.tunnel):
            if link.backlog < MAX_TRACED:
                link.send([Traced(flow.tunnel.id, flow_id, flow.span_id, wall)])

    def _onramps(self, tunnel: Tunnel) -> list[peers.OnrampLink]:
        """The connections of a tunnel's on-ramp worker: one, none while that is away, for a moment two where it was replaced."""
        return [link for link in self._worker.onramps if link.onramp == tunnel.onramp]
