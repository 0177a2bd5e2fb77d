"""otel_hooks, with the real SDK: every span ends once, under the right parent and says only what it may."""

import asyncio
import json
import pathlib
import re
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
from opentelemetry import trace
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import StatusCode
from pydantic import BaseModel, SecretStr
from tests.kit import Item, cancel, context_of, failing_with, passing, retry_policies
from tests.receivers.otlp import OtlpReceiver

from stroma import (
    ExecutionBudget,
    FailureClass,
    FailurePolicy,
    NodeHooks,
    Pipeline,
    RunStatus,
    SQLiteStore,
    StromaRunner,
    Suspend,
    Usage,
    current_node,
    execute_step,
    map_over,
    parallel,
)
from stroma.telemetry import otel_hooks

pytest_plugins = ["tests.receivers.fixtures"]


class State(BaseModel):
    n: int = 0
    text: str = "seven letters"
    key: SecretStr = SecretStr("sk-hunter2")
    items: list[int] = [1, 2, 3]


#: The events of a node that fails once.
RETRIED = ["stroma.attempt", "stroma.retry", "stroma.attempt"]


class Seen:
    """An SDK of its own, and what it exported."""

    def __init__(self) -> None:
        self._exporter = InMemorySpanExporter()
        self.tracer = TracerProvider()
        self.tracer.add_span_processor(SimpleSpanProcessor(self._exporter))
        self._reader = InMemoryMetricReader()
        self.meter = MeterProvider([self._reader])
        self.user = self.tracer.get_tracer("user")

    @property
    def spans(self) -> list[ReadableSpan]:
        return list(self._exporter.get_finished_spans())

    def named(self, name: str) -> list[ReadableSpan]:
        return [span for span in self.spans if span.name == name]

    def span(self, name: str) -> ReadableSpan:
        (result,) = self.named(name)
        return result

    def tree(self) -> list[tuple[str, str | None]]:
        """(name, name of the parent) of every span, sorted."""
        names = {span.context.span_id: span.name for span in self.spans}
        findings = [
            (span.name, None if span.parent is None else names.get(span.parent.span_id, "elsewhere"))
            for span in self.spans
        ]
        return sorted(findings, key=str)

    def points(self, name: str) -> dict[tuple[tuple[str, Any], ...], Any]:
        """The points of a metric by their attributes: a sum's value, a histogram's (count, sum)."""
        data = self._reader.get_metrics_data()
        findings: dict[tuple[tuple[str, Any], ...], Any] = {}
        for resource in () if data is None else data.resource_metrics:
            for scope in resource.scope_metrics:
                for metric in scope.metrics:
                    if metric.name == name:
                        for point in metric.data.data_points:
                            key = tuple(sorted((point.attributes or {}).items()))
                            findings[key] = (
                                point.value if hasattr(point, "value") else (point.count, point.sum)
                            )
        return findings

    def total(self, name: str) -> float:
        return sum(self.points(name).values())

    def hooks(self, **options: Any) -> Any:
        # Spans of model calls are the subject of test_inference.py.
        return otel_hooks(tracer=self.tracer, meter=self.meter, **{"inference": "never", **options})


@pytest.fixture
def seen() -> Iterator[Seen]:
    seen = Seen()
    yield seen
    # Whatever a test did: a run that has ended has left nothing current.
    assert not trace.get_current_span().get_span_context().is_valid
    assert not any(seen.points("stroma.runs.active").values())


def quick(hooks: Any, *, retries: int = 1, **config: Any) -> StromaRunner:
    policies = retry_policies(retries)
    return StromaRunner.quick(hooks=hooks, policy_map=config.pop("policy_map", policies), **config)


def flaky(runner: StromaRunner, name: str = "flaky", failures: int = 1) -> Any:
    @runner.node(name, input=State, output=State)
    async def node(state: State) -> Any:
        if current_node().attempt <= failures:
            raise ConnectionError(f"no answer for {state.key.get_secret_value()}")
        return state, 10, 5, "gpt-4o-mini"

    return node


