"""What Prometheus reads: the engine's counts and the server's own, in one registry.

Owns names and meanings of the figures. No label holds anything that a client wrote.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

if TYPE_CHECKING:
    from hybridk2.engine import EngineStats
    from hybridk2.server.worker import EngineWorker, RemoteReply

# Seconds; a first token comes from a cached prompt at once, from a long one after minutes.
_SECONDS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0)


class ServerMetrics:
    """The figures of one server."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._responses = Counter(
            "hybridk2_http_responses",
            "Responses, by route and status.",
            ("route", "status"),
            registry=self._registry,
        )
        self._first_output = Histogram(
            "hybridk2_time_to_first_token_seconds",
            "From a reply's admission to the first thing the model says.",
            buckets=_SECONDS,
            registry=self._registry,
        )
        self._reply_seconds = Histogram(
            "hybridk2_reply_seconds",
            "From a reply's admission to its end.",
            buckets=_SECONDS,
            registry=self._registry,
        )
        self.open_requests = Gauge(
            "hybridk2_http_requests_open",
            "Requests that are being answered.",
            registry=self._registry,
        )

    def watch(self, worker: EngineWorker) -> None:
        """Add the engine's own figures."""
        self._registry.register(_EngineFigures(worker))

    def count_response(self, route: str, status: int) -> None:
        self._responses.labels(route, str(status)).inc()

    def count_reply(self, reply: RemoteReply) -> None:
        """A reply ended."""
        self._reply_seconds.observe(reply.seconds)
        if reply.first_output_seconds is not None:
            self._first_output.observe(reply.first_output_seconds)

    def exposition(self) -> bytes:
        """Everything, in Prometheus' text format."""
        return generate_latest(self._registry)


class _EngineFigures(Collector):
    """Reads the engine's counts at the moment they are asked for."""

    def __init__(self, worker: EngineWorker) -> None:
        self._worker = worker

    def collect(self) -> Iterator[Metric]:
        yield _gauge("up", "1 while requests are answered.", float(self._worker.alive))
        yield _gauge("replies_under_way", "Replies begun and not ended.", self._worker.under_way)
        if self._worker.alive:
            yield from _engine_figures(self._worker.assistant.stats())


def _engine_figures(stats: EngineStats) -> Iterator[Metric]:
    yield _gauge("running", "Requests that compute.", stats.running)
    waiting = GaugeMetricFamily("hybridk2_waiting", "Requests that wait.", labels=["priority"])
    waiting.add_metric(["interactive"], stats.waiting_interactive)
    waiting.add_metric(["background"], stats.waiting_background)
    yield waiting
    yield _gauge("cache_tokens_used", "Tokens of cache held.", stats.cache_tokens_used)
    yield _gauge("cache_tokens_capacity", "Tokens of cache.", stats.cache_tokens_capacity)
    yield _counter("prompt_tokens", "Tokens of prompts.", stats.prompt_tokens_total)
    yield _counter("cached_tokens", "Of those, not computed again.", stats.cached_tokens_total)
    yield _counter("completion_tokens", "Tokens generated.", stats.completion_tokens_total)
    finished = CounterMetricFamily(
        "hybridk2_requests", "Requests that ended, by how.", labels=["reason"]
    )
    for reason, count in stats.requests_total.items():
        finished.add_metric([reason], count)
    yield finished
    yield _counter("steps", "Steps of the engine.", stats.steps_total)
    yield _counter("step_seconds", "Time spent in them.", stats.step_seconds_total)
    yield _counter(
        "expert_bytes",
        "Bytes of expert weights read; its rate is the bandwidth that was reached.",
        stats.expert_bytes_total,
    )
    yield _gauge(
        "host_expert_share",
        "Share of picked experts that host memory served; the rest was on the GPU.",
        stats.host_expert_share,
    )


def _gauge(name: str, meaning: str, value: float) -> Metric:
    return GaugeMetricFamily(f"hybridk2_{name}", meaning, value=value)


def _counter(name: str, meaning: str, value: float) -> Metric:
    return CounterMetricFamily(f"hybridk2_{name}", meaning, value=value)
