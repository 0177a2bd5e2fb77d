"""150 runs at once that succeed, fail, retry, wait, cool limits down and are cancelled, seen by all sets
together.

    python -m tests.telemetry.many SEED STORE [STATSD]

They are lists of nodes, flows, and lists with an effect and a limit. ddtrace goes by its environment
variables, so this is a process of its own. It prints what each of them counted as JSON.
"""

import asyncio
import json
import random
import sys
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import sentry_sdk
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
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
    Flow,
    Limit,
    NodeContract,
    NodeHooks,
    SQLiteStore,
    StepFailed,
    StromaRunner,
    Suspend,
    Usage,
    current_node,
    map_over,
    parallel,
    stroma_flow,
    stroma_node,
)
from stroma.telemetry import (
    ExporterHooks,
    datadog_hooks,
    log_hooks,
    otel_hooks,
    prometheus_hooks,
    sentry_hooks,
)

RUNS = 150
MODELS = ("gpt-4o-mini", "gpt-4o")


class State(BaseModel):
    n: int = 0
    items: list[int] = [1, 2, 3]


class Item(BaseModel):
    n: int


class Fine(Exception):
    pass


class Refused(Exception):
    """The error of an HTTP client whose provider asks to wait."""

    def __init__(self, retry_after: str) -> None:
        super().__init__("HTTP 429")
        self.response = SimpleNamespace(status_code=429, headers={"retry-after": retry_after})


def key(node_id: str, outcome: str, failure_class: Any) -> str:
    return f"{node_id} {outcome} {failure_class or ''}".strip()


class Systems:
    """Every set of hooks, and what each has received; and what the runs themselves say."""

    def __init__(self, draw: random.Random, statsd: str | None) -> None:
        self.spans, self.reader, self.registry = (
            InMemorySpanExporter(),
            InMemoryMetricReader(),
            CollectorRegistry(),
        )
        self.tracer = TracerProvider()
        self.tracer.add_span_processor(SimpleSpanProcessor(self.spans))
        self.sentry = RecordedSentry()
        self.results: dict[str, ExecutionResult] = {}
        self.events: Counter[str] = Counter()

        async def keep(run_id: str, result: ExecutionResult) -> None:
            self.results[run_id] = result

        async def bad(*_: Any) -> None:
            if draw.random() < 0.1:
                raise RuntimeError("a neighbour")

        def count(event: str) -> Callable[..., Awaitable[None]]:
            async def hook(*_: Any) -> None:
                self.events[event] += 1

            return hook

        counted = {f"on_{event}": count(event) for event in ("limit_cooldown", "node_wait")}
        self.sets: list[NodeHooks] = [
            # Ends are called last to first: this one sees the whole list of hook errors.
            NodeHooks(on_run_end=keep, **counted),
            otel_hooks(tracer=self.tracer, meter=MeterProvider([self.reader]), attempts="spans"),
            NodeHooks(on_node_start=bad, on_node_success=bad, on_node_failure=bad),
            prometheus_hooks(registry=self.registry),
            datadog_hooks(statsd=statsd) if statsd else datadog_hooks(),
            sentry_hooks(client=self.sentry.client),
            log_hooks(),
        ]

    def points(self, name: str) -> list[tuple[dict[str, Any], float]]:
        """The series of a metric of OpenTelemetry, with their values or counts."""
        data = self.reader.get_metrics_data()
        points: list[Any] = [
            point
            for resource in (data.resource_metrics if data else ())
            for scope in resource.scope_metrics
            for metric in scope.metrics
            if metric.name == name
            for point in metric.data.data_points
        ]
        return [
            (dict(point.attributes or {}), float(getattr(point, "value", 0) or getattr(point, "count", 0)))
            for point in points
        ]

    def otel(self, name: str) -> float:
        return sum(value for _, value in self.points(name))

    def samples(self, name: str) -> list[tuple[dict[str, str], float]]:
        """The series of a metric of Prometheus."""
        return [
            (sample.labels, sample.value)
            for metric in self.registry.collect()
            for sample in metric.samples
            if sample.name == name
        ]

    def prometheus(self, name: str) -> float:
        return sum(value for _, value in self.samples(name))


