"""The page "Observability Hooks": every example of it runs here, and every sentence of it is held by a
test."""

import asyncio
import contextlib
import dataclasses
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
from tests.kit import ONCE

from stroma import (
    CheckpointManager,
    ContractRegistry,
    ContractViolation,
    FailureClass,
    InMemoryStore,
    NodeContract,
    NodeHooks,
    ReliabilityContext,
    RunConfig,
    RunStatus,
    StromaRunner,
    current_node,
    execute_step,
)
from stroma.hooks import dispatch

THE_THREE = ("on_node_start", "on_node_success", "on_node_failure")


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


# ---------------------------------------------------------------------- Basic usage

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
    """The example "Basic usage" runs as it stands and prints the status and the events that its comments
    promise."""
    page, printed = run_page(BASIC_USAGE)
    assert printed.splitlines() == [
        "COMPLETED",
        "[('start', 'double', {'value': 5}), ('success', 'double', {'result': 10}, 0)]",
    ]
    assert page["events"] == [("start", "double", {"value": 5}), ("success", "double", {"result": 10}, 0)]


# ---------------------------------------------------------------------- Tracking failures

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
    """The example "Tracking failures" pages someone for a terminal failure, and only logs one that is
    retried."""
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

    @runner.node("broken", input=Input, output=Output)
    async def broken(state: Input) -> dict[str, Any]:
        return {"result": "not a number"}

    result = await runner.run([flaky, broken], Input(value=1))
    assert result.status is RunStatus.FAILED
    assert attempts == 2
    logged = [record.getMessage() for record in caplog.records if record.name == "the user's"]
    assert logged == ["Node flaky failed (class=RECOVERABLE): slow today"]
    ((run_id, node_id, exc),) = paged
    assert (run_id, node_id) == (result.run_id, "broken")
    assert isinstance(exc, ContractViolation)


# ---------------------------------------------------------------------- Integrating with OpenTelemetry

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
    """The example "Integrating with OpenTelemetry" runs as it stands, with the real SDK, and no hook of it
    raises."""
    page, _ = run_page(OPENTELEMETRY, NodeHooks=NodeHooks)
    runner = StromaRunner.quick(hooks=page["hooks"])
    result = await runner.run([double_on(runner)], Input(value=5))
    assert result.status is RunStatus.COMPLETED
    assert result.hook_errors == []
    assert exporter.get_finished_spans() == ()  # It ends no span: that is left to the reader.


async def test_opentelemetry_completed(exporter: InMemorySpanExporter) -> None:
    """With its comments filled in, the OpenTelemetry example exports a span per attempt: run id, tokens,
    failures."""
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
    assert failed.events[0].attributes is not None
    assert failed.events[0].attributes["exception.message"] == "no answer"
    assert succeeded.attributes == {"run_id": result.run_id, "tokens_used": 42}
    assert page["spans"] == {}


# ---------------------------------------------------------------------- The three hooks


async def test_start_fires_before_the_function_runs() -> None:
    """`on_node_start` gets (run_id, node_id, input_state_dict) before the node function runs."""
    seen: list[Any] = []

    async def on_start(*arguments: Any) -> None:
        seen.append(arguments)

    runner = StromaRunner.quick(hooks=NodeHooks(on_node_start=on_start), run_id="r1")

    @runner.node("double", input=Input, output=Output)
    async def double(state: Input) -> dict[str, Any]:
        seen.append("the function")
        return {"result": 0}

    await runner.run([double], Input(value=5))
    assert seen == [("r1", "double", {"value": 5}), "the function"]


async def test_success_fires_after_validation() -> None:
    """`on_node_success` gets (run_id, node_id, output_state_dict, tokens_used) of output that passed
    validation."""
    seen: list[Any] = []

    async def on_success(*arguments: Any) -> None:
        seen.append(arguments)

    runner = StromaRunner.quick(hooks=NodeHooks(on_node_success=on_success), run_id="r1")

    @runner.node("loose", input=Input, output=Output)
    async def loose(state: Input) -> dict[str, Any]:
        seen.append("the function")
        return {"result": "10", "unasked": True}

    await runner.run([loose], Input(value=5))
    assert seen == ["the function", ("r1", "loose", {"result": 10}, 0)]


async def test_invalid_output_is_no_success() -> None:
    """A node that returns without passing validation fires `on_node_failure`, and `on_node_success` never."""
    seen: list[str] = []

    async def on_success(*_: Any) -> None:
        seen.append("success")

    async def on_failure(run_id: str, node_id: str, exc: Exception, failure_class: FailureClass) -> None:
        seen.append(f"{type(exc).__name__} {failure_class}")

    runner = StromaRunner.quick(hooks=NodeHooks(on_node_success=on_success, on_node_failure=on_failure))

    @runner.node("bad", input=Input, output=Output)
    async def bad(state: Input) -> dict[str, Any]:
        return {}

    await runner.run([bad], Input(value=5))
    assert seen == ["ContractViolation TERMINAL"]


