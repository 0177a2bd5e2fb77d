"""Agents of the OpenAI Agents SDK in a flow: each model request and each tool call is a step of it."""

import asyncio
import json
from collections.abc import Callable
from typing import Any

import openai
import pytest
from agents import (
    Agent,
    ComputerTool,
    CustomTool,
    GuardrailFunctionOutput,
    InputGuardrailTripwireTriggered,
    Model,
    ModelProvider,
    ModelRetrySettings,
    ModelSettings,
    OpenAIProvider,
    RunConfig,
    Runner,
    RunState,
    SQLiteSession,
    ToolOutputImage,
    ToolOutputText,
    function_tool,
    input_guardrail,
    output_guardrail,
    set_tracing_disabled,
)
from mcp.types import CallToolResult
from openai.types.responses import (
    ResponseCustomToolCall,
    ResponseFunctionToolCall,
    ResponseFunctionWebSearch,
    ResponseOutputMessage,
    ResponseOutputText,
)
from pydantic import BaseModel
from tests.frameworks.body_kit import answer_in_rounds, survive
from tests.frameworks.openai_agents.test_openai_agents import Script, Server
from tests.kit import NEVER, Num, Text

from stroma import (
    FailurePolicy,
    Flow,
    InMemoryStore,
    NotDone,
    RunStatus,
    StromaRunner,
    current_node,
    stroma_flow,
)
from stroma.adapters import Guard
from stroma.adapters.openai_agents import DurableRunner, ToolApproval, attach
from stroma.telemetry.messages import messages_of_call
from stroma.testing import assert_resumable

try:  # What the client of this release takes.
    import httpx2 as httpx
except ImportError:
    import httpx

set_tracing_disabled(True)


def says(text: str) -> list[Any]:
    part = ResponseOutputText(text=text, type="output_text", annotations=[])
    return [
        ResponseOutputMessage(id="m", content=[part], role="assistant", status="completed", type="message")
    ]


def asks(*calls: tuple[str, dict[str, Any], str]) -> list[Any]:
    """Return calls of tools: names, arguments and ids."""
    return [
        ResponseFunctionToolCall(
            name=name, arguments=json.dumps(arguments), call_id=call_id, type="function_call"
        )
        for name, arguments, call_id in calls
    ]


def outputs_of(items: Any) -> list[Any]:
    """Return what tools have returned to a model."""
    return (
        [one["output"] for one in items if one.get("type") == "function_call_output"]
        if isinstance(items, list)
        else []
    )


class Fake(Script):
    """Answers what a function makes of the input, and takes time: the body of a flow does not wait for it."""

    def __init__(self, respond: Callable[[Any], list[Any]]) -> None:
        super().__init__(tokens=12)
        self.respond = respond

    def _output(self, given: Any) -> list[Any]:
        return self.respond(given)

    async def get_response(self, *args: Any, **kwargs: Any) -> Any:
        await asyncio.sleep(0.001)
        return await super().get_response(*args, **kwargs)

    async def stream_response(self, *args: Any, **kwargs: Any) -> Any:
        await asyncio.sleep(0.001)
        async for event in super().stream_response(*args, **kwargs):
            yield event


def flow_of(body: Callable[[Num], Any]) -> Any:
    """Return a flow whose answer is what a body returns."""

    @stroma_flow("f", input=Num, output=Text)
    async def f(flow: Flow, state: Num) -> Text:
        return Text(text=str(await body(state)))

    return f


def answering(agent: Agent[Any], runner: DurableRunner | None = None, **options: Any) -> Any:
    """Return a flow whose answer is that of an agent."""
    runner = runner or DurableRunner()

    async def body(state: Num) -> Any:
        return (await runner.run(agent, "go", **options)).final_output

    return flow_of(body)


def run_flow(flow: Any, **config: Any) -> Any:
    return StromaRunner.quick(**{"run_id": "r", "store": InMemoryStore(), **config}).run(flow, Num())