class Programs:
    """What one run does, by its own chances."""

    def __init__(self, systems: Systems, chances: random.Random) -> None:
        self._systems, self._chances = systems, chances

    def node(self, name: str, argument: type[BaseModel], *, effect: bool = False) -> Any:
        """A node that succeeds, fails, breaks its contract or waits for a person."""
        chances = self._chances

        async def call(state: Any) -> Any:
            here = current_node()
            with self._systems.tracer.get_tracer("user").start_as_current_span(f"in {name}"):
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

        contract: Any = NodeContract(
            node_id=name, input_schema=argument, output_schema=argument, effect=effect
        )
        return stroma_node(name, contract)(call)

    def limited(self) -> Any:
        """A node whose provider closes its limit for a moment now and then."""

        async def call(state: State) -> Any:
            await asyncio.sleep(self._chances.uniform(0, 0.002))
            if self._chances.random() < 0.3:
                raise Refused("0.01")
            if self._chances.random() < 0.5:  # Priced per call, without tokens.
                return state, Usage(model="dall-e-3", cost_usd=0.04)
            return state, 5, 5, MODELS[0]

        return stroma_node("limited", input=State, output=State)(call)

    def a_list(self) -> Any:
        a, b, c, d = (self.node(name, State) for name in "abcd")
        return [a, parallel(b, parallel(c, d)), map_over("items", self.node("item", Item), into="made"), a]

    def with_an_effect(self) -> Any:
        return [self.limited(), self.node("charge", State, effect=True), self.node("a", State)]

    def a_flow(self) -> Any:
        """The same steps in turn, at once and as a map; failures of some are caught."""
        a, b, c = (self.node(name, State) for name in "abc")
        item = self.node("i", Item)
        limited, both = self.limited(), parallel(self.node("d", State), self.node("e", State))

        @stroma_flow("flow", input=State, output=State)
        async def flow(flow: Flow, state: State) -> State:
            await flow.step(a, state)
            try:
                await asyncio.gather(flow.step(b, state), flow.step(both, state), flow.step(limited, state))
            except StepFailed:
                await flow.step(c, state)
            await flow.map(item, [Item(n=n) for n in state.items])
            last: State = await flow.step(a, state)
            return last

        return flow

    def draw(self, number: int) -> Any:
        return (self.a_list, self.a_list, self.a_flow, self.with_an_effect)[number % 4]()


async def run_all(seed: str, systems: Systems, store: SQLiteStore) -> None:
    policies = {kind: FailurePolicy(max_retries=1, backoff_seconds=0.002) for kind in FailureClass}

    async def one(number: int) -> None:
        chances = random.Random(f"{seed} {number}")
        runner = StromaRunner.quick(
            store=store,
            hooks=systems.sets,
            policy_map=policies,
            pipeline=f"pipeline-{number % 3}",
            budget=ExecutionBudget(max_tokens_total=chances.choice((100, 600, 10_000))),
            limits={"provider": Limit(requests_per_minute=100_000)},
            node_limits={"limited": "provider"},
        )
        program = Programs(systems, chances).draw(number)
        task = asyncio.create_task(runner.run(program, State(), run_id=f"run-{number}"))
        if chances.random() < 0.25:
            await asyncio.sleep(chances.uniform(0, 0.05))
            task.cancel()
        await asyncio.wait([task])

    await asyncio.gather(*map(one, range(RUNS)))
    await StromaRunner.quick(hooks=systems.sets).aclose(timeout_seconds=20)


def executions(systems: Systems, journal: Counter[str]) -> dict[str, dict[str, int]]:
    """Attempts by node, outcome and class, in the trace, the journal and the systems."""
    events = [event for result in systems.results.values() for event in result.trace.walk()]
    otel: Counter[str] = Counter()
    for about, value in systems.points("stroma.node.executions"):
        otel[key(about["stroma.node.id"], about["stroma.outcome"], about["stroma.failure_class"])] += int(
            value
        )
    prometheus: Counter[str] = Counter()
    for labels, value in systems.samples("stroma_node_executions_total"):
        prometheus[key(labels["node_id"], labels["outcome"], labels["failure_class"])] += int(value)
    return {
        "trace": dict(Counter(key(event.node_id, event.outcome, event.failure) for event in events)),
        "journal": dict(journal),
        "otel": dict(otel),
        "prometheus": dict(prometheus),
    }


def tree(spans: tuple[ReadableSpan, ...]) -> list[list[Any]]:
    """(node, the group that it is under, or "" under the run, how often) of the nodes' spans."""
    names = {span.context.span_id: span.name for span in spans if span.context}
    places: Counter[tuple[str, str]] = Counter()
    for span in spans:
        if span.name.startswith("stroma.node ") and span.parent is not None:
            above = names[span.parent.span_id]
            group = "" if above.startswith("invoke_workflow ") else above.removeprefix("stroma.node ")
            places[span.name.removeprefix("stroma.node "), group] += 1
    return [[*place, count] for place, count in sorted(places.items())]


