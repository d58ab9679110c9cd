"""Messages to values and back: PolicyService."""

from __future__ import annotations

import asyncio
import ipaddress
import os
from collections import Counter
from collections.abc import AsyncIterator
from typing import Any, Final

import grpc

from falkirk.api.net.v1 import net_pb2
from falkirk.api.policy.v1 import policy_service_pb2 as pb
from falkirk.api.policy.v1 import policy_service_pb2_grpc as pb_grpc
from falkirk.decide.destination import DestinationDevice
from falkirk.decide.rules import RuleSource, RuleTable, Verdict, check
from falkirk.policy.rulebook import TREATMENTS, Rulebook
from falkirk.policy.store import AuditStore
from falkirk.runtime import supervised
from falkirk.runtime.contexts import destination_of_proto
from falkirk.runtime.errors import FalkirkError
from falkirk.wire.context import TunnelContext

_TREATMENT_NUMBERS: Final = {name: number for number, name in TREATMENTS.items()}
_RESERVED_PROTOCOL: Final = 255
"""IANA: reserved, so rules see it as "other"."""
MAX_TRACES: Final = 1000
MAX_CHECKED: Final = 20_000
"""Rules of one Check."""


class PolicyService(pb_grpc.PolicyServiceServicer):
    """Decides, explains, checks and pushes; see the proto."""

    def __init__(self, rulebook: Rulebook, store: AuditStore, started_ns: int) -> None:
        self._rulebook = rulebook
        self._store = store
        self._started_ns = started_ns
        self.answers: Counter[str] = Counter()
        """Decisions asked for, by outcome. (Those of packet workers are counted there.)"""

    async def Decide(self, request: pb.DecideRequest, context: Any) -> pb.DecideResponse:
        """See the proto."""
        table, asked = self._table(), self._question(request.question)
        verdict = table.decide(*asked)
        self.answers["decided_allowed" if verdict.allowed else "decided_denied"] += 1
        return pb.DecideResponse(verdict=_verdict(verdict), replica=self._rulebook.status())

    async def Explain(self, request: pb.ExplainRequest, context: Any) -> pb.ExplainResponse:
        """See the proto."""
        table, asked = self._table(), self._question(request.question)
        verdict, traces = table.explain(*asked, limit=MAX_TRACES)
        self.answers["explained"] += 1
        return pb.ExplainResponse(
            verdict=_verdict(verdict),
            rules=[
                pb.RuleTrace(rule=trace.rule, outcome=trace.outcome, when=trace.when, error=trace.error)
                for trace in traces
            ],
            replica=self._rulebook.status(),
        )

    async def Check(self, request: pb.CheckRequest, context: Any) -> pb.CheckResponse:
        """See the proto."""
        if len(request.rules) > MAX_CHECKED:
            raise _invalid("TOO_MANY_RULES", f"{len(request.rules)} rules; at most {MAX_CHECKED} are checked at once")
        rules = [RuleSource(rule.name, rule.when) for rule in request.rules]
        errors = await asyncio.to_thread(check, rules)
        return pb.CheckResponse(
            errors=[
                pb.CheckResponse.Error(rule=error.rule, line=error.line, column=error.column, message=error.message)
                for error in errors
            ]
        )

    async def WatchRules(self, request: pb.WatchRulesRequest, context: Any) -> AsyncIterator[pb.WatchRulesResponse]:
        """See the proto."""
        async for response in self._rulebook.publisher.watch(request.have if request.HasField("have") else None):
            yield response

    async def Stats(self, request: pb.StatsRequest, context: Any) -> pb.StatsResponse:
        """See the proto."""
        counts = {f"audit_{name}": count for name, count in dict(self._store.counters).items()} | self.answers
        process = net_pb2.ProcessInfo(name="policy", pid=os.getpid(), generation=supervised.generation())
        process.start_time.FromNanoseconds(self._started_ns)
        return pb.StatsResponse(
            replicas=[self._rulebook.replica.status(), self._rulebook.status()],
            rules=_counters(self._rulebook.rules_by_tenant()),
            counters=_counters(counts),
            processes=[process],
        )

    def _table(self) -> RuleTable:
        table = self._rulebook.table
        if table is None:
            raise FalkirkError(
                grpc.StatusCode.UNAVAILABLE,
                "NOT_READY",
                "no rules yet: the registry hasn't answered since the first start",
            )
        return table

    def _question(self, question: pb.Question) -> tuple[TunnelContext, bytes, int, int, DestinationDevice]:
        """Raises FalkirkError, INVALID_ARGUMENT or NOT_FOUND. The tenant may be given by its name alone."""
        given = question.context
        tenant_id = given.tenant_id or self._rulebook.tenant_id(given.tenant)
        if tenant_id is None:
            raise FalkirkError(
                grpc.StatusCode.NOT_FOUND, "UNKNOWN_TENANT", f"there is no tenant {given.tenant!r}", tenant=given.tenant
            )
        destination = _address(question.destination_address, "destination_address")
        if question.destination_port > 0xFFFF:
            raise _invalid("INVALID_PORT", f"destination_port: {question.destination_port} is not a port")
        protocol = {
            net_pb2.PROTOCOL_UDP: 17,
            net_pb2.PROTOCOL_ICMP: 1 if len(destination) == 4 else 58,
            net_pb2.PROTOCOL_OTHER: _RESERVED_PROTOCOL,
        }.get(question.protocol, 6)
        context = TunnelContext(
            tenant_id=tenant_id,
            tenant=given.tenant,
            device_id=given.device_id,
            device=given.device,
            virtual_network_id=given.virtual_network_id,
            virtual_network=given.virtual_network,
            addresses=tuple(_address(text, "context.addresses") for text in given.addresses),
            user_id=given.user_id,
            user=given.user,
            groups=tuple(given.groups),
            posture=dict(given.posture),
            attributes=dict(given.attributes),
        )
        device = destination_of_proto(question.destination_device)
        return context, destination, question.destination_port, protocol, device


def _address(text: str, field: str) -> bytes:
    try:
        return ipaddress.ip_address(text).packed
    except ValueError as error:
        raise _invalid("INVALID_ADDRESS", f"{field}: {error}", field=field) from error


def _invalid(reason: str, message: str, **metadata: object) -> FalkirkError:
    return FalkirkError(grpc.StatusCode.INVALID_ARGUMENT, reason, message, **metadata)


def _verdict(verdict: Verdict) -> pb.Verdict:
    return pb.Verdict(
        allowed=verdict.allowed,
        rule=verdict.rule,
        why=verdict.why,
        treatment=net_pb2.Treatment.Name(_TREATMENT_NUMBERS[verdict.treatment]),
    )


def _counters(counts: dict[str, int]) -> list[net_pb2.Counter]:
    return [net_pb2.Counter(name=name, value=value) for name, value in sorted(counts.items())]
