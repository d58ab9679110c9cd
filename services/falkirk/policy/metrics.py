"""What Prometheus is told of the policy service."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from falkirk.policy.rulebook import Rulebook
from falkirk.policy.store import AuditStore


class PolicyCollector(Collector):
    """Rules in force, audit records and what else is counted, read when asked for."""

    def __init__(self, rulebook: Rulebook, store: AuditStore) -> None:
        self._rulebook = rulebook
        self._store = store

    def collect(self) -> Iterator[Metric]:
        """The metrics."""
        status = self._rulebook.status()
        yield GaugeMetricFamily("falkirk_policy_rules", "Rules in force.", status.items)
        yield GaugeMetricFamily("falkirk_policy_revision", "Registry revision of the rules.", status.revision.number)
        yield GaugeMetricFamily("falkirk_policy_watchers", "Open WatchRules.", self._rulebook.publisher.watchers)
        family = CounterMetricFamily("falkirk_audit", "What the audit store did.", labels=["what"])
        for name, count in sorted(dict(self._store.counters).items()):
            family.add_metric([name], count)
        yield family
