"""Streams that leave as packets: each has a leg, which is the NAT between a client socket of the lowering namespace and the device's tunnel.

    upgrader ── connect ──► kernel TCP ──device──► SYN to the slot ── leg ──► SYN from the client's own address, into the device's tunnel
                                ▲                                               │
                                └───────────device── to the slot ◄── leg ───────┘ its replies, known by their exact key

The slot is reserved first, so when the SYN comes out of the device its leg is there. End to end the addresses and ports are the original ones.

A leg has the shape of a lifted flow seen from the device that it leads to: it lies in that device's tunnel under the key of the replies, so the lanes
carry it like any other (`falkirk.flow.lane`). What isn't its own are decision, records and limits: those are its flow's, the lifted one (or one of
`falkirk.flow.admin_flows`), and they end together: when the device's tunnel closes the flow ends; when the flow ends the leg stays for `LINGER`
seconds at most, until the kernel's RST has passed.

The tunnel may be another worker's. The leg is its flow's worker's all the same, and packets cross over the pair of the two (`falkirk.flow.siblings`): so
a stream's two descriptors stay with one upgrader worker, a crash takes both ends together, and with one worker there is no hop. The price is a hop a
packet (a super-packet) where there are several.

Limits: TCP only. What a slow device is still owed when a client's side and tunnel have ended in order is delivered without a flow that could be listed or
ended, at most what the sockets on its way hold. A device that sends from an address behind it (a route's prefix) is known by its exact replies, as everywhere.
"""

from __future__ import annotations

from ipaddress import ip_address, ip_network
from typing import TYPE_CHECKING, Final

from falkirk.flow.directory import Attachment
from falkirk.flow.keys import key_of, lift_key, signature
from falkirk.flow.segments import ACK, FIN, LINGER, RST, SYN, Segments
from falkirk.flow.siblings import Carrier, Foreign, Forget, SiblingLink
from falkirk.flow.table import Distant, Leg, State, TcpLift, Tunnel
from falkirk.flow.tracker import FINISHED, OFFLINE
from falkirk.wire.context import Framing, TunnelContext
from falkirk.wire.malformed import MalformedPacket
from falkirk.wire.packet import Packet, parse
from falkirk.wire.protocol import TCP
from falkirk.wire.slots import LOWERED
from falkirk.wire.translate import quoted

if TYPE_CHECKING:
    from falkirk.decide.routes import RouteEntry
    from falkirk.flow.admin_flows import AdminFlow
    from falkirk.flow.lane import Lane
    from falkirk.flow.worker import Worker

HEADER: Final = 10
IN_USE: Final = "ports_in_use"
EXHAUSTED: Final = "lower_slots_exhausted"
UPSTREAM_RESET: Final = "upstream_reset"
"""The upgrader's word for a stream that the device has reset."""
ANY_SIZE: Final = 65535
"""What the lowering devices take: the kernel has no MTU for what it receives."""


