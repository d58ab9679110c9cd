"""The fast path of `raw` tunnels, where every packet is a plain one: there are forty for each super-packet of a `vnet` tunnel.

    tunnel ──► arena ──► walk ──► runs joined, one write each     coalesce.py, PURE
                           │ ├──► plain segments, rewritten in place
                           │ ├──► UDP of known sessions, from its place to the socket    udp_trains.py
                           └────► all else: to the lane's own buffer, and its slow path
    device ──► arena ──► rewritten in place ──► one datagram for several packets of a tunnel that asked for it (`packed`)

Up, datagrams are read one behind another into an arena, so that a run of segments may go across them. Down likewise: what the device
gave for one tunnel leaves as one datagram, of at most `PACK` bytes, in the order in which it came; before a packet takes the
slow path, what was kept leaves, so that nothing overtakes. Both are empty again at the end of each drain.

The device has a virtio-net header and no offloads: its reads are plain packets with complete checksums, its writes may be super-packets.
"""

from __future__ import annotations

import os
from os import writev
from struct import Struct
from typing import TYPE_CHECKING, Final

from falkirk.flow.coalesce import Coalescer, Run, count
from falkirk.flow.counters import FORWARDED, RECEIVED
from falkirk.flow.lane import HEADER, ZERO_HEADER, Lane
from falkirk.flow.table import IPV6, State, TcpLift, Tunnel
from falkirk.wire.trunk import DATAGRAM

if TYPE_CHECKING:
    from falkirk.flow.slots import SlotPool
    from falkirk.flow.trunks import Trunk
    from falkirk.flow.worker import Worker
    from falkirk.wire.context import Framing

ARENA: Final = 4 * DATAGRAM
ROOM: Final = ARENA - DATAGRAM
"""Where the last datagram may begin."""
PACKETS: Final = 512
"""Packets of one tunnel a turn, so that no tunnel starves another; the datagram that reaches it is finished."""
TRUNK_PACKETS: Final = 4 * PACKETS
"""Of a trunk, which has many tunnels."""
SLOW: Final = 8
"""For how many of those one stands that takes the slow path."""
READS: Final = 128
"""Packets of the device a turn."""
_PUT4: Final = Struct(">H12s").pack_into
"""An IPv4 header's checksum and signature."""
_PUT: Final = Struct(">H").pack_into
_DOWN4: Final = Struct(">BxxxxxxxxBH4xI2xH9xB2xH").unpack_from
"""First byte, protocol, checksum; destination, port; flags, checksum."""
_DOWN6: Final = Struct(">B5xB29xI2xH9xB2xH").unpack_from
"""First byte, next header; the destination's last four bytes, port; flags, checksum."""


