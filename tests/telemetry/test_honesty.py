"""What exporters say is what happened, also at the odd ends of an attempt."""

import asyncio
import contextvars
import io
import logging
import pathlib
from pathlib import Path
from typing import Any

import pytest
import structlog
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import StatusCode
from prometheus_client import CollectorRegistry, generate_latest
from pydantic import BaseModel
from tests.kit import Num, computing, context_on, failing_with, node, passing, retry_policies, same, words
from tests.receivers.sentry import RecordedSentry
from tests.telemetry.test_counted_once import Otel, Statsd, Tracer, runner_of, total
from tests.telemetry.test_opentelemetry import Item, Seen, State, quick

from stroma import (
    AsyncInMemoryStore,
    Limit,
    NodeHooks,
    Pipeline,
    RunConfig,
    RunStatus,
    SQLiteStore,
    StromaRunner,
    Suspend,
    current_node,
    current_node_or_none,
    execute_step,
    parallel,
)
from stroma.telemetry import datadog_hooks, log_hooks, otel_hooks, prometheus_hooks, sentry_hooks

pytest_plugins = ["tests.receivers.fixtures"]


def own_pipeline(hooks: Any, name: str = "own") -> Pipeline:
    a = node("a", same)
    return Pipeline(name, [a], config=RunConfig(hooks=hooks))


@pytest.mark.core
async def test_returned_runs_have_a_counter_of_their_own(tmp_path: Path) -> None:
    """A caller that attached to a run, or got the result of a finished one, counts as returned, by status."""
    registry, otel, statsd = CollectorRegistry(), Otel(), Statsd()
    statsd_hooks = datadog_hooks(tracer=Tracer(), statsd=statsd)  # type: ignore[arg-type]
    hooks = [prometheus_hooks(registry=registry), otel.hooks(), statsd_hooks]
    runner, a, gate = runner_of(hooks, tmp_path / "runs.db")
    gate.set()
    for _ in range(3):
        await runner.run([a], Num(), run_id="one", if_exists="return")
    assert total(registry, "stroma_runs_returned_total") == 2
    assert otel.count("stroma.runs.returned") == 2
    assert [value for name, value in statsd.counts if name == "stroma.runs.returned"] == [1, 1]
    assert total(registry, "stroma_runs_total") == otel.count("gen_ai.invoke_agent.duration") == 1


@pytest.mark.core
@pytest.mark.parametrize("place", ["before", "after"])
async def test_every_exception_of_a_hook_is_counted(place: str) -> None:
    """Wherever the set stands, and whichever hook it is: result.hook_errors are counted in every system."""

    async def bad(*_: Any) -> None:
        if current_node_or_none() is not None:
            current_node().at_end(lambda: 1 / 0)  # type: ignore[arg-type, return-value]
        raise RuntimeError

    registry, otel, statsd = CollectorRegistry(), Otel(), Statsd()
    statsd_hooks = datadog_hooks(tracer=Tracer(), statsd=statsd)  # type: ignore[arg-type]
    exporters = [prometheus_hooks(registry=registry), otel.hooks(), statsd_hooks]
    events = ("on_run_start", "on_node_start", "on_node_success", "on_run_end")
    own = NodeHooks(**dict.fromkeys(events, bad))
    runner, a, gate = runner_of([own, *exporters] if place == "before" else [*exporters, own])
    gate.set()
    result = await runner.run([a], Num())
    assert len(result.hook_errors) == 6  # Two of them in at_end.
    assert total(registry, "stroma_hook_errors_total") == 6
    assert otel.count("stroma.hook.errors") == 6
    assert sum(value for name, value in statsd.counts if name == "stroma.hook.errors") == 6


async def test_exceptions_of_hooks_of_plain_steps_are_counted() -> None:
    """Also where no run ends: execute_step() without `async with`."""

    async def bad(*_: Any) -> None:
        raise RuntimeError

    registry = CollectorRegistry()
    config = RunConfig(hooks=[prometheus_hooks(registry=registry), NodeHooks(on_node_success=bad)])
    ctx = context_on(AsyncInMemoryStore(), config)

    for _ in range(3):
        await execute_step("s", same, Num(), ctx)
    assert total(registry, "stroma_hook_errors_total") == 3


