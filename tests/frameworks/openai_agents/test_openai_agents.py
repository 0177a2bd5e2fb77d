"""OpenAI Agents SDK: real agents with and without the guard, with a fake model and no network."""

import asyncio
import contextlib
import copy
import dataclasses
import json
from pathlib import Path
from typing import Any

import openai
import pytest
from agents import (
    Agent,
    GuardrailFunctionOutput,
    InputGuardrailTripwireTriggered,
    Model,
    ModelProvider,
    ModelResponse,
    OpenAIResponsesModel,
    RunConfig,
    Runner,
    RunState,
    Usage,
    UserError,
    function_tool,
    input_guardrail,
    set_tracing_disabled,
)
from agents.mcp import MCPServer
from agents.realtime import OpenAIRealtimeWebSocketModel, RealtimeAgent, RealtimeRunner
from mcp.types import CallToolResult, TextContent
from mcp.types import Tool as MCPTool
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
from tests.frameworks.contract import (
    CALL,
    City,
    EmitsDeltas,
    FrameworkContract,
    Narrow,
    Strict,
    Weather,
    weather,
)
from tests.frameworks.kit import changed_until_detached, fifty_at_once, guard_of, holds, lines_of, result_of

from stroma import BudgetExceeded, ContractViolation, ExecutionBudget, RunStatus
from stroma.adapters import Guard, UnknownNode, what_stopped
from stroma.adapters.openai_agents import GuardedModel, GuardedRunner, attach

try:  # What the client of this release takes.
    import httpx2 as httpx
except ImportError:
    import httpx

set_tracing_disabled(True)
KINDS = ["run", "run_sync", "streamed"]


class Script(Model):
    """Answers: a text, or (tool name, JSON arguments); exceptions are raised. Streams break where told."""

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
                arguments=answer[1] if isinstance(answer[1], str) else json.dumps(answer[1]),
                call_id=f"call{self.tokens}-{len(self.asked)}",
                type="function_call",
            )
        text = ResponseOutputText(text=answer, type="output_text", annotations=[])
        return ResponseOutputMessage(
            id="1", content=[text], role="assistant", status="completed", type="message"
        )

    def _output(self, given: Any) -> list[Any]:
        return [self._next(given)]

    async def get_response(self, system_instructions: Any, input: Any, *_: Any, **__: Any) -> ModelResponse:
        usage = Usage(requests=1, input_tokens=self.tokens - 1, output_tokens=1, total_tokens=self.tokens)
        return ModelResponse(output=self._output(input), usage=usage, response_id=None)

    async def stream_response(self, system_instructions: Any, input: Any, *_: Any, **__: Any) -> Any:
        output = self._output(input)
        words = output[0].content[0].text.split() if isinstance(output[0], ResponseOutputMessage) else []
        for n, word in enumerate(words):
            if n == self.break_after:
                raise TimeoutError("lost")
            yield ResponseTextDeltaEvent(
                content_index=0,
                delta=word,
                item_id="1",
                output_index=0,
                sequence_number=n,
                logprobs=[],
                type="response.output_text.delta",
            )
        usage = ResponseUsage(
            input_tokens=self.tokens - 1,
            output_tokens=1,
            total_tokens=self.tokens,
            input_tokens_details=InputTokensDetails(cached_tokens=0, cache_write_tokens=0),
            output_tokens_details=OutputTokensDetails(reasoning_tokens=0),
        )
        response = Response(
            id="r",
            created_at=0,
            model="gpt-4o",
            object="response",
            output=output,
            tool_choice="auto",
            tools=[],
            parallel_tool_calls=False,
            usage=usage,
        )
        yield ResponseCompletedEvent(response=response, sequence_number=9, type="response.completed")


def tool_of(tool: Any = weather) -> Any:
    return function_tool(tool, name_override="weather")