def events(span: ReadableSpan) -> list[str]:
    return [event.name for event in span.events]


class TestNesting:
    @pytest.mark.core
    async def test_the_users_spans_are_under_their_node(self, seen: Seen) -> None:
        """What a node opens is under its span, in coroutines, threads, tasks, groups and maps."""
        runner = quick(seen.hooks())

        @runner.node("coroutine", input=State, output=State)
        async def coroutine(state: State) -> State:
            with seen.user.start_as_current_span("in coroutine"):
                await asyncio.sleep(0)
            return state

        @runner.node("thread", input=State, output=State)
        def thread(state: State) -> State:
            with seen.user.start_as_current_span("in thread"):
                return state

        @runner.node("tasks", input=State, output=State)
        async def tasks(state: State) -> State:
            async def task(n: int) -> None:
                with seen.user.start_as_current_span(f"in task {n}"):
                    await asyncio.sleep(0)

            async with asyncio.TaskGroup() as group:
                group.create_task(task(1))
                group.create_task(task(2))
            await asyncio.to_thread(lambda: seen.user.start_span("in to_thread").end())
            return state

        @runner.node("item", input=Item, output=Item)
        async def item(state: Item) -> Item:
            with seen.user.start_as_current_span(f"in item {state.n}"):
                await asyncio.sleep(0)
            return state

        nodes = [parallel(coroutine, parallel(thread, tasks)), map_over("items", item, into="made")]
        assert (await runner.run(Pipeline("letters", nodes), State())).status is RunStatus.COMPLETED
        outer, inner = (f"stroma.node {node.node_id}" for node in (nodes[0], nodes[0].children[1]))
        run, each = "invoke_workflow letters", f"stroma.node {nodes[1].node_id}"
        items = [f"in item {n}" for n in (1, 2, 3)]
        assert seen.tree() == sorted(
            [
                (run, None),
                (outer, run),
                ("stroma.node coroutine", outer),
                (inner, outer),
                ("stroma.node thread", inner),
                ("stroma.node tasks", inner),
                (each, run),
                *[("stroma.node item", each)] * 3,
                ("in coroutine", "stroma.node coroutine"),
                ("in thread", "stroma.node thread"),
                *[(f"in {what}", "stroma.node tasks") for what in ("task 1", "task 2", "to_thread")],
                *[(name, "stroma.node item") for name in items],
            ],
            key=str,
        )
        parents = {span.context.span_id: span for span in seen.spans}
        for n in (1, 2, 3):  # Each under its own item, not under a sibling.
            parent = parents[seen.span(f"in item {n}").parent.span_id]
            assert parent.attributes["stroma.node.branch"] == str(n - 1)

    @pytest.mark.core
    async def test_the_run_is_under_what_is_current(self, seen: Seen) -> None:
        """A run is a child of the caller's span, a nested run of its node's; nodes stand side by side."""
        runner = quick(seen.hooks())

        inner = runner.node("inner", input=State, output=State)(passing())

        @runner.node("outer", input=State, output=State)
        async def outer(state: State) -> State:
            await runner.run(Pipeline("nested", [inner]), state)
            return state

        with seen.user.start_as_current_span("request") as request:
            await runner.run([outer, inner], State())
            assert trace.get_current_span() is request
        run = "invoke_workflow pipeline"
        assert seen.tree() == [
            ("invoke_workflow nested", "stroma.node outer"),
            (run, "request"),
            ("request", None),
            ("stroma.node inner", "invoke_workflow nested"),
            ("stroma.node inner", run),
            ("stroma.node outer", run),
        ]

    async def test_a_trace_context_is_carried_in(self, seen: Seen) -> None:
        """run(traceparent=) makes the run part of that trace, whatever span is current here."""
        runner = quick(seen.hooks())
        with seen.user.start_as_current_span("another"):
            value = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
            await runner.run([flaky(runner)], State(), traceparent=value)
        span = seen.span("invoke_workflow pipeline")
        assert f"{span.context.trace_id:032x}" == "0af7651916cd43dd8448eb211c80319c"
        assert f"{span.parent.span_id:016x}" == "b7ad6b7169203331"
        assert seen.span("stroma.node flaky").context.trace_id == span.context.trace_id

    async def test_steps_of_plain_code_are_under_what_is_current(self, seen: Seen) -> None:
        """execute_step without a run around it makes a node's span under the caller's."""
        runner = quick(seen.hooks())
        ctx = context_of(runner)

        async def step(state: State) -> State:
            seen.user.start_span("inside").end()
            return state

        with seen.user.start_as_current_span("loop"):
            await execute_step("a", step, State(), ctx)
            await execute_step("b", step, State(), ctx)
        assert seen.tree() == [
            ("inside", "stroma.node a"),
            ("inside", "stroma.node b"),
            ("loop", None),
            ("stroma.node a", "loop"),
            ("stroma.node b", "loop"),
        ]

    async def test_two_sets_make_two_trees(self, seen: Seen) -> None:
        """Two sets on two providers do not mix: each has its own run and nodes and leaves nothing current."""
        other = Seen()
        runner = quick(seen.hooks() | other.hooks(attempts="spans"))
        await runner.run([flaky(runner), flaky(runner, "b")], State())
        for one in (seen, other):
            assert Counter(
                name for name, _ in one.tree() if not name.startswith("stroma.attempt")
            ) == Counter(["invoke_workflow pipeline", "stroma.node flaky", "stroma.node b"])