async def test_flush_sends_what_a_pipelines_own_hooks_hold() -> None:
    """flush() covers the exporters of pipelines and runs with their own hooks, once per destination."""
    kept, other = InMemorySpanExporter(), InMemorySpanExporter()
    providers = [TracerProvider(), TracerProvider()]
    for exporter, provider in zip((kept, other), providers, strict=True):
        provider.add_span_processor(BatchSpanProcessor(exporter, schedule_delay_millis=60_000))
    runner = StromaRunner.quick()
    for _ in range(3):
        await runner.run(own_pipeline(otel_hooks(tracer=providers[0])), Num())
    await runner.run(own_pipeline(otel_hooks(tracer=providers[1])), Num())
    assert len(runner._exporters) == 2
    assert await runner.aclose() is True
    assert (len(kept.get_finished_spans()), len(other.get_finished_spans())) == (6, 2)


@pytest.mark.core
@pytest.mark.parametrize("order", ["otel first", "datadog first"])
async def test_a_resumed_run_links_to_the_trace_of_its_own_system(order: str, tmp_path: Path) -> None:
    """Each system has its own trace context in the journal, whichever hooks come first."""
    otel, tracer = Otel(), Tracer()
    sets = [otel.hooks(), datadog_hooks(tracer=tracer)]  # type: ignore[arg-type]
    fails = [True]
    hooks = sets if order == "otel first" else sets[::-1]
    runner = StromaRunner.quick(store=tmp_path / "runs.db", hooks=hooks)

    @runner.node("a", input=Num, output=Num)
    async def a(state: Num) -> Num:
        if fails:
            raise PermissionError
        return state

    await runner.run([a], Num(), run_id="r")
    fails.clear()
    await runner.run([a], Num(), run_id="r", resume=True)
    first, again = [span for span in otel.spans.get_finished_spans() if span.parent is None]
    assert [link.context.trace_id for link in again.links] == [first.context.trace_id]


def test_trace_contexts_as_one_text() -> None:
    """A text names each system's trace context; a plain one is that of all systems without their own."""
    plain, own = "00-a-b-01", "00-c-d-01"
    run = context_on(AsyncInMemoryStore())
    assert (run.all_traces(), run.outer_trace("otel")) == (None, None)
    run.keep_trace("otel", own)
    later = context_on(AsyncInMemoryStore())
    later.journal.traceparent = run.all_traces()
    assert (later.outer_trace("otel"), later.outer_trace("sentry")) == (own, None)
    later.journal.traceparent = plain
    later.keep_trace("otel", own)
    both = later.all_traces()
    run.journal.traceparent = both
    assert (run.outer_trace("otel"), run.outer_trace("sentry")) == (own, plain)


@pytest.mark.core
async def test_the_runs_span_is_current_in_its_hooks_and_lines() -> None:
    """ "run started" and "run ended" are in the run's trace, and the run's duration has an exemplar."""
    otel, seen = Otel(), []

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            seen.append((record.getMessage().partition(":")[0], trace.get_current_span()))

    logger = logging.getLogger("test.honesty")
    logger.addHandler(Handler())
    logger.setLevel("INFO")
    logger.propagate = False
    runner = StromaRunner.quick(hooks=otel.hooks() | log_hooks(logger))
    await runner.run(own_pipeline(None).nodes, Num())
    assert trace.get_current_span() is trace.INVALID_SPAN
    (root,) = [span for span in otel.spans.get_finished_spans() if span.parent is None]
    lines = dict(seen)
    assert lines["run started"].get_span_context() == lines["run ended"].get_span_context() == root.context
    data = otel.reader.get_metrics_data()
    points = {
        metric.name: metric.data.data_points
        for scope in data.resource_metrics[0].scope_metrics
        for metric in scope.metrics
    }
    (point,) = points["gen_ai.invoke_agent.duration"]
    assert [one.trace_id for one in point.exemplars] == [root.context.trace_id]


