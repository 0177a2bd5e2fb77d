"""Pydantic AI: real agents with and without the capability, with its own function model and no network."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel, Field
from pydantic_ai import Agent, ModelRetry, RunContext
from pydantic_ai.exceptions import ApprovalRequired, UnexpectedModelBehavior
from pydantic_ai.messages import ModelMessage, ModelResponse, TextPart, ToolCallPart
from pydantic_ai.models.function import AgentInfo, DeltaToolCall, FunctionModel, FunctionStreamedResponse
from pydantic_ai.models.test import TestModel
from pydantic_ai.tools import DeferredToolRequests, DeferredToolResults
from pydantic_ai.usage import RequestUsage
from tests.frameworks.contract import EmitsDeltas, FrameworkContract, weather
from tests.frameworks.kit import changed_until_detached, fifty_at_once, guard_of, holds, lines_of, result_of

from stroma import KNOWN_MODELS, ExecutionBudget, RunStatus, SQLiteStore, UsageError
from stroma.adapters import Guard
from stroma.adapters.pydantic_ai import StromaCapability
from stroma.trace import ExecutionResult


class Script:
    """A model that answers what it is told to, one answer per request; what is an exception, it raises."""

    def __init__(self, *answers: Any, tokens: int = 10, break_after: int | None = None) -> None:
        self.answers = list(answers)
        self.tokens = tokens
        self.break_after = break_after
        self.asked: list[list[ModelMessage]] = []

    def _next(self, messages: list[ModelMessage]) -> Any:
        self.asked.append(messages)
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    def _whole(self, messages: list[ModelMessage], info: AgentInfo) -> ModelResponse:
        answer = self._next(messages)
        if isinstance(answer, Both):
            parts: list[Any] = [ToolCallPart(name, "{}") for name in answer]
        else:
            parts = [TextPart(answer) if isinstance(answer, str) else ToolCallPart(*answer)]
        usage = RequestUsage(input_tokens=self.tokens - 1, output_tokens=1)
        return ModelResponse(parts=parts, usage=usage, model_name="gpt-4o")

    async def _parts(self, messages: list[ModelMessage], info: AgentInfo) -> Any:
        answer = self._next(messages)
        if isinstance(answer, str):
            for n, word in enumerate(answer.split()):
                if n == self.break_after:
                    raise TimeoutError("lost")
                yield word + " "
        else:
            yield {0: DeltaToolCall(name=answer[0], json_args=json.dumps(answer[1]), tool_call_id="1")}

    @property
    def model(self) -> FunctionModel:
        return FunctionModel(self._whole, stream_function=self._parts, model_name="gpt-4o")


def ask(agent: Agent[Any, Any], kind: str = "run", **options: Any) -> Any:
    async def main() -> Any:
        if kind == "run":
            return (await agent.run("hello", **options)).output
        async with agent.run_stream("hello", **options) as result:
            return await result.get_output()

    output = agent.run_sync("hello", **options).output if kind == "run_sync" else asyncio.run(main())
    return output.strip() if isinstance(output, str) else output


def agent_of(
    script: Script,
    capability: StromaCapability | None = None,
    tool: Callable[..., Any] = weather,
    **options: Any,
) -> Agent[None, Any]:
    agent: Agent[None, Any] = Agent(
        script.model, name="forecaster", capabilities=[] if capability is None else [capability], **options
    )
    agent.tool_plain(name="weather")(tool)
    return agent


@holds("sync and async")
class TestPydanticAI(EmitsDeltas, FrameworkContract):
    KINDS = ("run_sync", "run", "run_stream")
    #: The framework's own function model guesses what its streams use.
    METERED = ("run_sync", "run")
    STEPS = ("forecaster success", "  model success 10", "  weather success", "  model success 10")

    def script(self, *answers: Any, break_after: int | None = None) -> Script:
        return Script(*answers, break_after=break_after)

    def program(self, script: Script, guard: Any = None, contracts: Any = None, tool: Any = weather) -> Any:
        return agent_of(script, None if guard is None else StromaCapability(guard, tools=contracts), tool)

    def call(self, program: Any, kind: str, guard: Any = None) -> Any:
        return ask(program, kind)

    def stream(self, script: Script, guard: Guard, seen: list[str]) -> None:
        async def main() -> None:
            async with self.program(script, guard).run_stream("hello") as result:
                async for word in result.stream_text(delta=True, debounce_by=None):
                    seen.append(word.strip())

        asyncio.run(main())

    def requests(self, script: Script) -> list[int]:
        return [len(messages) for messages in script.asked]


def test_an_answer_that_breaks_the_contract_is_told_to_the_model_and_then_fails() -> None:
    """The model is asked again with what was wrong, as often as the agent allows; then the run fails."""
    script = Script(("final_result", '{"text": "no"}'), ("final_result", '{"text": "long enough"}'))

    class Long(BaseModel):
        text: str

        def __init__(self, **data: Any) -> None:
            super().__init__(**data)

    class Wanted(BaseModel):
        text: str = Field(min_length=5)

    guard = guard_of()
    agent = agent_of(script, StromaCapability(guard, output=Wanted), output_type=Long)
    assert ask(agent).text == "long enough"
    assert "at least 5 characters" in str(script.asked[1])
    assert result_of(guard).total_tokens == 20
    script = Script(*[("final_result", '{"text": "no"}')] * 2)
    agent = agent_of(script, StromaCapability(guard, output=Wanted), output_type=Long)
    with pytest.raises(UnexpectedModelBehavior):
        ask(agent)
    assert result_of(guard).total_tokens == 20
    assert result_of(guard).status is not RunStatus.COMPLETED


@holds("control flow")
def test_model_retry_goes_to_the_model_and_is_no_second_call() -> None:
    """ModelRetry is the framework's: the tool is called once for each time that the model calls it."""
    calls: list[int] = []
    script = Script(("pick", "{}"), ("pick", "{}"), "done")
    guard = guard_of()
    agent = Agent(script.model, capabilities=[StromaCapability(guard)])

    @agent.tool_plain
    def pick() -> str:
        calls.append(1)
        if len(calls) == 1:
            raise ModelRetry("another one")
        return "picked"

    assert ask(agent) == "done"
    assert len(calls) == 2
    assert "another one" in str(script.asked[1])
    assert guard.stopped is None


