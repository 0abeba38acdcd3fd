"""What the server measures, in Prometheus' text format."""

from collections.abc import Iterator

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from qtale_jax.engine.engine import Engine

CONTENT_TYPE = CONTENT_TYPE_LATEST
BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)


class _EngineMetrics(Collector):
    """The engine's own counts, read when they are asked for."""

    def __init__(self, engine: Engine):
        self._engine = engine

    def collect(self) -> Iterator[Metric]:
        """Yields every metric."""
        now = self._engine.statistics()
        gauges = {
            "qtale_executed_ratio": ("Executed share of all layers over all tokens that ran.", now.executed_ratio),
            "qtale_kv_bytes": ("Bytes of KV pages in use.", now.kv_bytes),
            "qtale_kv_bytes_held": ("Bytes of the whole KV cache.", now.kv_bytes_held),
            "qtale_tokens_per_second": ("New tokens per second over the last ten.", now.tokens_per_second),
            "qtale_requests_running": ("Requests that have rows.", now.running),
            "qtale_requests_waiting": ("Requests that wait for a row.", now.waiting),
            "qtale_rows": ("Rows.", now.rows),
        }
        for name, (text, value) in gauges.items():
            yield GaugeMetricFamily(name, text, value=value)
        counters = {
            "qtale_prompt_tokens": ("Tokens of prompts that ran.", now.prompt_tokens),
            "qtale_new_tokens": ("Tokens that were given out.", now.new_tokens),
            "qtale_layers": ("Layers that tokens could have executed.", now.layers),
            "qtale_layers_executed": ("Layers that tokens executed.", now.executed_layers),
            "qtale_interruptions": ("Times that a request lost its row for want of pages.", now.interruptions),
        }
        for name, (text, value) in counters.items():
            yield CounterMetricFamily(name, text, value=value)
        finished = CounterMetricFamily("qtale_finished", "Requests that ended, by reason.", labels=["reason"])
        for reason, count in now.finished.items():
            finished.add_metric([reason], count)
        yield finished


class Metrics:
    """The metrics of one server."""

    def __init__(self, engine: Engine):
        self._registry = CollectorRegistry()
        self._registry.register(_EngineMetrics(engine))
        self.responses = Counter(
            "qtale_http_responses", "Answers to completion requests, by status.", ["status"], registry=self._registry
        )
        self.first_token = Histogram(
            "qtale_first_token_seconds", "From a request to its first text.", buckets=BUCKETS, registry=self._registry
        )
        self.duration = Histogram(
            "qtale_request_seconds", "From a request to its last text.", buckets=BUCKETS, registry=self._registry
        )

    def text(self) -> bytes:
        """Everything, in the text format."""
        return generate_latest(self._registry)