def agent_of(
    script: Model, guard: Guard | None = None, tools: Any = None, contracts: Any = None, **options: Any
) -> Agent[Any]:
    own = [tool_of()] if tools is None else list(tools)
    agent = Agent(name="forecaster", model=script, tools=own, **options)
    return agent if guard is None else attach(agent, guard, contracts)


def ask(agent: Agent[Any], kind: str, guard: Guard | None = None) -> Any:
    runner: Any = Runner if guard is None else GuardedRunner(guard)

    async def streamed() -> Any:
        result = runner.run_streamed(agent, "hello")
        async for _ in result.stream_events():
            pass
        return result.final_output

    if kind == "run_sync":
        return runner.run_sync(agent, "hello").final_output
    if kind == "streamed":
        return asyncio.run(streamed())
    return asyncio.run(runner.run(agent, "hello")).final_output


@holds("sync and async")
class TestOpenAIAgents(EmitsDeltas, FrameworkContract):
    KINDS = KINDS
    STEPS = ("forecaster success", "  model success 10", "  weather success", "  model success 10")
    #: The SDK wraps what a tool raises.
    WRAPPERS = (UserError,)

    def script(self, *answers: Any, break_after: int | None = None) -> Script:
        return Script(*answers, break_after=break_after)

    def program(self, script: Script, guard: Any = None, contracts: Any = None, tool: Any = weather) -> Any:
        return agent_of(script, guard, [tool_of(tool)], contracts)

    def call(self, program: Any, kind: str, guard: Any = None) -> Any:
        return ask(program, kind, guard)

    def stream(self, script: Script, guard: Guard, seen: list[str]) -> None:
        async def main() -> None:
            result = GuardedRunner(guard).run_streamed(agent_of(script, guard), "hello")
            async for event in result.stream_events():
                if event.type == "raw_response_event" and hasattr(event.data, "delta"):
                    seen.append(event.data.delta)

        asyncio.run(main())

    def requests(self, script: Script) -> list[str]:
        return [str(value) for value in script.asked]


def test_a_tool_that_fails_for_good_is_told_to_the_model_as_ever() -> None:
    """The SDK makes a message of an error; with its own words, after our retries, and the agent goes on."""

    @function_tool
    def broken() -> str:
        """Never works."""
        calls.append(1)
        raise LookupError("no such thing")

    events = []
    for guard in (None, guard_of()):
        calls: list[int] = []
        script = Script(("broken", "{}"), "without it")
        assert ask(agent_of(script, guard, [broken]), "run", guard) == "without it"
        events.append(script.asked[1][-1]["output"])
        assert len(calls) == (1 if guard is None else 2)
    assert events[0] == events[1]
    assert "An error occurred while running the tool" in events[0]


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
    assert result_of(guard).total_tokens == 17


@holds("control flow")
@pytest.mark.parametrize("kind", KINDS)
def test_a_guardrail_that_trips_passes_untouched(kind: str) -> None:
    """Its exception is the SDK's own, once, and ends the run as FAILED."""
    trips: list[int] = []

    @input_guardrail(run_in_parallel=False)
    async def never(context: Any, agent: Any, value: Any) -> GuardrailFunctionOutput:
        trips.append(1)
        return GuardrailFunctionOutput(output_info="no", tripwire_triggered=True)

    guard = guard_of()
    with pytest.raises(InputGuardrailTripwireTriggered):
        ask(agent_of(Script("x"), guard, input_guardrails=[never]), kind, guard)
    assert len(trips) == 1
    assert result_of(guard).status is RunStatus.FAILED


class Ledger:
    """What the fake provider has charged for, in all models that write to it."""

    def __init__(self) -> None:
        self.tokens = 0

    def model(self, *answers: Any, tokens: int = 10) -> Script:
        ledger = self

        class Charged(Script):
            def _next(self, given: Any) -> Any:
                answer = super()._next(given)
                ledger.tokens += self.tokens
                return answer

        return Charged(*answers, tokens=tokens)


