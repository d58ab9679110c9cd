"""What Prometheus is told of the store."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from falkirk.registry.store import Store
from falkirk.registry.watch import Feed


class StoreCollector(Collector):
    """Revision, history and watches, read when asked for."""

    def __init__(self, store: Store, feed: Feed) -> None:
        self._store = store
        self._feed = feed

    def collect(self) -> Iterator[Metric]:
        """The metrics."""
        yield GaugeMetricFamily("falkirk_registry_revision", "Revision of the last commit.", self._store.revision)
        yield GaugeMetricFamily(
            "falkirk_registry_oldest_resumable",
            "Oldest revision that a watch can resume after.",
            self._store.oldest_resumable,
        )
        yield GaugeMetricFamily("falkirk_registry_watches", "Open watches.", self._feed.watches)
