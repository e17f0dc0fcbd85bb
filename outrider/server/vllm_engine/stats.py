"""vLLM's own counters, read from where it registers them for Prometheus."""

from collections.abc import Iterator

from prometheus_client import REGISTRY
from prometheus_client.core import Metric
from prometheus_client.registry import Collector


class VllmCounters:
    """Sums over the data-parallel engines."""

    def read(self) -> dict[str, float]:
        """Sample name, without ``_total``, → value."""
        totals: dict[str, float] = {}
        for metric in REGISTRY.collect():
            if metric.name.startswith("vllm:"):
                for sample in metric.samples:
                    name = sample.name.removesuffix("_total")
                    totals[name] = totals.get(name, 0.0) + sample.value
        return totals


class OtherMetrics(Collector):
    """Those of vLLM's metrics that a server of this project does not give itself. own: names that it does."""

    def __init__(self, own: frozenset[str]) -> None:
        self.own = own

    def collect(self) -> Iterator[Metric]:
        for metric in REGISTRY.collect():
            if metric.name not in self.own:
                yield metric
