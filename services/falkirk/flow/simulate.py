"""What would become of a packet, stage by stage, without sending anything. PURE: the functions that packets are judged by, in packets' order.

    well_formed ─► source ─► ttl ─► fragment ─► flow ─► checksum ─► mtu ─► route ─► policy ─► treatment ─► limits ─► slot or tunnel ─► off_ramp

Each stage says whether the packet passes it, what it found, and by which name audit and counters know it; the last one is where the packet stops, or
leaves. What a worker knows and others don't comes by `Node`.

Limits: rate limits of ICMP errors aren't looked at. A fragment is judged alone. What a server answers can't be known: a dial that would be
refused isn't.
"""

from __future__ import annotations

from typing import Final, NamedTuple, Protocol

from falkirk.decide.destination import NO_DEVICE
from falkirk.decide.routes import RouteEntry, RouteTable
from falkirk.decide.rules import RuleTable
from falkirk.flow import quota
from falkirk.flow.decision import Decision, Outcome, authorise, resolve
from falkirk.flow.keys import Signature
from falkirk.flow.settings import FlowSettings
from falkirk.flow.signatures import of_packet
from falkirk.flow.text import address_text
from falkirk.wire import build, fragments, icmp, tcp
from falkirk.wire.context import TunnelContext
from falkirk.wire.icmp import Unreachable
from falkirk.wire.malformed import MalformedPacket
from falkirk.wire.packet import Packet, parse, verify
from falkirk.wire.protocol import ICMP, ICMPV6, TCP, UDP
from falkirk.wire.protocol import name as protocol_name

DROP: Final = "drop"
EXPIRED: Final = "answer_time_exceeded"
TOO_BIG: Final = "answer_too_big"
WAIT: Final = "wait"
"""A fragment, until its packet is whole."""
FLOW: Final = "flow"
"""An existing flow takes it."""
PASSES: Final = frozenset((Outcome.LIFT.value, Outcome.FORWARD.value, WAIT, FLOW))
"""Outcomes of what gets on."""
_OPEN: Final = tcp.SYN | tcp.ACK
_NOT_WITH_SYN: Final = tcp.FIN | tcp.RST
_FLAGS: Final = ((tcp.SYN, "SYN"), (tcp.FIN, "FIN"), (tcp.RST, "RST"), (tcp.PSH, "PSH"), (tcp.ACK, "ACK"))
_ECHO: Final = {4: icmp.ECHO4, 6: icmp.ECHO6}


class Stage(NamedTuple):
    """One stage's answer."""

    name: str
    passed: bool
    detail: str
    reference: str = ""


class Existing(NamedTuple):
    """A live flow that a packet is of."""

    flow_id: str
    state: str
    """As the API names it, in small letters."""
    rule: str
    reply: bool = False
    """The packet goes the other way: it comes from the device that the flow was forwarded to."""
    mtu: int = 0
    """Where it is forwarded as packets: of the tunnel that this one would go into; else 0."""


class Leading(NamedTuple):
    """The tunnel that a route to a device leads into."""

    where: str
    """For people."""
    mtu: int


class Node(Protocol):
    """What is asked of the node on which the packet would come."""

    routes: RouteTable
    rules: RuleTable
    settings: FlowSettings

    def existing(self, context: TunnelContext, said: Signature) -> Existing | None:
        """The live flow that a packet with this signature is of."""

    def load(self, context: TunnelContext, *, lifted: bool) -> quota.Load:
        """What the worker of this device has."""

    def free_slots(self, context: TunnelContext) -> int:
        """NAT slots that may be used now."""

    def leading(self, context: TunnelContext, route: RouteEntry) -> Leading | None:
        """The tunnel of the device that a route leads to; None where it has none."""


