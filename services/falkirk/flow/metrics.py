"""What Prometheus is told of the flow workers, read from their shared memory when asked for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from falkirk.flow import counters
from falkirk.runtime.counters import Counters

_GAUGES: Final = (
    ("flows", "Live flows.", counters.FLOWS),
    ("tunnels", "Open tunnels.", counters.TUNNELS),
    ("slots_active", "NAT slots in use.", counters.SLOTS_ACTIVE),
    ("slots_resting", "NAT slots that rest before they are used again.", counters.SLOTS_RESTING),
    ("slots_total", "NAT slots in all.", counters.SLOTS_TOTAL),
    ("paired", "1 while an upgrader worker is there.", counters.PAIRED),
)
_FAMILIES: Final = (
    (
        "packets",
        "fate",
        "Packets from tunnels and TUN devices: received, and what became of them beside falkirk_drops_total.",
        (counters.RECEIVED, counters.FORWARDED, counters.ANSWERED),
    ),
    ("events", "event", "Flows that were started, denied, ended.", (counters.STARTED, counters.DENIED, counters.ENDED)),
)


class FlowCollector(Collector):
    """Every worker's counters; gauges are at most a second old."""

    def __init__(self, workers: Sequence[Counters]) -> None:
        self._workers = workers

    def collect(self) -> Iterator[Metric]:
        """The metrics."""
        for name, text, place in _GAUGES:
            gauge = GaugeMetricFamily(f"falkirk_flow_{name}", text, labels=["worker"])
            for worker, counts in enumerate(self._workers):
                gauge.add_metric([str(worker)], counts.view[place])
            yield gauge
        for name, label, text, places in _FAMILIES:
            family = CounterMetricFamily(f"falkirk_flow_{name}", text, labels=["worker", label])
            for worker, counts in enumerate(self._workers):
                for place in places:
                    family.add_metric([str(worker), counters.NAMES[place]], counts.view[place])
            yield family
        drops = CounterMetricFamily("falkirk_drops", "Packets dropped, by reason.", labels=["service", "reason"])
        for reason, place in counters.DROPS.items():
            drops.add_metric(["flow", reason], sum(counts.view[place] for counts in self._workers))
        yield drops
