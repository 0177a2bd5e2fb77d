"""What exporters make of runs whose parts are in several processes: each attempt and each end has its own context."""

from __future__ import annotations

from typing import Any

import pytest
from tests.drivers.scenarios import Left, Right, counted, failing, half, spending
from tests.drivers.seam import SeamDriver
from tests.kit import NEVER, THRICE, Num, node
from tests.receivers.sentry import RecordedSentry

from stroma import RunStatus, parallel
from stroma.telemetry import datadog_hooks, log_hooks, prometheus_hooks, sentry_hooks

pytest_plugins = ["tests.receivers.fixtures"]

GIVEN = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


@pytest.mark.core
class TestPrometheus:
    async def test_a_run_is_counted_once_and_none_stays_in_progress(self) -> None:
        """Its begin and its end may be told in two processes: the gauge does not count it, all else does so once."""
        from prometheus_client import CollectorRegistry

        registry = CollectorRegistry()
        nodes = [spending([], "a", 10, "gpt-4o-mini"), failing([], "b", TimeoutError("slow"), tokens=5)]
        async with SeamDriver().bind(nodes, hooks=prometheus_hooks(registry=registry), policy_map=THRICE) as bound:  # fmt: skip
            result = await bound.run(Num())
        assert result.status is RunStatus.COMPLETED

        def value(name: str, **labels: str) -> float | None:
            return registry.get_sample_value(name, {"pipeline": "pipe", **labels})

        assert not value("stroma_runs_in_progress")
        assert value("stroma_runs_total", status="COMPLETED") == 1
        assert value("stroma_run_duration_seconds_count", status="COMPLETED") == 1
        seconds = value("stroma_run_duration_seconds_sum", status="COMPLETED")
        assert seconds is not None
        assert seconds * 1000 >= next(iter(result.trace)).duration_ms
        events = {"node_id": "a", "model": "gpt-4o-mini", "direction": "input"}
        assert value("stroma_tokens_total", **events) == 10
        assert value("stroma_node_retries_total", node_id="b", failure_class="RECOVERABLE") == 1
        assert (
            value("stroma_cost_usd_total", node_id="a", model="gpt-4o-mini")
            == next(iter(result.trace)).usage.cost_usd
        )

    async def test_a_run_that_nobody_could_begin_leaves_no_gauge_below_zero(self) -> None:
        """OpenTelemetry's gauge, too, is moved by no run of other machines."""
        from opentelemetry.sdk.metrics import MeterProvider
        from opentelemetry.sdk.metrics.export import InMemoryMetricReader

        from stroma.telemetry import otel_hooks

        reader = InMemoryMetricReader()
        hooks = otel_hooks(meter=MeterProvider(metric_readers=[reader]))
        async with SeamDriver().bind([counted([], "a")], hooks=hooks) as bound:
            await bound.run(Num())
        data: Any = reader.get_metrics_data()
        metrics = {m.name: m for r in data.resource_metrics for s in r.scope_metrics for m in s.metrics}
        assert "gen_ai.invoke_agent.duration" in metrics
        assert "stroma.runs.active" not in metrics


class Odd(Exception):
    pass


@pytest.mark.core
class TestSentry:
    async def test_only_a_runs_final_failure_is_captured_and_once(self, sentry: RecordedSentry) -> None:
        """Attempts that are tried again are none; the issue is that of a local run: same fingerprint, same tags."""
        from tests.drivers.conftest import LocalDriver

        issues: list[Any] = []
        for driver in (SeamDriver(), LocalDriver()):
            before = len(sentry.transport.events)
            nodes = [
                failing([], "a", TimeoutError("slow")),
                parallel(failing([], "b", *[Odd("no")] * 9), counted([], "c")),
            ]
            async with driver.bind(
                nodes, hooks=sentry_hooks(client=sentry.client), policy_map=THRICE
            ) as bound:
                result = await bound.run(Num(), run_id="run")
            assert result.status is RunStatus.PARTIAL
            (event,) = sentry.transport.events[before:]
            (value,) = event["exception"]["values"]
            issues.append(
                (
                    event["fingerprint"],
                    event["tags"],
                    event["contexts"]["stroma"],
                    value["type"],
                    value["module"],
                )
            )
        assert issues[0] == issues[1]
        assert issues[0][0] == ["stroma", "pipe", "b", "AMBIGUOUS", f"{__name__}.Odd"]

    async def test_spans_stand_under_one_trace(self, sentry: RecordedSentry) -> None:
        """All of them are sent, under the caller's trace, children under their group."""
        nodes = [counted([], "a"), parallel(half([], "l", "left", Left), half([], "r", "right", Right))]
        async with SeamDriver().bind(nodes, hooks=sentry_hooks(client=sentry.client)) as bound:
            await bound.run(Num(), traceparent=GIVEN)
        spans = sentry.transport.spans
        assert {span["trace_id"] for span in spans} == {GIVEN.split("-")[1]}
        names = {span["span_id"]: (span["op"], span["name"]) for span in spans}
        group = ("gen_ai.execute_tool", "parallel(l, r)")
        run = ("gen_ai.invoke_agent", "pipe")
        assert {(s["op"], s["name"]): names.get(s["parent_span_id"]) for s in spans} == {
            run: None,
            ("gen_ai.execute_tool", "a"): run,
            group: run,
            ("gen_ai.execute_tool", "l"): group,
            ("gen_ai.execute_tool", "r"): group,
            ("stroma.node_end", "parallel(l, r)"): group,
            ("stroma.run_end", "pipe"): run,
        }