class Server(MCPServer):
    """A server of one tool, in this process."""

    def __init__(self, *results: Any, **options: Any) -> None:
        super().__init__(use_structured_content=True, **options)
        self.cache_tools_list = True
        self.results = list(results)
        self.listed, self.called = 0, list[Any]()

    @property
    def name(self) -> str:
        return "server"

    async def connect(self) -> None: ...
    async def cleanup(self) -> None: ...
    async def list_prompts(self) -> Any: ...
    async def get_prompt(self, name: str, arguments: Any = None) -> Any: ...

    async def list_tools(self, run_context: Any = None, agent: Any = None) -> Any:
        await asyncio.sleep(0.001)  # As a server takes time: the body of a flow refuses to wait for it.
        self.listed += 1
        schema = {"type": "object", "properties": {"city": {"type": "string"}}}
        return [MCPTool(name="remote", inputSchema=schema)]

    async def call_tool(self, tool_name: str, arguments: Any, meta: Any = None) -> Any:
        await asyncio.sleep(0.001)
        self.called.append(arguments)
        result = self.results.pop(0)
        if isinstance(result, Exception):
            raise result
        if isinstance(result, CallToolResult):
            return result
        content = [TextContent(type="text", text=json.dumps(result))]
        return CallToolResult(content=content, structuredContent=result)


def judge(ledger: Ledger) -> Any:
    """A guardrail that asks a model of its own."""

    @input_guardrail
    async def judges(context: Any, agent: Any, value: Any) -> GuardrailFunctionOutput:
        own = Agent(name="judge", model=ledger.model("fine", tokens=7))
        await Runner.run(own, value, context=context.context)
        return GuardrailFunctionOutput(output_info="ok", tripwire_triggered=False)

    return judges


def realistic(ledger: Ledger) -> Any:
    """Tools, parallel tool calls, an agent as a tool, a handoff, a judge, an MCP server, a model by name."""
    inner = Agent(name="inner", model=ledger.model(CALL, "deep", tokens=3), tools=[tool_of()])
    last = Agent(name="last", model="named", mcp_servers=[Server({"celsius": 4})])
    both = ("ask_inner", '{"input": "x"}'), CALL
    return Agent(
        name="first",
        model=ledger.model(both[0], both[1], ("transfer_to_last", "{}"), tokens=10),
        tools=[inner.as_tool("ask_inner", "Ask it."), tool_of()],
        handoffs=[last],
        input_guardrails=[judge(ledger)],
    )


def named(ledger: Ledger) -> RunConfig:
    class Provider(ModelProvider):
        def get_model(self, model_name: str | None) -> Model:
            assert model_name == "named"
            return models[0]

    models = [ledger.model(("remote", {"city": "Oslo"}), "done", tokens=20)]
    return RunConfig(model_provider=Provider())


async def test_a_streamed_run_that_waits_for_an_approval_is_suspended() -> None:
    """It has the SDK's interruptions, and its state continues as a stream."""

    @function_tool(needs_approval=True)
    def buy() -> str:
        """Needs a yes."""
        return "bought"

    guard = guard_of()
    agent = agent_of(Script(("buy", "{}"), "done"), guard, [buy])
    runner = GuardedRunner(guard)
    waiting = runner.run_streamed(agent, "hello")
    with pytest.raises(AttributeError, match="before stream_events"):
        _ = waiting.interruptions
    assert [event async for event in waiting.stream_events()]
    assert (result_of(guard).status, result_of(guard).suspended) == (RunStatus.SUSPENDED, ["approval of buy"])
    state = waiting.to_state()
    state.approve(waiting.interruptions[0])
    answered = runner.run_streamed(agent, state)
    assert [event async for event in answered.stream_events()]
    assert (answered.final_output, result_of(guard).status) == ("done", RunStatus.COMPLETED)
    with pytest.raises(RuntimeError, match="read already"):
        await anext(aiter(answered.stream_events()))