class World:
    """A triage agent with two rounds of two parallel tools, which hands off to another with a tool."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        calls = self.calls

        @function_tool
        async def double(x: int) -> int:
            calls.append(f"double {x}")
            return 2 * x

        @function_tool
        def half(x: int) -> int:
            calls.append(f"half {x}")
            return x // 2

        def triage(items: Any) -> list[Any]:
            done = len(outputs_of(items))
            self.calls.append(f"triage {done}")
            if done < 4:
                return asks(
                    *((name, {"x": done + n}, f"c{done + n}") for n, name in enumerate(("double", "half")))
                )
            return asks(("transfer_to_writer", {}, "h"))

        def write(items: Any) -> list[Any]:
            done = len(outputs_of(items))
            self.calls.append(f"write {done}")
            return asks(("double", {"x": 9}, "w")) if done < 6 else says(f"done {outputs_of(items)[-1]}")

        writer: Agent[Any] = Agent(name="writer", model=Fake(write), tools=[double])
        self.agent: Agent[Any] = Agent(
            name="triage", model=Fake(triage), tools=[double, half], handoffs=[writer]
        )

    def flow(self) -> Any:
        async def body(state: Num) -> str:
            result = await DurableRunner().run(self.agent, f"go {state.n}")
            usage = result.context_wrapper.usage
            return (
                f"{result.final_output} {usage.total_tokens} {len(result.new_items)} {result.last_agent.name}"
            )

        return flow_of(body)


async def test_requests_and_tools_are_steps_and_survive_death_at_every_boundary() -> None:
    """G5, G12: Each request and call of a tool, also after a handoff, is a step with its usage and cost;
    killed at any record, the agents repeat none that ended."""
    world, store = World(), InMemoryStore()
    plain = await Runner.run(World().agent, "go 0")
    result = await run_flow(world.flow(), store=store)
    assert result.final_state == Text(text=f"done 18 60 {len(plain.new_items)} writer"), result.failure
    steps = [one.node_id for one in store.attempts("r") if one.node_id != "f"]
    rounds = 2 * ["triage.model", "triage.double", "triage.half"]
    assert steps == [*rounds, "triage.model", "writer.model", "writer.double", "writer.model"]
    assert result.total_tokens == 60
    assert result.total_cost_usd > 0
    assert await survive(World().flow()) > 30


async def test_outside_of_a_flow_it_is_the_agent_as_it_was() -> None:
    """The runner changes nothing of an agent outside of flows, also after a flow and in a plain node."""
    world = World()
    result = await DurableRunner().run(world.agent, "go")
    assert (result.final_output, result.last_agent.name) == ("done 18", "writer")
    assert result.context_wrapper.usage.total_tokens == 60
    last: list[Any] = []

    async def body(state: Num) -> str:
        result = await DurableRunner().run(world.agent, "go")
        last.append(result.last_agent)
        return str(result.final_output)

    await run_flow(flow_of(body))
    items: Any = [{"type": "function_call_output", "call_id": f"c{n}", "output": "7"} for n in range(6)]
    assert (await Runner.run(last[0], items)).final_output == "done 7"
    assert await DurableRunner().run_streamed(world.agent, "go").stream_events().__anext__()
    assert world.agent.tools[0].on_invoke_tool.__class__.__module__.startswith("agents")


@pytest.mark.parametrize("streamed", [False, True])
async def test_an_approval_is_a_question_of_the_flow(streamed: bool) -> None:
    """A tool that needs approval suspends the run; the approval has it called once, with its arguments."""
    calls: list[str] = []

    @function_tool(needs_approval=True)
    def refund(cents: int) -> str:
        calls.append(f"refund {cents}")
        return f"refunded {cents}"

    def respond(items: Any) -> list[Any]:
        returned = outputs_of(items)
        return (
            says(f"done {returned}")
            if returned
            else asks(("refund", {"cents": 500}, "a"), ("refund", {"cents": 9}, "b"))
        )

    agent: Agent[Any] = Agent(name="a", model=Fake(respond), tools=[refund])
    runner = DurableRunner()

    async def body(state: Num) -> str:
        if not streamed:
            return str((await runner.run(agent, "go")).final_output)
        result = runner.run_streamed(agent, "go")
        kinds = [
            event.item.type async for event in result.stream_events() if event.type == "run_item_stream_event"
        ]
        assert kinds.count("tool_call_output_item") == 2, kinds
        return str(result.final_output)

    yes, no = {"cents": 400}, ToolApproval(approved=False, message="too cheap")
    answers = [ToolApproval(approved=True, arguments=yes), no]
    asked, output = await answer_in_rounds(flow_of(body), answers)
    assert asked == [['approval of refund({"cents": 500})', 'approval of refund({"cents": 9})']]
    assert output == Text(text="done ['refunded 400', 'too cheap']")
    assert calls == ["refund 400"]


async def test_a_tool_that_is_an_effect_is_asked_about_before_it_is_called_again() -> None:
    """G13: An effect's call that the death of its process cut off is looked up, with arguments and key."""
    booked: dict[str, int] = {}
    asked: list[dict[str, Any]] = []
    is_dying = [True]

    @function_tool
    async def charge(cents: int) -> int:
        booked[current_node().idempotency_key] = cents
        if is_dying.pop():
            raise ConnectionResetError("connection reset by peer")
        return cents

    def look(arguments: dict[str, Any], key: str) -> Any:
        asked.append(arguments)
        return booked.get(key, NotDone())

    def respond(items: Any) -> list[Any]:
        returned = outputs_of(items)
        return says(f"done {returned}") if returned else asks(("charge", {"cents": 500}, "a"))

    agent: Agent[Any] = Agent(name="a", model=Fake(respond), tools=[charge])
    runner = DurableRunner(tools={"charge": {"effect": True, "reconcile": look}})

    result = await run_flow(answering(agent, runner))
    assert result.final_state == Text(text="done ['500']"), result.failure
    assert list(booked.values()) == [500]
    assert asked == [{"cents": 500}]


