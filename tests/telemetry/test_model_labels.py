"""Names of models, which come from providers' answers, as labels of metrics."""

from __future__ import annotations

import asyncio
from typing import Any

import prometheus_client
from tests.kit import Num

from stroma import StromaRunner
from stroma.telemetry import datadog_hooks, otel_hooks, prometheus_hooks


async def _run(hooks: Any, count: int = 260) -> None:
    runner = StromaRunner.quick(hooks=hooks, pipeline="p")

    @runner.node("a", input=Num, output=Num)
    async def a(state: Num) -> Any:
        return state, 1, 1, f"gpt-{state.n}-{'x' * 500}"

    for n in range(count):
        await runner.run([a], Num(n=n))


def _check(models: set[str]) -> None:
    assert len(models) == 201
    assert "other" in models
    assert max(map(len, models)) <= 100


def test_prometheus() -> None:
    """Prometheus gets at most 200 names of models for each metric, then "other", and no tokens are lost."""
    registry = prometheus_client.CollectorRegistry()
    asyncio.run(_run(prometheus_hooks(registry=registry)))
    for name in ("stroma_tokens", "stroma_cost_usd"):
        (metric,) = [one for one in registry.collect() if one.name == name]
        samples = [one for one in metric.samples if one.name.endswith("_total")]
        _check({one.labels["model"] for one in samples})
        if name == "stroma_tokens":
            assert sum(one.value for one in samples) == 520


def test_opentelemetry() -> None:
    """The same of OpenTelemetry's metrics."""
    from opentelemetry.sdk.metrics import MeterProvider
    from opentelemetry.sdk.metrics.export import InMemoryMetricReader
    from opentelemetry.sdk.trace import TracerProvider

    reader = InMemoryMetricReader()
    asyncio.run(_run(otel_hooks(tracer=TracerProvider(), meter=MeterProvider([reader]))))
    data: Any = reader.get_metrics_data()
    points = {
        metric.name: metric.data.data_points
        for resource in data.resource_metrics
        for scope in resource.scope_metrics
        for metric in scope.metrics
    }
    for name in ("stroma.tokens", "stroma.cost"):
        _check({point.attributes["stroma.model"] for point in points[name]})


def test_datadog(monkeypatch: Any) -> None:
    """The same of the tags of DogStatsD."""
    sent: list[str] = []

    class Client:
        def increment(self, _name: str, _value: float = 1, tags: Any = (), **_: Any) -> None:
            sent.extend(tags)

        distribution = gauge = increment

    monkeypatch.setenv("DD_TRACE_ENABLED", "false")
    asyncio.run(_run(datadog_hooks(statsd=Client())))
    _check({tag.partition(":")[2] for tag in sent if tag.startswith("model:")})
