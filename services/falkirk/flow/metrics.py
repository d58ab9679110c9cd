"""What Prometheus is told of the flow workers, read from their shared memory when asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Final

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from falkirk.flow import counters
from falkirk.runtime.counters import Counters
from falkirk.wire.context import TunnelContext

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


DEVICES: Final = 200
"""Devices that metrics name, those with the most live flows; the rest are summed as device "(others)"."""
_WHOSE: Final = ("tenant", "device", "user", "groups")
_OTHERS: Final = ("", "(others)", "", "")


class DeviceCollector(Collector):
    """Live flows and their bytes by device, with its owner and groups; `live` gives (context, bytes up, bytes down) of each live flow.

    Limit: goes through all flows at each scrape, a tenth of a second for 100,000.
    """

    def __init__(self, live: Callable[[], Iterable[tuple[TunnelContext, int, int]]]) -> None:
        self._live = live

    def collect(self) -> Iterator[Metric]:
        """The metrics."""
        sums: dict[tuple[str, ...], list[int]] = {}
        for context, up, down in self._live():
            labels = context.tenant, context.device, context.user, ",".join(context.groups)
            counts = sums.setdefault(labels, [0, 0, 0])
            counts[0] += 1
            counts[1] += up
            counts[2] += down
        ordered: list[tuple[tuple[str, ...], list[int]]] = sorted(sums.items(), key=lambda item: (-item[1][0], item[0]))
        if len(ordered) > DEVICES:
            rest = [sum(column) for column in zip(*(counts for _, counts in ordered[DEVICES:]), strict=True)]
            ordered = [*ordered[:DEVICES], (_OTHERS, rest)]
        flows = GaugeMetricFamily("falkirk_flow_device_flows", "Live flows that a device began.", labels=_WHOSE)
        text = "IP bytes of a device's live flows since they began; up is from the device."
        moved = GaugeMetricFamily("falkirk_flow_device_live_bytes", text, labels=(*_WHOSE, "direction"))
        for whose, (count, up, down) in ordered:
            flows.add_metric(whose, count)
            moved.add_metric((*whose, "up"), up)
            moved.add_metric((*whose, "down"), down)
        yield flows
        yield moved


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