def asking(tool: str, **arguments: Any) -> Fake:
    """Return a model that calls a tool, and answers."""
    return Fake(
        lambda items: (
            says(f"done {outputs_of(items)[-1]}") if outputs_of(items) else asks((tool, arguments, "c"))
        )
    )


async def test_a_guarded_agent_is_durable_in_a_flow() -> None:
    """An agent that scripts run under a guard has the same steps in a flow as one without."""

    @function_tool
    async def look() -> str:
        return "seen"

    agent = attach(Agent(name="a", model=asking("look"), tools=[look]), guard := Guard())

    store = InMemoryStore()
    result = await StromaRunner.quick(store=store, run_id="r").run(answering(agent), Num())
    guard.detach()
    assert result.final_state == Text(text="done seen"), result.failure
    steps = [(one.node_id, one.tokens) for one in store.attempts("r") if "." in one.node_id]
    assert steps == [("a.model", 12), ("a.look", 0), ("a.model", 12)]


@pytest.mark.parametrize("streamed", [False, True])
async def test_telemetry_has_what_a_model_was_sent(streamed: bool) -> None:
    """The messages of a request have the agent's instructions, in a flow as under a guard."""
    sent: list[Any] = []

    def respond(items: Any) -> list[Any]:
        sent.append(messages_of_call(current_node()._own)[0])
        return says("hi")

    async def body(state: Num) -> str:
        result = DurableRunner().run_streamed(agent, "go") if streamed else None
        if result is None:
            return str((await DurableRunner().run(agent, "go")).final_output)
        async for _ in result.stream_events():
            pass
        return str(result.final_output)

    agent: Agent[Any] = Agent(name="a", instructions="Be brief.", model=Fake(respond))
    assert (await StromaRunner.quick().run(flow_of(body), Num())).ok
    guarded = attach(Agent(name="a", instructions="Be brief.", model=Fake(respond)), guard := Guard())
    await Runner.run(guarded, "go")
    guard.detach()
    assert sent[0] == sent[1]
    assert [one["role"] for one in sent[0]] == ["system", "user"]


async def test_agents_run_in_parallel_and_as_tools_of_others() -> None:
    """Agents in tasks of a body have steps of their own, as has an agent as a tool, with its approvals."""
    calls: list[str] = []

    @function_tool(needs_approval=True)
    async def look() -> str:
        calls.append("look")
        return "seen"

    inner: Agent[Any] = Agent(name="inner", model=asking("look"), tools=[look])
    outer: Agent[Any] = Agent(
        name="outer", model=asking("ask", input="?"), tools=[inner.as_tool("ask", "Ask.")]
    )
    runner = DurableRunner()

    async def body(state: Num) -> str:
        results = await asyncio.gather(*(runner.run(outer, f"go {n}") for n in range(2)))
        return " ".join(str(one.final_output) for one in results)

    store = InMemoryStore()
    stroma = StromaRunner.quick(store=store, run_id="r", resume=True)
    result = await stroma.run(flow_of(body), Num())
    assert result.suspended == 2 * ["approval of look({})"], result.failure
    for question in result.questions:
        await stroma.signal("r", ToolApproval(approved=True), question=question.id)
    result = await stroma.run(flow_of(body), Num())
    assert result.final_state == Text(text="done done seen done done seen"), result.failure
    assert calls == 2 * ["look"]
    steps = sorted(one.node_id for one in store.attempts("r") if "." in one.node_id)
    assert steps == [*2 * ["inner.look"], *4 * ["inner.model"], *4 * ["outer.model"]]
    assert sum(one.tokens for one in store.attempts("r")) == 8 * 12