async def test_a_stream_that_nobody_reads_to_its_end_stops_the_agent() -> None:
    """The SDK's run is cancelled, and the guard's with it; what was used so far counts."""
    guard = guard_of()
    stream = GuardedRunner(guard).run_streamed(agent_of(Script(CALL, "one two three"), guard), "hello")
    async with contextlib.aclosing(stream.stream_events()) as events:
        async for event in events:
            if event.type == "raw_response_event" and getattr(event.data, "delta", "").strip() == "one":
                break
    assert stream.is_complete
    assert result_of(guard).status is RunStatus.CANCELLED
    assert result_of(guard).total_tokens >= 10


@pytest.mark.parametrize("kind", KINDS)
def test_all_spend_is_that_of_the_provider_s_ledger(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    """Tools, sub-agents, handoffs, judges, MCP tools and models by their names, to the token."""
    ledger, guard = Ledger(), guard_of()
    agent, config = attach(realistic(ledger), guard), named(ledger)

    runner = GuardedRunner(guard)

    async def streamed() -> Any:
        result = runner.run_streamed(agent, "hello", run_config=config)
        async for _ in result.stream_events():
            pass
        return result

    if kind == "streamed":
        answer = asyncio.run(streamed())
    elif kind == "run":
        answer = asyncio.run(runner.run(agent, "hello", run_config=config))
    else:
        answer = runner.run_sync(agent, "hello", run_config=config)
    assert answer.final_output == "done"
    result = result_of(guard)
    assert result.total_tokens == ledger.tokens == 3 * 10 + 2 * 3 + 7 + 2 * 20
    assert "counted" not in caplog.text
    steps = [event.node_id for event in result.trace.walk()]
    assert set(steps) - {"first"} == {"ask_inner", "inner", "judge", "last", "model", "remote", "weather"}
    assert steps.count("weather") == 2


def test_fifty_runs_at_once_are_counted_apart() -> None:
    """Each run of fifty at the same time has its own spend, and together the provider's."""
    guard, total = guard_of(), Ledger()

    async def one(n: int) -> int:
        ledger = Ledger()
        agent = attach(
            Agent(name="one", model=ledger.model(CALL, "done", tokens=n + 1), tools=[tool_of()]), guard
        )
        async with guard.run() as run:
            await GuardedRunner(guard).run(agent, "hello")
        assert run.result.total_tokens == ledger.tokens == 2 * (n + 1)
        total.tokens += ledger.tokens
        return run.result.total_tokens

    assert sum(fifty_at_once(one)) == total.tokens


@pytest.mark.parametrize("kind", ["run", "run_sync"])
def test_the_model_of_a_run_config_is_guarded(kind: str) -> None:
    """``RunConfig(model=)`` replaces every agent's model, and its requests are steps with a budget."""
    guard = guard_of(budget=ExecutionBudget(max_tokens_total=25))
    script = Script(*[CALL] * 9)
    agent, config = agent_of(Script(), guard), RunConfig(model=script)
    runner = GuardedRunner(guard)
    with pytest.raises(BudgetExceeded):
        if kind == "run":
            asyncio.run(runner.run(agent, "hello", run_config=config))
        else:
            runner.run_sync(agent, "hello", run_config=config)
    assert len(script.asked) == 3
    assert config.model is script


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("contract", "direction"), [((Narrow, Weather), "input"), ((City, Strict), "output")], ids=["in", "out"]
)
def test_a_tool_of_an_mcp_server_holds_its_contract(kind: str, contract: Any, direction: str) -> None:
    """It ends the run, and is not told to the model and forgotten."""
    guard, server = guard_of(), Server({"celsius": 4})
    agent = Agent(name="a", model=Script(("remote", {"city": "Oslo"}), "done"), mcp_servers=[server])
    attach(agent, guard, {"remote": contract})
    with pytest.raises(Exception) as caught:
        ask(agent, kind, guard)
    broken = what_stopped(caught.value)
    assert isinstance(broken, ContractViolation)
    assert (broken.node_id, broken.direction) == ("remote", direction)
    assert len(server.called) == (direction == "output")


