"""Labels of metrics: bounded whatever runs are called, and the same events counted in every system."""

import asyncio
from collections import defaultdict
from typing import Any

import pytest
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF
from prometheus_client import CollectorRegistry
from prometheus_client.openmetrics.exposition import generate_latest
from tests.kit import Num, computing, failing_with, node, retry_policies, same

from stroma import Breaker, ExecutionBudget, Limit, StromaRunner
from stroma.telemetry import datadog_hooks, otel_hooks, prometheus_hooks
from stroma.telemetry.metrics import MetricLabels


class Systems:
    """OpenTelemetry, Prometheus and DogStatsD in memory, and what each has counted."""

    def __init__(self, **tracing: Any) -> None:
        self.reader, self.registry = InMemoryMetricReader(), CollectorRegistry()
        self.statsd: dict[str, dict[tuple[str, ...], float]] = defaultdict(lambda: defaultdict(float))
        self.tracer = TracerProvider(**tracing)

    def hooks(self) -> Any:
        from ddtrace.trace import tracer

        tracer.enabled = False
        otel = otel_hooks(tracer=self.tracer, meter=MeterProvider([self.reader]))
        return otel | prometheus_hooks(registry=self.registry) | datadog_hooks(statsd=self)

    def increment(self, name: str, value: float = 1, tags: Any = ()) -> None:
        self.statsd[name][tuple(tag.partition(":")[2] for tag in tags)] += value

    def distribution(self, name: str, value: float, tags: Any = ()) -> None:
        return None

    def counts(self, otel: str, prometheus: str, datadog: str) -> list[dict[tuple[str, ...], float]]:
        """What each system counts under its name of one metric, by the values of the labels in order."""
        data: Any = self.reader.get_metrics_data()
        of_otel = {
            tuple(sorted(point.attributes.values())): point.value
            for resource in data.resource_metrics
            for scope in resource.scope_metrics
            for metric in scope.metrics
            if metric.name == otel
            for point in metric.data.data_points
        }
        of_prometheus = {
            tuple(sorted(sample.labels.values())): sample.value
            for metric in self.registry.collect()
            for sample in metric.samples
            if sample.name == prometheus
        }
        of_datadog = {tuple(sorted(tags)): value for tags, value in self.statsd[datadog].items()}
        return [of_otel, of_prometheus, of_datadog]

    def page(self) -> str:
        """Return what a server that asks for OpenMetrics gets."""
        return generate_latest(self.registry).decode()


def named(node_id: str) -> Any:
    return node(node_id, same)


async def test_names_of_pipelines_and_nodes_are_bounded() -> None:
    """After 1,000 pairs of pipeline and node the label is "other" everywhere; no run is lost, the gauge 0."""
    systems = Systems()
    hooks = systems.hooks()
    for number in range(1010):
        runner = StromaRunner.quick(hooks=hooks, pipeline=f"p{number}")
        await runner.run([named(f"n{number}-{'x' * 500}")], Num())
    for names in (
        ("stroma.node.executions", "stroma_node_executions_total", "stroma.node.executions"),
        ("stroma.runs.active", "stroma_runs_in_progress", ""),
    ):
        for counted in systems.counts(*names)[: 3 if names[2] else 2]:
            assert len(counted) == 1001
            assert max(len(value) for labels in counted for value in labels) <= 200
            assert sum(counted.values()) == (1010 if names[2] else 0)


async def test_names_of_models_are_bounded() -> None:
    """Each metric has at most 200 names of models, then "other", in all systems, and no tokens are lost."""
    systems = Systems()
    runner = StromaRunner.quick(hooks=systems.hooks(), pipeline="p")

    call = computing(lambda state: (state, 1, 1, f"gpt-{state.n}-{'x' * 500}"))
    one = node("a", call)
    for n in range(260):
        await runner.run([one], Num(n=n))
    for names in (
        ("stroma.tokens", "stroma_tokens_total", "stroma.tokens"),
        ("stroma.cost", "stroma_cost_usd_total", "stroma.cost_usd"),
    ):
        for counted in systems.counts(*names):
            models = {text for labels in counted for text in labels if text.startswith(("gpt-", "other"))}
            assert len(models) == 201, names
            assert max(map(len, models)) <= 100
            assert names[0] != "stroma.tokens" or sum(counted.values()) == 520