async def test_a_streamed_answer_is_one_step() -> None:
    """The events of run_streamed come from the step of their request, with its text and, once, its usage."""
    agent: Agent[Any] = Agent(name="a", model=Fake(lambda items: says("hello world")))

    async def body(state: Num) -> str:
        result = DurableRunner().run_streamed(agent, "go")
        events = [event async for event in result.stream_events()]
        deltas = [
            event.data.delta
            for event in events
            if getattr(event, "data", None) and event.data.type.endswith("delta")
        ]
        return f"{deltas} {result.final_output} {result.context_wrapper.usage.total_tokens}"

    store, emitted = InMemoryStore(), list[Any]()
    stroma = StromaRunner.quick(store=store, run_id="r")
    async for event in stroma.stream(flow_of(body), Num()):
        if event.kind == "node_event":
            emitted.append(event.data)
        if event.result is not None:
            expected = Text(text="['helloworld'] hello world 12")
            assert event.result.final_state == expected, event.result.failure
    assert emitted == ["hello", "world"]
    assert [one.tokens for one in store.attempts("r") if one.node_id == "a.model"] == [12]
    assert await survive(flow_of(body))


@pytest.mark.parametrize("trips", [False, True])
async def test_guardrails_run_in_the_body_and_their_judges_are_durable(trips: bool) -> None:
    """The judge of a guardrail is an agent with steps; a tripwire is raised in the body, also on replay."""
    judge: Agent[Any] = Agent(name="judge", model=Fake(lambda items: says("bad" if trips else "good")))

    @input_guardrail
    async def check(context: Any, agent: Any, input: Any) -> GuardrailFunctionOutput:
        answer = (await Runner.run(judge, input)).final_output
        return GuardrailFunctionOutput(output_info=answer, tripwire_triggered=answer == "bad")

    @output_guardrail
    def look(context: Any, agent: Any, output: Any) -> GuardrailFunctionOutput:
        return GuardrailFunctionOutput(output_info=None, tripwire_triggered=False)

    agent: Agent[Any] = Agent(
        name="a", model=Fake(lambda items: says("hello")), input_guardrails=[check], output_guardrails=[look]
    )

    async def body(state: Num) -> str:
        try:
            return str((await DurableRunner().run(agent, "go")).final_output)
        except InputGuardrailTripwireTriggered as error:
            return f"refused: {error.guardrail_result.output.output_info}"

    store = InMemoryStore()
    result = await run_flow(flow_of(body), store=store)
    assert result.final_state == Text(text="refused: bad" if trips else "hello"), result.failure
    assert {one.node_id for one in store.attempts("r")} >= {"judge.model"}
    await survive(flow_of(body))


class ListSession:
    """A session in memory, which is the only thing that outlives a life."""

    session_id = "s"
    session_settings = None

    def __init__(self) -> None:
        self.items: list[Any] = []

    async def get_items(self, limit: int | None = None) -> list[Any]:
        await asyncio.sleep(0.001)
        return self.items[-limit:] if limit else list(self.items)

    async def add_items(self, items: list[Any]) -> None:
        await asyncio.sleep(0.001)
        self.items += items

    async def pop_item(self) -> Any:
        return self.items.pop()

    async def clear_session(self) -> None:
        self.items.clear()


async def test_a_session_is_read_and_written_once() -> None:
    """A session's reads and writes are steps: killed at any record, a run reads the same and writes once."""
    agent: Agent[Any] = Agent(name="a", model=Fake(lambda items: says(f"answer {len(items)}")))
    sessions: list[Any] = [ListSession()]

    async def body(state: Num) -> str:
        runner, session = DurableRunner(), sessions[-1]
        first = await runner.run(agent, "one", session=session)
        second = await runner.run(agent, "two", session=session)
        return f"{first.final_output} {second.final_output}"

    await assert_resumable(
        flow_of(body),
        Num(),
        runner=StromaRunner.quick(policy_map=NEVER),
        processes=False,
        reset=lambda: sessions.append(ListSession()),
        effects=lambda: sessions[-1].items,
    )
    sessions.append(SQLiteSession("s"))
    result = await run_flow(flow_of(body))
    assert result.final_state == Text(text="answer 1 answer 3"), result.failure
    assert [item.get("role") for item in await sessions[-1].get_items()] == 2 * ["user", "assistant"]


