"""OpenAI Agents SDK: real agents with and without the guard, with a fake model and no network."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from agents import (
    Agent,
    GuardrailFunctionOutput,
    InputGuardrailTripwireTriggered,
    Model,
    ModelProvider,
    ModelResponse,
    RunConfig,
    Runner,
    Usage,
    UserError,
    function_tool,
    input_guardrail,
    set_tracing_disabled,
)
from openai.types.responses import (
    Response,
    ResponseCompletedEvent,
    ResponseFunctionToolCall,
    ResponseOutputMessage,
    ResponseOutputText,
    ResponseTextDeltaEvent,
    ResponseUsage,
)
from openai.types.responses.response_usage import InputTokensDetails, OutputTokensDetails
from pydantic import BaseModel
from tests.frameworks.kit import PAID, Seen, guard_of, holds, pay, result_of, tree

from stroma import (
    BudgetExceeded,
    ContractViolation,
    ExecutionBudget,
    FailureClass,
    RunStatus,
    SQLiteStore,
)
from stroma.adapters import Guard, UnknownNode, what_stopped
from stroma.adapters.openai_agents import GuardedModel, GuardedProvider, GuardedRunner, attach

set_tracing_disabled(True)
KINDS = ["run", "run_sync", "streamed"]
CALL = ("weather", '{"city": "Oslo"}')


class City(BaseModel):
    city: str


class Weather(BaseModel):
    celsius: int


class Script(Model):
    """Answers: a text, or (tool name, JSON arguments); what is an exception, it raises. Streams break where they are told to."""

    def __init__(self, *answers: Any, tokens: int = 10, break_after: int | None = None) -> None:
        self.model = "gpt-4o"
        self.answers = list(answers)
        self.tokens = tokens
        self.break_after = break_after
        self.asked: list[Any] = []

    def _next(self, given: Any) -> Any:
        self.asked.append(given)
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        if isinstance(answer, tuple):
            return ResponseFunctionToolCall(
                name=answer[0],
                arguments=answer[1],
                call_id=f"call{self.tokens}-{len(self.asked)}",
                type="function_call",
            )
        text = ResponseOutputText(text=answer, type="output_text", annotations=[])
        return ResponseOutputMessage(
            id="1", content=[text], role="assistant", status="completed", type="message"
        )

    async def get_response(self, system_instructions: Any, input: Any, *_: Any, **__: Any) -> ModelResponse:
        usage = Usage(requests=1, input_tokens=self.tokens - 1, output_tokens=1, total_tokens=self.tokens)
        return ModelResponse(output=[self._next(input)], usage=usage, response_id=None)

    async def stream_response(self, system_instructions: Any, input: Any, *_: Any, **__: Any) -> Any:
        item = self._next(input)
        words = item.content[0].text.split() if isinstance(item, ResponseOutputMessage) else []
        for n, word in enumerate(words):
            if n == self.break_after:
                raise TimeoutError("lost")
            yield ResponseTextDeltaEvent(
                content_index=0, delta=word, item_id="1", output_index=0, sequence_number=n, logprobs=[],
                type="response.output_text.delta",
            )  # fmt: skip
        usage = ResponseUsage(
            input_tokens=self.tokens - 1, output_tokens=1, total_tokens=self.tokens,
            input_tokens_details=InputTokensDetails(cached_tokens=0, cache_write_tokens=0),
            output_tokens_details=OutputTokensDetails(reasoning_tokens=0),
        )  # fmt: skip
        response = Response(
            id="r", created_at=0, model="gpt-4o", object="response", output=[item], tool_choice="auto", tools=[],
            parallel_tool_calls=False, usage=usage,
        )  # fmt: skip
        yield ResponseCompletedEvent(response=response, sequence_number=9, type="response.completed")


@function_tool
def weather(city: str) -> Any:
    """The weather of a city."""
    return {"celsius": len(city)}


def agent_of(
    script: Model, guard: Guard | None = None, tools: Any = (weather,), **options: Any
) -> Agent[Any]:
    contracts = options.pop("contracts", None)
    agent = Agent(name="forecaster", model=script, tools=list(tools), **options)
    return agent if guard is None else attach(agent, guard, contracts)


def ask(agent: Agent[Any], kind: str, guard: Guard | None = None) -> Any:
    async def streamed() -> Any:
        result = Runner.run_streamed(agent, "hello")
        async for _ in result.stream_events():
            pass
        return result.final_output

    async def guarded() -> Any:
        if guard is None:
            return await streamed()
        async with guard.run():
            return await streamed()

    runner: Any = Runner if guard is None else GuardedRunner(guard)
    if kind == "run_sync":
        return runner.run_sync(agent, "hello").final_output
    return (
        asyncio.run(guarded()) if kind == "streamed" else asyncio.run(runner.run(agent, "hello")).final_output
    )


def lines_of(guard: Guard) -> list[str]:
    assert guard.last is not None
    assert guard.last.result is not None
    return [line.strip() for line in tree(guard.last.result)]


@holds("same answer", "sync and async")
@pytest.mark.parametrize("kind", KINDS)
def test_an_agent_gives_the_same_answer_with_and_without_the_guard(kind: str) -> None:
    plain, guarded = Script(CALL, "It is 4 C"), Script(CALL, "It is 4 C")
    guard = guard_of()
    agent = agent_of(guarded, guard, contracts={"weather": (City, Weather)})
    assert ask(agent_of(plain), kind) == ask(agent, kind, guard) == "It is 4 C"
    assert str(guarded.asked[1][-1]) == str(plain.asked[1][-1])
    around = [] if kind == "streamed" else ["forecaster success"]
    assert lines_of(guard) == [*around, "model success 10", "weather success", "model success 10"]
    assert guard.last is not None
    assert guard.last.result is not None
    assert guard.last.result.total_cost_usd > 0
    assert guard.last.result.status is RunStatus.COMPLETED


@holds("violations")
@pytest.mark.parametrize("kind", KINDS)
def test_violations_are_caught_at_their_tool(kind: str) -> None:
    """G1: not told to the model as the text of an error, as the SDK would by default, but out of the run."""

    class Narrow(BaseModel):
        city: int

    class Strict(BaseModel):
        celsius: str

    for contract, direction in (((Narrow, Weather), "input"), ((City, Strict), "output")):
        guard = guard_of()
        agent = agent_of(Script(CALL, "done"), guard, contracts={"weather": contract})
        with pytest.raises(
            UserError, match="Error running tool weather"
        ) as caught:  # The SDK wraps what a tool raises.
            ask(agent, kind, guard)
        found = what_stopped(caught.value)
        assert isinstance(found, ContractViolation)
        assert (found.node_id, found.direction) == ("weather", direction)
        assert guard.stopped is not None
        assert guard.stopped.exception is found


@holds("retries", "failed attempts")
@pytest.mark.parametrize("kind", KINDS)
def test_transient_failures_are_retried_and_terminal_ones_are_not(kind: str) -> None:
    """G3, for models and tools."""
    script = Script(TimeoutError("slow"), ("flaky", "{}"), ConnectionError("gone"), "done")
    errors: list[Exception] = [TimeoutError(), TimeoutError()]

    @function_tool
    def flaky() -> str:
        """Fails twice."""
        pay()
        if errors:
            raise errors.pop()
        return "fine"

    guard = guard_of()
    assert ask(agent_of(script, guard, [flaky]), kind, guard) == "done"
    assert (len(script.asked), len(errors)) == (4, 0)
    assert result_of(guard).total_tokens == 20 + 3 * PAID
    script = Script(PermissionError("no"), "never")
    guard = guard_of(classifiers=[lambda e, c: FailureClass.TERMINAL])
    with pytest.raises(PermissionError):
        ask(agent_of(script, guard), kind, guard)
    assert len(script.asked) == 1
    assert guard.stopped is not None
    assert guard.stopped.node_id == "model"


def test_a_tool_that_fails_for_good_is_told_to_the_model_as_ever() -> None:
    """The SDK makes a message of an error; with its own words, after our retries, and the agent goes on."""

    @function_tool
    def broken() -> str:
        """Never works."""
        calls.append(1)
        raise LookupError("no such thing")

    told = []
    for guard in (None, guard_of()):
        calls: list[int] = []
        script = Script(("broken", "{}"), "without it")
        assert ask(agent_of(script, guard, [broken]), "run", guard) == "without it"
        told.append(script.asked[1][-1]["output"])
        assert len(calls) == (1 if guard is None else 2)
    assert told[0] == told[1]
    assert "An error occurred while running the tool" in told[0]


@holds("budget")
@pytest.mark.parametrize("kind", KINDS)
def test_the_budget_stops_the_agent_to_the_token(kind: str) -> None:
    script = Script(*[CALL] * 9)
    guard = guard_of(budget=ExecutionBudget(max_tokens_total=25))
    with pytest.raises(BudgetExceeded) as caught:
        ask(agent_of(script, guard), kind, guard)
    assert (caught.value.actual, caught.value.limit, len(script.asked)) == (30, 25, 3)
    assert guard.last is not None
    assert guard.last.result is not None
    assert (guard.last.result.total_tokens, guard.last.result.status) == (30, RunStatus.PARTIAL)
    assert isinstance(guard.stopped and guard.stopped.exception, BudgetExceeded)


@pytest.mark.parametrize("kind", KINDS)
def test_a_budget_that_trips_inside_a_tool_stops_the_agent_too(kind: str) -> None:
    """An agent as a tool: the SDK would tell the model of the error and go on spending."""
    guard = guard_of(budget=ExecutionBudget(max_tokens_total=15))
    inner = attach(Agent(name="inner", model=Script("deep", tokens=7)), guard)
    script = Script(("ask_inner", '{"input": "x"}'), *["more"] * 5)
    agent = agent_of(script, guard, [inner.as_tool("ask_inner", "Ask it.")])
    with pytest.raises(UserError) as caught:
        ask(agent, kind, guard)
    assert isinstance(what_stopped(caught.value), BudgetExceeded)
    assert len(script.asked) == 1
    assert guard.last is not None
    assert guard.last.result is not None
    assert guard.last.result.total_tokens == 17


@holds("control flow")
def test_handoffs_hand_off_and_every_agent_is_guarded() -> None:
    """The agent that is handed to is counted, its tools hold their contracts, and the answer is its own."""
    guard = guard_of()
    other = Agent(name="other", model=Script(CALL, "from other", tokens=7), tools=[weather])
    agent = agent_of(
        Script(("transfer_to_other", "{}")), guard, handoffs=[other], contracts={"weather": (City, Weather)}
    )
    result = asyncio.run(GuardedRunner(guard).run(agent, "hello"))
    assert (result.final_output, result.last_agent.name) == ("from other", "other")
    assert lines_of(guard) == [
        "forecaster success", "model success 10", "model success 7", "weather success", "model success 7",
    ]  # fmt: skip


@holds("control flow")
@pytest.mark.parametrize("kind", KINDS)
def test_a_guardrail_that_trips_passes_untouched(kind: str) -> None:
    """Its exception is the SDK's own, once, and ends the run as FAILED."""
    trips: list[int] = []

    @input_guardrail(run_in_parallel=False)
    async def never(context: Any, agent: Any, given: Any) -> GuardrailFunctionOutput:
        trips.append(1)
        return GuardrailFunctionOutput(output_info="no", tripwire_triggered=True)

    guard = guard_of()
    with pytest.raises(InputGuardrailTripwireTriggered):
        ask(agent_of(Script("x"), guard, input_guardrails=[never]), kind, guard)
    assert len(trips) == 1
    assert guard.last is not None
    assert guard.last.result is not None
    if kind != "streamed":
        assert guard.last.result.status is RunStatus.FAILED


