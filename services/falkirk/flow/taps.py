"""Captures of one worker: copies of packets for whoever watches, from both sides of the NAT, with what became of each.

While nobody watches there is nothing of this on a packet's way. While somebody does, lanes are tapped ones (`falkirk.flow.tapped`), and the
worker's `drop`, `inject` and `deliver` are those of `Taps`, which note what they hear about the packet under way::

    tunnel ──► tapped lane ──► lane …… drop(reason)? deliver? device?  ──►  fate of the packet that came, then what went out
    device ──► tapped lane ──► lane …… deliver(tunnel)?                ──►  the same

A tap says in the audit log that it begins before it sees a packet, and that it ended, with its numbers.

Limits: of a UDP session the side towards its server is a socket, so there is nothing to capture of it. A SYN that is held, or a fragment, is
captured as it comes, and behind the NAT when it goes on (with its packet); what becomes of it in between isn't another packet.
"""

from __future__ import annotations

import contextlib
import os
import select
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from falkirk.flow import captured, records
from falkirk.flow.captured import Begun, Captured
from falkirk.flow.counters import ANSWERED, FORWARDED
from falkirk.flow.keys import Signature, signature
from falkirk.flow.lane import HEADER, ZERO_HEADER
from falkirk.flow.signatures import keys, reverse, signature_of
from falkirk.flow.table import Leg, TcpLift
from falkirk.flow.tap import Tap
from falkirk.flow.tapped import TAPPED
from falkirk.wire import vnet
from falkirk.wire.context import Framing
from falkirk.wire.malformed import MalformedPacket
from falkirk.wire.packet import split

if TYPE_CHECKING:
    from falkirk.flow.control import Tap as Wanted
    from falkirk.flow.table import Flow, Tunnel
    from falkirk.flow.worker import Worker

Packet = tuple[bytes, bytes]
"""A virtio-net header, and the packet behind it."""


class Passing:
    """What is under way: packets of one flow as they came, and what was heard of them since. None came where one was held before."""

    def __init__(self, side: int, tunnel: Tunnel | None, flow: Flow | None, came: list[Packet]) -> None:
        self.side = side
        self.tunnel = tunnel
        self.flow = flow
        self.came = came
        self.reason = ""
        """Why something of it was dropped last."""
        self.sent: list[tuple[int, Tunnel | None, Packet]] = []
        """What went out meanwhile: side, tunnel, packet."""


