"""FlowService: proto <-> values. Reads what the workers share; asks them nothing but to end a flow."""

from __future__ import annotations

import ipaddress
import os
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import grpc

from falkirk.api.flow.v1 import flow_service_pb2 as pb
from falkirk.api.flow.v1 import flow_service_pb2_grpc
from falkirk.api.net.v1 import net_pb2
from falkirk.decide import cel
from falkirk.flow import control, counters
from falkirk.flow.capture import CaptureRefused, response
from falkirk.flow.events import EventFeed, flow_of_record
from falkirk.flow.explain import explain, simulate
from falkirk.flow.fleet import Fleet
from falkirk.flow.live import LiveRecord
from falkirk.flow.match import FlowMatch
from falkirk.flow.messages import flow_of_live
from falkirk.flow.top_service import Tops
from falkirk.runtime import callers
from falkirk.runtime.contexts import context_of_proto
from falkirk.runtime.errors import FalkirkError
from falkirk.wire.context import TunnelContext

CAPTURING = ("falkirk-capturing", "1")
"""Initial metadata of a capture that has begun; one that is refused has none."""
MAX_PAGE = 1000
MAX_WORDS = 200
"""Characters of what somebody says for the audit log."""
MAX_PACKET = 65_575
"""Bytes of an IPv6 packet with a whole payload."""
WITH_PORTS = frozenset((net_pb2.PROTOCOL_UNSPECIFIED, net_pb2.PROTOCOL_TCP, net_pb2.PROTOCOL_UDP))