@holds("control flow")
def test_a_tool_that_needs_approval_suspends_and_goes_on() -> None:
    """The SDK's own interruption and state: the run is SUSPENDED until it is approved."""

    @function_tool(needs_approval=True)
    def buy() -> str:
        """Needs a yes."""
        calls.append(1)
        return "bought"

    calls: list[int] = []
    guard = guard_of()
    agent = agent_of(Script(("buy", "{}"), "done"), guard, [buy])
    runner = GuardedRunner(guard)
    result = asyncio.run(runner.run(agent, "hello"))
    assert calls == []
    assert guard.last is not None
    assert guard.last.result is not None
    assert (guard.last.result.status, guard.last.result.suspended) == (
        RunStatus.SUSPENDED,
        ["approval of buy"],
    )
    state = result.to_state()
    state.approve(result.interruptions[0])
    assert asyncio.run(runner.run(agent, state)).final_output == "done"
    assert calls == [1]
    assert guard.last.result.status is RunStatus.COMPLETED


@holds("hooks")
def test_hooks_fire_in_order_with_the_right_parents() -> None:
    seen = Seen()
    guard = guard_of(seen)
    ask(agent_of(Script(TimeoutError(), CALL, "done"), guard), "run", guard)
    assert seen.lines == [
        "run start",
        "start forecaster",
        "start model < forecaster",
        "failure model < forecaster",
        "retry model < forecaster",
        "start model < forecaster",
        "success model < forecaster",
        "start weather < forecaster",
        "success weather < forecaster",
        "start model < forecaster",
        "success model < forecaster",
        "success forecaster",
        "run end COMPLETED",
    ]