async def test_tools_of_mcp_servers_are_steps() -> None:
    """The discovery of an MCP server's tools is a step, as is each call, with retries and approvals."""
    lost = ConnectionResetError("connection reset by peer")
    server = Server(lost, {"text": "content"}, require_approval="always")
    agent: Agent[Any] = Agent(name="a", model=asking("remote"), mcp_servers=[server])
    approval, store = [ToolApproval(approved=True)], InMemoryStore()
    asked, output = await answer_in_rounds(answering(agent), approval, policy_map=AT_ONCE, store=store)
    assert asked == [["approval of remote({})"]]
    assert "content" in output.text
    assert (server.listed, len(server.called)) == (1, 2)
    assert {one.node_id for one in store.attempts("r")} >= {"a.server.tools", "a.remote"}


@pytest.mark.parametrize(
    "answer", [ConnectionResetError("connection reset by peer"), CallToolResult(content=[], isError=True)]
)
async def test_an_effect_of_an_mcp_server_is_not_called_again_by_the_model(answer: Any) -> None:
    """G13: Neither a lost connection nor an error that the server answers with goes to the model."""
    server = Server(answer, answer)
    agent: Agent[Any] = Agent(name="a", model=asking("remote"), mcp_servers=[server])
    flow = answering(agent, DurableRunner(tools={"remote": {"effect": True}}))
    result = await StromaRunner.quick(policy_map=AT_ONCE).run(flow, Num())
    assert (result.status, result.suspended) == (RunStatus.SUSPENDED, ["effect"]), result.failure
    assert len(server.called) == 1


AT_ONCE = {"RECOVERABLE": FailurePolicy(max_retries=2, backoff_seconds=0)}


async def test_models_by_name_and_hosted_tools() -> None:
    """A model that a provider knows by name is durable; hosted tool calls are in its recorded answer."""
    search = ResponseFunctionWebSearch.model_validate(
        {
            "id": "w",
            "status": "completed",
            "type": "web_search_call",
            "action": {"type": "search", "query": "q"},
        }
    )
    seen: list[Any] = []

    def respond(items: Any) -> list[Any]:
        seen.append(items)
        return (
            [search, *asks(("pure", {}, "p"))] if isinstance(items, str) or len(items) == 1 else says("done")
        )

    class Provider(ModelProvider):
        def get_model(self, model_name: str | None) -> Model:
            assert model_name == "mine"
            return Fake(respond)

    @function_tool
    def pure() -> int:
        return 7

    agent: Agent[Any] = Agent(name="a", model="mine", tools=[pure])
    config = RunConfig(model_provider=Provider())
    runner = DurableRunner(tools={"pure": False})

    async def body(state: Num) -> str:
        result = await runner.run(agent, "go", run_config=config)
        return f"{result.final_output} {[item.type for item in result.new_items]}"

    store = InMemoryStore()
    result = await run_flow(flow_of(body), store=store)
    kinds = ["tool_call_item", "tool_call_item", "tool_call_output_item", "message_output_item"]
    assert result.final_state == Text(text=f"done {kinds}"), result.failure
    assert [one.node_id for one in store.attempts("r") if "." in one.node_id] == 2 * ["a.model"]
    in_flow = seen[-1]
    await runner.run(agent, "go", run_config=config)
    assert in_flow == seen[-1]


