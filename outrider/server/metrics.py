"""``/metrics``: the engine's counters under vLLM's metric names where the meaning is the same."""

from collections.abc import Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from outrider.server.engine import Engine


class EngineCollector(Collector):
    """Reads the engine whenever Prometheus asks; nothing is counted twice."""

    def __init__(self, engine: Engine, model: str) -> None:
        self.engine, self.model = engine, model

    def collect(self) -> Iterator[Metric]:
        load, status = self.engine.load(), self.engine.status()
        gauges = [
            ("vllm:num_requests_running", "Sequences that are decoded or prefilled", load.running),
            ("vllm:num_requests_waiting", "Sequences that wait", load.waiting),
            ("vllm:kv_cache_usage_perc", "Share of the cache in use", load.cache_usage),
            ("outrider:weight_version", "Version of the weights in use", status.version),
            ("outrider:weight_stage_seconds", "Seconds of the latest stage", status.stage_seconds),
            ("outrider:weight_commit_seconds", "Seconds of the latest commit", status.commit_seconds),
        ]
        counters = [
            ("vllm:prompt_tokens", "Prompt tokens of accepted requests", load.prompt_tokens),
            ("vllm:generation_tokens", "Tokens generated", load.generated_tokens),
            ("vllm:request_success", "Requests ended", load.finished),
            ("vllm:num_preemptions", "Sequences put back for lack of cache", load.preemptions),
            ("vllm:prefix_cache_queries", "Prompt tokens looked up in the prefix cache", load.prefix_queries),
            ("vllm:prefix_cache_hits", "Prompt tokens found in the prefix cache", load.prefix_hits),
            ("outrider:engine_steps", "Forward passes of the model", load.steps),
            ("outrider:engine_idle_seconds", "Seconds without work, mean over the replicas", load.idle_seconds),
            ("outrider:replica_restarts", "Replicas that died and were started anew", load.restarts),
        ]
        for name, text, value in gauges:
            gauge = GaugeMetricFamily(name, text, labels=["model_name"])
            gauge.add_metric([self.model], value)
            yield gauge
        for name, text, value in counters:
            counter = CounterMetricFamily(name, text, labels=["model_name"])
            counter.add_metric([self.model], value)
            yield counter