class Taps:
    """All taps of a worker. `passing` is the packet under way, where one is."""

    def __init__(self, worker: Worker) -> None:
        self._worker = worker
        self._taps: list[Tap] = []
        self._deliver = worker.deliver
        self.passing: Passing | None = None
        self.loose = ""
        """Why something was dropped last while no packet was under way."""

    # begun and ended

    def begin(self, wanted: Wanted, fd: int) -> None:
        """Capture from now on; `fd` is ours."""
        worker = self._worker
        os.set_blocking(fd, False)
        try:
            tap = Tap(wanted, fd)
        except ValueError as error:
            self._refuse(fd, str(error))
            return
        # On record before anything is seen. A worker that dies writes no end; its successor's record is another beginning.
        worker.write_record("capture_started", wanted.flow_id, records.of_capture(wanted))
        if not worker.record():
            self._refuse(fd, "the audit log can't be written")
            return
        if not self._taps:
            self._arm()
        self._taps.append(tap)
        worker.watch(fd, select.EPOLLRDHUP, lambda _: self._end(tap))
        tap.push(captured.encode(Begun()))

    @staticmethod
    def _refuse(fd: int, why: str) -> None:
        with contextlib.suppress(OSError):
            os.write(fd, captured.encode(Begun(why)))
        os.close(fd)

    def _end(self, tap: Tap) -> None:
        worker = self._worker
        self._taps.remove(tap)
        worker.unwatch(tap.fd)
        os.close(tap.fd)
        said = records.of_capture(tap.wanted, tap.count, tap.lost_in_all)
        worker.write_record("capture_ended", tap.wanted.flow_id, said)
        if not self._taps:
            self._disarm()

    def _arm(self) -> None:
        worker = self._worker
        for lane in worker.all_lanes():
            lane.__class__ = TAPPED[type(lane)]
        # An attribute of an object hides the method of its class.
        vars(worker).update(drop=self.drop, inject=self.inject, deliver=self.deliver)
        vars(worker.tunnels).update(deliver=self.deliver)

    def _disarm(self) -> None:
        worker = self._worker
        for lane in worker.all_lanes():
            lane.__class__ = next(plain for plain, tapped in TAPPED.items() if tapped is type(lane))
        for name in ("drop", "inject"):
            del vars(worker)[name]
        del vars(worker.tunnels)["deliver"]
        worker.deliver = self._deliver

    def forget(self) -> None:
        """A tunnel's context has changed: what expressions said of it no longer holds."""
        for tap in self._taps:
            tap.forget()

    def watched(self, tunnel: Tunnel | None) -> bool:
        """Whether anybody may want packets of a tunnel; None is no tunnel that is known."""
        return any(tap.watches(tunnel) for tap in self._taps)

    def close(self) -> None:
        """Let the pairs go."""
        for tap in self._taps:
            os.close(tap.fd)

    # what the worker does meanwhile

    def drop(self, reason: str, packets: int = 1) -> None:
        """Worker.drop, noting why."""
        type(self._worker).drop(self._worker, reason, packets)
        if self.passing is not None:
            self.passing.reason = reason
        else:
            self.loose = reason

    def inject(self, flow: TcpLift, packet: bytes) -> None:
        """Worker.inject: a SYN that was held goes on. It was captured when it came."""
        worker = self._worker
        lane = worker.lane(flow.tunnel.framing)
        self.follow(
            captured.TUNNEL, flow.tunnel, flow, [], lambda: type(worker).inject(worker, flow, packet), lane.ready
        )

    def deliver(self, tunnel: Tunnel, data: bytes | memoryview, *, counted: bool = True, packets: int = 1) -> bool:
        """Tunnels.deliver, noting what goes out."""
        leaving = _packets(tunnel, bytes(data))
        self.loose = ""
        sent = self._deliver(tunnel, data, counted=counted, packets=packets)
        if sent and self.passing is not None:
            self.passing.sent += [(captured.TUNNEL, tunnel, packet) for packet in leaving]
        elif self.passing is None and (sent or self.loose) and self.watched(tunnel):
            fate = captured.SENT if sent else captured.DROPPED
            reason = "" if sent else self.loose
            for header, packet in leaving:
                said = signature_of(packet)
                flow = self._flow(tunnel, said)
                # To a tunnel: the flow's direction is the other one.
                said = signature(flow.key) if flow is not None else said and reverse(said)
                self._offer(captured.TUNNEL, fate, reason, tunnel, flow, said, header, packet)
        return sent

    def put(self, packet: bytes) -> None:
        """A packet was written to the device by somebody who has made it."""
        if self.passing is not None:
            self.passing.sent.append((captured.NAMESPACE, self.passing.tunnel, (ZERO_HEADER, packet)))

    # what becomes of a packet

    def follow(
        self,
        side: int,
        tunnel: Tunnel | None,
        flow: Flow | None,
        came: list[Packet],
        go: Callable[[], None],
        below: Callable[[], Packet] | None = None,
    ) -> None:
        """Let packets of one flow go their way (`go`), then tell what was seen of them. `below` gives what was written to the device on their
        account; it is asked where they went on as a lifted flow's."""
        passing = Passing(side, tunnel, flow, came)
        counts = self._worker.counts
        forwarded, answered = counts[FORWARDED], counts[ANSWERED]
        said = signature_of(passing.came[0][1] if passing.came else b"")
        if passing.flow is None:
            # Before it passes: a RST takes its flow with it.
            passing.flow = self._flow(passing.tunnel, said)
        self.passing = passing
        try:
            go()
        finally:
            self.passing = None
        flow = passing.flow or self._flow(passing.tunnel, said)
        if flow is not None:
            said = signature(flow.key)
        fate, reason = captured.HELD, ""
        if counts[FORWARDED] != forwarded or (passing.side == captured.NAMESPACE and not passing.reason):
            # What comes from the device for a flow may leave later, with others; whether it does is told of what leaves.
            fate = captured.FORWARDED
        elif passing.reason:
            fate, reason = captured.DROPPED, passing.reason
        elif counts[ANSWERED] != answered:
            fate = captured.ANSWERED
        for header, data in passing.came:
            self._offer(passing.side, fate, reason, passing.tunnel, flow, said, header, data)
        made = any(where == captured.NAMESPACE for where, _, _ in passing.sent)
        if fate == captured.FORWARDED and below is not None and isinstance(flow, TcpLift) and not made:
            self._offer(captured.NAMESPACE, captured.SENT, "", passing.tunnel, flow, said, *below())
        for side, tunnel, (header, data) in passing.sent:
            of = self._flow(tunnel, signature_of(data)) or flow
            about = signature(of.key) if of is not None else said
            self._offer(side, captured.SENT, "", tunnel, of, about, header, data)

    @staticmethod
    def _flow(tunnel: Tunnel | None, said: Signature | None) -> Flow | None:
        """The flow that a packet of a tunnel is of, whichever way it goes."""
        if tunnel is None or said is None:
            return None
        for one in (said, reverse(said)):
            for key in keys(one):
                if (flow := tunnel.flows.get(key)) is not None:
                    return flow
                passage = tunnel.passages.get(key)
                if passage is not None and passage.flow is not None:
                    return passage.flow
        return None

    def _offer(
        self,
        side: int,
        fate: str,
        reason: str,
        tunnel: Tunnel | None,
        flow: Flow | None,
        said: Signature | None,
        header: bytes,
        data: bytes,
    ) -> None:
        """Give a packet to the taps that want it."""
        now = self._worker.now
        flow_id = self._worker.lifecycle.identity(flow) if flow is not None else b""
        takers = [
            tap
            for tap in self._taps
            if (fate == captured.DROPPED or not tap.wanted.dropped_only)
            and tap.wants(tunnel, flow, flow_id, said)
            and tap.has_room(now)
        ]
        if not takers:
            return
        whose = flow.flow if isinstance(flow, Leg) else flow
        decision = whose.decision if whose is not None else None
        if decision is None and tunnel is not None and said is not None:
            decision = tunnel.memo.get((said.destination, said.destination_port, said.protocol))
        flags, _, _, gso_size, _, _ = vnet.STRUCT.unpack(header)
        for tap in takers:
            message = Captured(
                time.time_ns(),
                side,
                fate,
                reason,
                flow_id,
                tunnel.context.tenant if tunnel is not None else "",
                tunnel.context.device if tunnel is not None else "",
                tunnel.id if tunnel is not None else 0,
                decision.outcome.value if decision is not None else "",
                decision.rule if decision is not None else "",
                gso_size,
                bool(flags & vnet.NEEDS_CSUM),
                len(data),
                data[: tap.wanted.snaplen or None],
                tap.lost,
            )
            tap.take(message, now)


def _packets(tunnel: Tunnel, data: bytes) -> list[Packet]:
    """The packets of a datagram to a tunnel; none of the admission's answer."""
    if tunnel.framing is not Framing.RAW:
        return [(data[:HEADER], data[HEADER:])] if data[HEADER : HEADER + 1] not in (b"", b"{") else []
    found: list[Packet] = []
    with contextlib.suppress(MalformedPacket):
        found = [(ZERO_HEADER, data[at : at + length]) for at, length in split(data, len(data))]
    return found
