"""The page "Observability Hooks": every example of it runs here, every sentence is held by a test."""

import asyncio
import contextlib
import io
import logging
import textwrap
from typing import Any

import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from pydantic import BaseModel
from tests.kit import ONCE, returning

from stroma import (
    CheckpointManager,
    ContractRegistry,
    ContractViolation,
    InMemoryStore,
    NodeContract,
    NodeHooks,
    ReliabilityContext,
    RunConfig,
    RunStatus,
    StromaRunner,
    execute_step,
)
from stroma.hooks import dispatch


class Input(BaseModel):
    value: int


class Output(BaseModel):
    result: int


def run_page(source: str, **names: Any) -> tuple[dict[str, Any], str]:
    """Run an example of the page as a module; what it defined and what it printed."""
    namespace = {"__name__": "page", **names}
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(textwrap.dedent(source), "the page", "exec"), namespace)
    return namespace, printed.getvalue()


def double_on(runner: StromaRunner) -> Any:
    @runner.node("double", input=Input, output=Output)
    async def double(state: Input) -> dict[str, Any]:
        return {"result": state.value * 2}

    return double


BASIC_USAGE = """
    import asyncio
    from pydantic import BaseModel
    from stroma import NodeHooks, RunConfig, StromaRunner

    class Input(BaseModel):
        value: int

    class Output(BaseModel):
        result: int

    events = []

    async def on_start(run_id, node_id, input_state):
        events.append(("start", node_id, input_state))

    async def on_success(run_id, node_id, output_state, tokens_used):
        events.append(("success", node_id, output_state, tokens_used))

    runner = StromaRunner.quick(
        hooks=NodeHooks(
            on_node_start=on_start,
            on_node_success=on_success,
        ),
    )

    @runner.node("double", input=Input, output=Output)
    async def double(state: Input) -> dict:
        return {"result": state.value * 2}

    async def main():
        result = await runner.run([double], Input(value=5))
        print(result.status)
        print(events)

    asyncio.run(main())
"""


def test_basic_usage() -> None:
    """The example "Basic usage" runs as it stands and prints the status and the events of its comments."""
    page, printed = run_page(BASIC_USAGE)
    assert printed.splitlines() == [
        "COMPLETED",
        "[('start', 'double', {'value': 5}), ('success', 'double', {'result': 10}, 0)]",
    ]
    assert page["events"] == [("start", "double", {"value": 5}), ("success", "double", {"result": 10}, 0)]


TRACKING_FAILURES = """
    from stroma import FailureClass, NodeHooks

    async def on_failure(run_id, node_id, exc, failure_class):
        if failure_class == FailureClass.TERMINAL:
            # Page someone
            await alert_oncall(run_id, node_id, exc)
        else:
            # Just log
            logger.warning("Node %s failed (class=%s): %s", node_id, failure_class, exc)

    config = RunConfig(
        hooks=NodeHooks(on_node_failure=on_failure),
    )
"""


async def test_tracking_failures(caplog: pytest.LogCaptureFixture) -> None:
    """The example "Tracking failures" pages someone for a terminal failure, and logs one that is retried."""
    paged: list[tuple[str, str, Exception]] = []

    async def alert_oncall(run_id: str, node_id: str, exc: Exception) -> None:
        paged.append((run_id, node_id, exc))

    page, _ = run_page(
        TRACKING_FAILURES,
        RunConfig=RunConfig,
        alert_oncall=alert_oncall,
        logger=logging.getLogger("the user's"),
    )
    config: RunConfig = page["config"]
    config.policy_map = ONCE
    runner = StromaRunner(ContractRegistry(), CheckpointManager(InMemoryStore()), config)
    attempts = 0

    @runner.node("flaky", input=Input, output=Input)
    async def flaky(state: Input) -> dict[str, Any]:
        nonlocal attempts
        attempts += 1
        if attempts == 1:
            raise TimeoutError("slow today")
        return {"value": state.value}

    broken = runner.node("broken", input=Input, output=Output)(returning({"result": "not a number"}))
    result = await runner.run([flaky, broken], Input(value=1))
    assert result.status is RunStatus.FAILED
    assert attempts == 2
    logged = [record.getMessage() for record in caplog.records if record.name == "the user's"]
    assert logged == ["Node flaky failed (class=RECOVERABLE): slow today"]
    ((run_id, node_id, exc),) = paged
    assert (run_id, node_id) == (result.run_id, "broken")
    assert isinstance(exc, ContractViolation)


