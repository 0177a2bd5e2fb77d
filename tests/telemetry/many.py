"""200 runs at once that succeed, fail, retry, wait and are cancelled, seen by all sets together.

    python -m tests.telemetry.many SEED STORE [STATSD]

ddtrace goes by its environment variables, so this is a process of its own. It prints what each of them counted as JSON.
"""

from __future__ import annotations

import asyncio
import json
import random
import sys
from collections import Counter
from typing import Any

import sentry_sdk
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from prometheus_client import CollectorRegistry
from pydantic import BaseModel
from tests.receivers.sentry import RecordedSentry

from stroma import (
    ExecutionBudget,
    ExecutionResult,
    FailureClass,
    FailurePolicy,
    NodeHooks,
    SQLiteStore,
    StromaRunner,
    Suspend,
    current_node,
    map_over,
    parallel,
)
from stroma.telemetry import datadog_hooks, log_hooks, otel_hooks, prometheus_hooks, sentry_hooks

RUNS = 200
MODELS = ("gpt-4o-mini", "gpt-4o")


class State(BaseModel):
    n: int = 0
    items: list[int] = [1, 2, 3]


class Item(BaseModel):
    n: int


class Fine(Exception):
    pass


def key(node_id: str, outcome: str, failure_class: Any) -> str:
    return f"{node_id} {outcome} {failure_class or ''}".strip()


