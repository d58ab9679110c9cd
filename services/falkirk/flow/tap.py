"""Captures of one worker: copies of packets for whoever watches, from both sides of the NAT, with what became of each.

While nobody watches there is nothing of this on a packet's way. While somebody does, lanes are `TappedLane`s and the worker's `drop` and
`deliver` are those of `Taps`, which note what they hear about the packet under way::

    tunnel ──► TappedLane.up ──► Lane.up …… drop(reason)? deliver? device?  ──►  fate of the packet that came, then what went out
    device ──► TappedLane._down ──► Lane._down …… deliver(tunnel)?          ──►  the same

A tap says in the audit log that it begins before it sees a packet, and that it ended, with its numbers. What its pair doesn't take at once is
lost for the watcher and counted; packets never wait.

Limits: of a UDP session the side towards its server is a socket, so there is nothing to capture of it. A SYN that is held is captured as it comes,
and behind the NAT when it goes on; what becomes of it in between isn't another packet.
"""

from __future__ import annotations

import contextlib
import os
import select
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from falkirk.decide import cel
from falkirk.flow import captured, records
from falkirk.flow.captured import Begun, Captured
from falkirk.flow.coalesce import claimed
from falkirk.flow.counters import ANSWERED, FORWARDED
from falkirk.flow.keys import Signature, signature
from falkirk.flow.lane import HEADER, ZERO_HEADER, Lane
from falkirk.flow.raw import RawLane
from falkirk.flow.signatures import keys, reverse, signature_of
from falkirk.flow.table import IPV6, TcpLift
from falkirk.wire import vnet
from falkirk.wire.context import Framing

if TYPE_CHECKING:
    from falkirk.flow.control import Tap as Wanted
    from falkirk.flow.table import Flow, Tunnel
    from falkirk.flow.worker import Worker

MEMO: Final = 65536
"""Answers of an expression that a tap remembers."""


class Tap:
    """One watcher: what it wants, and where it gets it."""

    def __init__(self, wanted: Wanted, fd: int) -> None:
        self.wanted = wanted
        self.fd = fd
        self.lost = 0
        """Since the last one that was taken."""
        self.lost_in_all = 0
        self.count = 0
        self._full_at = 0
        self._expression = cel.Expression(wanted.expression) if wanted.expression else None
        self._memo: dict[tuple[int, bytes, int, int], bool] = {}

    def watches(self, tunnel: Tunnel | None) -> bool:
        """Whether packets of this tunnel may be wanted; None is a packet of which no tunnel is known."""
        wanted = self.wanted
        if tunnel is None:
            return not (wanted.tenant or wanted.device)
        context = tunnel.context
        return (not wanted.tenant or wanted.tenant == context.tenant) and (
            not wanted.device or wanted.device == context.device
        )

    def wants(self, tunnel: Tunnel | None, flow: Flow | None, said: Signature | None) -> bool:
        """Whether a packet is wanted, which is of this flow or says that it would be of one like this."""
        wanted = self.wanted
        if not self.watches(tunnel) or (wanted.flow_id and (flow is None or flow.flow_id != wanted.flow_id)):
            return False
        if self._expression is None:
            return True
        if tunnel is None or said is None:
            return False
        question = (tunnel.id, said.destination, said.destination_port, said.protocol)
        answer = self._memo.get(question)
        if answer is None:
            if len(self._memo) >= MEMO:
                self._memo.clear()
            variables = cel.activation(tunnel.context, *question[1:])
            answer = self._memo[question] = self._expression.evaluate(variables) is True
        return answer

    def forget(self) -> None:
        """A tunnel's context has changed."""
        self._memo.clear()

    def has_room(self, now: int) -> bool:
        """Whether to make a message for it; False, and one is lost, where it has refused one in this turn (`now`)."""
        if self._full_at == now:
            self._lose()
            return False
        return True

    def take(self, message: Captured, now: int) -> None:
        """Hand a packet over, or lose it."""
        if self.push(captured.encode(message)):
            self.count += 1
            self.lost = 0
        else:
            self._full_at = now
            self._lose()

    def _lose(self) -> None:
        self.lost += 1
        self.lost_in_all += 1

    def push(self, datagram: bytes) -> bool:
        """Hand a datagram over; False where the watcher has no room or is gone."""
        try:
            os.write(self.fd, datagram)
        except OSError:
            # Its end is found by epoll.
            return False
        return True