class Lowering(Segments):
    """Legs of one worker."""

    def __init__(self, worker: Worker) -> None:
        super().__init__(worker)
        slots = worker.settings.lower_slots
        cursors = worker.orphans.cursors[2:]
        self.lanes: dict[Framing, Lane] = {
            framing: worker.make_lane(framing, slots, cursors[framing is Framing.RAW], LOWERED) for framing in Framing
        }
        self._distant: dict[int, Distant] = {}
        """Tunnels of other workers that legs lead to, by number."""

    # begun

    def reserve(self, tunnel: Tunnel, key: bytes, route: RouteEntry) -> tuple[Leg | None, str | None]:
        """A leg for a flow of this tunnel with this key, or why there is none."""
        found = self._worker.forward.find(tunnel.context, route)
        device = route.device.device if route.device is not None else ""
        to = self.tunnel_of(found, tunnel.context.tenant, device) if found is not None else None
        if to is None:
            return None, OFFLINE
        _, source, destination, source_port, destination_port = signature(key)
        return self.lead(to, lift_key(destination, source, destination_port, source_port), route.prefix)

    def tunnel_of(self, found: Attachment, tenant: str = "", device: str = "") -> Tunnel | None:
        """The tunnel, or what stands for it here (for captures with these names); None where there is no way to its worker."""
        worker = self._worker
        if found.worker == worker.start.worker:
            return worker.tunnels.get(found.tunnel)
        link = worker.forward.links.get(found.worker)
        if link is None:
            return None
        distant = self._distant.get(found.tunnel)
        if distant is None or distant.sibling is not link:
            context = TunnelContext(
                tenant_id=found.tenant_id,
                tenant=tenant,
                device_id=found.device_id,
                device=device,
                virtual_network_id=found.virtual_network_id,
                virtual_network="",
                addresses=(),
            )
            distant = Distant(found.tunnel, context, found.mtu, link)
        return distant

    def lead(self, to: Tunnel, reply: bytes, prefix: str) -> tuple[Leg | None, str | None]:
        """A leg into a tunnel, whose device's replies have this key; or why there is none."""
        self.clear(to.id, reply)
        if reply in to.lifts:
            # The device itself has a connection with these ports, the other way round.
            return None, IN_USE
        worker = self._worker
        lane = self.lanes[to.framing]
        index = lane.pool.claim(worker.second)
        if index is None:
            return None, EXHAUSTED
        slot = lane.first_slot + index
        forward = worker.slot_address(slot, len(reply)) + worker.own_address(lane, len(reply)) + reply[-4:]
        leg = Leg(self, to, reply, forward, slot, lane)
        leg.prefix = prefix
        leg.tick = worker.second
        lane.flows[index] = leg
        to.begin(reply, leg)
        if isinstance(to, Distant):
            self._distant[to.id] = to
            leg.handle = worker.forward.lend(leg)
            to.sibling.tell(Foreign(leg.handle, to.id, key_of(*signature(reply)), ANY_SIZE, prefix))
        return leg, None

    def clear(self, number: int, reply: bytes) -> None:
        """The ports of replies with this key (12 or 36 bytes) are wanted: one that only lingers there gives way."""
        tunnel = self._worker.tunnels.get(number) or self._distant.get(number)
        old = tunnel.lifts.get(reply) if tunnel is not None else None
        if isinstance(old, Leg) and old.flow is None:
            self.drop(old)

    def join(self, flow: TcpLift | AdminFlow, leg: Leg) -> None:
        """It is the other side of this flow, which is on record."""
        flow.leg = leg
        leg.flow = flow
        self._worker.live.lowered(flow.index, leg.slot, leg.tunnel.id)

    # segments

    def segment_up(self, flow: TcpLift, buffer: bytearray, l4: int, end: int) -> bool:
        """A segment from the device that opens, closes, or comes while the leg isn't established. True: it goes on."""
        assert isinstance(flow, Leg)
        flags = buffer[l4 + 13]
        if flags & SYN and flags & (FIN | RST):
            self._worker.drop("bad_tcp_flags")
            return False
        gone = flow.flow is None or flow.over or flow.reset or (flow.fin_acked_up and flow.fin_acked_down)
        if gone and flags & SYN and not flags & ACK:
            # RFC 9293 3.6.1: the device opens a connection of its own with ports of one whose end was seen.
            tunnel = flow.tunnel
            self._over(flow)
            if isinstance(tunnel, Distant):
                self._worker.drop("no_flow")  # Its next one finds the other worker free of it.
            else:
                self._worker.ingress.packet(self._worker.lane(tunnel.framing), tunnel, end)
            return False
        if flow.state is State.OPENING and not flags & (SYN | RST):
            self.advance(flow, State.ESTABLISHED)
        if flags & SYN:
            self.clamp(flow, buffer, l4, end)
        self.fins_up(flow, buffer, l4, end)
        return True

    def advance(self, flow: TcpLift, state: State) -> None:
        """It is somewhere else in its life, which nobody else looks at."""
        flow.state = state

    def settle(self, flow: TcpLift) -> bool:
        """Whether the stream has ended, for the upgrader and on the wire."""
        if flow.over and (flow.reset or (flow.fin_acked_up and flow.fin_acked_down)):
            self.finished.append((flow, ""))
            return True
        return False

    def end_of_turn(self) -> None:
        """Give back the legs whose last segment passed in this turn."""
        finished, self.finished = self.finished, []
        for leg, _ in finished:
            assert isinstance(leg, Leg)
            self._over(leg)

    def expects(self, tunnel: Tunnel, lane: Lane, packet: Packet) -> bool:
        """Whether a packet from an address that isn't the device's own belongs to a leg all the same: from behind the route that led
        there, exactly the reply, or an ICMP error about what was sent there."""
        if packet.is_icmp_error:
            try:
                quote = quoted(lane.buffer, packet)
            except MalformedPacket:
                return False
            ends = quote.destination, quote.source, quote.destination_port, quote.source_port
            leg = tunnel.lifts.get(lift_key(*ends)) if quote.protocol == TCP else None
            if not isinstance(leg, Leg) or not leg.prefix:
                return False
            network, source = ip_network(leg.prefix), ip_address(packet.source)
            return source.version == network.version and source in network
        if packet.protocol != TCP:
            return False
        ends = packet.source, packet.destination, packet.source_port, packet.destination_port
        return isinstance(tunnel.lifts.get(lift_key(*ends)), Leg)

    # what comes from another worker

    def reply(self, leg: Leg, carrier: Carrier, end: int) -> None:
        """A packet of the device's, in the carrier."""
        lane = self._worker.lane(Framing.VNET)
        lane.view[:end] = carrier.view[:end]
        lane.up(leg.tunnel, end)

    def error_reply(self, leg: Leg, carrier: Carrier, end: int) -> None:
        """An ICMP error about what was sent to the device, in the carrier; it was parsed where it came from."""
        lane = self._worker.lane(Framing.VNET)
        lane.view[:end] = carrier.view[:end]
        self._worker.errors.from_tunnel(lane, leg.tunnel, parse(lane.buffer, HEADER, end - HEADER))

    # ended

    def closed(self, leg: Leg, reason: str) -> None:
        """The upgrader has let go of the stream."""
        leg.over = True
        if reason == UPSTREAM_RESET:
            self._over(leg)
        else:
            self.closing(leg)
            self.settle(leg)

    def _over(self, leg: Leg) -> None:
        """Nothing is awaited of it any more."""
        flow = leg.flow
        self.drop(leg)
        if flow is not None:
            flow.owner.settle(flow)

    def abandon(self, leg: Leg, *, slow: bool = False) -> None:
        """Its flow has ended: it stays until the kernel's last word has passed. That is a RST, which is about to come; or, of one that is `slow`, the
        rest of what the device is owed, as long as something of it passes."""
        flow, leg.flow = leg.flow, None
        if flow is not None:
            flow.leg = None
        leg.over = True
        if leg.reset:
            self.drop(leg)
        else:
            leg.reason = FINISHED if slow else ""
            self._worker.wheel.place(leg, self._worker.second + (self._patience if slow else LINGER))
            self.settle(leg)

    @property
    def _patience(self) -> int:
        return self._worker.settings.transitory_idle_s

    def drop(self, leg: Leg) -> None:
        """Give it back. Doing it twice is doing it once."""
        if leg.lane.flows[leg.slot - leg.lane.first_slot] is not leg:
            return
        flow, leg.flow = leg.flow, None
        if flow is not None:
            flow.leg = None
        tunnel = leg.tunnel
        tunnel.flows.pop(leg.key, None)
        self._worker.wheel.remove(leg)
        leg.lane.free(leg)
        if leg.handle:
            self._worker.forward.unlend(leg.handle)
            if isinstance(tunnel, Distant):
                tunnel.sibling.tell(Forget(leg.handle, False))
                if not tunnel.flows:
                    self._distant.pop(tunnel.id, None)

    def end(self, flow: TcpLift, reason: str) -> None:
        """Its flow ends it."""

    def cut(self, flow: TcpLift, reason: str) -> None:
        """The device's tunnel is gone: its flow ends, if that isn't the tunnel's own."""
        assert isinstance(flow, Leg)
        whose = flow.flow
        if whose is not None and whose.tunnel is flow.tunnel:
            return
        self.drop(flow)
        if whose is not None:
            whose.owner.end(whose, OFFLINE)

    def bereave(self, flow: TcpLift, reason: str) -> None:
        """Its flow ends it, and has the device told; one that lingers has nothing more to wait for."""
        assert isinstance(flow, Leg)
        if flow.flow is None:
            self.drop(flow)

    def expire(self, flow: TcpLift) -> None:
        """It has lingered long enough, unless a slow device still fetches."""
        assert isinstance(flow, Leg)
        if flow.reason == FINISHED and flow.tick + self._patience > self._worker.second:
            self._worker.wheel.place(flow, flow.tick + self._patience)
        else:
            self.drop(flow)

    def release(self, flow: TcpLift, reason: str) -> None:
        """It isn't in the tables of flows."""

    def lost(self, number: int) -> None:
        """Another worker's tunnel is gone."""
        distant = self._distant.pop(number, None)
        if distant is not None:
            for leg in list(distant.lifts.values()):
                self.cut(leg, OFFLINE)

    def link_lost(self, link: SiblingLink) -> None:
        """Another worker has ended, or has a successor: its tunnels are gone until that one has them, and then their devices are told."""
        for distant in [distant for distant in self._distant.values() if distant.sibling is link]:
            for leg in distant.lifts.values():
                self._worker.orphans.seek(distant.id, leg.back)
            self.lost(distant.id)