class TestEndings:
    async def test_a_retried_failure_is_no_error(self, seen: Seen) -> None:
        """One span for all attempts of a node: failure and retry are events, the span no error."""
        runner = quick(seen.hooks())
        await runner.run([flaky(runner)], State())
        span = seen.span("stroma.node flaky")
        assert events(span) == RETRIED
        assert span.status.status_code is StatusCode.UNSET
        attributes = dict(span.attributes)
        assert (attributes["stroma.node.attempts"], attributes["stroma.outcome"]) == (2, "success")
        assert attributes["stroma.tokens"] == 15
        failed = dict(span.events[0].attributes)
        assert (failed["error.type"], failed["stroma.failure_class"]) == ("ConnectionError", "RECOVERABLE")
        assert failed["stroma.reason"] == "connection"
        assert seen.span("invoke_workflow pipeline").status.status_code is StatusCode.UNSET

    @pytest.mark.parametrize("attempts", ["events", "spans"])
    async def test_only_final_failures_have_an_exception_event(self, seen: Seen, attempts: Any) -> None:
        """A retried failure leaves no "exception" event on any span, which MLflow would show as an error."""
        runner = quick(seen.hooks(attempts=attempts, content="redacted"))
        await runner.run([flaky(runner)], State())
        assert not any("exception" in events(span) for span in seen.spans)
        (message,) = [
            attributes["stroma.message"]
            for span in seen.spans
            for attributes in (span.attributes, *(event.attributes for event in span.events))
            if "stroma.message" in attributes
        ]
        assert message == "no answer for **********"
        await runner.run([flaky(runner, "broken", failures=9)], State())
        failed = [span for span in seen.spans if span.status.status_code is StatusCode.ERROR]
        assert [span.name for span in failed] == [
            *(["stroma.attempt broken"] if attempts == "spans" else []),
            "stroma.node broken",
            "invoke_workflow pipeline",
        ]
        for span in failed:
            why = tuple(span.attributes[f"stroma.{name}"] for name in ("failure_class", "reason"))
            assert why == ("RECOVERABLE", "connection")
            (exception,) = [event for event in span.events if event.name == "exception"]
            assert dict(exception.attributes) == {
                "exception.type": "ConnectionError",
                "exception.message": "no answer for **********",
            }

    @pytest.mark.core
    async def test_attempts_as_spans(self, seen: Seen) -> None:
        """attempts="spans" gives each attempt a span under its node's; a retried attempt is no error."""
        runner = quick(seen.hooks(attempts="spans"))

        @runner.node("node", input=State, output=State)
        async def node(state: State) -> State:
            with seen.user.start_as_current_span(f"call {current_node().attempt}"):
                if current_node().attempt == 1:
                    raise ConnectionError
            return state

        await runner.run([node], State())
        assert trace.get_current_span() is trace.INVALID_SPAN
        assert seen.tree() == [
            ("call 1", "stroma.attempt node"),
            ("call 2", "stroma.attempt node"),
            ("invoke_workflow pipeline", None),
            ("stroma.attempt node", "stroma.node node"),
            ("stroma.attempt node", "stroma.node node"),
            ("stroma.node node", "invoke_workflow pipeline"),
        ]
        first, second = seen.named("stroma.attempt node")
        assert [span.status.status_code for span in (first, second)] == [StatusCode.UNSET, StatusCode.UNSET]
        assert first.attributes["stroma.failure_class"] == "RECOVERABLE"
        assert [span.attributes["stroma.node.attempt"] for span in (first, second)] == [1, 2]

    async def test_a_final_failure(self, seen: Seen) -> None:
        """A failure that stops the run makes the spans of node, group and run errors, not the siblings'."""
        runner = quick(seen.hooks())
        started = asyncio.Event()

        @runner.node("sibling", input=State, output=State)
        async def sibling(state: State) -> State:
            started.set()
            await asyncio.sleep(60)
            return state

        @runner.node("bad", input=State, output=State)
        async def bad(state: State) -> State:
            await started.wait()
            raise ValueError("no")

        assert (await runner.run([parallel(sibling, bad)], State())).status is RunStatus.PARTIAL
        status = {span.name: span.status.status_code for span in seen.spans}
        assert status == {
            "stroma.node sibling": StatusCode.UNSET,
            "stroma.node bad": StatusCode.ERROR,
            "stroma.node parallel(sibling, bad)": StatusCode.ERROR,
            "invoke_workflow pipeline": StatusCode.ERROR,
        }
        assert seen.span("stroma.node sibling").attributes["stroma.outcome"] == "cancelled"
        assert seen.span("invoke_workflow pipeline").attributes["error.type"] == "ValueError"

    async def test_input_that_breaks_its_contract(self, seen: Seen) -> None:
        """A failure without a start has a span too, of its own and no length."""

        class Other(BaseModel):
            missing: int

        runner = quick(seen.hooks())
        strict = runner.node("strict", input=Other, output=Other)(failing_with(AssertionError))
        await runner.run([flaky(runner), strict], State())
        span = seen.span("stroma.node strict")
        assert span.status.status_code is StatusCode.ERROR
        assert span.attributes["error.type"] == "stroma.contracts.contract.ContractViolation"
        assert seen.tree()[-1] == ("stroma.node strict", "invoke_workflow pipeline")

    @pytest.mark.core
    @pytest.mark.parametrize("when", ["node", "backoff", "hook"])
    async def test_cancelled(self, seen: Seen, when: str) -> None:
        """A cancelled run ends all its spans, none as an error, in nodes, between attempts, in hooks."""
        ready = asyncio.Event()

        async def neighbour(*_: Any) -> None:
            if when == "hook":
                ready.set()
                await asyncio.sleep(60)

        policies = {kind: FailurePolicy(backoff_seconds=60, jitter=False) for kind in FailureClass}
        hooks = seen.hooks(attempts="spans") | NodeHooks(on_node_start=neighbour)
        runner = quick(hooks, policy_map=policies)

        @runner.node("node", input=State, output=State)
        async def node(state: State) -> State:
            ready.set()
            if when == "backoff":
                raise ConnectionError
            await asyncio.sleep(60)
            return state

        task = asyncio.create_task(runner.run([node], State()))
        await ready.wait()
        await asyncio.sleep(0)
        await cancel(task)
        names = sorted(span.name for span in seen.spans)
        assert names == ["invoke_workflow pipeline", "stroma.attempt node", "stroma.node node"]
        run = seen.span("invoke_workflow pipeline")
        assert run.status.status_code is StatusCode.UNSET
        assert run.attributes["stroma.status"] == "CANCELLED"
        node_span = seen.span("stroma.node node")
        assert node_span.status.status_code is StatusCode.UNSET, (
            "a failure that is to be tried again is not final"
        )
        assert node_span.attributes["stroma.outcome"] == "cancelled"

    async def test_a_pause_is_no_error(self, seen: Seen) -> None:
        """A node that waits for a person ends its span without an error; so does the run."""
        runner = quick(seen.hooks())
        ask = runner.node("ask", input=State, output=State)(failing_with(Suspend, "may I?"))
        assert (await runner.run([ask], State())).status is RunStatus.SUSPENDED
        assert {span.status.status_code for span in seen.spans} == {StatusCode.UNSET}
        assert seen.span("stroma.node ask").attributes["stroma.outcome"] == "suspended"

    async def test_a_budget_stop(self, seen: Seen) -> None:
        """An attempt that goes over a limit is an error of its span and of the run, and is counted once."""
        runner = quick(seen.hooks(), budget=ExecutionBudget(max_tokens_total=20))
        result = await runner.run([flaky(runner), flaky(runner, "b", 0), flaky(runner, "c", 0)], State())
        assert result.status is RunStatus.PARTIAL
        assert seen.span("stroma.node b").status.status_code is StatusCode.ERROR
        assert seen.named("stroma.node c") == []
        (points,) = seen.points("stroma.budget.exceeded").items()
        assert points == ((("stroma.budget.dimension", "tokens"), ("stroma.pipeline", "pipeline")), 1)
        assert seen.total("stroma.tokens") == 30
        assert "stroma.budget.warning" in events(seen.span("invoke_workflow pipeline"))

    async def test_a_timeout(self, seen: Seen) -> None:
        """A node that runs into its time limit fails like any other."""
        runner = quick(seen.hooks(), retries=0, node_timeouts={"slow": 5})

        @runner.node("slow", input=State, output=State)
        async def slow(state: State) -> State:
            await asyncio.sleep(60)
            return state

        await runner.run([slow], State())
        assert seen.span("stroma.node slow").attributes["error.type"] == "TimeoutError"

    async def test_a_neighbour_that_raises(self, seen: Seen) -> None:
        """Hooks of another set that raise are counted, and cost no span its end."""

        names = ("on_run_start", "on_node_start", "on_node_failure", "on_node_retry", "on_node_success")
        neighbour = NodeHooks(**dict.fromkeys(names, failing_with(RuntimeError)))
        runner = quick(neighbour | seen.hooks() | neighbour)
        result = await runner.run([flaky(runner)], State())
        assert len(result.hook_errors) == 2 * (1 + 2 + 1 + 1 + 1)
        assert len(seen.spans) == 2
        assert seen.total("stroma.hook.errors") == len(result.hook_errors)