class Passing:
    """The packet under way: a copy of it as it came, and what was heard of it since."""

    def __init__(self, side: int, tunnel: Tunnel | None, flow: Flow | None, header: bytes, data: bytes) -> None:
        self.side = side
        self.tunnel = tunnel
        self.flow = flow
        self.header = header
        self.data = data
        self.said: Signature | None = None
        """The flow that it is of or would begin, once anybody has asked."""
        self.reason = ""
        self.sent: list[tuple[int, Tunnel | None, bytes, bytes]] = []
        """What went out on its account: side, tunnel, virtio-net header, packet."""


class TappedLane(Lane):
    """A lane whose packets are looked at. It has no state of its own, so that a lane can become one and turn back."""

    def up(self, tunnel: Tunnel, end: int) -> None:
        """A packet from a tunnel."""
        taps = self.worker.taps
        if taps.passing is not None or not taps.watched(tunnel):
            # The slow path gives packets back to the fast one: it is the same packet.
            return super().up(tunnel, end)
        header, data = self.view[:HEADER].tobytes(), self.view[HEADER:end].tobytes()
        passing = Passing(captured.TUNNEL, tunnel, None, header, data)
        taps.follow(passing, lambda: super(TappedLane, self).up(tunnel, end), self)
        return None

    def _down(self, end: int) -> None:
        """A packet from the private namespace's kernel."""
        taps = self.worker.taps
        flow = self.flow_below(end)
        tunnel = flow.tunnel if flow is not None else None
        if not taps.watched(tunnel):
            return super()._down(end)
        header, data = self.view[:HEADER].tobytes(), self.view[HEADER:end].tobytes()
        passing = Passing(captured.NAMESPACE, tunnel, flow, header, data)
        taps.follow(passing, lambda: super(TappedLane, self)._down(end))
        return None

    def put(self, packet: bytes) -> None:
        """A packet that somebody else than the lane has rewritten."""
        super().put(packet)
        self.worker.taps.put(ZERO_HEADER, packet)

    def flow_below(self, end: int) -> Flow | None:
        """The flow of a packet from the private namespace, by its slot's address."""
        at, port = (27, self.words[16]) if self.buffer[HEADER] >> 4 == 4 else (47, self.words[26] | IPV6)
        index = int.from_bytes(self.buffer[at : at + 3], "big") - self.slot_base
        flow = self.flows[index] if end > at + 3 and 0 <= index < len(self.flows) else None
        return flow if flow is not None and flow.port == port else None


class TappedRawLane(TappedLane, RawLane):
    """The same of plain packets, which go one by one meanwhile: nothing is joined, nothing packed. What is behind the last good one of a
    datagram is captured as it came."""

    def _walk(self, tunnel: Tunnel, at: int, end: int) -> int:
        count = 0
        while at < end:
            count += 1
            size = claimed(self._arena, at, end - at)
            self.other(at, size)
            at += size
        return count

    def _down_at(self, at: int, size: int) -> None:
        self._slow_down(at, size)