def test_a_tool_of_an_mcp_server_is_retried_and_an_unknown_one_is_refused() -> None:
    """Its errors are retried by their class; a contract of no tool is an error once tools are listed."""
    guard, server = guard_of(), Server(ConnectionError("gone"), {"celsius": 4})
    agent = Agent(name="a", model=Script(("remote", {"city": "Oslo"}), "done"), mcp_servers=[server])
    assert ask(attach(agent, guard), "run", guard) == "done"
    assert len(server.called) == 2
    assert [line.split()[:2] for line in lines_of(guard)] == [
        ["a", "success"],
        ["model", "success"],
        ["remote", "failure"],
        ["remote", "success"],
        ["model", "success"],
    ]
    guard = guard_of()
    agent = Agent(name="a", model=Script("done"), mcp_servers=[Server()], tools=[tool_of()])
    attach(agent, guard, {"remtoe": (City, Weather)})
    with pytest.raises(UnknownNode, match="unknown tool 'remtoe'; known: 'remote', 'weather'"):
        ask(agent, "run", guard)


def test_what_is_added_after_attach_is_guarded() -> None:
    """A tool, a model or an agent that was not there when the guard was attached is a step in its runs."""
    guard = guard_of()
    agent = attach(Agent(name="a", model=Script(), tools=[]), guard)
    agent.tools.append(tool_of())
    agent.model = Script(CALL, "done")
    assert ask(agent, "run", guard) == "done"
    assert [line.split()[0] for line in lines_of(guard)] == ["a", "model", "weather", "model"]


def test_a_second_attach_with_other_contracts_is_an_error() -> None:
    """The same contracts again, or none, change nothing."""
    guard = guard_of()
    agent = agent_of(Script(), guard, contracts={"weather": (City, Weather)})
    attach(attach(agent, guard), guard, {"weather": (City, Weather)})
    with pytest.raises(ValueError, match="already attached to this guard, with another contract"):
        attach(agent, guard, {"weather": (City, Strict)})


class Socket:
    """The connection of a realtime model: it answers each request for a response, and bills it."""

    def __init__(self, *answers: Any) -> None:
        self.answers = list(answers)
        self.billed: list[int] = []
        self.messages: asyncio.Queue[str | None] = asyncio.Queue()

    async def send(self, text: str) -> None:
        if json.loads(text)["type"] != "response.create":
            return
        answer, number = self.answers.pop(0), len(self.billed)
        item: dict[str, Any] = {"id": f"item{number}", "status": "completed", "type": "message"}
        if isinstance(answer, tuple):
            call = {"type": "function_call", "name": answer[0], "call_id": f"call{number}"}
            item |= call | {"arguments": json.dumps(answer[1])}
        else:
            item |= {"role": "assistant", "content": [{"type": "output_text", "text": answer}]}
        self.billed.append(10 + number)
        usage = {"input_tokens": 9 + number, "output_tokens": 1, "total_tokens": 10 + number}
        response = {"id": f"r{number}", "object": "realtime.response", "status": "completed"}
        place = {"response_id": f"r{number}", "output_index": 0}
        for event in (
            {"type": "response.created", "response": {**response, "status": "in_progress"}},
            {"type": "response.output_item.done", "item": item, **place},
            {"type": "response.done", "response": {**response, "usage": usage}},
        ):
            self.messages.put_nowait(json.dumps({"event_id": "e", **event}))

    def __aiter__(self) -> Any:
        return self

    async def __anext__(self) -> str:
        message = await self.messages.get()
        if message is None:
            raise StopAsyncIteration
        return message

    async def close(self) -> None:
        self.messages.put_nowait(None)


class Live(OpenAIRealtimeWebSocketModel):
    """The SDK's own realtime model over a connection that a test makes."""

    def __init__(self, socket: Socket) -> None:
        super().__init__()
        self.socket = socket

    async def _create_websocket_connection(self, *_: Any, **__: Any) -> Any:
        return self.socket


