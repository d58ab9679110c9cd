"""Flows between two devices, forwarded as packets: any IP protocol, no NAT.

    tunnel ─► known ──passage──► pass_on: follow, TTL, MTU ──► the other tunnel          every packet
                │ none
                ▼
              packet: decision, tunnel of the device, limits, record                     once a flow

Both ends keep their addresses, ports, DSCP, ECN and options. What changes is what a router changes: a hop is taken from TTL or hop limit
(RFC 1812 5.3.1; the IPv4 checksum by RFC 1624), and what doesn't fit the next tunnel is answered with its MTU (RFC 1191 4,
RFC 8201) or, where DF is clear, sent in fragments. A super-packet stays one between two `vnet` tunnels and is cut into its segments
for a `raw` one. UDP under treatment l4 is lifted to its payload and lowered again, which in user space is new headers around it
(`falkirk.wire.datagram.rebuild`): options and what else is in no header of ours don't get through.

The decision is the initiator's, on both identities, and is asked once; replies pass by their exact key (`falkirk.flow.passages`). A device's own flow
in the other direction needs its own decision. ICMP errors that quote a packet of the flow pass too (RFC 5508 4.2, without a NAT), from the device
itself, from the flow's destination, or from an address behind the route that led there.

The first packets of a flow wait until the end of the turn, when the flow's start is on record. Nothing here needs the upgrader.

A flow ends with its connection (`falkirk.flow.follow`), when it is idle, with the initiator's tunnel, or when the other device has no
tunnel any more; while it has another one, that one is taken. TCP ends that still talk are probed (`falkirk.flow.orphans`) and reset by
the answer. The other tunnel may be another worker's (`falkirk.flow.siblings`).

Limits: a TCP connection that this worker hasn't seen begin is reset, so none outlives the worker. A flow that has lived a while in one tunnel of a
device isn't moved when a newer one opens, and what that device sends by the newer one isn't taken for its part.
"""

from __future__ import annotations

import struct
from ipaddress import ip_address, ip_network
from typing import TYPE_CHECKING, Any, Final

from falkirk.flow.carriage import Carriage
from falkirk.flow.counters import FORWARDED
from falkirk.flow.decision import Outcome
from falkirk.flow.directory import Attachment, Directory
from falkirk.flow.passages import (
    REPLIES,
    REQUESTS,
    ForwardFlow,
    Passage,
    Remote,
    key_of_packet,
    key_of_quoted,
    plain,
    reply_key,
    unreachable_of,
)
from falkirk.flow.siblings import ERROR, REPLY, Carrier, Foreign, Forget, Gone, SiblingLink
from falkirk.flow.table import Leg, Owner, State, Tunnel
from falkirk.wire import vnet
from falkirk.wire.icmp import Unreachable
from falkirk.wire.malformed import MalformedPacket
from falkirk.wire.packet import Packet, verify
from falkirk.wire.protocol import (
    TCP,
    UDP,
)
from falkirk.wire.translate import quoted

if TYPE_CHECKING:
    from falkirk.decide.routes import RouteEntry
    from falkirk.flow.lane import Lane
    from falkirk.flow.worker import Worker
    from falkirk.wire.context import TunnelContext

HEADER: Final = 10
LINGER: Final = 5
"""Seconds that a finished connection waits for stragglers."""
HELD: Final = 64
"""Packets of a flow that may wait until its start is on record."""
OFFLINE: Final = "device_offline"
DNS: Final = 53
_SYN: Final = 2
_ACK: Final = 16
_SEQUENCES: Final = struct.Struct(">II")