class TestResume:
    @pytest.mark.core
    async def test_a_resumed_run_links_to_the_first(self, seen: Seen, tmp_path: pathlib.Path) -> None:
        """A resumed run is its own trace with a link to the first; restored nodes make no spans or counts."""
        broken = True

        async def go(store: SQLiteStore, **options: Any) -> Any:
            runner = quick(seen.hooks(), retries=0, store=store)

            @runner.node("first", input=Item, output=Item)
            async def first(state: Item) -> Any:
                return state, 10, 5, "gpt-4o-mini"

            @runner.node("second", input=Item, output=Item)
            async def second(state: Item) -> Any:
                if broken:
                    raise ValueError("no")
                return state, 1, 1, "gpt-4o-mini"

            return await runner.run([first, second], Item(n=1), run_id="r", **options)

        async with SQLiteStore(tmp_path / "runs.db") as store:
            await go(store)
        broken = False
        async with SQLiteStore(tmp_path / "runs.db") as store:
            result = await go(store, resume=True)
        assert result.status is RunStatus.RESUMED
        first, second = seen.named("invoke_workflow pipeline")
        assert first.links == ()
        (link,) = second.links
        assert link.context.trace_id == first.context.trace_id
        assert link.context.span_id == first.context.span_id
        assert second.parent is None
        assert second.context.trace_id != first.context.trace_id
        assert len(seen.named("stroma.node first")) == 1
        assert events(second) == ["stroma.node.skipped"]
        assert seen.total("stroma.tokens") == 17
        assert seen.total("stroma.node.executions") == 3