@pytest.mark.core
async def test_restored_nodes_are_counted_and_drop_no_event(tmp_path: Path, sentry: RecordedSentry) -> None:
    """A resumed run says how many nodes it restored, however many; the SDK drops none of its events."""
    otel, fails = Otel(), [True]
    hooks = [otel.hooks(), sentry_hooks(client=sentry.client)]
    runner = StromaRunner.quick(store=tmp_path / "runs.db", hooks=hooks)

    a = runner.node("a", input=Num, output=Num)(passing())

    @runner.node("last", input=Num, output=Num)
    async def last(state: Num) -> Num:
        if fails:
            raise PermissionError
        return state

    nodes = [*[a] * 200, last]
    await runner.run(nodes, Num(), run_id="r")
    fails.clear()
    otel.spans.clear()
    await runner.run(nodes, Num(), run_id="r", resume=True)
    root = next(span for span in otel.spans.get_finished_spans() if span.parent is None)
    assert root.dropped_events == 0
    assert root.attributes["stroma.nodes.restored"] == 200
    assert root.attributes["stroma.events.dropped"] == 200 - len(root.events)
    assert sentry.transport.transactions[-1]["contexts"]["trace"]["data"]["stroma.nodes.restored"] == 200


@pytest.mark.core
async def test_events_of_a_node_with_many_attempts() -> None:
    """No event of a node is dropped in silence: an attribute says how many are missing."""
    otel = Otel()
    runner = StromaRunner.quick(hooks=otel.hooks(), policy_map=retry_policies(60))
    a = runner.node("a", input=Num, output=Num)(failing_with(ConnectionError))
    await runner.run([a], Num())
    (node, _) = otel.spans.get_finished_spans()
    assert node.dropped_events == 0
    assert node.events[-1].name == "exception"
    assert node.attributes["stroma.events.dropped"] == 61 + 60 + 1 - len(node.events)


@pytest.mark.core
async def test_waits_are_in_traces(sentry: RecordedSentry) -> None:
    """An attempt that was queued says so: an event around the node, and for how long on the node."""
    otel = Otel()
    gate, entered, queued = asyncio.Event(), asyncio.Event(), asyncio.Event()

    async def note_wait(*_: Any) -> None:
        queued.set()

    hooks = [otel.hooks(), sentry_hooks(client=sentry.client), NodeHooks(on_node_wait=note_wait)]
    runner = StromaRunner.quick(hooks=hooks, limits={"a": Limit(concurrent=1)})

    @runner.node("a", input=Num, output=Num)
    async def a(state: Num) -> Num:
        entered.set()
        await gate.wait()
        return state

    first = asyncio.ensure_future(runner.run([a], Num()))
    await entered.wait()
    second = asyncio.ensure_future(runner.run([a], Num()))
    await queued.wait()
    await asyncio.sleep(0.05)
    gate.set()
    await asyncio.gather(first, second)
    spans = otel.spans.get_finished_spans()
    events = [event for span in spans for event in span.events if event.name == "stroma.node.wait"]
    (event,) = events
    assert event.attributes["stroma.node.id"] == "a"
    assert "limit 'a'" in str(event.attributes["stroma.wait.reason"])
    waited = [(span.attributes or {}).get("stroma.node.wait_s") for span in spans]
    (seconds,) = [one for one in waited if one is not None]
    assert float(str(seconds)) >= 0.04
    data = [span["data"] for span in sentry.transport.spans if "stroma.node.wait_s" in span["data"]]
    assert len(data) == 1


async def test_structlog_that_is_configured_later_is_used() -> None:
    """log_hooks() made at import writes to structlog once the application has configured it."""
    hooks, out = log_hooks(), io.StringIO()
    structlog.configure(
        processors=[structlog.processors.JSONRenderer()], logger_factory=structlog.PrintLoggerFactory(out)
    )
    try:
        runner = StromaRunner.quick(hooks=hooks)
        await runner.run(own_pipeline(None).nodes, Num())
    finally:
        structlog.reset_defaults()
    assert out.getvalue().count("\n") >= 3


async def test_metrics_that_were_taken_out_of_their_registry() -> None:
    """Hooks for a registry whose metrics were unregistered feed new ones; older sets follow."""
    registry = CollectorRegistry()
    old = prometheus_hooks(registry=registry)
    await StromaRunner.quick(hooks=old).run(own_pipeline(None).nodes, Num())
    for collector in list(registry._collector_to_names):
        registry.unregister(collector)
    new = prometheus_hooks(registry=registry)
    for hooks in (old, new):
        await StromaRunner.quick(hooks=hooks).run(own_pipeline(None).nodes, Num())
    assert b"stroma_runs_total" in generate_latest(registry)
    assert total(registry, "stroma_runs_total") == 2