async def test_failures_of_tools_go_to_the_model_after_their_retries() -> None:
    """A transient failure is retried by the step; the model hears of lasting ones and wrong arguments."""
    calls: list[str] = []

    @function_tool
    async def flaky() -> str:
        calls.append("flaky")
        if len(calls) < 2:
            raise ConnectionResetError("connection reset by peer")
        return "fine"

    @function_tool
    async def broken(n: int) -> str:
        calls.append("broken")
        raise ValueError("no such thing")

    @function_tool(timeout=0.01)
    async def slow() -> str:
        calls.append("slow")
        await asyncio.sleep(100)
        return "never"

    told: list[str] = []

    def respond(items: Any) -> list[Any]:
        told[:] = outputs_of(items)
        wanted = ("flaky", {}, "a"), ("broken", {"n": 1}, "b"), ("broken", {"n": "x"}, "c"), ("slow", {}, "d")
        return says("done") if told else asks(*wanted)

    agent: Agent[Any] = Agent(name="a", model=Fake(respond), tools=[flaky, broken, slow])

    store, once = InMemoryStore(), FailurePolicy(max_retries=1, backoff_seconds=0)
    result = await run_flow(answering(agent), store=store, policy_map={**AT_ONCE, "AMBIGUOUS": once})
    assert result.final_state == Text(text="done"), result.failure
    fine, failed, wrong, late = told
    assert fine == "fine"
    assert failed.startswith("An error occurred while running the tool.")
    assert wrong.startswith("An error occurred while running the tool.")
    assert late == "Tool 'slow' timed out after 0.01 seconds."
    assert sorted(calls) == ["broken", "broken", "flaky", "flaky", "slow"]
    assert [one.node_id for one in store.attempts("r")].count("a.broken") == 3


async def test_a_failed_request_is_retried_as_a_step_is() -> None:
    """A rate limit is retried by the step's policy, not by the SDK; a refused request stops the flow."""

    class Refused(Exception):
        def __init__(self, status_code: int) -> None:
            super().__init__(f"status {status_code}")
            self.status_code = status_code

    errors: list[Exception] = [Refused(429), Refused(401)]

    def respond(items: Any) -> list[Any]:
        raise errors.pop(0)

    settings = ModelSettings(retry=ModelRetrySettings(max_retries=3, policy=lambda context: True))
    agent: Agent[Any] = Agent(name="a", model=Fake(respond), model_settings=settings)

    result = await run_flow(answering(agent), policy_map=AT_ONCE)
    assert result.status is RunStatus.FAILED
    assert (result.failure.node_id, result.failure.reason) == ("a.model", "auth")
    assert errors == []


async def test_what_cannot_run_in_a_body_says_so() -> None:
    """Options of no tool, a tool that acts on this machine, a RunState and waiting code are refused."""

    @function_tool
    async def waits() -> None:
        await asyncio.open_connection("localhost", 1)

    async def message(run: Callable[[], Any]) -> str:
        async def body(state: Num) -> str:
            return str((await run()).final_output)

        result = await run_flow(flow_of(body))
        return str(result.failure.message)

    agent: Agent[Any] = Agent(name="a", model=asking("waits"), tools=[waits])
    state: Any = RunState(context=None, original_input="go", starting_agent=agent)
    computer: Any = ComputerTool(computer=object())
    acting: Agent[Any] = Agent(name="a", model=asking("waits"), tools=[computer])
    assert "options of unknown tool 'wait'; known: 'waits'" in await message(
        lambda: DurableRunner(tools={"wait": False}).run(agent, "go")
    )
    assert "agent 'a' has a ComputerTool, which cannot run in the body of a flow" in await message(
        lambda: DurableRunner().run(acting, "go")
    )
    assert "takes no RunState in a flow" in await message(lambda: DurableRunner().run(agent, state))
    with pytest.raises(
        TypeError, match=r"tool 'waits' has unknown options \['effects'\]; pass effect or reconcile"
    ):
        DurableRunner(tools={"waits": {"effects": True}})
    assert "waits for its steps, timers and answers only, and called" in await message(
        lambda: DurableRunner(tools={"waits": False}).run(agent, "go")
    )