@holds("control flow")
def test_a_tool_that_waits_for_approval_suspends() -> None:
    """ApprovalRequired passes untouched; the run is SUSPENDED, then goes on with the framework's results."""
    calls: list[bool] = []
    script = Script(("buy", "{}"), "bought")
    guard = guard_of()
    agent: Agent[None, Any] = Agent(
        script.model, output_type=[str, DeferredToolRequests], capabilities=[StromaCapability(guard)]
    )

    @agent.tool
    def buy(ctx: RunContext[None]) -> str:
        calls.append(ctx.tool_call_approved)
        if not ctx.tool_call_approved:
            raise ApprovalRequired
        return "ok"

    first = asyncio.run(agent.run("hello"))
    assert isinstance(first.output, DeferredToolRequests)
    assert result_of(guard).status is RunStatus.SUSPENDED
    approved = DeferredToolResults(approvals={first.output.approvals[0].tool_call_id: True})
    second = asyncio.run(agent.run(message_history=first.all_messages(), deferred_tool_results=approved))
    assert (second.output, calls) == ("bought", [False, True])
    assert result_of(guard).status is RunStatus.COMPLETED


def test_the_framework_s_own_test_model_calls_every_tool_once() -> None:
    """TestModel, which is what users test their agents with, sees no difference."""
    guard = guard_of()
    results = [
        Agent(TestModel(), capabilities=capabilities, tools=[_double]).run_sync("x").output
        for capabilities in ([], [StromaCapability(guard)])
    ]
    assert results[0] == results[1]
    assert result_of(guard).total_tokens > 0


def _double(n: int) -> int:
    return 2 * n


class Ledger:
    """What the fake provider has charged for, in all models that write to it."""

    def __init__(self) -> None:
        self.tokens = 0

    def model(self, *answers: Any, tokens: int = 10) -> FunctionModel:
        ledger = self

        class Charged(Script):
            def _next(self, messages: list[ModelMessage]) -> Any:
                answer = super()._next(messages)
                ledger.tokens += self.tokens
                return answer

        return Charged(*answers, tokens=tokens).model


def realistic(ledger: Ledger, *capabilities: Any) -> Agent[None, str]:
    """Tools side by side, sub-agents with and without the outer agent's usage, a judge of the output."""
    deep = Agent(ledger.model("deepest", "deepest", tokens=3), name="deep")
    inner = Agent(ledger.model(("go", "{}"), "deep", ("go", "{}"), "deep", tokens=7), name="inner")
    judge = Agent(ledger.model("fine", tokens=5), name="judge")
    agent = Agent(ledger.model(Both("ask", "ask"), "done"), name="outer", capabilities=list(capabilities))

    @inner.tool
    async def go(ctx: RunContext[None]) -> str:
        return (await deep.run("x")).output

    @agent.tool(sequential=True)
    async def ask(ctx: RunContext[None]) -> str:
        return (await inner.run("x", usage=ctx.usage)).output

    @agent.output_validator
    async def judged(ctx: RunContext[None], output: str) -> str:
        if not ctx.partial_output:
            await judge.run(output)
        return output

    return agent


class Both(tuple[str, ...]):
    """Calls of several tools in one answer."""

    def __new__(cls, *names: str) -> Both:
        return super().__new__(cls, names)