OPENTELEMETRY = """
    from opentelemetry import trace

    tracer = trace.get_tracer("stroma")

    async def otel_start(run_id, node_id, input_state):
        span = tracer.start_span(f"node.{node_id}", attributes={"run_id": run_id})
        # Store the span somewhere accessible to on_success/on_failure

    async def otel_success(run_id, node_id, output_state, tokens_used):
        # End the span, record tokens_used as an attribute
        ...

    hooks = NodeHooks(on_node_start=otel_start, on_node_success=otel_success)
"""
OPENTELEMETRY_COMPLETED = """
    from opentelemetry import trace

    tracer = trace.get_tracer("stroma")
    spans = {}

    async def otel_start(run_id, node_id, input_state):
        span = tracer.start_span(f"node.{node_id}", attributes={"run_id": run_id})
        spans[run_id, node_id] = span

    async def otel_success(run_id, node_id, output_state, tokens_used):
        span = spans.pop((run_id, node_id))
        span.set_attribute("tokens_used", tokens_used)
        span.end()

    async def otel_failure(run_id, node_id, exc, failure_class):
        span = spans.pop((run_id, node_id))
        span.record_exception(exc)
        span.set_status(trace.StatusCode.ERROR, failure_class)
        span.end()

    hooks = NodeHooks(on_node_start=otel_start, on_node_success=otel_success, on_node_failure=otel_failure)
"""


@pytest.fixture
def exporter(monkeypatch: pytest.MonkeyPatch) -> InMemorySpanExporter:
    """The real SDK as the global provider, for this test alone."""
    exporter = InMemorySpanExporter()
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr(trace, "_TRACER_PROVIDER", provider)
    return exporter


async def test_opentelemetry_as_printed(exporter: InMemorySpanExporter) -> None:
    """The example "Integrating with OpenTelemetry" runs as it stands, with the real SDK and no hook error."""
    page, _ = run_page(OPENTELEMETRY, NodeHooks=NodeHooks)
    runner = StromaRunner.quick(hooks=page["hooks"])
    result = await runner.run([double_on(runner)], Input(value=5))
    assert result.status is RunStatus.COMPLETED
    assert result.hook_errors == []
    assert exporter.get_finished_spans() == ()  # It ends no span: that is left to the reader.


async def test_opentelemetry_completed(exporter: InMemorySpanExporter) -> None:
    """With its comments filled in, the OpenTelemetry example exports a full span per attempt."""
    page, _ = run_page(OPENTELEMETRY_COMPLETED, NodeHooks=NodeHooks)
    runner = StromaRunner.quick(hooks=page["hooks"], policy_map=ONCE)
    attempts = 0

    @runner.node("ask", input=Input, output=Output)
    async def ask(state: Input) -> Any:
        nonlocal attempts
        attempts += 1
        if attempts == 1:
            raise TimeoutError("no answer")
        return {"result": 1}, 30, 12, "gpt-4o"

    result = await runner.run([ask], Input(value=5))
    assert result.status is RunStatus.COMPLETED
    assert result.hook_errors == []
    failed, succeeded = exporter.get_finished_spans()
    assert [failed.name, succeeded.name] == ["node.ask", "node.ask"]
    assert failed.attributes == {"run_id": result.run_id}
    assert (failed.status.status_code, failed.status.description) == (trace.StatusCode.ERROR, "RECOVERABLE")
    assert failed.events[0].attributes["exception.message"] == "no answer"
    assert succeeded.attributes == {"run_id": result.run_id, "tokens_used": 42}
    assert page["spans"] == {}