class TestMetrics:
    @pytest.mark.core
    async def test_counts_are_those_of_the_trace(self, seen: Seen) -> None:
        """Attempts, retries, tokens and cost are counted as in the trace, and no label has a run id."""
        runner = quick(seen.hooks(), retries=2)
        result = await runner.run(
            [flaky(runner, failures=2), flaky(runner, "b", 0)], State(), run_id="run-17"
        )
        attempts = list(result.trace.walk())
        assert seen.total("stroma.node.executions") == len(attempts) == 4
        assert seen.total("stroma.node.retries") == 2
        assert seen.total("stroma.tokens") == result.total_tokens == 30
        assert seen.total("stroma.cost") == pytest.approx(result.total_cost_usd)
        ((labels, (count, _)),) = seen.points("gen_ai.invoke_agent.duration").items()
        assert labels == (("gen_ai.agent.name", "pipeline"), ("stroma.status", "COMPLETED"))
        assert count == 1
        assert sum(count for count, _ in seen.points("stroma.node.duration").values()) == 4
        everything = str([seen.points(f"stroma.{name}") for name in ("node.executions", "tokens", "cost")])
        assert "run-17" not in everything


class TestContent:
    @pytest.mark.core
    async def test_nothing_of_the_content_by_default(self, seen: Seen) -> None:
        """Without being asked, spans hold names, types and sizes of fields: no values and no messages."""
        runner = quick(seen.hooks(attempts="spans"), retries=0)
        await runner.run([flaky(runner, failures=9)], State(text="my own words"))
        everything = [span.to_json() for span in seen.spans]
        assert not [text for text in everything if "my own words" in text or "no answer" in text]
        shape = json.loads(seen.span("stroma.node flaky").attributes["stroma.input"])
        assert shape == {"n": "int", "text": "str[12]", "key": "SecretStr", "items": "list[3]"}
        assert seen.span("stroma.node flaky").status.description == "RECOVERABLE connection"

    async def test_redacted_content(self, seen: Seen) -> None:
        """content="redacted" sends what redact and deny_keys leave; a SecretStr is in no state or message."""

        def redact(state: dict[str, Any]) -> dict[str, Any]:
            return {**state, **({"text": "..."} if "text" in state else {})}

        hooks = seen.hooks(content="redacted", deny_keys={"N"}, attempts="spans")
        runner = quick(hooks, retries=0, redact=redact)
        await runner.run([flaky(runner, failures=9)], State(text="my own words"))
        shown = json.loads(seen.span("stroma.node flaky").attributes["input.value"])
        assert shown == {"n": "[redacted]", "text": "...", "key": "[redacted]", "items": [1, 2, 3]}
        everything = [span.to_json() for span in seen.spans]
        assert not [text for text in everything if "my own words" in text or "hunter2" in text]
        for name in ("stroma.node flaky", "invoke_workflow pipeline"):
            assert seen.span(name).status.description == "no answer for **********"

    @pytest.mark.core
    async def test_large_states_are_cut(self, seen: Seen) -> None:
        """No attribute is larger than max_bytes and the mark that says that there was more."""
        runner = quick(seen.hooks(content="redacted", max_bytes=100), retries=0)
        await runner.run([flaky(runner, failures=9)], State(text="é" * 100_000))
        shown = seen.span("stroma.node flaky").attributes["input.value"]
        assert len(shown.encode()) < 140
        assert re.search(r"\.\.\. \[truncated, over \d+ bytes\]$", shown)

    def test_wrong_options_are_refused(self) -> None:
        """Options that say nothing are errors at once, not at the first run."""
        for wrong in (
            {"content": "all"},
            {"attempts": "no"},
            {"max_bytes": 0},
            {"vocabulary": "x"},
            {"inference": "x"},
        ):
            with pytest.raises(ValueError, match="must be"):
                otel_hooks(**wrong)  # type: ignore[arg-type]
        with pytest.raises(TypeError, match="deny_keys"):
            otel_hooks(deny_keys="password")


