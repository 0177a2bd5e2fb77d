"""Runs that are counted once, however many exporters and callers look at them."""

import asyncio
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sentry_sdk
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from prometheus_client import CollectorRegistry
from tests.kit import Num as Number
from tests.kit import noting
from tests.receivers.sentry import RecordedSentry

from stroma import FailureClass, NodeHooks, Pipeline, RunConfig, StromaRunner
from stroma.hooks.sets import HookSets
from stroma.telemetry import datadog_hooks, log_hooks, otel_hooks, prometheus_hooks, sentry_hooks

pytest_plugins = ["tests.receivers.fixtures"]


class Statsd:
    """A client of DogStatsD that records what it is called with."""

    def __init__(self) -> None:
        self.counts: list[tuple[str, float]] = []

    def increment(self, name: str, value: float, tags: list[str]) -> None:
        self.counts.append((name, value))

    def distribution(self, name: str, value: float, tags: list[str]) -> None: ...

    def flush(self) -> None: ...


class Span:
    span_id = trace_id = 1
    context = None

    def __init__(self, created: list[str], name: str) -> None:
        created.append(name)

    def __getattr__(self, name: str) -> Callable[..., Any]:
        return lambda *_, **__: None


class Tracer:
    """A tracer of ddtrace that records the names of the spans that it starts."""

    def __init__(self) -> None:
        self.created: list[str] = []
        self.context_provider = Span([], "")

    def start_span(self, name: str, **_: Any) -> Span:
        return Span(self.created, name)

    def current_trace_context(self) -> None:
        return None


class Otel:
    def __init__(self) -> None:
        self.spans, self.reader = InMemorySpanExporter(), InMemoryMetricReader()
        self.tracer = TracerProvider()
        self.tracer.add_span_processor(SimpleSpanProcessor(self.spans))
        self.meter = MeterProvider([self.reader])

    def hooks(self, **options: Any) -> Any:
        return otel_hooks(tracer=self.tracer, meter=self.meter, **options)

    def count(self, name: str) -> float:
        data = self.reader.get_metrics_data()
        result = [] if data is None else data.resource_metrics
        metrics = [m for r in result for scope in r.scope_metrics for m in scope.metrics if m.name == name]
        points: list[Any] = [point for metric in metrics for point in metric.data.data_points]
        return sum(getattr(point, "value", None) or getattr(point, "count", 0) for point in points)

    def roots(self) -> int:
        return sum(str(span.name).startswith("invoke_workflow") for span in self.spans.get_finished_spans())


def total(registry: CollectorRegistry, name: str) -> float:
    return sum(
        sample.value for family in registry.collect() for sample in family.samples if sample.name == name
    )


def runner_of(
    hooks: Any, store: Any = None, *, fails: bool = False
) -> tuple[StromaRunner, Any, asyncio.Event]:
    runner = StromaRunner.quick(
        hooks=hooks, store=store, pipeline="p", classifiers=[lambda error, where: FailureClass.TERMINAL]
    )
    gate = asyncio.Event()

    @runner.node("a", input=Number, output=Number)
    async def a(state: Number) -> Any:
        await gate.wait()
        if fails:
            raise ValueError("no")
        return {"n": 1}, 10, 0, "gpt-4o-mini"

    return runner, a, gate