async def talk(agent: Any, socket: Socket, turns: int) -> None:
    """Say one thing, and listen until the agent has ended as many turns."""
    session = await RealtimeRunner(agent, model=Live(socket)).run(model_config={"api_key": "x"})
    async with session:
        await session.send_message("How warm is it?")
        async for event in session:
            turns -= event.type == "agent_end"
            if not turns:
                return


def voice_of() -> RealtimeAgent[Any]:
    return RealtimeAgent(name="voice", tools=[tool_of()])


@pytest.mark.parametrize("is_attached", [True, False])
def test_a_realtime_session_in_a_run_is_counted(is_attached: bool) -> None:
    """Its tools are steps, and its model's tokens are the provider's bill; so without an attachment."""
    guard = guard_of()
    agent = voice_of()
    if is_attached:
        attach(agent, guard, {"weather": (City, Weather)})

    async def main() -> list[int]:
        socket = Socket(CALL, "4 C")
        async with guard.run():
            await talk(agent, socket, 2)
        return socket.billed

    billed = asyncio.run(main())
    assert (len(billed), result_of(guard).total_tokens) == (2, sum(billed))
    assert result_of(guard).status is RunStatus.COMPLETED
    assert lines_of(guard) == ["weather success"]


def test_a_spent_budget_ends_a_realtime_session() -> None:
    """No request is made after the one that has spent it."""
    guard = guard_of(budget=ExecutionBudget(max_tokens_total=15))

    async def main() -> list[int]:
        socket = Socket(*[CALL] * 9)
        with pytest.raises(BudgetExceeded) as caught:
            async with guard.run():
                await talk(voice_of(), socket, 9)
        assert caught.value.actual == 21
        return socket.billed

    assert asyncio.run(main()) == [10, 11]
    assert isinstance(guard.stopped.exception, BudgetExceeded)


def test_a_broken_contract_ends_a_realtime_session() -> None:
    guard = guard_of()
    agent = attach(voice_of(), guard, {"weather": (Narrow, Weather)})

    async def main() -> list[int]:
        socket = Socket(*[CALL] * 9)
        with pytest.raises(Exception) as caught:
            async with guard.run():
                await talk(agent, socket, 9)
        assert isinstance(what_stopped(caught.value), ContractViolation)
        return socket.billed

    assert asyncio.run(main()) == [10]
    assert lines_of(guard) == ["weather failure"]


def test_the_sdk_sees_all_of_a_model_and_sends_the_same() -> None:
    """Private attributes and the class too: without them no ``prompt_cache_key`` is sent."""
    sent: list[Any] = []
    answer = {
        "id": "r",
        "created_at": 0,
        "model": "gpt-4o",
        "object": "response",
        "parallel_tool_calls": True,
        "tool_choice": "auto",
        "tools": [],
        "output": [
            {
                "id": "m",
                "type": "message",
                "role": "assistant",
                "status": "completed",
                "content": [{"type": "output_text", "text": "x", "annotations": []}],
            }
        ],
        "usage": {
            "input_tokens": 1,
            "output_tokens": 1,
            "total_tokens": 2,
            "input_tokens_details": {"cached_tokens": 0},
            "output_tokens_details": {"reasoning_tokens": 0},
        },
    }

    def handler(request: Any) -> Any:
        sent.append(json.loads(request.content))
        return httpx.Response(200, json=answer)

    def model() -> Model:
        transport = httpx.AsyncClient(transport=httpx.MockTransport(handler))
        return OpenAIResponsesModel("gpt-4o", openai.AsyncOpenAI(api_key="x", http_client=transport))

    guard, config = guard_of(), RunConfig(group_id="same")
    plain = model()
    guarded = GuardedModel(plain, guard)
    assert isinstance(guarded, OpenAIResponsesModel)
    assert guarded._client is plain._client
    asyncio.run(Runner.run(Agent(name="a", model=model()), "?", run_config=config))
    asyncio.run(GuardedRunner(guard).run(Agent(name="a", model=guarded), "?", run_config=config))
    assert sent[0] == sent[1]
    assert "prompt_cache_key" in sent[1]
    assert lines_of(guard) == ["a success", "  model success 2"]