def test_labels_that_are_in_use_stay() -> None:
    """A name that has had a label keeps it when the bound is reached, so what went up comes down."""
    labels = MetricLabels()
    first = labels.limit("first")
    assert {labels.limit(f"limit-{n}") for n in range(300)} == {f"limit-{n}" for n in range(199)} | {"other"}
    assert (labels.limit("first"), labels.limit("second")) == (first, "other")
    assert labels.circuit("\ud800") == "\\ud800"


async def test_all_systems_count_the_same_events() -> None:
    """Waits, restored nodes and budget warnings have the same counts and labels in all three."""
    systems = Systems()
    hooks = systems.hooks()
    runner = StromaRunner.quick(hooks=hooks, pipeline="p", limits={"a": Limit(concurrent=1)})
    gate, entered = asyncio.Event(), asyncio.Event()

    async def waits(state: Num) -> Num:
        entered.set()
        await gate.wait()
        return state

    one = node("a", waits)
    first = asyncio.ensure_future(runner.run([one], Num(), run_id="r"))
    await entered.wait()
    second = asyncio.ensure_future(runner.run([one], Num()))
    await asyncio.sleep(0)
    while not systems.statsd["stroma.node.waits"]:
        await asyncio.sleep(0.001)
    gate.set()
    await asyncio.gather(first, second)

    costs = computing(lambda state: (state, 45, 45, "gpt-4o-mini"))
    limited = StromaRunner.quick(hooks=hooks, pipeline="p", budget=ExecutionBudget(max_tokens_total=100))
    nodes = [node("c", costs), node("d", failing_with(NotImplementedError))]
    await limited.run(nodes, Num(), run_id="s")
    await limited.resume(nodes, "s")
    for names, expected in (
        (("stroma.node.waits", "stroma_node_waits_total", "stroma.node.waits"), {("a", "p"): 1}),
        (("stroma.nodes.restored", "stroma_nodes_skipped_total", "stroma.nodes.restored"), {("c", "p"): 1}),
        (
            ("stroma.budget.warnings", "stroma_budget_warnings_total", "stroma.budget.warnings"),
            {("p", "tokens"): 2},  # Of the run, and of its resume.
        ),
    ):
        assert systems.counts(*names) == [expected] * 3, names


async def test_all_systems_count_circuits() -> None:
    """A circuit that opens is counted under its name and state in all three."""
    systems = Systems()

    runner = StromaRunner.quick(
        hooks=systems.hooks(),
        pipeline="p",
        breaker=Breaker(min_calls=1, max_wait_seconds=0),
        limits={"llm": Limit(concurrent=5)},
        node_limits={"a": "llm"},
        policy_map=retry_policies(0),
    )
    await runner.run([node("a", failing_with(ConnectionError, "no"))], Num())
    names = ("stroma.circuit.changes", "stroma_circuit_changes_total", "stroma.circuit.changes")
    assert systems.counts(*names) == [{("limit 'llm'", "open", "p"): 1}] * 3


@pytest.mark.parametrize("sampled", [True, False])
async def test_exemplars(sampled: bool) -> None:
    """Counts and durations of runs and attempts carry the trace id of a sampled span, and of no other."""
    systems = Systems(**({} if sampled else {"sampler": ALWAYS_OFF}))
    result = await StromaRunner.quick(hooks=systems.hooks(), pipeline="p").run([named("a")], Num())
    assert result.status == "COMPLETED"
    lines = [line for line in systems.page().splitlines() if "# {" in line]
    assert sorted({line.partition("{")[0] for line in lines}) == (
        [
            "stroma_node_duration_seconds_bucket",
            "stroma_node_executions_total",
            "stroma_run_duration_seconds_bucket",
            "stroma_runs_total",
        ]
        if sampled
        else []
    )
    assert all('trace_id="' in line and 'span_id="' in line for line in lines)


async def test_no_span_no_exemplar() -> None:
    """Without a span there is no exemplar."""
    registry = CollectorRegistry()
    await StromaRunner.quick(hooks=prometheus_hooks(registry=registry)).run([named("a")], Num())
    page = generate_latest(registry).decode()
    assert "stroma_runs_total" in page
    assert "# {" not in page
