"""The rules in force: mirrored from the registry, compiled in a thread, published, and loaded for our own answers.

Changes that come while a compilation runs are taken together by the next one. A transaction that touched neither tenants nor
policies moves the revision only. A rule that doesn't compile (the registry refuses such; an older one may have been stored
by another version) is logged and fails closed, and holds up no other rule.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, Literal

import grpc
import structlog

from falkirk.api.net.v1 import net_pb2
from falkirk.api.policy.v1 import policy_service_pb2
from falkirk.api.registry.v1 import policy_document_service_pb2 as documents
from falkirk.api.registry.v1 import registry_service_pb2 as registry
from falkirk.decide.rules import Compiler, PolicySource, RuleSource, RuleTable
from falkirk.runtime.replica import BlobPublisher, ResourceReplica

TREATMENTS: Final = {
    net_pb2.TREATMENT_UNSPECIFIED: "",
    net_pb2.TREATMENT_L3: "l3",
    net_pb2.TREATMENT_L4: "l4",
    net_pb2.TREATMENT_HTTP: "http",
    net_pb2.TREATMENT_SSH: "ssh",
}

log = structlog.get_logger()


class Rulebook:
    """Follows the registry. `table` is None until rules are known; `loaded` is set then."""

    def __init__(self, directory: Path, channel: grpc.aio.Channel) -> None:
        self.replica = ResourceReplica(
            "resources", directory, channel, (registry.KIND_TENANT, registry.KIND_POLICY), self._on_change
        )
        self.publisher = BlobPublisher(policy_service_pb2.WatchRulesResponse)
        self.table: RuleTable | None = None
        self.loaded = asyncio.Event()
        self._revision: net_pb2.Revision | None = None
        self._compiler = Compiler()
        self._data = b""
        self._stale = True
        self._wake = asyncio.Event()

    async def run(self) -> None:
        """Until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self.replica.run())
            tasks.create_task(self._apply_always())

    def tenant_id(self, name: str) -> str | None:
        """The id of a tenant by its name."""
        tenants = self.replica.messages(registry.KIND_TENANT)
        return next((tenant.metadata.id for tenant in tenants if tenant.metadata.name == name), None)

    def rules_by_tenant(self) -> dict[str, int]:
        """Rules in force of every tenant that has any, by the tenant's name (its id where the name isn't known)."""
        if self.table is None:
            return {}
        tenants = self.replica.messages(registry.KIND_TENANT)
        names = {tenant.metadata.id: tenant.metadata.name for tenant in tenants}
        return {names.get(identity, identity): self.table.count(identity) for identity in self.table.tenants()}

    def status(self) -> net_pb2.ReplicaStatus:
        """Of the rules, which may be a compilation behind `replica`."""
        mirrored = self.replica.status()
        return net_pb2.ReplicaStatus(
            name="rules",
            revision=self._revision,
            live=mirrored.live,
            source=mirrored.source if self.table is not None else "none",
            items=sum(self.table.count(tenant) for tenant in self.table.tenants()) if self.table is not None else 0,
        )

    def _on_change(self, changed: Sequence[Any], removed: Sequence[Any], revision: net_pb2.Revision) -> None:
        self._stale = self._stale or any(item.HasField("policy") for item in changed)
        self._stale = self._stale or any(item.kind == registry.KIND_POLICY for item in removed)
        self._wake.set()

    async def _apply_always(self) -> None:
        while True:
            await self._wake.wait()
            self._wake.clear()
            revision = self.replica.revision
            if revision is None:
                continue
            if self._stale:
                self._stale = False
                policies = sources(self.replica.messages(registry.KIND_POLICY))
                self._data, self.table = await asyncio.to_thread(self._compile, policies)
            self._revision = revision
            self.publisher.set(revision, self._data)
            self.loaded.set()

    def _compile(self, policies: list[PolicySource]) -> tuple[bytes, RuleTable]:
        data = self._compiler.compile(policies)
        for error in self._compiler.errors:
            log.error("rule_broken", rule=error.rule, problem=error.message)
        loading = RuleTable.load(data)
        for _ in loading:
            pass
        return data, loading.table or RuleTable.empty()


def sources(policies: Any) -> list[PolicySource]:
    """Policies as the compiler takes them; disabled ones are left out."""
    return [
        PolicySource(
            policy.metadata.tenant_id,
            policy.metadata.name,
            policy.priority,
            [RuleSource(rule.name, rule.when, _action(rule), TREATMENTS[rule.treatment]) for rule in policy.rules],
        )
        for policy in policies
        if not policy.disabled
    ]


def _action(rule: documents.PolicyRule) -> Literal["allow", "deny"]:
    """Only what says allow allows."""
    return "allow" if rule.action == documents.RULE_ACTION_ALLOW else "deny"