def lost(series: Sequence[tuple[Mapping[str, Any], float]], label: str) -> float:
    """The sum of the series of attempts without an output."""
    return sum(value for labels, value in series if labels[label] != "success")


def report(systems: Systems, store: SQLiteStore) -> dict[str, Any]:
    journal: Counter[str] = Counter()
    tokens, micro, lost_micro = 0, 0.0, 0.0
    for number in range(RUNS):
        for attempt in store.attempts(f"run-{number}"):
            if attempt.node_id == "flow":
                continue  # The output of a flow is a row of the journal, and no attempt.
            journal[key(attempt.node_id, attempt.outcome, attempt.failure_class)] += 1
            tokens += attempt.tokens
            micro += round(attempt.cost_usd * 1e6, 3)
            if attempt.outcome != "success":
                lost_micro += round(attempt.cost_usd * 1e6, 3)
    results, transport = systems.results.values(), systems.sentry.transport
    finished = systems.spans.get_finished_spans()
    attempts: Counter[str] = Counter()
    for span in finished:
        if span.name.startswith("stroma.attempt "):
            about = dict(span.attributes or {})
            name, outcome = span.name.removeprefix("stroma.attempt "), str(about.get("stroma.outcome"))
            attempts[key(name, outcome, about.get("stroma.failure_class"))] += 1
    names = Counter(span.name.split(" ")[0] for span in finished)
    ids = {span.context.span_id for span in finished if span.context}
    otel, prometheus = systems.otel, systems.prometheus
    return {
        "executions": executions(systems, journal),
        "attempt_spans": dict(attempts),
        "without_start": sum(
            event.reason == "contract" and "(input)" in (event.failure_message or "")
            for result in results
            for event in result.trace.walk()
        ),
        "tokens": {
            "trace": sum(result.total_tokens for result in results),
            "journal": tokens,
            "otel": otel("stroma.tokens"),
            "prometheus": prometheus("stroma_tokens_total"),
        },
        "micro_dollars": {
            "trace": sum(result.total_cost_usd for result in results) * 1e6,
            "journal": micro,
            "otel": otel("stroma.cost") * 1e6,
            "prometheus": prometheus("stroma_cost_usd_total") * 1e6,
        },
        "lost_micro_dollars": {
            "journal": lost_micro,
            "otel": 1e6 * lost(systems.points("stroma.cost"), "stroma.outcome"),
            "prometheus": 1e6 * lost(systems.samples("stroma_cost_usd_total"), "outcome"),
        },
        "runs": {
            "ended": len(results),
            "otel": otel("gen_ai.invoke_agent.duration"),
            "prometheus": prometheus("stroma_runs_total"),
            "spans": names["invoke_workflow"],
        },
        "active": {"otel": otel("stroma.runs.active"), "prometheus": prometheus("stroma_runs_in_progress")},
        "hook_errors": {
            "results": sum(len(result.hook_errors) for result in results),
            "otel": otel("stroma.hook.errors"),
            "prometheus": prometheus("stroma_hook_errors_total"),
        },
        "cooldowns": {
            "hooks": systems.events["limit_cooldown"],
            "otel": otel("stroma.limit.cooldowns"),
            "prometheus": prometheus("stroma_limit_cooldowns_total"),
        },
        "waits": {
            "hooks": systems.events["node_wait"],
            "otel": otel("stroma.node.waits"),
            "prometheus": prometheus("stroma_node_waits_total"),
        },
        "issues": {
            "results": sum(1 for r in results if r.status in ("FAILED", "PARTIAL") and r.failure),
            "sentry": len(transport.events),
        },
        "sentry_transactions": len(transport.transactions),
        "node_spans": {
            "otel": names["stroma.node"],
            "sentry": sum("stroma.node.id" in (s["data"] or {}) for s in transport.spans),
        },
        "tree": tree(finished),
        "statuses": dict(Counter(result.status for result in results)),
        "orphans": [s.name for s in finished if s.parent is not None and s.parent.span_id not in ids],
        "errors": {s.exporter.name: dict(s.errors) for s in systems.sets if isinstance(s, ExporterHooks)},
        "left_current": sentry_sdk.get_current_span() is not None,
    }


async def main(seed: str, path: str, statsd: str | None) -> dict[str, Any]:
    systems = Systems(random.Random(seed), statsd)
    async with SQLiteStore(path, synchronous="normal") as store:
        await run_all(seed, systems, store)
        return report(systems, store)


if __name__ == "__main__":
    print(json.dumps(asyncio.run(main(sys.argv[1], sys.argv[2], sys.argv[3] if len(sys.argv) > 3 else None))))