class TestDelivery:
    async def test_a_receiver_that_fails_gets_them_later(self, otlp: OtlpReceiver) -> None:
        """Spans reach a real OTLP receiver through an answer of 503 under their parents; flush() waits."""
        provider = TracerProvider()
        exporter = OTLPSpanExporter(endpoint=f"{otlp.url}/v1/traces")
        provider.add_span_processor(BatchSpanProcessor(exporter))
        otlp.refuse(1)
        runner = quick(otel_hooks(tracer=provider))
        await runner.run([flaky(runner)], State())
        assert await runner.flush(timeout_seconds=20)
        assert otlp.statuses == [503, 200]
        node, run = otlp.span("stroma.node flaky"), otlp.span("invoke_workflow pipeline")
        assert node["parent_span_id"] == run["span_id"]
        assert node["events"] == RETRIED
        provider.shutdown()

    async def test_the_global_provider_is_flushed(
        self, seen: Seen, otlp: OtlpReceiver, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Hooks without a provider flush what they use: the global provider, also a later one."""
        runner = quick(otel_hooks())
        provider = TracerProvider()
        exporter = OTLPSpanExporter(endpoint=f"{otlp.url}/v1/traces")
        provider.add_span_processor(BatchSpanProcessor(exporter, schedule_delay_millis=60_000))
        monkeypatch.setattr(trace, "_TRACER_PROVIDER", provider)
        await runner.run([flaky(runner)], State())
        assert await runner.flush(timeout_seconds=20)
        parent = otlp.span("stroma.node flaky")["parent_span_id"]
        assert parent == otlp.span("invoke_workflow pipeline")["span_id"]
        provider.shutdown()

    async def test_no_global_is_set(self, seen: Seen) -> None:
        """The factory neither sets nor needs a global provider."""
        before = trace.get_tracer_provider()
        seen.hooks()
        runner = quick(otel_hooks())  # The API's own provider does nothing.
        assert (await runner.run([flaky(runner)], State())).status is RunStatus.COMPLETED
        assert trace.get_tracer_provider() is before


@pytest.mark.parametrize(("cached", "written"), [(70, 20), (70, 0), (0, 0)])
async def test_an_attempt_says_what_a_cache_was_used_for(seen: Seen, cached: int, written: int) -> None:
    """The split of the input is on the attempt, where there is one."""
    runner = quick(seen.hooks())

    @runner.node("ask", input=State, output=State)
    async def ask(state: State) -> Any:
        return state, Usage(100, 10, cached, written, "gpt-4o-mini")

    await runner.run([ask], State())
    (span,) = [span for span in seen.spans if span.name == "stroma.node ask"]
    (event,) = [event for event in span.events if event.name == "stroma.attempt"]
    messages = {name: value for name, value in (event.attributes or {}).items() if "cache" in name}
    expected = {"stroma.cached_input_tokens": cached, "stroma.cache_write_tokens": written}
    assert messages == (expected if cached else {})