class Simulation:
    """One packet's way. `mtu` is that of the tunnel that it would come by, `by` says more of that for people."""

    def __init__(self, node: Node, context: TunnelContext, data: bytes, mtu: int, by: str = "") -> None:
        self.stages: list[Stage] = []
        self._node, self._context, self._data, self._mtu, self._by = node, context, data, mtu, by
        self.outcome = self._run()

    def _pass(self, name: str, detail: str, reference: str = "") -> None:
        self.stages.append(Stage(name, True, detail, reference))

    def _stop(self, name: str, detail: str, reference: str, outcome: str = DROP) -> str:
        self.stages.append(Stage(name, False, detail, reference))
        return str(outcome)

    def _answer(
        self, packet: Packet, name: str, detail: str, reference: str, outcome: str, otherwise: str = "unanswerable"
    ) -> str:
        """Stop with an answer; dropped, and counted as `otherwise`, where the rules say that nothing may be sent."""
        data, whom = self._data, packet.destination
        if outcome == Outcome.DENY:
            made = build.reset(packet)
        elif outcome == EXPIRED:
            made = build.time_exceeded(data, packet, whom)
        elif outcome == TOO_BIG:
            made = build.too_big(data, packet, self._mtu, whom)
        else:
            made = build.unreachable(data, packet, Unreachable.NET, whom)
        if made is None:
            return self._stop(name, f"{detail}; but nothing may answer this packet", otherwise)
        return self._stop(name, detail, reference, outcome)

    def _run(self) -> str:
        data, context = self._data, self._context
        try:
            packet = parse(data, 0, len(data), fragments=True)
            if packet.total_length != len(data):
                raise MalformedPacket("bad_total_length")
        except MalformedPacket as error:
            # No IP version begins like JSON.
            reason = "second_context" if data[:1] == b"{" else error.reason
            return self._stop("well_formed", f"{len(data)} bytes that aren't one whole packet", reason)
        self._pass("well_formed", described(packet))
        addresses = ", ".join(map(address_text, context.addresses)) or "nowhere"
        source = address_text(packet.source)
        if packet.source not in context.addresses and not self._reply_from_behind(packet):
            detail = f"the device may speak from {addresses}, not from {source}"
            return self._stop("source", detail, "spoofed_source")
        self._pass("source", f"may speak from {addresses}{self._by}")
        if packet.ttl < 2:
            return self._answer(packet, "ttl", f"a TTL of {packet.ttl} ends here: time exceeded", "ttl", EXPIRED)
        self._pass("ttl", f"{packet.ttl}: at least one hop is left")
        if packet.is_fragment:
            return self._fragment(packet)
        return self._whole(packet)

    def _reply_from_behind(self, packet: Packet) -> bool:
        """Whether it comes from behind a route that leads to the device, and is the reply to what was forwarded there."""
        if packet.is_fragment:
            return False
        try:
            found = self._node.existing(self._context, of_packet(self._data, packet))
        except MalformedPacket:
            return False
        return found is not None and found.reply

    def _fragment(self, packet: Packet) -> str:
        try:
            fragments.piece(self._data, packet)
        except MalformedPacket as error:
            return self._stop("fragment", "a fragment that can't be part of a packet", error.reason)
        if not self._node.settings.fragment_bytes:
            return self._stop("fragment", "fragments aren't put together here (setting fragment_bytes)", "fragment")
        end = "more follow" if packet.more_fragments else "the last one"
        self._pass("fragment", f"at {packet.fragment_offset}, {end}: it waits until its packet is whole")
        return WAIT

    def _whole(self, packet: Packet) -> str:
        try:
            said = of_packet(self._data, packet)
        except MalformedPacket as error:
            return self._stop("flow", "an ICMP error whose quotation says nothing", error.reason)
        existing = self._node.existing(self._context, said)
        if existing is not None:
            return self._known(packet, existing)
        if packet.is_icmp_error:
            return self._stop("flow", "an ICMP error about no flow that there is", "icmp_error_unmatched")
        if packet.icmp_type >= 0 and (packet.icmp_type != _ECHO[packet.version] or packet.icmp_code):
            return self._stop("flow", f"ICMP type {packet.icmp_type} of no flow", "icmp_not_carried")
        if packet.protocol == TCP and packet.flags & tcp.SYN and packet.flags & _NOT_WITH_SYN:
            return self._stop("flow", "SYN with FIN or RST", "bad_tcp_flags")
        if not self._right():
            return DROP
        if packet.protocol == TCP and packet.flags & _OPEN != tcp.SYN:
            if packet.flags & tcp.RST:
                return self._stop("flow", "a RST of no flow", "reset_of_nothing")
            return self._answer(packet, "flow", "a segment of no flow: a RST", "no_flow", Outcome.DENY)
        self._pass("flow", "a new one would begin")
        return self._new(packet, said)

    def _known(self, packet: Packet, existing: Existing) -> str:
        way = "is its reply" if existing.reply else "is of it"
        detail = f"flow {existing.flow_id} ({existing.state}, by {existing.rule or 'default'}): the packet {way}"
        if packet.protocol == TCP and packet.flags & tcp.SYN and packet.flags & _NOT_WITH_SYN:
            return self._stop("flow", f"{detail}, but is a SYN with FIN or RST", "bad_tcp_flags")
        if packet.protocol == TCP and existing.state == "held":
            reference = "syn_held" if packet.flags & tcp.SYN else "held"
            return self._stop("flow", f"{detail}, and its upstream isn't connected yet", reference)
        self._pass("flow", detail, existing.flow_id)
        if existing.mtu:
            return self._fits(packet, existing.mtu) or FLOW
        if packet.protocol != TCP and not packet.is_icmp_error and not self._right():
            return DROP
        return FLOW

    def _right(self) -> bool:
        """Whether the checksum is."""
        packet = parse(self._data, 0, len(self._data))
        try:
            verify(self._data, packet)
        except MalformedPacket as error:
            detail = "wrong; where it was captured before the device completed it, ask with --fix-checksums"
            self._stop("checksum", detail, error.reason)
            return False
        self._pass("checksum", "right" if packet.protocol in (TCP, UDP, ICMP, ICMPV6) else "none that is known")
        return True

    def _fits(self, packet: Packet, mtu: int) -> str:
        """Not empty where the packet doesn't fit into the tunnel that it would go into."""
        if packet.total_length <= mtu:
            self._pass("mtu", f"{packet.total_length} bytes fit into {mtu}")
        elif packet.dont_fragment:
            detail = f"{packet.total_length} bytes with DF don't fit into {mtu}: answered with that MTU"
            return self._answer(packet, "mtu", detail, "too_big", TOO_BIG)
        else:
            self._pass("mtu", f"{packet.total_length} bytes leave in fragments of {mtu}")
        return ""

    def _new(self, packet: Packet, said: Signature) -> str:
        route = resolve(self._node.routes, self._context, said.destination, said.protocol)
        to_device = not isinstance(route, Decision) and route.device is not None
        if packet.protocol not in (TCP, UDP, ICMP if packet.version == 4 else ICMPV6) and not to_device:
            detail = f"{protocol_name(packet.protocol)} can't be lifted, only forwarded to a device"
            reason = "protocol_not_built"
            return self._answer(packet, "treatment", detail, reason, Outcome.UNREACHABLE, reason)
        if isinstance(route, Decision):
            return self._answer(packet, "route", route.why, route.reason, route.outcome)
        if packet.protocol == TCP and packet.total_length > self._mtu and not to_device:
            return self._stop("mtu", f"a SYN of more than the tunnel's {self._mtu} bytes", "syn_too_large")
        self._pass("route", f"{route.prefix} ({route.name}) leads to {route.target}", route.route_id)
        decision = authorise(
            self._node.rules, route, self._context, said.destination, said.destination_port, said.protocol
        )
        if decision.reason == "denied":
            return self._answer(packet, "policy", decision.why, decision.rule or "denied", decision.outcome)
        verdict = decision.verdict
        self._pass("policy", verdict.why if verdict is not None else decision.why, decision.rule)
        if decision.reason == "treatment_not_built":
            return self._answer(packet, "treatment", decision.why, decision.rule, decision.outcome)
        if decision.outcome is Outcome.FORWARD:
            return self._forwarded(packet, route, rebuilt=decision.rebuilt)
        if decision.outcome is not Outcome.LIFT:
            return self._answer(packet, "off_ramp", decision.why, decision.reason, decision.outcome)
        return self._lifted(packet, route)

    def _forwarded(self, packet: Packet, route: RouteEntry, *, rebuilt: bool) -> str:
        detail = "l4: its payload is lowered again in a new packet" if rebuilt else "l3: forwarded as packets"
        self._pass("treatment", detail)
        refused = self._limits(lifted=False)
        if refused:
            return refused
        device = (route.device or NO_DEVICE).device
        leading = self._node.leading(self._context, route)
        if leading is None:
            detail = f"device {device} has no open tunnel"
            return self._answer(packet, "tunnel", detail, "device_offline", Outcome.UNREACHABLE)
        self._pass("tunnel", f"forwarded to device {device} by {leading.where}")
        return self._fits(packet, leading.mtu) or Outcome.FORWARD.value

    def _lifted(self, packet: Packet, route: RouteEntry) -> str:
        stream = packet.protocol == TCP
        if stream and packet.total_length > self._mtu:
            return self._stop("mtu", f"a SYN of more than the tunnel's {self._mtu} bytes", "syn_too_large")
        self._pass("treatment", "l4: lifted to a stream" if stream else "l4: its payload is sent by a socket")
        refused = self._limits(lifted=True)
        if refused:
            return refused
        leading: Leading | None = None
        if route.device is not None:
            device = route.device.device
            leading = self._node.leading(self._context, route)
            if leading is None:
                detail = f"device {device} has no open tunnel"
                return self._answer(packet, "tunnel", detail, "device_offline", Outcome.UNREACHABLE)
            self._pass("tunnel", f"lowered again for device {device}, by {leading.where}")
        if stream:
            free = self._node.free_slots(self._context)
            if free <= 0:
                return self._stop("slot", "no NAT slot is free", "slots_exhausted")
            self._pass("slot", f"{free} NAT slots are free")
        egress = route.egress4 if packet.version == 4 else route.egress6
        source = address_text(egress) if egress else "an address that the kernel chooses"
        if stream:
            timeout = route.connect_timeout_ms or self._node.settings.connect_timeout_ms
            way = f"dialled from {source}" if leading is None else "connected from the client's own address"
            if route.target == "resolver":
                way = "connected to the tenant's resolver"
            self._pass("off_ramp", f"{way}, at most {timeout} ms", route.target)
            self._pass("mtu", f"segments are made anew; those to the device fit its {self._mtu} bytes")
        else:
            way = "handed to the tenant's resolver" if route.target == "resolver" else f"sent from {source}"
            self._pass("off_ramp", way, route.target)
            way = "what is too big for the path is answered" if packet.dont_fragment else "it may be cut on its way"
            self._pass("mtu", f"{packet.total_length} bytes; {way}; replies fit the device's {self._mtu} bytes")
        return Outcome.LIFT.value

    def _limits(self, *, lifted: bool) -> str:
        """Not empty where the flow is refused."""
        settings, context = self._node.settings, self._context
        load = self._node.load(context, lifted=lifted)
        refusal = quota.refusal(load, context, settings)
        device = f"{load.device_flows} of {context.device_max_flows or settings.device_flows} flows of the device"
        tenant = f"{load.tenant_flows} of {context.tenant_max_flows or settings.tenant_flows} of the tenant"
        if refusal is not None:
            return self._stop("limits", f"{device}, {tenant}", refusal)
        self._pass("limits", f"{device}, {tenant}")
        return ""


def described(packet: Packet) -> str:
    """A packet in a line."""
    source, destination = address_text(packet.source), address_text(packet.destination)
    if packet.version == 6:
        source, destination = f"[{source}]", f"[{destination}]"
    if packet.source_port or packet.destination_port:
        source, destination = f"{source}:{packet.source_port}", f"{destination}:{packet.destination_port}"
    what = protocol_name(packet.protocol).upper()
    if packet.protocol == TCP and not packet.fragment_offset:
        what += "".join(f" {name}" for flag, name in _FLAGS if packet.flags & flag)
    elif packet.icmp_type >= 0:
        what += f" type {packet.icmp_type} code {packet.icmp_code}"
    return f"IPv{packet.version} {what} {source} -> {destination}, {packet.total_length} bytes"