async def test_no_overhead_when_unused(monkeypatch: pytest.MonkeyPatch) -> None:
    """G12: Without hooks, no state is copied or redacted for them."""
    shown: list[dict[str, Any]] = []

    def fire(self: Any, hooks: Any, event: str, *_: Any) -> None:
        pytest.fail(f"{event} was fired though nobody asked for it")

    def redact(state: dict[str, Any]) -> dict[str, Any]:
        shown.append(state)
        return state

    monkeypatch.setattr(dispatch.Firing, "__init__", fire)
    for hooks in (NodeHooks(), [], [NodeHooks(), NodeHooks()]):
        runner = StromaRunner.quick(hooks=hooks, redact=redact, policy_map=ONCE)
        attempts = 0

        @runner.node("flaky", input=Input, output=Output)
        async def flaky(state: Input) -> dict[str, Any]:
            nonlocal attempts
            attempts += 1
            if attempts == 1:
                raise TimeoutError
            return {"result": 1}

        assert (await runner.run([flaky], Input(value=5))).status is RunStatus.COMPLETED
    assert shown == [{"value": 5}, {"message": "TimeoutError"}] * 3  # For the journal, of what failed.


async def test_an_unset_hook_costs_nothing_beside_a_set_one() -> None:
    """G12: the state is taken apart for the hook that is set, and not for its unset neighbours."""
    shown: list[dict[str, Any]] = []

    async def on_success(*_: Any) -> None: ...

    def redact(state: dict[str, Any]) -> dict[str, Any]:
        shown.append(state)
        return state

    runner = StromaRunner.quick(hooks=NodeHooks(on_node_success=on_success), redact=redact)
    await runner.run([double_on(runner)], Input(value=5))
    assert shown == [{"result": 10}]


def not_async(*_: Any) -> Any:
    """A hook that somebody forgot to make async, which only its call shows."""
    return len(_)


async def test_a_sync_hook_that_is_never_due_does_not_raise() -> None:
    """A sync hook raises at its call: a sync failure hook does not affect runs without failures."""
    runner = StromaRunner.quick(hooks=NodeHooks(on_node_failure=not_async))
    assert (await runner.run([double_on(runner)], Input(value=5))).status is RunStatus.COMPLETED


async def test_hooks_fire_after_trace_recording_and_before_the_result() -> None:
    """Success and failure fire when their attempt is in the trace, and the result is returned after them."""
    order: list[Any] = []

    async def on_start(*_: Any) -> None:
        order.append(("start", [event.outcome for event in ctx.trace]))

    async def on_success(*_: Any) -> None:
        await asyncio.sleep(0)  # Nobody goes ahead meanwhile.
        order.append(("success", [event.outcome for event in ctx.trace]))

    async def on_failure(*_: Any) -> None:
        await asyncio.sleep(0)
        order.append(("failure", [event.outcome for event in ctx.trace]))

    config = RunConfig(hooks=NodeHooks(on_start, on_success, on_failure), policy_map=ONCE)
    ctx = ReliabilityContext.for_run(config, ContractRegistry(), CheckpointManager(InMemoryStore()))
    contract = NodeContract(node_id="flaky", input_schema=Input, output_schema=Output)
    attempts = 0

    async def flaky(state: Input) -> dict[str, Any]:
        nonlocal attempts
        attempts += 1
        if attempts == 1:
            raise TimeoutError
        return {"result": 1}

    result = await execute_step("flaky", flaky, Input(value=5), ctx, contract=contract)
    order.append("result")
    assert result.status is RunStatus.COMPLETED
    assert order == [
        ("start", []),
        ("failure", ["failure"]),
        ("start", ["failure"]),
        ("success", ["failure", "success"]),
        "result",
    ]


@pytest.mark.parametrize("way", ["RunConfig(hooks=...)", "quick(hooks=...)", "with_hooks(...)"])
async def test_ways_to_pass_hooks(way: str) -> None:
    """Hooks come by `RunConfig(hooks=NodeHooks(...))` or `StromaRunner.quick(hooks=...)` or a builder."""
    events: list[str] = []

    async def on_start(run_id: str, node_id: str, state: dict[str, Any]) -> None:
        events.append(node_id)

    hooks = NodeHooks(on_node_start=on_start)
    if way == "RunConfig(hooks=...)":
        manager = CheckpointManager(InMemoryStore())
        runner = StromaRunner(ContractRegistry(), manager, RunConfig(hooks=hooks))
    elif way == "quick(hooks=...)":
        runner = StromaRunner.quick(hooks=hooks)
    else:
        runner = StromaRunner.quick().with_hooks(hooks)
    await runner.run([double_on(runner)], Input(value=5))
    assert events == ["double"]