async def test_failure_gets_the_exception_and_its_class() -> None:
    """`on_node_failure` gets (run_id, node_id, exc, failure_class) with the very exception, after each
    attempt."""
    raised: list[Exception] = []
    seen: list[Any] = []

    async def on_failure(*arguments: Any) -> None:
        seen.append(arguments)

    runner = StromaRunner.quick(hooks=NodeHooks(on_node_failure=on_failure), policy_map=ONCE, run_id="r1")

    @runner.node("never", input=Input, output=Output)
    async def never(state: Input) -> dict[str, Any]:
        raised.append(ValueError("no"))
        raise raised[-1]

    result = await runner.run([never], Input(value=5))
    assert result.status is RunStatus.PARTIAL
    assert len(raised) == 2
    assert seen == [("r1", "never", exc, FailureClass.AMBIGUOUS) for exc in raised]
    assert all(arguments[2] is exc for arguments, exc in zip(seen, raised, strict=True))


@pytest.mark.parametrize(
    ("returned", "tokens"),
    [
        pytest.param({"result": 1}, 0, id="a dict"),
        pytest.param(Output(result=1), 0, id="a model"),
        pytest.param(({"result": 1}, 7), 7, id="output, tokens"),
        pytest.param(({"result": 1}, 0), 0, id="output, no tokens"),
        pytest.param(({"result": 1}, 5, "gpt-4o"), 5, id="output, input tokens, model"),
        pytest.param(({"result": 1}, 5, 3, "gpt-4o"), 8, id="output, input tokens, output tokens, model"),
        pytest.param((Output(result=1), 5, 3, "gpt-4o"), 8, id="a model with usage"),
    ],
)
async def test_tokens_used(returned: Any, tokens: int) -> None:
    """`tokens_used` is input + output tokens, and 0 if the node did not report usage."""
    seen: list[Any] = []

    async def on_success(run_id: str, node_id: str, output: dict[str, Any], tokens_used: int) -> None:
        seen.append((output, tokens_used, type(tokens_used)))

    runner = StromaRunner.quick(hooks=NodeHooks(on_node_success=on_success))

    @runner.node("ask", input=Input, output=Output)
    async def ask(state: Input) -> Any:
        return returned

    await runner.run([ask], Input(value=5))
    assert seen == [({"result": 1}, tokens, int)]


async def test_tokens_used_are_those_of_this_attempt() -> None:
    """`tokens_used` counts this attempt: neither a failed attempt's tokens nor another node's are in it."""
    seen: list[tuple[str, int]] = []

    async def on_success(run_id: str, node_id: str, output: dict[str, Any], tokens_used: int) -> None:
        seen.append((node_id, tokens_used))

    runner = StromaRunner.quick(hooks=NodeHooks(on_node_success=on_success), policy_map=ONCE)
    attempts = 0

    @runner.node("ask", input=Input, output=Input)
    async def ask(state: Input) -> Any:
        nonlocal attempts
        attempts += 1
        here = current_node()
        here.report_usage(input_tokens=100)
        if attempts == 1:
            raise TimeoutError
        return {"value": 1}, 5, 3, "gpt-4o"

    @runner.node("free", input=Input, output=Input)
    async def free(state: Input) -> Any:
        return {"value": 1}

    result = await runner.run([ask, free], Input(value=5))
    assert seen == [("ask", 108), ("free", 0)]
    assert result.total_tokens == 208


# ---------------------------------------------------------------------- Design notes


def test_all_hooks_are_optional() -> None:
    """All hooks are optional: None by default, alone or together."""
    unset = NodeHooks()
    assert {name: getattr(unset, name) for name in THE_THREE} == dict.fromkeys(THE_THREE)
    hooks = [field for field in dataclasses.fields(NodeHooks) if field.name.startswith("on_")]
    assert all(field.default is None for field in hooks)
    assert RunConfig().hooks == NodeHooks()
    assert StromaRunner.quick().config.hooks == NodeHooks()


@pytest.mark.parametrize("name", THE_THREE)
async def test_each_hook_works_alone(name: str) -> None:
    """Each of the three hooks may be set without the others."""
    calls: list[str] = []

    async def hook(run_id: str, node_id: str, *_: Any) -> None:
        calls.append(node_id)

    runner = StromaRunner.quick(hooks=NodeHooks(**{name: hook}))

    @runner.node("good", input=Input, output=Input)
    async def good(state: Input) -> dict[str, Any]:
        return {"value": 1}

    @runner.node("bad", input=Input, output=Output)
    async def bad(state: Input) -> dict[str, Any]:
        return {}

    result = await runner.run([good, bad], Input(value=5))
    assert result.status is RunStatus.FAILED
    assert result.hook_errors == []
    assert (
        calls
        == {
            "on_node_start": ["good", "bad"],
            "on_node_success": ["good"],
            "on_node_failure": ["bad"],
        }[name]
    )