class Forward(Owner[ForwardFlow]):
    """Forwarded flows of one worker, and its part in those of others."""

    def __init__(self, worker: Worker) -> None:
        self._worker = worker
        self.directory = Directory()
        self.carrier = Carrier()
        self._carriage = Carriage(worker)
        self.links: dict[int, SiblingLink] = {}
        """By the other worker's number."""
        self.held: list[ForwardFlow] = []
        """Flows whose first packets wait for the end of the turn."""
        self._flows: dict[int, ForwardFlow] = {}
        self._led: dict[int, dict[ForwardFlow, None]] = {}
        """Flows by the number of the tunnel that they lead to."""
        self._handle = 0
        self._legs: dict[int, Leg] = {}
        """Legs of lowered streams that lead to other workers' tunnels, by their handle (`falkirk.flow.lowering`)."""

    # every packet of a flow

    def known(self, lane: Lane, tunnel: Tunnel, end: int) -> bool:
        """Pass on the packet at [10, end) of the lane's buffer where it is a plain one of a flow. False: look at it more closely."""
        view = lane.view
        found = plain(lane.buffer, view, end)
        if found is None:
            return False
        key, l4 = found
        passage = tunnel.passages.get(key)
        if passage is None or view[:HEADER].tobytes() != passage.vnet_ok:
            return False
        if not lane.raw:
            view[:HEADER] = passage.vnet_put
        self._pass(passage, tunnel, lane, l4, end)
        return True

    def _pass(self, passage: Passage, tunnel: Tunnel, lane: Lane, l4: int, end: int) -> None:
        """A packet of a passage; its virtio-net header is normal."""
        flow = passage.flow
        if flow is not None:
            self._pass_on(flow, passage.up, tunnel, lane, l4, end)
        elif self._carriage.fits(tunnel, lane, end, passage.mtu) and passage.link.packet(
            REPLY, l4 | self._worker.fragments.largest << 16, passage.handle, lane.view[:end]
        ):
            self._worker.counts[FORWARDED] += 1

    def _pass_on(
        self, flow: ForwardFlow, up: bool, tunnel: Tunnel | None, lane: Lane | Carrier, l4: int, end: int
    ) -> None:
        """A packet of a flow of this worker; `tunnel` is None where another worker has read it, and looked at its size."""
        buffer = lane.buffer
        if (flow.state is not State.ESTABLISHED or (flow.tcp is not None and buffer[l4 + 13] & 7)) and not self._follow(
            flow, up, tunnel, lane, l4, end
        ):
            return
        to = flow.to if up else flow.tunnel
        if to is None:
            self._worker.drop("no_flow")
            return
        if flow.heads is not None:
            end = self._carriage.rebuild(flow.heads[up], lane, l4, end)
            if not end:
                return
        if tunnel is not None and not self._carriage.fits(tunnel, lane, end, to.mtu):
            return
        size = end - HEADER
        if up:
            flow.bytes_up += size
            flow.packets_up += 1
        else:
            flow.bytes_down += size
            flow.packets_down += 1
        worker = self._worker
        if flow.tick != worker.second:
            flow.tick = worker.second
            worker.dirty.append(flow)
        self._carriage.hop(to, lane, end)

    def _follow(
        self, flow: ForwardFlow, up: bool, tunnel: Tunnel | None, lane: Lane | Carrier, l4: int, end: int
    ) -> bool:
        """A packet while the flow isn't established, or one that may change that. True: pass it on."""
        worker = self._worker
        if flow.state is State.HELD:
            if not up:
                worker.drop("no_flow")  # Nothing has been asked yet that it could answer.
            elif len(flow.held) < HELD:
                flow.held.append((l4, worker.fragments.largest, lane.view[:end].tobytes()))
            else:
                worker.drop("held")
            return False
        tcp = flow.tcp
        if tcp is None:
            return True
        buffer = lane.buffer
        flags = buffer[l4 + 13]
        if flags & _SYN and flags & 5:
            worker.drop("bad_tcp_flags")
            return False
        over = tcp.over
        if over and flags & _SYN and not flags & _ACK:
            # RFC 9293 3.6.1: a new connection may take the place of one whose end was seen.
            worker.lifecycle.finish(flow, tcp.reason)
            if tunnel is None:
                worker.drop("no_flow")
            else:
                worker.ingress.packet(worker.lane(tunnel.framing), tunnel, end)
            return False
        if flags & _SYN:
            self._carriage.clamp(flow, buffer, l4, end)
        sequence, acknowledged = _SEQUENCES.unpack_from(buffer, l4 + 4)
        tcp.segment(up, flags, sequence, acknowledged, max(end - l4 - (buffer[l4 + 12] >> 4 << 2), 0))
        if tcp.state != flow.state:
            worker.lifecycle.state(flow, State(tcp.state))
        if tcp.over and not over:
            worker.wheel.place(flow, worker.second + LINGER)
        return True

    # a packet that needs a closer look

    def expects(self, tunnel: Tunnel, lane: Lane, packet: Packet) -> bool:
        """Whether a packet from an address that isn't the device's own belongs to a flow all the same: from behind a route that leads to
        the device, exactly the reply, or an ICMP error about what was sent there."""
        if not tunnel.passages:
            return False
        if packet.is_icmp_error:
            passage = self._quoted(tunnel, lane, packet)
            if passage is None or passage.up:
                return False
            network = ip_network(passage.prefix)
            source = ip_address(packet.source)
            return source.version == network.version and source in network
        key = key_of_packet(packet)
        return key is not None and key in tunnel.passages

    def packet(self, lane: Lane, tunnel: Tunnel, packet: Packet, end: int) -> bool:
        """A whole packet with hops left, from an address that `tunnel` may speak from. False where it has nothing to do with devices."""
        if packet.is_icmp_error:
            return self._error(lane, tunnel, packet, end)
        key = key_of_packet(packet)
        if key is None:
            return False
        passage = tunnel.passages.get(key)
        if passage is not None:
            header = lane.view[:HEADER].tobytes()
            if self._worker.ingress.normal(lane, tunnel, packet, end):
                if lane.buffer[1] != vnet.GSO_UDP_L4:
                    # How many datagrams come out of one is for its own length to say.
                    passage.vnet_ok, passage.vnet_put = header, lane.view[:HEADER].tobytes()
                self._pass(passage, tunnel, lane, HEADER + packet.header_length, end)
            return True
        begins = packet.protocol != TCP or packet.flags & (_SYN | _ACK) == _SYN
        if not begins or packet.icmp_type == REPLIES.get(packet.protocol, -2):
            return False
        return self._new(lane, tunnel, packet, key, end)

    def _new(self, lane: Lane, tunnel: Tunnel, packet: Packet, key: bytes, end: int) -> bool:
        worker = self._worker
        if not worker.snapshots.complete:
            return False
        decision, timing = worker.ingress.decide(tunnel, packet.destination, packet.destination_port, packet.protocol)
        route = decision.route
        if route is None or route.device is None or decision.outcome is Outcome.LIFT:
            return False
        if not worker.ingress.normal(lane, tunnel, packet, end):
            return True
        if packet.protocol == TCP and packet.flags & 5:
            worker.drop("bad_tcp_flags")
            return True
        if not lane.buffer[0] & 1:
            try:
                verify(lane.buffer, packet)
            except MalformedPacket as error:
                worker.drop(error.reason)
                return True
        data = lane.view[:end].tobytes()
        if decision.outcome is not Outcome.FORWARD:
            worker.answers.decided(tunnel, data, decision.outcome)
            worker.lifecycle.refused(tunnel, key, decision, decision.reason, decision.why)
            return True
        refusal = worker.lifecycle.refusal(tunnel, lifted=False)
        if refusal is not None:
            worker.lifecycle.refuse(tunnel, key, decision, refusal)
            return True
        self._handle += 1
        flow = ForwardFlow(self, tunnel, key, self._handle, route)
        if decision.rebuilt:
            flow.rebuild()
        if not self._lead(flow):
            worker.answers.unreachable(tunnel, data, Unreachable.HOST)
            why = f"device {route.device.device} has no open tunnel"
            worker.lifecycle.refused(tunnel, key, decision, OFFLINE, why)
            return True
        tunnel.let(key, Passage(flow, True))
        self._flows[flow.handle] = flow
        worker.lifecycle.begin(flow, decision, timing, self._idle(flow))
        flow.held.append((HEADER + packet.header_length, worker.fragments.largest, data))
        self.held.append(flow)
        return True

    def end_of_turn(self) -> None:
        """The starts of this turn's flows are on record: let their packets go."""
        flows, self.held = self.held, []
        for flow in flows:
            if flow.state is not State.HELD or self._flows.get(flow.handle) is not flow:
                continue
            flow.tunnel.device.held -= 1
            self._worker.lifecycle.state(flow, State.OPENING if flow.tcp is not None else State.ESTABLISHED)
            packets, flow.held = flow.held, []
            lane = self._worker.lane(flow.tunnel.framing)
            fragments = self._worker.fragments
            for l4, fragments.largest, data in packets:
                lane.view[: len(data)] = data
                self._pass_on(flow, True, flow.tunnel, lane, l4, len(data))
            fragments.largest = 0

    def _quoted(self, tunnel: Tunnel, lane: Lane, packet: Packet) -> Passage | None:
        """The passage of what answers the packet that an ICMP error quotes."""
        try:
            key = key_of_quoted(lane.buffer, packet, quoted(lane.buffer, packet))
        except MalformedPacket:
            return None  # Who looks next says what is wrong with it.
        return tunnel.passages.get(key) if key is not None else None

    def _error(self, lane: Lane, tunnel: Tunnel, packet: Packet, end: int) -> bool:
        passage = self._quoted(tunnel, lane, packet) if tunnel.passages else None
        if passage is None:
            return False
        if not self._worker.ingress.normal(lane, tunnel, packet, end):
            return True
        flow = passage.flow
        if flow is None:
            if passage.link.packet(ERROR, 0, passage.handle, lane.view[:end]):
                self._worker.counts[FORWARDED] += 1
            return True
        to = flow.to if passage.up else flow.tunnel
        if to is None or flow.state is State.HELD:
            self._worker.drop("icmp_error_unmatched")
        else:
            self._carriage.hop(to, lane, end)
        return True

    # where a flow leads

    def _lead(self, flow: ForwardFlow) -> bool:
        """Lead a flow to the tunnel that its device has now; False where there is none (or another flow there has the same key: of two
        tunnels of this device, say)."""
        while (found := self._attachment(flow)) is not None:
            self._worker.lowering.clear(found.tunnel, flow.reply[:-1])
            if found.worker != self._worker.start.worker:
                link = self.links.get(found.worker)
                if link is None:
                    self.directory.closed(found.tunnel)
                    continue
                flow.to = Remote(link, found.tunnel, found.mtu)
                link.tell(Foreign(flow.handle, found.tunnel, flow.reply, flow.tunnel.mtu, flow.route.prefix))
            else:
                tunnel = self._worker.tunnels[found.tunnel]
                if flow.reply in tunnel.passages:
                    return False
                tunnel.let(flow.reply, Passage(flow, False, prefix=flow.route.prefix))
                flow.to = tunnel
            self._led.setdefault(found.tunnel, {})[flow] = None
            return True
        return False

    def _attachment(self, flow: ForwardFlow) -> Attachment | None:
        return self.find(flow.tunnel.context, flow.route)

    def find(self, context: TunnelContext, route: RouteEntry) -> Attachment | None:
        """The tunnel of the device that a route leads to, for whoever has this context."""
        if route.device is None:
            return None
        # A device's own address means the device in this virtual network; a written route means it wherever it is.
        network = context.virtual_network_id if route.own_address else ""
        return self.directory.find(context.tenant_id, route.device.device_id, network)

    def _unlead(self, flow: ForwardFlow, reset: bool) -> None:
        """A flow leads nowhere any more. With `reset` its other end's TCP is told."""
        to, flow.to = flow.to, None
        if to is None:
            return
        if isinstance(to, Remote):
            number = to.number
            to.link.tell(Forget(flow.handle, reset))
        else:
            number = to.id
            passage = to.passages.get(flow.reply)
            if passage is not None and passage.flow is flow:
                del to.passages[flow.reply]
            if reset:
                self._worker.orphans.ask(self._worker, number, flow.key[:-1])
        led = self._led.get(number)
        if led is not None:
            led.pop(flow, None)
            if not led:
                del self._led[number]

    def _lost(self, number: int) -> None:
        """A tunnel is gone that flows lead to: lead them to another one of its device, else they end."""
        for flow in self._led.pop(number, {}):
            flow.to = None
            if not self._lead(flow):
                self.end(flow, OFFLINE)

    def lend(self, leg: Leg) -> int:
        """A number for a leg that leads to another worker's tunnel."""
        self._handle += 1
        self._legs[self._handle] = leg
        return self._handle

    def unlend(self, handle: int) -> None:
        """It has ended."""
        self._legs.pop(handle, None)

    # tunnels and workers come and go

    def tunnel_opened(self, tunnel: Tunnel) -> None:
        """A tunnel of this worker."""
        context = tunnel.context
        self.directory.opened(
            Attachment(
                tunnel.id,
                self._worker.start.worker,
                context.tenant_id,
                context.device_id,
                context.virtual_network_id,
                tunnel.framing,
                tunnel.mtu,
            )
        )

    def tunnel_closed(self, tunnel: Tunnel) -> None:
        """A tunnel of this worker, whose own flows have ended."""
        self.directory.closed(tunnel.id)
        for passage in tunnel.passages.values():
            if passage.flow is None:
                passage.link.foreign.pop(passage.handle, None)
                passage.link.tell(Gone(passage.handle, closed=True))
        self._lost(tunnel.id)

    def detached(self, number: int) -> None:
        """A tunnel of another worker is over."""
        self.directory.closed(number)
        self._lost(number)
        self._worker.lowering.lost(number)

    def sibling(self, number: int, link: SiblingLink) -> None:
        """A pair with another worker, in place of the one with its predecessor."""
        old = self.links.get(number)
        if old is not None:
            self.link_lost(old)
        self.links[number] = link

    def link_lost(self, link: SiblingLink) -> None:
        """Another worker has ended."""
        link.close()
        if self.links.get(link.number) is link:
            del self.links[link.number]
        for number, key in link.foreign.values():
            tunnel = self._worker.tunnels.get(number)
            if tunnel is not None:
                tunnel.passages.pop(key, None)
        link.foreign.clear()
        self.directory.lost(link.number)
        for number in [number for number, flows in self._led.items() if _leads_by(flows, link)]:
            self._lost(number)
        self._worker.lowering.link_lost(link)

    # what other workers say

    def foreign(self, link: SiblingLink, message: Foreign) -> None:
        """A flow of another worker leads to a tunnel of ours."""
        tunnel = self._worker.tunnels.get(message.tunnel)
        if tunnel is None or message.key in tunnel.passages:
            link.tell(Gone(message.handle, closed=tunnel is None))
            return
        link.foreign[message.handle] = message.tunnel, message.key
        passage = Passage(None, False, link, message.handle, message.mtu, message.prefix)
        tunnel.let(message.key, passage)

    def forget(self, link: SiblingLink, message: Forget) -> None:
        """It has ended."""
        number, key = link.foreign.pop(message.handle, (0, b""))
        tunnel = self._worker.tunnels.get(number)
        if tunnel is None:
            return
        tunnel.passages.pop(key, None)
        if message.reset:
            self._worker.orphans.ask(self._worker, number, reply_key(key)[:-1])

    def gone(self, message: Gone) -> None:
        """A flow of ours can't lead to where it was led."""
        leg = self._legs.get(message.handle)
        if leg is not None:
            self._worker.lowering.cut(leg, OFFLINE)
        flow = self._flows.get(message.handle)
        if flow is None or not isinstance(flow.to, Remote):
            return
        number = flow.to.number
        if message.closed:
            self.detached(number)
        else:
            self.end(flow, OFFLINE)

    def from_owner(self, number: int, largest: int, end: int) -> None:
        """A packet of another worker's flow, in the carrier, for a tunnel of ours; `largest` as in `falkirk.flow.fragments`."""
        worker = self._worker
        worker.fragments.largest = largest
        tunnel = worker.tunnels.get(number)
        if tunnel is None:
            worker.drop("tunnel_closed")
        elif self._carriage.send(tunnel, self.carrier.view, end):
            worker.counts[FORWARDED] += 1
        worker.fragments.largest = 0

    def reply(self, handle: int, places: int, end: int) -> None:
        """A packet that answers a flow of ours, in the carrier."""
        flow = self._flows.get(handle)
        if flow is None:
            if (leg := self._legs.get(handle)) is not None:
                self._worker.lowering.reply(leg, self.carrier, end)
            else:
                self._worker.drop("no_flow")
            return
        fragments = self._worker.fragments
        fragments.largest = places >> 16
        self._pass_on(flow, False, None, self.carrier, places & 0xFFFF, end)
        fragments.largest = 0

    def error_reply(self, handle: int, end: int) -> None:
        """An ICMP error about a packet of a flow of ours, in the carrier."""
        flow = self._flows.get(handle)
        if (leg := self._legs.get(handle)) is not None:
            self._worker.lowering.error_reply(leg, self.carrier, end)
        elif flow is None or flow.state is State.HELD:
            self._worker.drop("icmp_error_unmatched")
        else:
            self._carriage.hop(flow.tunnel, self.carrier, end)

    # ended

    def end(self, flow: ForwardFlow, reason: str) -> None:
        """End a live flow. TCP that isn't over yet is reset at both ends; of others the initiator is told what a router would say."""
        worker = self._worker
        kind = Unreachable.HOST if reason == OFFLINE else Unreachable.PROHIBITED
        if flow.state is State.HELD:
            packets, flow.held = flow.held, []
            for _, _, data in packets:
                if flow.tcp is not None and kind is Unreachable.PROHIBITED:
                    worker.answers.reset(flow.tunnel, data)
                else:
                    worker.answers.unreachable(flow.tunnel, data, kind)
        elif flow.tcp is None:
            if reason != "drained":  # The successor lets it go on.
                message = unreachable_of(flow.key, kind)
                worker.answers.relay(flow.tunnel, message, b"", flow.source, counted=False)
        elif not flow.tcp.over:
            worker.orphans.ask(worker, flow.tunnel.id, flow.reply[:-1])
            self._unlead(flow, reset=True)
        worker.lifecycle.finish(flow, reason)

    def cut(self, flow: ForwardFlow, reason: str) -> None:
        """End it at once: the initiator's tunnel is gone; the other end's TCP is reset."""
        self._unlead(flow, reset=flow.tcp is not None and not flow.tcp.over)
        self._worker.lifecycle.finish(flow, reason)

    def bereave(self, flow: ForwardFlow, reason: str) -> None:
        """It needs no upgrader."""

    def expire(self, flow: ForwardFlow) -> None:
        """End it where it is over or idle. An end that goes on after that is reset by its next segment."""
        worker = self._worker
        if flow.tcp is not None and flow.tcp.over:
            worker.lifecycle.finish(flow, flow.tcp.reason)
            return
        limit = self._idle(flow)
        if flow.tick + limit > worker.second:
            worker.wheel.place(flow, flow.tick + limit)
        else:
            worker.lifecycle.finish(flow, "idle")

    def _idle(self, flow: ForwardFlow) -> int:
        """Seconds after which the flow is idle."""
        settings = self._worker.settings
        if flow.tcp is not None:
            established = flow.state is State.ESTABLISHED
            return settings.established_idle_s if established else settings.transitory_idle_s
        protocol = flow.key[-1]
        if protocol == UDP:
            return settings.udp_dns_idle_s if flow.destination_port == DNS else settings.udp_idle_s
        return settings.echo_idle_s if protocol in REQUESTS else settings.other_idle_s

    def release(self, flow: ForwardFlow, reason: str) -> None:
        """Give back its passages, and the packets that are held."""
        self._flows.pop(flow.handle, None)
        self._unlead(flow, reset=False)
        flow.tunnel.passages.pop(flow.key, None)
        if flow.state is State.HELD:
            flow.tunnel.device.held -= 1
            for _ in flow.held:
                self._worker.drop("tunnel_closed" if reason == "tunnel_closed" else "held")
            flow.held = []


def _leads_by(flows: dict[ForwardFlow, None], link: Any) -> bool:
    """Whether a tunnel's flows go over a pair; all of them do, or none."""
    flow = next(iter(flows), None)
    return flow is not None and isinstance(flow.to, Remote) and flow.to.link is link
