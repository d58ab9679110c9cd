"""What Prometheus is told of the resolver, read from its shared memory when asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Final

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from falkirk.router.control import DROPS, GAUGES
from falkirk.runtime.counters import Counters

_GAUGE_HELP: Final = {
    "connections": "Connections of flows to the resolver.",
    "waiting": "Questions that wait for other resolvers.",
}
_FAMILIES: Final = (
    ("questions", "protocol", "Questions of devices."),
    ("answers", "rcode", "Replies, by response code."),
    (
        "asked",
        "whom",
        "Questions to other resolvers: the node's own, those of forwarded zones, and those that nobody answered.",
    ),
)


class ResolverCollector(Collector):
    """The resolver's counters, and how many of its audit records wait."""

    def __init__(self, counters: Counters, pending: Callable[[], int]) -> None:
        self._counters, self._pending = counters, pending

    def collect(self) -> Iterator[Metric]:
        """The metrics."""
        counts = self._counters.values()
        for name in GAUGES:
            yield GaugeMetricFamily(f"falkirk_resolver_{name}", _GAUGE_HELP[name], value=counts[name])
        spooled = "Audit records of questions that policy hasn't acknowledged."
        yield GaugeMetricFamily("falkirk_resolver_spooled", spooled, value=self._pending())
        drops = CounterMetricFamily("falkirk_drops", "What was refused or lost.", labels=["service", "reason"])
        for reason in DROPS:
            drops.add_metric(["router", reason], counts[reason])
        yield drops
        for prefix, label, text in _FAMILIES:
            family = CounterMetricFamily(f"falkirk_resolver_{prefix}", text, labels=[label])
            for name, count in counts.items():
                if name.startswith(f"{prefix}_"):
                    family.add_metric([name.removeprefix(f"{prefix}_")], count)
            yield family
        yield CounterMetricFamily("falkirk_resolver_hidden", "Names that a rule hid.", value=counts["hidden"])