def outcome_of(span: Any) -> tuple[Any, Any]:
    return span.attributes["stroma.outcome"], span.attributes.get("stroma.redelivered")


def asking(runner: StromaRunner, outcome: str) -> Any:
    @runner.node("node", input=Item, output=Item)
    async def node(state: Item) -> Any:
        current_node().report_usage(input_tokens=3, output_tokens=4, model="gpt-4o-mini")
        if outcome == "failure":
            raise ValueError("no")
        if outcome == "suspended":
            raise Suspend("may I?")
        return state

    return node


@pytest.mark.core
@pytest.mark.parametrize("outcome", ["success", "failure", "suspended"])
async def test_an_end_that_is_told_again_is_a_span_that_ends(outcome: str, tmp_path: pathlib.Path) -> None:
    """An end hook that a dead process owed is one marked span of the attempt's time, and its tokens count."""

    async def die(*_: Any) -> None:
        raise KeyboardInterrupt  # As good as a death: nobody else is told.

    seen = Seen()
    options: dict[str, Any] = {"retries": 0, "hook_delivery": "at_least_once", "resume": True}
    async with SQLiteStore(tmp_path / "runs.db") as store:
        runner = quick(NodeHooks(**{f"on_node_{outcome}": die}), store=store, **options)
        with pytest.raises(KeyboardInterrupt):
            await runner.run([asking(runner, outcome)], Item(n=1), run_id="r")
        if outcome == "suspended":
            await runner.signal("r", True)
        runner = quick(seen.hooks(), store=store, **options)
        await runner.run([asking(runner, "success")], Item(n=1), run_id="r")
    first = seen.named("stroma.node node")[0]
    assert outcome_of(first) == (outcome, True)
    assert first.end_time <= seen.span("invoke_workflow pipeline").start_time
    assert first.status.status_code is StatusCode.UNSET  # The node has succeeded since.
    attempts = 1 if outcome == "success" else 2
    assert [outcome_of(span) for span in seen.named("stroma.node node")][1:] == [("success", None)] * (
        attempts - 1
    )
    assert seen.total("stroma.node.executions") == attempts
    assert seen.total("stroma.tokens") == 7 * attempts


@pytest.mark.core
@pytest.mark.parametrize("outcome", ["success", "failure", "suspended", "cancelled"])
async def test_a_cancelled_hook_is_not_told_again(outcome: str, tmp_path: pathlib.Path) -> None:
    """A cancellation in a neighbour's end hook: every set was called, so a resume counts no token twice."""
    waits = asyncio.Event()
    seen = Seen()

    async def slow(*_: Any) -> None:
        waits.set()
        await asyncio.sleep(60)

    options: dict[str, Any] = {"retries": 0, "hook_delivery": "at_least_once", "resume": True}
    async with SQLiteStore(tmp_path / "runs.db") as store:
        runner = quick(seen.hooks() | NodeHooks(**{f"on_node_{outcome}": slow}), store=store, **options)

        @runner.node("long", input=Item, output=Item)
        async def long(state: Item) -> Item:
            await asyncio.sleep(60)
            return state

        node = long if outcome == "cancelled" else asking(runner, outcome)
        task = asyncio.create_task(runner.run([node], Item(n=1), run_id="r"))
        if outcome == "cancelled":
            while not store.exists() or not await asyncio.to_thread(store.list_runs):
                await asyncio.sleep(0.01)
            await asyncio.sleep(0.05)
            task.cancel()
        await waits.wait()
        task.cancel()
        await asyncio.wait([task])
        counted = seen.total("stroma.node.executions"), seen.total("stroma.tokens")
        assert counted == (1, 0 if outcome == "cancelled" else 7)
        if outcome == "suspended":
            await runner.signal("r", True)
        later = Seen()
        runner = quick(later.hooks(), store=store, **options)

        quickly = runner.node(node._stroma_node_id, input=Item, output=Item)(passing())
        await runner.run([quickly], Item(n=1), run_id="r")
    assert later.total("stroma.tokens") == 0
    assert later.total("stroma.node.executions") == (0 if outcome == "success" else 1)


