"""The fast path. A lane is one kind of tunnel's way through the NAT: its TUN device, its slots, its receive buffer. There are two of each kind, one where
packets are lifted and one where streams are lowered (`falkirk.flow.lowering`): a tunnel is read by the first, and each flow knows by which device its
packets go on.

A packet lies at byte 10 of the buffer, behind a virtio-net header, whichever way it goes; for `raw` tunnels that header is
all zero. Signatures, addresses and ports are contiguous in a header without options, so one slice finds the flow and one
assignment rewrites it. Whatever isn't a plain TCP segment of a known, established flow goes to the slow path
(`falkirk.flow.ingress`), which parses everything.

A lifted packet ends here as an IP packet, so its TTL is checked, not decremented.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Final

from falkirk.flow.counters import FORWARDED, RECEIVED
from falkirk.flow.slots import SlotPool
from falkirk.flow.table import IPV6, State, TcpLift, Tunnel
from falkirk.wire.context import Framing

if TYPE_CHECKING:
    from falkirk.flow.orphans import Orphan
    from falkirk.flow.worker import Worker

HEADER: Final = 10
"""Bytes of the virtio-net header."""
BUFFER: Final = HEADER + 65536 + 6
BUDGET: Final = 64
"""Datagrams (packets, where several came in one) of one descriptor a turn, so that no tunnel starves another."""
ZERO_HEADER: Final = bytes(HEADER)


class Lane:
    """One kind's device, slots and buffer."""

    def __init__(self, worker: Worker, framing: Framing, pool: SlotPool, first_slot: int, slots: int) -> None:
        self.worker = worker
        self.framing = framing
        self.raw = framing is Framing.RAW
        self.pool = pool
        self.first_slot = first_slot
        """The slot number of index 0 of this kind."""
        self.flows: list[TcpLift | None] = [None] * slots
        """Flows by the index of their slot."""
        self.tun = -1
        self.slot_base = 0
        """The low 24 bits of the address of index 0."""
        self.waiting = 0
        """Packets of this turn that wait for the rest of their fragments: what is `received` is known later."""
        self.buffer = bytearray(BUFFER)
        self.view = memoryview(self.buffer)
        self.words = self.view.cast("H")
        self._whole = [self.view]

    def from_tunnel(self, tunnel: Tunnel, hung_up: bool) -> bool:
        """Read a tunnel until it is empty or the budget is spent. False where it is over."""
        buffers = self._whole
        read = tunnel.bearer.read
        received = 0
        alive = True
        for _ in range(BUDGET):
            try:
                size = read(buffers)
            except BlockingIOError:
                break
            except OSError:
                alive = False
                break
            if not size:
                if hung_up or tunnel.bearer.ended():
                    alive = False
                    break
                received += 1
                self.worker.drop("empty_datagram")
            else:
                received += 1
                self.up(tunnel, size)
        self.worker.counts[RECEIVED] += received - self.waiting
        self.waiting = 0
        return alive

    def up(self, tunnel: Tunnel, end: int) -> None:
        """A packet at [10, end) of the buffer, from a tunnel."""
        buffer = self.buffer
        view = self.view
        words = self.words
        first = buffer[10]
        if first == 0x45 and buffer[19] == 6 and end >= 50:
            flow = tunnel.lifts.get(view[22:34].tobytes())
            if (
                flow is None
                or end - 10 != buffer[12] << 8 | buffer[13]
                or buffer[16] & 0x3F
                or buffer[17]
                or buffer[18] < 2
                or int.from_bytes(view[10:30], "little") % 0xFFFF
            ):
                return self.worker.ingress.packet(self, tunnel, end)
            l4 = 30
        elif first >> 4 == 6 and buffer[16] == 6 and end >= 70:
            flow = tunnel.lifts.get(view[18:54].tobytes())
            if flow is None or end - 50 != buffer[14] << 8 | buffer[15] or buffer[17] < 2:
                return self.worker.ingress.packet(self, tunnel, end)
            l4 = 50
        elif first == 0x45 and buffer[19] == 17 and end >= 38:
            return self.worker.udp.up4(self, tunnel, end)
        elif first >> 4 == 6 and buffer[16] == 17 and end >= 58:
            return self.worker.udp.up6(self, tunnel, end)
        else:
            return self.worker.ingress.packet(self, tunnel, end)
        header = view[:10].tobytes()
        if header == flow.vnet_ok:
            view[:10] = flow.vnet_put
        elif not self.worker.ingress.vnet(self, flow, l4, end):
            return None
        flags = buffer[l4 + 13]
        worker = self.worker
        if (flags & 7 or flow.state is not State.ESTABLISHED) and not flow.owner.segment_up(flow, buffer, l4, end):
            return None
        if l4 == 30:
            view[22:34] = flow.forward
            words[10] = (words[10] - flow.delta_addresses) % 0xFFFF
            at = 23
        else:
            view[18:54] = flow.forward
            at = 33
        if buffer[0] & 1:
            # The uncomplemented pseudo-header sum: the device completes the checksum.
            words[at] = (words[at] + flow.delta_addresses) % 0xFFFF
        else:
            words[at] = (words[at] - flow.delta_all) % 0xFFFF
        flow.bytes_up += end - 10
        flow.packets_up += 1
        if flow.tick != worker.second:
            flow.tick = worker.second
            worker.dirty.append(flow)
        try:
            os.write(flow.lane.tun, view[:end])
        except OSError:
            worker.drop("tun_write_error")
        else:
            worker.counts[FORWARDED] += 1
        return None

    def free(self, flow: TcpLift) -> None:
        """Its slot rests from now on."""
        index = flow.slot - self.first_slot
        self.flows[index] = None
        self.pool.release(index, self.worker.second, long=flow.long_rest)

    def put(self, packet: bytes) -> None:
        """Write a packet that is ready, with complete checksums, to the device. Raises OSError."""
        os.writev(self.tun, [ZERO_HEADER, packet])

    def ready(self) -> tuple[bytes, bytes]:
        """What is in the buffer: virtio-net header, and the packet as long as it says that it is."""
        buffer = self.buffer
        length = buffer[12] << 8 | buffer[13] if buffer[10] >> 4 == 4 else 40 + (buffer[14] << 8 | buffer[15])
        return self.view[:HEADER].tobytes(), self.view[HEADER : HEADER + length].tobytes()

    def readable(self, _: int) -> None:
        """What epoll says of the device."""
        self.from_tun()

    def from_tun(self) -> int:
        """Read the device until it is empty or the budget is spent; returns how many packets there were."""
        buffers = self._whole
        tun = self.tun
        readv = os.readv
        received = 0
        for _ in range(BUDGET):
            try:
                end = readv(tun, buffers)
            except BlockingIOError:
                break
            except OSError:
                end = 0
            if not end:
                # The device is gone; the upgrader's next ones take its place.
                self.worker.unwatch(tun)
                break
            received += 1
            self._down(end)
        self.worker.counts[RECEIVED] += received
        return received

    def _down(self, end: int) -> None:
        """A packet at [10, end) of the buffer, from the private namespace's kernel."""
        buffer = self.buffer
        view = self.view
        words = self.words
        worker = self.worker
        if buffer[10] == 0x45 and buffer[19] == 6:
            index = (buffer[27] << 16 | buffer[28] << 8 | buffer[29]) - self.slot_base
            port = words[16]
            l4 = 30
        elif buffer[10] >> 4 == 6 and buffer[16] == 6:
            index = (buffer[47] << 16 | buffer[48] << 8 | buffer[49]) - self.slot_base
            port = words[26] | IPV6
            l4 = 50
        else:
            return worker.egress.other(self, end)
        flow = self.flows[index] if 0 <= index < len(self.flows) else None
        if flow is None or flow.port != port:
            return worker.egress.unknown(self, end, index, l4)
        self.rewrite_back(flow, l4)
        flow.bytes_down += end - 10
        flow.packets_down += 1
        if flow.tick != worker.second:
            flow.tick = worker.second
            worker.dirty.append(flow)
        if buffer[l4 + 13] & 7 or flow.state is not State.ESTABLISHED:
            flow.owner.segment_down(flow, buffer, l4, end)
        if worker.deliver(flow.tunnel, view[10:end] if self.raw else view[:end]):
            worker.counts[FORWARDED] += 1
        return None

    def rewrite_back(self, flow: TcpLift | Orphan, l4: int) -> None:
        """Give a segment from the private namespace the initiator's view of its signature."""
        words = self.words
        if l4 == 30:
            self.view[22:34] = flow.back
            words[10] = (words[10] + flow.delta_addresses) % 0xFFFF
            at = 23
        else:
            self.view[18:54] = flow.back
            at = 33
        if self.buffer[0] & 1:
            words[at] = (words[at] - flow.delta_addresses) % 0xFFFF
        else:
            words[at] = (words[at] + flow.delta_all) % 0xFFFF
