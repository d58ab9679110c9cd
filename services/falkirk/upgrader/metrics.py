"""What Prometheus is told of the upgrader, read from the workers' shared memory when asked for."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from falkirk.runtime.counters import Counters
from falkirk.upgrader.control import DROPS, GAUGES


class UpgraderCollector(Collector):
    """Every worker's counters."""

    def __init__(self, workers: list[Counters]) -> None:
        self._workers = workers

    def collect(self) -> Iterator[Metric]:
        """The metrics."""
        values = [counters.values() for counters in self._workers]
        for name in GAUGES:
            gauge = GaugeMetricFamily(f"falkirk_upgrader_{name}", _GAUGE_HELP[name], labels=["worker"])
            for worker, counts in enumerate(values):
                gauge.add_metric([str(worker)], counts[name])
            yield gauge
        drops = CounterMetricFamily("falkirk_drops", "What was refused or lost.", labels=["service", "reason"])
        for reason in DROPS:
            drops.add_metric(["upgrader", reason], sum(counts[reason] for counts in values))
        yield drops
        for prefix, label, help_text in _FAMILIES:
            family = CounterMetricFamily(f"falkirk_upgrader_{prefix}", help_text, labels=["worker", label])
            for worker, counts in enumerate(values):
                for name, count in counts.items():
                    if name.startswith(f"{prefix}_"):
                        family.add_metric([str(worker), name.removeprefix(f"{prefix}_")], count)
            yield family


_GAUGE_HELP = {
    "streams": "Streams that are relayed or wait for their client.",
    "dialling": "Dials under way.",
    "paired": "1 while a flow worker is there.",
}
_FAMILIES = (
    ("dial", "outcome", "Dials by outcome."),
    ("socket", "outcome", "Sockets of UDP and echo sessions by outcome."),
    ("lower", "outcome", "Streams to devices that administrators asked for, and those that flow refused."),
    ("closed", "reason", "Streams that ended, by reason."),
    ("bytes", "direction", "Payload bytes relayed; up is towards the upstream."),
)