async def test_no_overhead_when_unused(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """G12: without hooks nothing is fired, and no state is taken apart or redacted for them."""
    caplog.set_level(logging.CRITICAL, "stroma")  # A log line of a failure that somebody reads is redacted.
    shown: list[dict[str, Any]] = []

    async def fire(self: Any, event: str, *_: Any) -> None:
        pytest.fail(f"{event} was fired though nobody asked for it")

    def redact(state: dict[str, Any]) -> dict[str, Any]:
        shown.append(state)
        return state

    monkeypatch.setattr(dispatch.Hooks, "fire", fire)
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

        result = await runner.run([flaky], Input(value=5))
        assert result.status is RunStatus.COMPLETED
    assert shown == []


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


@pytest.mark.parametrize("name", THE_THREE)
def test_a_sync_hook_raises_at_call_time_at_the_latest(name: str) -> None:
    """A function that is certainly sync raises the TypeError when the set is made, before any run."""

    def sync(*_: Any) -> None: ...

    with pytest.raises(TypeError, match=f"^hook {name} is not async: .*sync.*; define it with async def$"):
        NodeHooks(**{name: sync})


@pytest.mark.parametrize("name", THE_THREE)
def test_construction_accepts_what_may_return_an_awaitable(name: str) -> None:
    """A callable that may return an awaitable raises at call time if it does not: constructing with it is
    fine."""
    hooks = NodeHooks(**{name: not_async})
    assert RunConfig(hooks=hooks).hooks is hooks
    assert StromaRunner.quick(hooks=hooks).config.hooks is hooks
    assert StromaRunner.quick().with_hooks(hooks).config.hooks is hooks


@pytest.mark.parametrize("name", THE_THREE)
async def test_a_sync_hook_raises_at_call_time(name: str) -> None:
    """A sync hook makes `run()` raise a TypeError that names the hook and the callable, with the trace
    complete."""
    called: list[str] = []
    runner = StromaRunner.quick(hooks=NodeHooks(**{name: not_async}))

    @runner.node("good", input=Input, output=Input)
    async def good(state: Input) -> dict[str, Any]:
        called.append("good")
        return {"value": 1}

    @runner.node("bad", input=Input, output=Output)
    async def bad(state: Input) -> dict[str, Any]:
        called.append("bad")
        return {}

    with pytest.raises(TypeError, match=name) as caught:
        await runner.run([good, bad], Input(value=5))
    assert "not_async" in str(caught.value)
    assert "async" in str(caught.value)
    assert (
        called == {"on_node_start": [], "on_node_success": ["good"], "on_node_failure": ["good", "bad"]}[name]
    )
    trace_of_run = caught.value.result.trace  # type: ignore[attr-defined]
    assert [(event.node_id, event.outcome) for event in trace_of_run] == {
        "on_node_start": [("good", "cancelled")],
        "on_node_success": [("good", "success")],
        "on_node_failure": [("good", "success"), ("bad", "failure")],
    }[name]


async def test_a_sync_hook_that_is_never_due_does_not_raise() -> None:
    """A sync hook raises at its call, so a failure hook that is not async is no trouble to a run without
    failures."""
    runner = StromaRunner.quick(hooks=NodeHooks(on_node_failure=not_async))
    result = await runner.run([double_on(runner)], Input(value=5))
    assert result.status is RunStatus.COMPLETED


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


@pytest.mark.parametrize("name", THE_THREE)
async def test_the_trace_is_complete_even_if_a_hook_raises(name: str) -> None:
    """A hook that raises costs no trace event, no result and no retry (G8)."""
    calls: list[str] = []

    async def hook(*_: Any) -> None:
        raise RuntimeError("the monitoring system is down")

    runner = StromaRunner.quick(hooks=NodeHooks(**{name: hook}), policy_map=ONCE)

    @runner.node("flaky", input=Input, output=Input)
    async def flaky(state: Input) -> dict[str, Any]:
        calls.append("flaky")
        if len(calls) == 1:
            raise TimeoutError
        return {"value": 7}

    @runner.node("last", input=Input, output=Output)
    async def last(state: Input) -> dict[str, Any]:
        calls.append("last")
        return {"result": state.value}

    result = await runner.run([flaky, last], Input(value=5))
    assert result.status is RunStatus.COMPLETED
    assert result.final_state == Output(result=7)
    assert calls == ["flaky", "flaky", "last"]
    assert [(event.node_id, event.attempt, event.outcome) for event in result.trace] == [
        ("flaky", 1, "failure"),
        ("flaky", 2, "success"),
        ("last", 1, "success"),
    ]
    assert {error.hook for error in result.hook_errors} == {name}


# ---------------------------------------------------------------------- Recap


@pytest.mark.parametrize("way", ["RunConfig(hooks=...)", "quick(hooks=...)", "with_hooks(...)"])
async def test_ways_to_pass_hooks(way: str) -> None:
    """Hooks are passed by `RunConfig(hooks=NodeHooks(...))` or `StromaRunner.quick(hooks=...)`, or a
    builder."""
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