@pytest.mark.core
class TestClosed:
    @pytest.mark.filterwarnings("ignore:coroutine .* was never awaited")
    @pytest.mark.parametrize(
        "event",
        words("""
            on_run_start on_node_start on_node_success on_node_failure on_node_retry on_node_suspended
            on_run_end
        """),
    )
    async def test_in_a_neighbours_hook(self, event: str, caplog: pytest.LogCaptureFixture) -> None:
        """G9: closed while a neighbour's hook awaits, a coroutine ends each span and gauge."""
        seen = Seen()

        async def slow(*_: Any) -> None:
            await asyncio.sleep(60)

        neighbour, own = NodeHooks(**{event: slow}), seen.hooks(attempts="spans")
        starts = event in ("on_run_start", "on_node_start", "on_node_retry")
        runner = quick(neighbour | own if starts else own | neighbour, retries=1)

        @runner.node("node", input=State, output=State)
        async def node(state: State) -> Any:
            if event in ("on_node_failure", "on_node_retry"):
                raise ValueError("no")
            if event == "on_node_suspended":
                raise Suspend("may I?")
            return state, 3, 4, "gpt-4o-mini"

        run: Any = runner.run([node], State())
        contextvars.copy_context().run(run.send, None)
        with seen.user.start_as_current_span("mine") as mine:
            run.close()
            assert trace.get_current_span() is mine
        assert not any(seen.points("stroma.runs.active").values())
        assert sum(own.errors.values()) == 0
        assert "Failed to detach" not in caplog.text
        assert seen.total("stroma.node.executions") == (0 if event == "on_run_start" else 1)
        assert seen.total("stroma.tokens") == (7 if event in ("on_node_success", "on_run_end") else 0)
        names = {span.name for span in seen.spans}
        assert ({"invoke_workflow pipeline", "stroma.node node"} <= names) == (event != "on_run_start")

    async def test_between_two_of_their_lines(self, caplog: pytest.LogCaptureFixture) -> None:
        """A run that is closed from elsewhere resets no foreign context: the SDK has no complaint."""
        seen = Seen()
        runner = quick(seen.hooks(attempts="spans"))

        @runner.node("node", input=State, output=State)
        async def node(state: State) -> State:
            await asyncio.sleep(60)
            return state

        run: Any = runner.run([node], State())
        contextvars.copy_context().run(run.send, None)
        run.close()
        assert "Failed to detach" not in caplog.text
        assert len(seen.spans) == 3


@pytest.mark.core
async def test_a_contract_that_cannot_be_read() -> None:
    """A node whose contract is not fully defined has a span that ends, under its group."""

    class Half(BaseModel):
        x: "Missing"  # noqa: F821

    seen = Seen()
    runner = quick(seen.hooks(), retries=0)
    half = runner.node("half", input=Half, output=Half)(failing_with(AssertionError))

    whole = runner.node("whole", input=State, output=State)(passing())
    assert (await runner.run([half], State())).status is RunStatus.FAILED
    expected = [("invoke_workflow pipeline", None), ("stroma.node half", "invoke_workflow pipeline")]
    assert seen.tree() == expected
    await runner.run([parallel(whole, half)], State())
    assert seen.total("stroma.node.executions") == len(seen.spans) - 2


async def test_at_end_after_a_restored_node() -> None:
    """What a hook of a restored node leaves with at_end() is called."""
    seen: list[str] = []

    async def skipped(*_: Any) -> None:
        current_node().at_end(lambda: seen.append("called"))

    runner = quick(NodeHooks(on_node_skipped=skipped))

    node = runner.node("node", input=Item, output=Item)(passing())
    await runner.run([node], Item(n=1), run_id="r")
    await runner.run([node], Item(n=1), run_id="r", resume=True)
    assert seen == ["called"]


@pytest.mark.core
async def test_a_model_that_no_protocol_can_say() -> None:
    """A lone surrogate in the name of a model costs the metrics no label: it is written out."""
    seen = Seen()
    runner = quick(seen.hooks())
    node = runner.node("node", input=State, output=State)(computing(lambda state: (state, 1, "model \udcff")))
    await runner.run([node], State())
    models = {dict(labels)["stroma.model"] for labels in seen.points("stroma.tokens")}
    assert models == {"model \\udcff"}