@holds("streams")
def test_a_stream_is_handed_on_as_it_comes_and_not_retried_after_its_first_part() -> None:
    """Rule 9."""
    script = Script("one two three", break_after=2)
    guard = guard_of()
    agent = agent_of(script, guard)
    seen: list[str] = []

    async def main() -> None:
        async with guard.run():
            result = Runner.run_streamed(agent, "hello")
            async for event in result.stream_events():
                if event.type == "raw_response_event" and hasattr(event.data, "delta"):
                    seen.append(event.data.delta)

    with pytest.raises(TimeoutError, match="lost"):
        asyncio.run(main())
    assert (seen, len(script.asked)) == (["one", "two"], 1)


def test_a_model_that_is_only_named_is_guarded_by_its_provider() -> None:
    script = Script("done")

    class Provider(ModelProvider):
        def get_model(self, model_name: str | None) -> Model:
            assert model_name == "mine"
            return script

    guard = guard_of()
    agent = Agent(name="named", model="mine")
    result = asyncio.run(
        GuardedRunner(guard).run(agent, "hello", run_config=RunConfig(model_provider=Provider()))
    )
    assert result.final_output == "done"
    assert lines_of(guard) == ["named success", "model success 10"]
    guarded = GuardedProvider(guard, Provider()).get_model("mine")
    assert isinstance(guarded, GuardedModel)
    assert guarded.asked is script.asked  # type: ignore[attr-defined]


@holds("unknown")
def test_a_contract_for_an_unknown_tool_is_an_error() -> None:
    with pytest.raises(UnknownNode, match=r"no tool 'wether' .* 'weather'"):
        agent_of(Script(), guard_of(), contracts={"wether": (City, Weather)})


@holds("journal")
def test_a_call_is_a_run_in_the_journal(tmp_path: Any) -> None:
    with SQLiteStore(tmp_path / "runs.db") as store:
        guard = guard_of(store=store)
        ask(agent_of(Script(CALL, "done"), guard), "run", guard)
        (run,) = store.list_runs()
        assert (run.status, run.tokens) == ("COMPLETED", 20)
        assert [a.node_id for a in store.attempts(run.run_id)] == ["forecaster", "model", "weather", "model"]