@pytest.mark.core
class TestDatadog:
    async def test_spans_stand_under_one_trace_and_a_run_is_counted_once(self) -> None:
        """Every span ends, under the caller's trace; a run is one run in the metrics."""
        from ddtrace.trace import TraceFilter, tracer

        seen: list[Any] = []

        class Keep(TraceFilter):
            def process_trace(self, trace: Any) -> None:
                seen.extend(trace)

        class Statsd:
            def __init__(self) -> None:
                self.counts: list[tuple[str, float]] = []

            def increment(self, name: str, value: float, tags: list[str]) -> None:
                self.counts.append((name, value))

            def distribution(self, name: str, value: float, tags: list[str]) -> None:
                self.counts.append((name, 1))

        statsd: Any = Statsd()
        tracer.configure(trace_processors=[Keep()])
        try:
            nodes = [
                failing([], "a", TimeoutError("slow"), tokens=7),
                parallel(half([], "l", "left", Left), half([], "r", "right", Right)),
            ]
            hooks = datadog_hooks(tracer=tracer, statsd=statsd)
            async with SeamDriver().bind(nodes, hooks=hooks, policy_map=THRICE) as bound:
                result = await bound.run(Num(), traceparent=GIVEN)
        finally:
            tracer.configure(trace_processors=[])
        assert result.hook_errors == []
        assert {f"{span.trace_id:032x}" for span in seen} == {GIVEN.split("-")[1]}
        names = {span.span_id: (span.name, span.resource) for span in seen}
        group, run = ("stroma.node", "parallel(l, r)"), ("stroma.run", "pipe")
        assert {(s.name, s.resource): names.get(s.parent_id) for s in seen} == {
            run: None,
            ("stroma.node", "a"): run,
            group: run,
            ("stroma.node", "l"): group,
            ("stroma.node", "r"): group,
            ("stroma.node_end", "parallel(l, r)"): group,
            ("stroma.run_end", "pipe"): run,
        }
        counts = dict.fromkeys(
            ("stroma.runs", "stroma.run.duration", "stroma.tokens", "stroma.node.retries"), 0.0
        )
        for name, value in statsd.counts:
            if name in counts:
                counts[name] += value
        assert counts == {
            "stroma.runs": 1,
            "stroma.run.duration": 1,
            "stroma.tokens": 14,
            "stroma.node.retries": 1,
        }


async def test_every_line_of_the_log_says_which_run_it_is_of(caplog: Any) -> None:
    """The end, too, which also says how long the run took."""
    caplog.set_level("DEBUG", "stroma.events")
    nodes = [failing([], "a", TimeoutError("slow")), node("b", _bad)]
    async with SeamDriver().bind(nodes, hooks=log_hooks(), policy_map=NEVER | {}) as bound:
        await bound.run(Num(), run_id="run-7")
    records = [record for record in caplog.records if record.name == "stroma.events"]
    assert {record.run_id for record in records} == {"run-7"}
    (end,) = [record for record in records if record.getMessage().startswith("run ended")]
    assert end.duration_s >= 0
    assert end.levelname == "ERROR"


async def _bad(state: Num) -> Any:
    raise ValueError("no")