@pytest.mark.parametrize("fails", [False, True], ids=["completed", "failed"])
async def test_callers_that_attach_count_no_run_again(
    fails: bool, tmp_path: Path, sentry: RecordedSentry, caplog: pytest.LogCaptureFixture
) -> None:
    """A run that others wait for, or whose result is asked for later, counts once in each system."""
    caplog.set_level("INFO", logger="stroma")
    registry, otel, statsd, tracer = CollectorRegistry(), Otel(), Statsd(), Tracer()
    hooks = [
        prometheus_hooks(registry=registry),
        otel.hooks(),
        datadog_hooks(tracer=tracer, statsd=statsd),
        sentry_hooks(client=sentry.client),
        log_hooks(),
    ]
    runner, a, gate = runner_of(hooks, tmp_path / "runs.db", fails=fails)
    before = deque(sentry_sdk.get_isolation_scope()._breadcrumbs)

    async def call() -> Any:
        return await runner.run([a], Number(), run_id="one", if_exists="return", if_running="attach")

    calls = [asyncio.ensure_future(call()) for _ in range(3)]
    await asyncio.sleep(0.05)  # Those that attach have found the run busy.
    gate.set()
    results = await asyncio.gather(*calls)
    if not fails:  # A run that failed would be continued.
        results.append(await call())
    assert len({result.status for result in results}) == 1
    assert total(registry, "stroma_runs_total") == 1
    assert total(registry, "stroma_run_duration_seconds_count") == 1
    assert total(registry, "stroma_nodes_skipped_total") == 0
    assert total(registry, "stroma_runs_in_progress") == 0
    assert otel.roots() == 1
    assert otel.count("gen_ai.invoke_agent.duration") == 1
    assert tracer.created.count("stroma.run") == 1
    assert [value for name, value in statsd.counts if name == "stroma.runs"] == [1]
    assert [one["transaction"] for one in sentry.transport.transactions] == ["p"]
    assert len(sentry.transport.events) == fails
    lines = [record.getMessage().partition(":")[0] for record in caplog.records]
    assert (lines.count("run started"), lines.count("run ended")) == (1, 1)
    assert lines.count("run returned") == len(results) - 1
    assert "node restored" not in lines
    engine = [record.getMessage() for record in caplog.records if record.name == "stroma"]
    assert sum("pipeline 'p' ended" in line for line in engine) == 1
    assert sentry_sdk.get_isolation_scope()._breadcrumbs == before


async def test_errors_of_hooks_of_callers_that_attach_still_count() -> None:
    """What a hook of the caller itself raises is an error like any other."""

    async def raises(run_id: str, result: Any) -> None:
        raise LookupError

    registry = CollectorRegistry()
    hooks = [prometheus_hooks(registry=registry), NodeHooks(on_run_start=lambda *_: raises("", None))]
    runner, a, gate = runner_of(hooks)
    gate.set()
    for _ in range(2):
        await runner.run([a], Number(), run_id="one", if_exists="return")
    assert total(registry, "stroma_hook_errors_total") == 2
    assert total(registry, "stroma_runs_total") == 1


@pytest.mark.parametrize("how", ["list", "or", "same set", "nested"])
async def test_two_sets_of_one_exporter_in_a_run_are_one(
    how: str, sentry: RecordedSentry, caplog: pytest.LogCaptureFixture
) -> None:
    """Sets of hooks of one run with the same registry, provider, client or logger count each event once."""
    caplog.set_level("INFO", logger="stroma")
    registry, otel, statsd, tracer = CollectorRegistry(), Otel(), Statsd(), Tracer()
    makers: list[Callable[[], Any]] = [
        lambda: prometheus_hooks(registry=registry),
        otel.hooks,
        lambda: datadog_hooks(tracer=tracer, statsd=statsd),
        lambda: sentry_hooks(client=sentry.client),
        log_hooks,
    ]
    seen: list[str] = []

    plain = NodeHooks(on_node_start=noting(seen, lambda run_id, node_id, state: node_id))
    hooks: Any = [plain, plain]  # Whoever composes a plain set twice is called twice.
    for make in makers:
        one = make()
        other = one if how == "same set" else make()
        pair: Any = (
            HookSets((one, other)) if how == "or" else [[one], [other]] if how == "nested" else [one, other]
        )
        hooks = [*hooks, *pair]
    runner, a, gate = runner_of(hooks, fails=True)
    gate.set()
    await runner.run([a], Number())
    assert total(registry, "stroma_runs_total") == 1
    assert total(registry, "stroma_node_executions_total") == 1
    assert otel.roots() == 1
    assert otel.count("stroma.node.executions") == 1
    assert tracer.created == ["stroma.run", "stroma.node"]
    assert [value for name, value in statsd.counts if name == "stroma.runs"] == [1]
    assert len(sentry.transport.events) == 1
    assert sum(record.getMessage().startswith("run ended") for record in caplog.records) == 1
    assert seen == ["a", "a"]


async def test_sets_that_feed_different_places_all_count() -> None:
    """Two registries, and two providers, each count the run."""
    registries, otels = [CollectorRegistry(), CollectorRegistry()], [Otel(), Otel()]
    runner, a, gate = runner_of(
        [*(prometheus_hooks(registry=r) for r in registries), *(o.hooks() for o in otels)]
    )
    gate.set()
    await runner.run(Pipeline("p", [a], config=RunConfig()), Number())
    assert [total(registry, "stroma_runs_total") for registry in registries] == [1, 1]
    assert [otel.roots() for otel in otels] == [1, 1]