TAPPED: Final[dict[type[Lane], type[Lane]]] = {Lane: TappedLane, RawLane: TappedRawLane}


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
        for framing in Framing:
            lane = worker.lane(framing)
            lane.__class__ = TAPPED[type(lane)]
        # An attribute of an object hides the method of its class.
        vars(worker).update(drop=self.drop, inject=self.inject, deliver=self.deliver)
        vars(worker.tunnels).update(deliver=self.deliver)

    def _disarm(self) -> None:
        worker = self._worker
        for framing in Framing:
            lane = worker.lane(framing)
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
        passing = Passing(captured.TUNNEL, flow.tunnel, flow, packet[:HEADER], packet[HEADER:])
        lane = self._worker.lane(flow.tunnel.framing)
        self.follow(passing, lambda: type(self._worker).inject(self._worker, flow, packet), lane, came=False)

    def deliver(self, tunnel: Tunnel, data: bytes | memoryview, *, counted: bool = True, packets: int = 1) -> bool:
        """Tunnels.deliver, noting what goes out."""
        if tunnel.framing is Framing.RAW:
            header, packet = ZERO_HEADER, bytes(data)
        else:
            header, packet = bytes(data[:HEADER]), bytes(data[HEADER:])
        self.loose = ""
        sent = self._deliver(tunnel, data, counted=counted, packets=packets)
        passing = self.passing
        if packet[:1] in (b"", b"{"):
            return sent  # The admission's answer.
        if passing is not None:
            if sent:
                passing.sent.append((captured.TUNNEL, tunnel, header, packet))
        elif sent or self.loose:
            said = signature_of(packet)
            flow = self._flow(tunnel, said)
            # To a tunnel: the flow's direction is the other one.
            said = signature(flow.key) if flow is not None else said and reverse(said)
            self._offer(
                captured.TUNNEL,
                captured.SENT if sent else captured.DROPPED,
                self.loose,
                tunnel,
                flow,
                said,
                header,
                packet,
            )
        return sent

    def put(self, header: bytes, packet: bytes) -> None:
        """A packet was written to the device."""
        if self.passing is not None:
            self.passing.sent.append((captured.NAMESPACE, None, header, packet))

    # what becomes of a packet

    def follow(self, passing: Passing, go: Callable[[], None], lane: Lane | None = None, *, came: bool = True) -> None:
        """Let a packet go its way, then tell what was seen of it. A packet to the device lies rewritten in `lane`'s buffer."""
        counts = self._worker.counts
        forwarded, answered = counts[FORWARDED], counts[ANSWERED]
        said = signature_of(passing.data)
        if passing.flow is None:
            # Before it passes: a RST takes its flow with it.
            passing.flow = self._flow(passing.tunnel, said)
        self.passing = passing
        try:
            go()
        finally:
            self.passing = None
        gone = counts[FORWARDED] != forwarded
        flow = passing.flow or self._flow(passing.tunnel, said)
        if flow is not None:
            said = signature(flow.key)
        rewritten = lane is not None and lane.view[HEADER : HEADER + len(passing.data)] != passing.data
        if gone and lane is not None and isinstance(flow, TcpLift) and rewritten:
            passing.sent.append((captured.NAMESPACE, None, lane.view[:HEADER].tobytes(), lane.packet()))
        if came:
            fate = (
                captured.FORWARDED
                if gone
                else captured.DROPPED
                if passing.reason
                else captured.ANSWERED
                if counts[ANSWERED] != answered
                else captured.HELD
            )
            reason = "" if gone else passing.reason
            self._offer(passing.side, fate, reason, passing.tunnel, flow, said, passing.header, passing.data)
        for side, tunnel, header, packet in passing.sent:
            self._offer(side, captured.SENT, "", tunnel or passing.tunnel, flow, said, header, packet)

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
        takers = [
            tap
            for tap in self._taps
            if (fate == captured.DROPPED or not tap.wanted.dropped_only)
            and tap.wants(tunnel, flow, said)
            and tap.has_room(now)
        ]
        if not takers:
            return
        decision = flow.decision if flow is not None else None
        if decision is None and tunnel is not None and said is not None:
            decision = tunnel.memo.get((said.destination, said.destination_port, said.protocol))
        flags, _, _, gso_size, _, _ = vnet.STRUCT.unpack(header)
        for tap in takers:
            message = Captured(
                time.time_ns(),
                side,
                fate,
                reason,
                flow.flow_id if flow is not None else b"",
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