async def main(seed: str, path: str, statsd: str | None) -> dict[str, Any]:
    draw = random.Random(seed)
    spans, reader, registry = InMemorySpanExporter(), InMemoryMetricReader(), CollectorRegistry()
    tracer = TracerProvider()
    tracer.add_span_processor(SimpleSpanProcessor(spans))
    meter = MeterProvider([reader])
    sentry = RecordedSentry()
    results: dict[str, ExecutionResult] = {}

    async def keep(run_id: str, result: ExecutionResult) -> None:
        results[run_id] = result

    async def bad(*_: Any) -> None:
        if draw.random() < 0.1:
            raise RuntimeError("a neighbour")

    sets = [
        NodeHooks(
            on_run_end=keep
        ),  # Ends are told last to first: this one sees the whole list of hook errors.
        otel_hooks(tracer=tracer, meter=meter, attempts="spans"),
        NodeHooks(on_node_start=bad, on_node_success=bad, on_node_failure=bad),
        prometheus_hooks(registry=registry),
        datadog_hooks(statsd=statsd) if statsd else datadog_hooks(),
        sentry_hooks(client=sentry.client),
        log_hooks(),
    ]
    store = SQLiteStore(path, synchronous="normal")
    policies = {kind: FailurePolicy(max_retries=1, backoff_seconds=0.002) for kind in FailureClass}

    def node(runner: StromaRunner, name: str, argument: type[BaseModel], chances: random.Random) -> Any:
        @runner.node(name, input=argument, output=argument)
        async def call(state: Any) -> Any:
            here = current_node()
            assert here is not None
            with tracer.get_tracer("user").start_as_current_span(f"in {name}"):
                await asyncio.sleep(chances.uniform(0, 0.003))
            roll = chances.random()
            model = chances.choice(MODELS)
            if roll < 0.2:
                here.report_usage(input_tokens=chances.randint(1, 50), output_tokens=3, model=model)
                raise chances.choice((ConnectionError, ValueError, Fine))("no")
            if roll < 0.25:
                return {"n": "not a number"}, 7, 1, model
            if roll < 0.27:
                raise Suspend("may I?")
            return state, chances.randint(0, 90), chances.randint(0, 20), model

        return call

    async def one(number: int) -> None:
        chances = random.Random(f"{seed} {number}")
        runner = StromaRunner.quick(
            store=store,
            hooks=sets,
            policy_map=policies,
            pipeline=f"pipeline-{number % 3}",
            budget=ExecutionBudget(max_tokens_total=chances.choice((100, 600, 10_000))),
        )
        a, b, c, d = (node(runner, name, State, chances) for name in "abcd")
        nodes = [
            a,
            parallel(b, parallel(c, d)),
            map_over("items", node(runner, "item", Item, chances), into="made"),
            a,
        ]
        task = asyncio.create_task(runner.run(nodes, State(), run_id=f"run-{number}"))
        if chances.random() < 0.25:
            await asyncio.sleep(chances.uniform(0, 0.05))
            task.cancel()
        await asyncio.wait([task])

    async with store:
        await asyncio.gather(*map(one, range(RUNS)))
        journal: Counter[str] = Counter()
        totals: Counter[str] = Counter()
        for number in range(RUNS):
            for attempt in store.attempts(f"run-{number}"):
                journal[key(attempt.node_id, attempt.outcome, attempt.failure_class)] += 1
                totals["tokens"] += attempt.tokens
                totals["micro"] += round(attempt.cost_usd * 1e6, 3)  # type: ignore[assignment]

    events = [(result, event) for result in results.values() for event in result.trace.walk()]
    trace = Counter(key(event.node_id, event.outcome, event.failure) for _, event in events)

    def points(name: str) -> list[tuple[dict[str, Any], float]]:
        data = reader.get_metrics_data()
        return [
            (dict(point.attributes or {}), getattr(point, "value", None) or getattr(point, "count", 0))
            for resource in (data.resource_metrics if data else ())
            for scope in resource.scope_metrics
            for metric in scope.metrics
            if metric.name == name
            for point in metric.data.data_points
        ]

    otel: Counter[str] = Counter()
    for labels, value in points("stroma.node.executions"):
        otel[key(labels["stroma.node.id"], labels["stroma.outcome"], labels["stroma.failure_class"])] += int(
            value
        )
    finished = spans.get_finished_spans()
    otel_spans: Counter[str] = Counter()
    for span in finished:
        if span.name.startswith("stroma.attempt "):
            attributes = dict(span.attributes or {})
            name, outcome = span.name.removeprefix("stroma.attempt "), str(attributes.get("stroma.outcome"))
            otel_spans[key(name, outcome, attributes.get("stroma.failure_class"))] += 1

    samples = {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for metric in registry.collect()
        for sample in metric.samples
    }

    def prometheus(name: str) -> float:
        return sum(value for (match, _), value in samples.items() if match == name)

    counted: Counter[str] = Counter()
    for (name, pairs), value in samples.items():
        if name == "stroma_node_executions_total":
            labels = dict(pairs)
            counted[key(labels["node_id"], labels["outcome"], labels["failure_class"])] += int(value)

    await runner_flush(sets)
    names = Counter(span.name.split(" ")[0] for span in finished)
    ids = {span.context.span_id: span.name for span in finished if span.context}
    orphans = [s.name for s in finished if s.parent is not None and s.parent.span_id not in ids]
    return {
        "executions": {
            "trace": dict(trace), "journal": dict(journal), "otel": dict(otel), "prometheus": dict(counted),
        },
        "attempt_spans": dict(otel_spans),
        "without_start": sum(1 for _, e in events if e.reason == "contract" and "(input)" in (e.failure_message or "")),
        "tokens": {
            "trace": sum(result.total_tokens for result in results.values()),
            "journal": totals["tokens"],
            "otel": sum(value for _, value in points("stroma.tokens")),
            "prometheus": prometheus("stroma_tokens_total"),
        },
        "micro_dollars": {
            "trace": sum(result.total_cost_usd for result in results.values()) * 1e6,
            "journal": totals["micro"],
            "otel": sum(value for _, value in points("stroma.cost")) * 1e6,
            "prometheus": prometheus("stroma_cost_usd_total") * 1e6,
        },
        "runs": {
            "ended": len(results),
            "otel": sum(value for _, value in points("gen_ai.invoke_agent.duration")),
            "prometheus": prometheus("stroma_runs_total"),
            "spans": names["invoke_workflow"],
        },
        "active": {
            "otel": sum(value for _, value in points("stroma.runs.active")),
            "prometheus": prometheus("stroma_runs_in_progress"),
        },
        "hook_errors": {
            "results": sum(len(result.hook_errors) for result in results.values()),
            "otel": sum(value for _, value in points("stroma.hook.errors")),
            "prometheus": prometheus("stroma_hook_errors_total"),
        },
        "issues": {
            "results": sum(1 for r in results.values() if r.status in ("FAILED", "PARTIAL") and r.failure),
            "sentry": len(sentry.transport.events),
        },
        "sentry_transactions": len(sentry.transport.transactions),
        "node_spans": {"otel": names["stroma.node"], "sentry": sum(s["op"] == "gen_ai.execute_tool" for s in sentry.transport.spans)},
        "statuses": dict(Counter(result.status for result in results.values())),
        "orphans": orphans,
        "errors": {s.exporter.name: dict(s.errors) for s in sets if hasattr(s, "exporter")},
        "left_current": sentry_sdk.get_current_span() is not None,
    }  # fmt: skip


async def runner_flush(sets: list[NodeHooks]) -> None:
    await StromaRunner.quick(hooks=sets).aclose(timeout_seconds=20)


if __name__ == "__main__":
    print(json.dumps(asyncio.run(main(sys.argv[1], sys.argv[2], sys.argv[3] if len(sys.argv) > 3 else None))))