class RawLane(Lane):
    """The lane of plain packets."""

    def __init__(self, worker: Worker, framing: Framing, pool: SlotPool, first_slot: int, slots: int) -> None:
        super().__init__(worker, framing, pool, first_slot, slots)
        self._arena = bytearray(ARENA)
        self._arena_view = memoryview(self._arena)
        self._coalescer = Coalescer(self._arena, self, enabled=worker.settings.coalesce)
        self._tunnel: Tunnel | None = None
        """Whose packets are in the arena."""
        self._sent = 0
        """Packets that this drain has written to the device, uncounted so far."""
        self._slow = 0
        """What this drain's slow packets have spent of the budget."""
        self._down_arena = bytearray(ARENA)
        self._down_view = memoryview(self._down_arena)
        self._packs: dict[Tunnel, _Pack] = {}
        """Packets that wait for the end of the drain."""

    # from a tunnel

    def from_tunnel(self, tunnel: Tunnel, hung_up: bool) -> bool:
        """Read a tunnel until it is empty or the budget is spent. False where it is over."""
        view = self._arena_view
        read = tunnel.bearer.read
        walk = self._walk
        self._tunnel = tunnel
        self._slow = at = received = 0
        alive = True
        while received + self._slow < PACKETS:
            try:
                size = read((view[at : at + DATAGRAM],))
            except BlockingIOError:
                break
            except OSError:
                alive = False
                break
            if size:
                received += walk(tunnel, at, at + size)
                at += size
                if at > ROOM:
                    self._flush()
                    at = 0
            elif hung_up or tunnel.bearer.ended():
                alive = False
                break
            else:
                received += 1
                self.worker.drop("empty_datagram")
        self._flush()
        self.settle()
        self.worker.counts[RECEIVED] += received - self.waiting
        self.waiting = 0
        return alive

    def _flush(self) -> None:
        """Nothing refers to the arena any more."""
        self._coalescer.flush()
        if self.worker.udp.runs:
            self.worker.udp.flush()

    def from_trunk(self, trunk: Trunk) -> bool:
        """The same for a trunk, and every tunnel of which there is a datagram."""
        view = self._arena_view
        tunnel: Tunnel | None = None
        self._slow = at = received = 0
        alive = True
        while received + self._slow < TRUNK_PACKETS:
            try:
                size = trunk.receive(view[at : at + DATAGRAM])
            except BlockingIOError:
                break
            except OSError:
                alive = False
                break
            if size <= 0:
                if size < 0 and trunk.ended():
                    alive = False
                    break
                received += 1
                self.worker.drop("short_datagram" if size < 0 else "empty_datagram")
                continue
            whose = trunk.tunnel()
            if whose is None:
                packets = count(self._arena, at, at + size)
                received += packets
                self.worker.drop("unknown_tunnel", packets)
                continue
            if whose is not tunnel:
                # Two tunnels may have flows with the same key.
                self._coalescer.flush()
                self._tunnel = tunnel = whose
            received += self._walk(whose, at, at + size)
            at += size
            if at > ROOM:
                self._flush()
                at = 0
        self._flush()
        self.settle()
        self.worker.counts[RECEIVED] += received - self.waiting
        self.waiting = 0
        return alive

    def settle(self) -> None:
        """Count what has been written to the device."""
        self.worker.counts[FORWARDED] += self._sent
        self._sent = 0

    def _walk(self, tunnel: Tunnel, at: int, end: int) -> int:
        """A datagram in the arena; how many packets it has."""
        return self._coalescer.walk(tunnel.lifts, at, end)

    def plain(self, flow: TcpLift, at: int, size: int, ip_checksum: int, checksum: int) -> None:
        """A segment of an established flow, rewritten in place. The deltas are sums of words in native order; times 256 they are those of
        the words' own (2^16 = 1 modulo 65,535)."""
        arena = self._arena
        if arena[at] == 0x45:
            _PUT4(arena, at + 10, (ip_checksum - (flow.delta_addresses << 8)) % 0xFFFF, flow.forward)
            _PUT(arena, at + 36, (checksum - (flow.delta_all << 8)) % 0xFFFF)
        else:
            arena[at + 8 : at + 44] = flow.forward
            _PUT(arena, at + 56, (checksum - (flow.delta_all << 8)) % 0xFFFF)
        flow.bytes_up += size
        flow.packets_up += 1
        worker = self.worker
        if flow.tick != worker.second:
            flow.tick = worker.second
            worker.dirty.append(flow)
        try:
            writev(flow.lane.tun, (ZERO_HEADER, self._arena_view[at : at + size]))
        except OSError:
            worker.drop("tun_write_error")
        else:
            self._sent += 1

    def joined(self, run: Run) -> None:
        """One super-packet of several segments."""
        view, header, count = self._arena_view, run.header, len(run.places)
        parts: list[bytes | memoryview] = [run.headers(self._arena, run.flow.forward)]
        parts += [view[place + header : place + run.size] for place in run.places]
        parts[-1] = view[run.places[-1] + header : run.places[-1] + run.last]
        self._count_up(run.flow, run.length + (count - 1) * header, count)
        try:
            writev(run.flow.lane.tun, parts)
        except OSError:
            self.worker.drop("tun_write_error", count)
        else:
            self._sent += count

    def datagrams(self, at: int, end: int) -> tuple[int, int]:
        """UDP packets of sessions; what those don't take goes the lane's own way."""
        tunnel = self._tunnel
        assert tunnel is not None
        return self.worker.udp.plain(tunnel, self._arena, self._arena_view, at, end)

    def bad(self, at: int, size: int) -> None:
        """A segment whose payload isn't what was sent."""
        self.worker.drop("bad_l4_checksum")

    def other(self, at: int, size: int) -> None:
        """The lane's own way, which looks at everything."""
        tunnel = self._tunnel
        assert tunnel is not None
        self._slow += SLOW
        self.view[HEADER : HEADER + size] = self._arena_view[at : at + size]
        self.up(tunnel, HEADER + size)

    def _count_up(self, flow: TcpLift, size: int, packets: int) -> None:
        flow.bytes_up += size
        flow.packets_up += packets
        worker = self.worker
        if flow.tick != worker.second:
            flow.tick = worker.second
            worker.dirty.append(flow)

    # from the device

    def from_tun(self) -> int:
        """Read the device until it is empty or the budget is spent; returns how many packets there were."""
        view, tun = self._down_view, self.tun
        # Not the lane's own: what the device says there must not be a tunnel's next word.
        head = bytearray(HEADER)
        at = received = 0
        while received < READS:
            try:
                size = os.readv(tun, (head, view[at : at + DATAGRAM])) - HEADER
            except BlockingIOError:
                break
            except OSError:
                size = -HEADER
            if size < 0:
                # The device is gone; the upgrader's next ones take its place.
                self.worker.unwatch(tun)
                break
            received += 1
            self._down_at(at, size)
            at += size
            if at > ROOM:
                self._ship_all()
                at = 0
        self._ship_all()
        self.worker.counts[RECEIVED] += received
        return received

    def _down_at(self, at: int, size: int) -> None:
        """A packet from the private namespace's kernel, in its place."""
        arena = self._down_arena
        flow = None
        if size >= 40 and arena[at] == 0x45 and arena[at + 9] == 6:
            _, _, check, slot, port, flags, check_l4 = _DOWN4(arena, at)
            flow = self._flow(slot, port, 0)
            if flow is not None:
                _PUT4(arena, at + 10, (check + (flow.delta_addresses << 8)) % 0xFFFF, flow.back)
                _PUT(arena, at + 36, (check_l4 + (flow.delta_all << 8)) % 0xFFFF)
            l4 = at + 20
        elif size >= 60 and arena[at] >> 4 == 6 and arena[at + 6] == 6:
            _, _, slot, port, flags, check_l4 = _DOWN6(arena, at)
            flow = self._flow(slot, port, IPV6)
            if flow is not None:
                arena[at + 8 : at + 44] = flow.back
                _PUT(arena, at + 56, (check_l4 + (flow.delta_all << 8)) % 0xFFFF)
            l4 = at + 40
        if flow is None:
            self._ship_all()
            self._slow_down(at, size)
            return
        worker = self.worker
        flow.bytes_down += size
        flow.packets_down += 1
        if flow.tick != worker.second:
            flow.tick = worker.second
            worker.dirty.append(flow)
        if flags & 7 or flow.state is not State.ESTABLISHED:
            flow.owner.segment_down(flow, arena, l4, at + size)
        if flow.tunnel.context.packed:
            self._pack(flow.tunnel, at, size)
        elif worker.tunnels.deliver(flow.tunnel, self._down_view[at : at + size]):
            worker.counts[FORWARDED] += 1

    def _slow_down(self, at: int, size: int) -> None:
        """The lane's own way, which looks at everything."""
        self.view[HEADER : HEADER + size] = self._down_view[at : at + size]
        self._down(HEADER + size)

    def _flow(self, address: int, port: int, family: int) -> TcpLift | None:
        """The flow of a slot's address (its low 32 bits) whose initiator has this port."""
        index = (address & 0xFFFFFF) - self.slot_base
        flow = self.flows[index] if 0 <= index < len(self.flows) else None
        return flow if flow is not None and flow.port == (port >> 8 | (port & 0xFF) << 8 | family) else None

    def _pack(self, tunnel: Tunnel, at: int, size: int) -> None:
        pack = self._packs.get(tunnel)
        if pack is not None and pack.size + size > DATAGRAM:
            self._ship(tunnel, self._packs.pop(tunnel))
            pack = None
        if pack is None:
            self._packs[tunnel] = _Pack(at, size)
            return
        pack.count += 1
        pack.size += size
        if pack.parts[-1][1] == at:
            pack.parts[-1] = (pack.parts[-1][0], at + size)
        else:
            pack.parts.append((at, at + size))

    def _ship_all(self) -> None:
        while self._packs:
            self._ship(*self._packs.popitem())

    def _ship(self, tunnel: Tunnel, pack: _Pack) -> None:
        view = self._down_view
        parts = [view[start:end] for start, end in pack.parts]
        data = parts[0] if len(parts) == 1 else b"".join(parts)
        if self.worker.tunnels.deliver(tunnel, data, packets=pack.count):
            self.worker.counts[FORWARDED] += pack.count


class _Pack:
    """Packets for one tunnel."""

    __slots__ = ("count", "parts", "size")

    def __init__(self, at: int, size: int) -> None:
        self.count = 1
        self.size = size
        self.parts = [(at, at + size)]
        """From and to in the arena, in order."""