def buying(script: Script, guard: Guard) -> tuple[Agent[Any], list[int]]:
    calls: list[int] = []

    @function_tool(needs_approval=True)
    def buy() -> str:
        """Needs a yes."""
        calls.append(1)
        return "bought"

    return agent_of(script, guard, [buy]), calls


@pytest.mark.parametrize("kind", ["run", "run_sync"])
def test_an_approved_run_goes_on_under_its_run_id(kind: str, tmp_path: Path) -> None:
    """Under ``resume=True`` the state of the SDK goes on in the same run, and its budget is carried on."""

    def step(guard: Guard, agent: Any, value: Any) -> Any:
        runner = GuardedRunner(guard)
        return runner.run_sync(agent, value) if kind == "run_sync" else asyncio.run(runner.run(agent, value))

    def guarded() -> Guard:
        budget = ExecutionBudget(max_tokens_total=25)
        return guard_of(store=str(tmp_path / "r.db"), run_id="r", resume=True, budget=budget)

    script, guard = Script(("buy", "{}"), ("buy", "{}"), "done"), guarded()
    agent, _ = buying(script, guard)
    result = step(guard, agent, "hello")
    assert result_of(guard).status is RunStatus.SUSPENDED
    for status in (RunStatus.SUSPENDED, None):
        stored, guard = result.to_state().to_string(), guarded()
        agent, _ = buying(script, guard)
        state = asyncio.run(RunState.from_string(agent, stored))
        state.approve(state.get_interruptions()[0])
        if status is None:  # The budget of the first two counts.
            with pytest.raises(BudgetExceeded) as caught:
                step(guard, agent, state)
            assert caught.value.actual == 30
        else:
            result = step(guard, agent, state)
            assert (result_of(guard).status, result_of(guard).total_tokens) == (status, 10)


def test_copies_of_a_guarded_tool_are_guarded() -> None:
    """Copies and replacements of a guarded tool are guarded, also with another function."""
    plain = tool_of()
    guard = guard_of()
    agent = agent_of(Script(), guard, [plain])
    (guarded,) = agent.tools
    assert isinstance(guarded, type(plain))
    for other in (copy.copy(guarded), dataclasses.replace(guarded, description="another")):
        assert other is not guarded
        attach(Agent(name="copy", tools=[other]), guard)
        copied = Agent(name="copy", model=Script(CALL, "done"), tools=[other])
        assert ask(attach(copied, guard), "run", guard) == "done"
        assert [line.split()[0] for line in lines_of(guard)] == ["copy", "model", "weather", "model"]

    async def instead(context: Any, arguments: str) -> str:
        return "instead"

    guarded.on_invoke_tool = instead
    script = Script(CALL, "done")
    agent.model = script
    assert ask(agent, "run", guard) == "done"
    assert script.asked[1][-1]["output"] == "instead"


def test_agents_with_one_model_compare_as_without_the_guard() -> None:
    """Guarded apart, one model is still one; a deep copy of an agent has the same guard."""
    script, guard = Script("done"), guard_of()
    one, other = (attach(Agent(name="a", model=script), guard) for _ in range(2))
    assert one == other
    assert one.model == script
    assert {one.model: 1}[other.model] == 1
    copied = copy.deepcopy(one)
    assert ask(copied, "run", guard) == "done"
    assert lines_of(guard) == ["a success", "  model success 10"]


def test_detach_restores_the_classes_of_the_framework() -> None:
    """An import changes none of them; attaching does, until no guard needs it."""
    changed = changed_until_detached(
        "from stroma.adapters.openai_agents import GuardedRunner", "GuardedRunner(guard)"
    )
    assert changed == [
        "get_model",
        "run_single_turn",
        "run_single_turn_streamed",
        "get_all_tools",
        "get_all_tools",
        "on_event",
    ]