@pytest.mark.parametrize("streamed", [False, True])
async def test_the_provider_gets_the_same_requests_as_without(streamed: bool) -> None:
    """What the SDK sends from a flow, with items of models, is what it sends elsewhere, to the byte."""
    sent: list[bytes] = []
    call = {
        "id": "f",
        "type": "function_call",
        "name": "add",
        "arguments": '{"a": 1}',
        "call_id": "c",
        "status": "completed",
    }
    text = {"type": "output_text", "text": "done", "annotations": []}
    outputs = [
        [{"id": "rs", "type": "reasoning", "summary": [], "encrypted_content": "x"}, call],
        [{"id": "m", "type": "message", "role": "assistant", "status": "completed", "content": [text]}],
    ]

    def handler(request: Any) -> Any:
        sent.append(request.content)
        answer = {
            "id": "r",
            "created_at": 0,
            "model": "gpt-4o",
            "object": "response",
            "parallel_tool_calls": True,
            "tool_choice": "auto",
            "tools": [],
            "output": outputs[1 - len(sent) % 2],
            "usage": {
                "input_tokens": 1,
                "output_tokens": 1,
                "total_tokens": 2,
                "input_tokens_details": {"cached_tokens": 0},
                "output_tokens_details": {"reasoning_tokens": 0},
            },
        }
        if not streamed:
            return httpx.Response(200, json=answer)
        event = {"type": "response.completed", "sequence_number": 1, "response": answer}
        lines = f"event: response.completed\ndata: {json.dumps(event)}\n\n"
        return httpx.Response(200, content=lines, headers={"content-type": "text/event-stream"})

    @function_tool
    def add(a: int) -> ToolOutputText:
        """Add one."""
        return ToolOutputText(text=str(a + 1))

    transport = httpx.AsyncClient(transport=httpx.MockTransport(handler))
    provider = OpenAIProvider(openai_client=openai.AsyncOpenAI(api_key="x", http_client=transport))
    config = RunConfig(model_provider=provider, group_id="same")
    agent: Agent[Any] = Agent(name="a", model="gpt-4o", tools=[add])

    async def ask() -> str:
        if not streamed:
            return str((await DurableRunner().run(agent, "?", run_config=config)).final_output)
        result = DurableRunner().run_streamed(agent, "?", run_config=config)
        async for _ in result.stream_events():
            pass
        return str(result.final_output)

    async def body(state: Num) -> str:
        return await ask()

    result = await run_flow(flow_of(body))
    assert result.final_state == Text(text="done"), result.failure
    assert (result.total_tokens, result.unpriced_models) == (4, [])
    assert await ask() == "done"
    assert len(sent) == 4
    assert sent[:2] == sent[2:]


async def test_what_the_model_gets_of_a_tool_is_the_same_as_without() -> None:
    """Results of all kinds, also of a custom tool, reach the model in the same form as outside of a flow."""

    class Point(BaseModel):
        x: int

    results: list[Any] = [
        "text",
        1,
        1.5,
        None,
        True,
        {"a": [1, None]},
        [1, "b"],
        (1, 2),
        {1: 2},
        Point(x=1),
        [Point(x=1)],
        ToolOutputImage(image_url="data:"),
        [ToolOutputText(text="t"), ToolOutputImage(image_url="data:")],
        {"type": "text", "text": "t"},
        float("nan"),
    ]

    @function_tool
    def give(n: int) -> Any:
        return results[n]

    async def shout(context: Any, text: str) -> str:
        return text.upper()

    custom = CustomTool(name="shout", description="Shout.", on_invoke_tool=shout)
    told: list[Any] = []

    def respond(items: Any) -> list[Any]:
        if isinstance(items, str) or len(items) == 1:
            call = ResponseCustomToolCall(call_id="x", input="hello", name="shout", type="custom_tool_call")
            return [*asks(*(("give", {"n": n}, f"c{n}") for n in range(len(results)))), call]
        told.append([one for one in items if str(one.get("type")).endswith("_output")])
        return says("done")

    agent: Agent[Any] = Agent(name="a", model=Fake(respond), tools=[give, custom])

    store = InMemoryStore()
    result = await run_flow(answering(agent), store=store)
    assert result.final_state == Text(text="done"), result.failure
    assert "a.shout" in {one.node_id for one in store.attempts("r")}
    await DurableRunner().run(agent, "go")
    assert told[0] == told[1]
    assert len(told[0]) == len(results) + 1


async def test_a_tool_decides_if_a_call_needs_approval() -> None:
    """A function of the arguments decides, in the body; a call that the function approves is made at once."""
    calls: list[int] = []

    async def is_much(context: Any, arguments: dict[str, Any], call_id: str) -> bool:
        return bool(arguments["cents"] > 100)

    @function_tool(needs_approval=is_much)
    def refund(cents: int) -> str:
        calls.append(cents)
        return f"refunded {cents}"

    def respond(items: Any) -> list[Any]:
        wanted = ("refund", {"cents": 50}, "a"), ("refund", {"cents": 500}, "b")
        return says(f"done {outputs_of(items)}") if outputs_of(items) else asks(*wanted)

    agent: Agent[Any] = Agent(name="a", model=Fake(respond), tools=[refund])

    asked, output = await answer_in_rounds(answering(agent), [ToolApproval(approved=True)])
    assert asked == [['approval of refund({"cents": 500})']]
    assert output == Text(text="done ['refunded 50', 'refunded 500']")
    assert calls == [50, 500]