class FlowService(flow_service_pb2_grpc.FlowServiceServicer):
    """Answers for all workers of this node."""

    def __init__(self, fleet: Fleet, feed: EventFeed, process: Callable[[], net_pb2.ProcessInfo]) -> None:
        self._fleet = fleet
        self._feed = feed
        self._tops = Tops(fleet, feed)
        self._process = process

    async def List(self, request: pb.ListRequest, context: Any) -> pb.ListResponse:
        """A page of live flows; the token is "worker:place"."""
        match = self._match(request.filter)
        size = min(request.page_size or 100, MAX_PAGE)
        worker, place = self._token(request.page_token)
        response = pb.ListResponse()
        for number in range(worker, self._fleet.workers):
            for record in self._records(number, place if number == worker else 0):
                flow = flow_of_live(record, number, self._fleet)
                if flow is None or not match.flow(flow):
                    continue
                if len(response.flows) == size:
                    response.next_page_token = f"{number}:{record.index}"
                    return response
                response.flows.append(flow)
        return response

    async def Get(self, request: pb.GetRequest, context: Any) -> pb.GetResponse:
        """One live flow."""
        number, record = self._find(request.id)
        flow = flow_of_live(record, number, self._fleet)
        if flow is None:
            raise self._ended(request.id)
        return pb.GetResponse(flow=flow)

    async def Watch(self, request: pb.WatchRequest, context: Any) -> AsyncIterator[pb.WatchResponse]:
        """Events from now on."""
        match = self._match(request.filter)
        with self._feed.subscribe() as subscription:
            if request.include_live:
                for number in range(self._fleet.workers):
                    for record in self._records(number, 0):
                        flow = flow_of_live(record, number, self._fleet)
                        if flow is not None and match.flow(flow):
                            yield pb.WatchResponse(event=pb.WatchResponse.EVENT_STARTED, flow=flow)
            async for happened, dropped in subscription:
                event, ended = flow_of_record(happened)
                if match.flow(ended):
                    yield pb.WatchResponse(event=event, flow=ended, dropped=dropped)

    async def Terminate(self, request: pb.TerminateRequest, context: Any) -> pb.TerminateResponse:
        """Ask the flow's worker to end it."""
        if len(request.reason) > MAX_WORDS:
            raise FalkirkError(grpc.StatusCode.INVALID_ARGUMENT, "REASON_TOO_LONG", "reason: at most 200 characters")
        number, record = self._find(request.id)
        if not self._fleet.terminate(number, record, request.reason):
            message = f"flow worker {number} is being restarted; its flows end by themselves"
            raise FalkirkError(grpc.StatusCode.UNAVAILABLE, "WORKER_AWAY", message)
        return pb.TerminateResponse()

    async def Capture(self, request: pb.CaptureRequest, context: Any) -> AsyncIterator[pb.CaptureResponse]:
        """Packets from now on; the initial metadata says when that is."""
        wanted = self._wanted(request)
        try:
            with self._fleet.captures.open(wanted) as capture:
                await capture.begun()
                await context.send_initial_metadata((CAPTURING,))
                async for worker, packet in capture:
                    yield response(worker, packet, self._fleet.context(worker, packet.tunnel))
        except CaptureRefused as error:
            raise FalkirkError(grpc.StatusCode.RESOURCE_EXHAUSTED, "CAPTURE_REFUSED", str(error)) from error

    async def Explain(self, request: pb.ExplainRequest, context: Any) -> pb.ExplainResponse:
        """Judge a packet that isn't sent: the one that is given, or the first one of a flow."""
        if request.packet:
            if len(request.packet) > MAX_PACKET:
                message = f"packet: {len(request.packet)} bytes; an IP packet has at most {MAX_PACKET}"
                raise FalkirkError(grpc.StatusCode.INVALID_ARGUMENT, "PACKET_TOO_LONG", message)
            return simulate(self._fleet, self._whose(request), request.packet)
        try:
            destination = ipaddress.ip_address(request.destination_address).packed
        except ValueError as error:
            raise FalkirkError(
                grpc.StatusCode.INVALID_ARGUMENT, "INVALID_ADDRESS", f"destination_address: {error}"
            ) from error
        lowest = 1 if request.protocol in WITH_PORTS else 0
        if not lowest <= request.destination_port < 65536:
            raise FalkirkError(grpc.StatusCode.INVALID_ARGUMENT, "INVALID_PORT", "destination_port: must be 1 to 65535")
        return explain(self._fleet, self._whose(request), destination, request.destination_port, request.protocol)

    def _whose(self, request: pb.ExplainRequest) -> TunnelContext:
        """Whom to decide for."""
        if request.HasField("context"):
            return context_of_proto(request.context)
        found = self._fleet.context_of(request.tenant, request.device)
        if found is None:
            message = (
                f"device {request.device} of tenant {request.tenant} has no open tunnel on this node; "
                "give its context (OnrampService.Explain tells it), as `falkirk explain` does"
            )
            raise FalkirkError(grpc.StatusCode.NOT_FOUND, "NO_TUNNEL", message)
        return found

    async def Top(self, request: pb.TopRequest, context: Any) -> AsyncIterator[pb.TopResponse]:
        """Who uses most, once an interval."""
        async for message in self._tops.watch(request):
            yield message

    async def Stats(self, request: pb.StatsRequest, context: Any) -> pb.StatsResponse:
        """Counts of all workers."""
        response = pb.StatsResponse(
            replicas=self._fleet.replicas(),
            spooled=self._fleet.spooled(),
            processes=[self._process(), *self._fleet.processes()],
        )
        for number in range(self._fleet.workers):
            values = self._fleet.counters[number].view
            stats = response.workers.add(
                worker=number,
                flows=values[counters.FLOWS],
                slots_active=values[counters.SLOTS_ACTIVE],
                slots_resting=values[counters.SLOTS_RESTING],
                slots_total=values[counters.SLOTS_TOTAL],
                received=values[counters.RECEIVED],
                forwarded=values[counters.FORWARDED],
                answered=values[counters.ANSWERED],
                paired=bool(values[counters.PAIRED]),
                tunnels=values[counters.TUNNELS],
            )
            for reason, place in counters.DROPS.items():
                if values[place]:
                    stats.drops.append(net_pb2.Counter(name=reason, value=values[place]))
            for place in (counters.STARTED, counters.DENIED, counters.ENDED):
                stats.counters.append(net_pb2.Counter(name=counters.NAMES[place], value=values[place]))
        return response

    def _wanted(self, request: pb.CaptureRequest) -> control.Tap:
        """What the workers are asked for."""
        if len(request.by) > MAX_WORDS:
            raise FalkirkError(grpc.StatusCode.INVALID_ARGUMENT, "REASON_TOO_LONG", "by: at most 200 characters")
        flow_id = self._find(request.flow_id)[1].flow_id if request.flow_id else b""
        expression = b""
        if request.filter:
            try:
                expression = cel.compile_expression(request.filter).serialized
            except cel.InvalidExpression as error:
                raise FalkirkError(
                    grpc.StatusCode.INVALID_ARGUMENT, "INVALID_FILTER", f"filter: line {error}"
                ) from error
        return control.Tap(
            capture_id=os.urandom(16),
            flow_id=flow_id,
            tenant=request.tenant,
            device=request.device,
            expression=expression,
            text=request.filter,
            dropped_only=request.dropped_only,
            snaplen=request.snaplen,
            by=callers.actor(request.by),
        )

    def _records(self, worker: int, start: int) -> Iterator[LiveRecord]:
        table = self._fleet.live(worker)
        return table.records(start) if table is not None else iter(())

    def _find(self, text: str) -> tuple[int, LiveRecord]:
        try:
            flow_id = bytes.fromhex(text)
        except ValueError:
            flow_id = b""
        if len(flow_id) != 16:
            message = f"id: {text!r} isn't 32 hexadecimal digits"
            raise FalkirkError(grpc.StatusCode.INVALID_ARGUMENT, "INVALID_FLOW_ID", message)
        for number in range(self._fleet.workers):
            table = self._fleet.live(number)
            record = table.find(flow_id) if table is not None else None
            if record is not None:
                return number, record
        raise self._ended(text)

    @staticmethod
    def _ended(text: str) -> FalkirkError:
        message = f"flow {text} isn't live; ask the audit log: falkirk audit query --flow {text}"
        return FalkirkError(grpc.StatusCode.NOT_FOUND, "FLOW_NOT_LIVE", message)

    @staticmethod
    def _match(chosen: pb.FlowFilter) -> FlowMatch:
        try:
            return FlowMatch(chosen)
        except ValueError as error:
            raise FalkirkError(
                grpc.StatusCode.INVALID_ARGUMENT, "INVALID_FILTER", f"filter.destination: {error}"
            ) from error

    @staticmethod
    def _token(token: str) -> tuple[int, int]:
        if not token:
            return 0, 0
        worker, _, place = token.partition(":")
        if not (worker.isdecimal() and place.isdecimal()):
            message = "page_token: take it from the previous page's next_page_token"
            raise FalkirkError(grpc.StatusCode.INVALID_ARGUMENT, "INVALID_PAGE_TOKEN", message)
        return int(worker), int(place)