@pytest.mark.parametrize("kind", ["run", "run_sync"])
def test_all_spend_is_that_of_the_provider_s_ledger(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    """Sub-agents without the capability, with our usage or not, judges, parallel calls: to the token."""
    ledger, guard = Ledger(), guard_of()
    assert ask(realistic(ledger, StromaCapability(guard)), kind) == "done"
    result = result_of(guard)
    assert result.total_tokens == ledger.tokens == 2 * 10 + 4 * 7 + 2 * 3 + 5
    assert "counted" not in caplog.text
    assert [line for line in lines_of(guard) if "deep" in line] == ["        deep success"] * 2
    assert [line for line in lines_of(guard) if "judge" in line] == ["  judge success"]


def test_a_stream_that_opens_too_late_is_requested_again() -> None:
    """A stream whose first part exceeds the time limit of its model is read from the next request alone."""
    requests: list[int] = []

    async def parts(_: Any, __: Any) -> Any:
        requests.append(1)
        await asyncio.sleep(60 if len(requests) == 1 else 0)
        yield "one two"

    guard = guard_of(node_timeouts={"model": 100})
    agent = Agent(FunctionModel(stream_function=parts), name="asker", capabilities=[StromaCapability(guard)])
    assert ask(agent, "run_stream") == "one two"
    ends = [line.split()[:2] for line in lines_of(guard)]
    assert ends == [["asker", "success"], ["model", "failure"], ["model", "success"]]


def test_a_stream_is_counted_as_the_framework_counts_it() -> None:
    """With sub-agents in its tools, all of the framework's own figure is counted."""
    ledger, guard = Ledger(), guard_of()
    inner = Agent(ledger.model("deep", tokens=7), name="inner")
    agent = Agent(ledger.model(("ask", {}), "one two"), name="outer", capabilities=[StromaCapability(guard)])

    @agent.tool(name="ask")
    async def ask_inner(ctx: RunContext[None]) -> str:
        return (await inner.run("x", usage=ctx.usage)).output

    assert ask(agent, "run_stream") == "one two"
    assert "      model success 7" in lines_of(guard)


def usage_with(**figures: Any) -> RequestUsage:
    """Return a usage with figures that not every release has."""
    if not figures.keys() <= {field.name for field in dataclasses.fields(RequestUsage)}:
        pytest.skip("this release does not report that")
    return RequestUsage(**figures)


def charged(usage: RequestUsage, model: str, details: Any = None, **config: Any) -> ExecutionResult:
    """Return the result of an agent whose model answers once."""
    guard = guard_of(**config)
    answer = ModelResponse(
        parts=[TextPart("x")], usage=usage, model_name=model, provider_name="openai", provider_details=details
    )
    model_of = FunctionModel(lambda *_: answer, model_name=model)
    with contextlib.suppress(UsageError):
        ask(Agent(model_of, name="forecaster", capabilities=[StromaCapability(guard)]))
    return result_of(guard)


@pytest.mark.parametrize(
    ("usage", "model", "details", "cost"),
    [
        (
            {"cache_write_tokens": 1_000_000, "cache_write_1h_tokens": 1_000_000},
            "claude-haiku-4-5",
            None,
            2.00,
        ),
        ({"cache_write_tokens": 1_000_000}, "claude-haiku-4-5", {"service_tier": "standard"}, 1.25),
        ({}, "gpt-5", {"service_tier": "priority"}, 2.50),
        ({}, "gpt-5", {"service_tier": "flex"}, 0.625),
        # What a gateway says is charged; with a key of one's own at OpenRouter, what its fee is and what the
        # provider bills.
        ({"cost": Decimal("3.5")}, "gpt-5", None, 3.50),
        ({"cost": Decimal(0)}, "gpt-5", None, 0.00),
        ({}, "gpt-5", {"cost": 0.25, "is_byok": False}, 0.25),
        ({}, "gpt-5", {"cost": 0.25, "is_byok": True, "upstream_inference_cost": 0.5}, 0.75),
    ],
)
def test_caches_tiers_and_charges_are_priced(usage: Any, model: str, details: Any, cost: float) -> None:
    """What a response says of a cache, of its tier and of its cost counts."""
    result = charged(usage_with(input_tokens=1_000_000, **usage), model, details)
    assert (result.total_tokens, result.total_cost_usd) == (1_000_000, pytest.approx(cost))


@pytest.mark.parametrize("kind", ["run", "run_stream"])
def test_your_own_price_wins_over_the_framework_s(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What Pydantic AI works out itself is no charge of the provider."""
    monkeypatch.setitem(KNOWN_MODELS, "gpt-4o", (1000.0, 1000.0))
    monkeypatch.setattr(FunctionStreamedResponse, "provider_name", "openai")
    ask(agent_of(Script("x"), StromaCapability(guard := guard_of())), kind)
    result = result_of(guard)
    assert result.total_cost_usd == pytest.approx(result.total_tokens / 1000)


def test_a_response_without_usage_stops_a_run_with_a_limit() -> None:
    """It counts as 0 only where nothing limits what it may use."""
    usage = usage_with(unmeasured_requests=1)
    assert charged(usage, "gpt-4o").status is RunStatus.COMPLETED
    limited = charged(usage, "gpt-4o", budget=ExecutionBudget(max_tokens_total=100))
    assert (limited.status, limited.failure and limited.failure.reason) == (RunStatus.FAILED, "usage")


@pytest.mark.parametrize("kind", ["run", "run_stream"])
def test_a_cancelled_agent_is_a_cancelled_step(kind: str) -> None:
    """Cancelling the task of an agent is a failure of no step: the agent's and the tool's are cancelled."""
    guard, begun = guard_of(), asyncio.Event()

    async def wait() -> str:
        begun.set()
        await asyncio.sleep(60)
        return ""

    async def main() -> None:
        agent = agent_of(Script(("weather", {})), StromaCapability(guard), wait)
        opened = agent.run("hello") if kind == "run" else agent.run_stream("hello").__aenter__()
        task = asyncio.ensure_future(opened)
        await begun.wait()
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
        assert task.cancelled()

    asyncio.run(main())
    assert lines_of(guard)[0::2] == ["forecaster cancelled", "  weather cancelled"]
    assert result_of(guard).status is RunStatus.CANCELLED


def test_fifty_runs_at_once_are_counted_apart() -> None:
    """Each run of fifty at the same time has its own spend, as the provider charged it."""
    guard = guard_of()

    async def one() -> None:
        ledger = Ledger()
        async with guard.run() as run:
            await realistic(ledger, StromaCapability(guard)).run("hello")
        assert run.result.total_tokens == ledger.tokens == 59

    fifty_at_once(lambda _: one())


def test_a_capability_twice_guards_once() -> None:
    """An agent with the capability that gets it for a run too makes each step once."""
    guard = guard_of()
    agent = agent_of(Script(("weather", '{"city": "Oslo"}'), "done"), StromaCapability(guard))
    assert ask(agent, capabilities=[StromaCapability(guard)]) == "done"
    expected = ["forecaster success", "  model success 10", "  weather success", "  model success 10"]
    assert lines_of(guard) == expected


@pytest.mark.parametrize("kind", ["run", "run_sync", "run_stream"])
def test_a_tool_that_needs_approval_suspends_and_goes_on_under_its_id(kind: str, tmp_path: Path) -> None:
    """``requires_approval`` and tools that others run are SUSPENDED; results go on in one run and budget."""
    calls: list[int] = []
    script = Script(("buy", {}), ("buy", {}), "bought")

    def agent_with(guard: Guard) -> Agent[None, Any]:
        agent: Agent[None, Any] = Agent(
            script.model,
            name="a",
            output_type=[str, DeferredToolRequests],
            capabilities=[StromaCapability(guard)],
        )

        @agent.tool_plain(requires_approval=True)
        def buy() -> str:
            calls.append(1)
            return "ok"

        return agent

    async def step(agent: Agent[None, Any], **options: Any) -> Any:
        if kind == "run":
            return await agent.run(**options)
        async with agent.run_stream(**options) as result:
            await result.get_output()
            return result

    def run(agent: Agent[None, Any], **options: Any) -> Any:
        return agent.run_sync(**options) if kind == "run_sync" else asyncio.run(step(agent, **options))

    options: dict[str, Any] = {"user_prompt": "hello"}
    for n, status in enumerate((RunStatus.SUSPENDED, RunStatus.SUSPENDED, RunStatus.RESUMED)):
        guard = guard_of(store=str(tmp_path / "r.db"), run_id="r", resume=True)
        result = run(agent_with(guard), **options)
        assert (result_of(guard).status, len(calls)) == (status, n)
        with SQLiteStore(tmp_path / "r.db") as store:
            spent = store.list_runs()[0].tokens
        assert result_of(guard).suspended == ([] if status is RunStatus.RESUMED else ["approval of buy"])
        if status is RunStatus.SUSPENDED:
            output = result.output if kind != "run_stream" else asyncio.run(result.get_output())
            approved = {output.approvals[0].tool_call_id: True}
            approvals = DeferredToolResults(approvals=approved)
            options = {"message_history": result.all_messages(), "deferred_tool_results": approvals}
    assert spent == 30 or kind == "run_stream"


def test_detach_restores_the_classes_of_the_framework() -> None:
    """An import changes none of them; attaching does, until no guard needs it."""
    changed = changed_until_detached(
        "from stroma.adapters.pydantic_ai import StromaCapability", "StromaCapability(guard)"
    )
    assert changed == ["iter"]
