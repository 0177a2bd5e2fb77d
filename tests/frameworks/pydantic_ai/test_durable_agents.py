"""Agents of Pydantic AI in a flow: each model request and each tool call is a step of it."""

import asyncio
import os
import threading
from collections.abc import AsyncIterator
from typing import Any

import pytest
from pydantic_ai import Agent, FunctionToolset, RunContext
from pydantic_ai.exceptions import ModelHTTPError
from pydantic_ai.messages import ModelMessage, ModelResponse, TextPart, ToolCallPart
from pydantic_ai.models.function import AgentInfo, FunctionModel
from pydantic_ai.usage import RequestUsage
from tests.frameworks.body_kit import answer_in_rounds, survive
from tests.kit import NEVER, Num, retry_policies

from stroma import FailurePolicy, Flow, InMemoryStore, NotDone, RunStatus, StromaRunner, stroma_flow
from stroma.contracts.examples import example_text

pytest.importorskip("stroma.adapters._pydantic_ai_durability", exc_type=ImportError)
from pydantic_ai.exceptions import RunCancelled
from pydantic_ai.toolsets import DynamicToolset, PreparedToolset, WrapperToolset
from tests.kit import Text

from stroma.adapters.pydantic_ai import StromaDurability, ToolApproval


def answering(agent: Agent[None, str]) -> Any:
    """Return a flow whose answer is that of an agent."""

    @stroma_flow("f", input=Num, output=Text)
    async def f(flow: Flow, state: Num) -> Text:
        return Text(text=(await agent.run("go")).output)

    return f


class World:
    """A model with four rounds of two tools in parallel, and what was called."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def respond(self, messages: list[ModelMessage], info: AgentInfo) -> ModelResponse:
        returned = sum(part.part_kind == "tool-return" for message in messages for part in message.parts)
        self.calls.append(f"model {len(messages)}")
        parts: list[Any] = [TextPart("done")]
        if returned < 6:
            parts = [ToolCallPart("double", {"x": returned}), ToolCallPart("double", {"x": 10 + returned})]
        usage = RequestUsage(input_tokens=10, output_tokens=2)
        return ModelResponse(parts=parts, usage=usage, model_name="gpt-4o")

    def agent(self, **options: Any) -> Agent[None, str]:
        agent = Agent(FunctionModel(self.respond), name="a", capabilities=[StromaDurability()], **options)

        @agent.tool_plain
        async def double(x: int) -> int:
            self.calls.append(f"double {x}")
            return 2 * x

        return agent

    def flow(self, **options: Any) -> Any:
        agent = self.agent(**options)

        @stroma_flow("f", input=Num, output=Text)
        async def f(flow: Flow, state: Num) -> Text:
            result = await agent.run(f"go {state.n}")
            return Text(text=f"{result.output} {result.usage.total_tokens} {len(result.all_messages())}")

        return f


async def test_requests_and_tools_are_steps_and_survive_death_at_every_boundary() -> None:
    """G5, G12: Each request and each call of a tool is a step with its usage; killed at any record, the agent
    has the same answer and repeats none that ended."""
    world, store = World(), InMemoryStore()
    result = await StromaRunner.quick(store=store, run_id="r").run(world.flow(), Num())
    assert result.status is RunStatus.COMPLETED, result.failure
    assert result.final_state == Text(text="done 48 8")
    steps = [one.node_id for one in store.attempts("r") if one.node_id != "f"]
    assert steps == 3 * ["a.model", "a.double", "a.double"] + ["a.model"]
    assert result.total_tokens == 48
    assert await survive(World().flow()) > 20


async def test_outside_of_a_flow_it_is_the_agent_as_it_was() -> None:
    """The capability changes nothing of an agent outside of flows, also inside a plain node."""
    world = World()
    result = await world.agent().run("go")
    assert (result.output, result.usage.total_tokens) == ("done", 48)


async def test_an_approval_is_a_question_of_the_flow() -> None:
    """A tool that needs approval suspends the run; the approval has it called once, with its arguments."""
    calls: list[str] = []

    def respond(messages: list[ModelMessage], info: AgentInfo) -> ModelResponse:
        returned = [
            part.content for message in messages for part in message.parts if part.part_kind == "tool-return"
        ]
        part: Any = TextPart(f"done {returned}") if returned else ToolCallPart("refund", {"cents": 500})
        return ModelResponse(parts=[part])

    agent = Agent(FunctionModel(respond), name="a", capabilities=[StromaDurability()])

    @agent.tool_plain(requires_approval=True)
    def refund(cents: int) -> str:
        calls.append(f"refund {cents}")
        return f"refunded {cents}"

    answer = ToolApproval(approved=True, arguments={"cents": 400})
    asked, output = await answer_in_rounds(answering(agent), [answer])
    assert (asked, output) == ([['approval of refund({"cents":500})']], Text(text="done ['refunded 400']"))
    assert calls == ["refund 400"]


async def test_a_tool_that_is_an_effect_is_asked_about_before_it_is_called_again() -> None:
    """G13: An effect's call that the death of its process cut off is looked up, with arguments and key."""
    booked: dict[str, int] = {}
    asked: list[dict[str, Any]] = []
    is_dying = [True]

    def respond(messages: list[ModelMessage], info: AgentInfo) -> ModelResponse:
        returned = any(part.part_kind == "tool-return" for message in messages for part in message.parts)
        part: Any = TextPart("done") if returned else ToolCallPart("charge", {"cents": 500})
        return ModelResponse(parts=[part])

    def look(arguments: dict[str, Any], key: str) -> Any:
        asked.append(arguments)
        return booked.get(key, NotDone())

    agent = Agent(FunctionModel(respond), name="a", capabilities=[StromaDurability()])

    @agent.tool_plain(metadata={"stroma": {"effect": True, "reconcile": look}})
    async def charge(cents: int) -> int:
        from stroma import current_node

        booked[current_node().idempotency_key] = cents
        if is_dying.pop():
            raise ConnectionResetError("connection reset by peer")
        return cents

    result = await StromaRunner.quick(store=InMemoryStore()).run(answering(agent), Num())
    assert result.final_state == Text(text="done"), result.failure
    assert list(booked.values()) == [500]
    assert asked == [{"cents": 500}]


async def test_a_person_states_the_result_of_a_tool() -> None:
    """G13: A statement that a call happened needs the result of the tool: an accepted one stays."""
    agent = Agent(FunctionModel(_calls_all), name="a", capabilities=[StromaDurability()])

    @agent.tool_plain(metadata={"stroma": {"effect": True}})
    async def charge(c: int) -> str:
        raise ConnectionResetError("connection reset by peer")

    @stroma_flow("f", input=Num, output=Text)
    async def f(flow: Flow, state: Num) -> Text:
        return Text(text=str((await agent.run("go")).all_messages()[2].parts[0].content))  # type: ignore[union-attr]

    runner = StromaRunner.quick(store=InMemoryStore(), policy_map=NEVER, run_id="r", resume=True)
    (question,) = (await runner.run(f, Num())).questions
    assert example_text(question.schema) == '{"result": ...}'
    with pytest.raises(ValueError, match=r"result\n  Field required"):
        await runner.signal("r", {}, question=question.id)
    await runner.signal("r", {"result": "charged"}, question=question.id)
    result = await runner.run(f, Num())
    assert result.final_state == Text(text="charged"), result.failure


async def _lose(c: int) -> str:
    raise ConnectionResetError("connection reset by peer")


def _plain(c: int) -> str:
    return threading.current_thread().name


async def _double(c: int) -> str:
    return str(2 * c)


def _calls_all(messages: list[ModelMessage], info: AgentInfo) -> ModelResponse:
    """Call each tool once, one after the other, then end."""
    returned = sum(part.part_kind == "tool-return" for message in messages for part in message.parts)
    names = [tool.name for tool in info.function_tools]
    part: Any = TextPart("done") if returned == len(names) else ToolCallPart(names[returned], {"c": 1})
    return ModelResponse(parts=[part])


def _asking(*toolsets: Any) -> Any:
    """Return a flow whose agent calls each tool of the toolsets once."""
    agent = Agent(
        FunctionModel(_calls_all), name="a", toolsets=list(toolsets), capabilities=[StromaDurability()]
    )

    @stroma_flow("f", input=Num, output=Text)
    async def f(flow: Flow, state: Num) -> Text:
        try:
            return Text(text=(await agent.run("go")).output)
        except RunCancelled:
            return Text(text="cancelled")

    return f


async def test_options_belong_to_a_tool_of_one_toolset() -> None:
    """G13: An effect with the name of a tool of another toolset is not called twice."""
    toolsets = FunctionToolset(id="safe"), FunctionToolset(id="paid").with_metadata(stroma={"effect": True})
    toolsets[0].add_function(_double, takes_ctx=False, name="charge")
    toolsets[1].wrapped.add_function(_lose, takes_ctx=False, name="charge")
    store = InMemoryStore()
    runner = StromaRunner.quick(store=store, run_id="r", policy_map=retry_policies(2))
    result = await runner.run(_asking(toolsets[0].prefixed("x"), toolsets[1].prefixed("y")), Num())
    assert (result.status, result.suspended) == (RunStatus.SUSPENDED, ["effect"]), result.failure
    assert [one.node_id for one in store.attempts("r")].count("a.charge") == 2


async def test_the_check_of_the_arguments_of_an_effect_is_not_an_effect() -> None:
    """A failed check of arguments is retried, also if its tool must not be called twice blindly."""
    errors = [ConnectionResetError("connection reset by peer")]
    toolset: Any = FunctionToolset(id="paid")

    async def check(ctx: Any, c: int) -> None:
        if errors:
            raise errors.pop()

    effect = {"stroma": {"effect": True}}
    toolset.add_function(_double, takes_ctx=False, args_validator=check, metadata=effect)
    result = await StromaRunner.quick(policy_map=retry_policies(2)).run(_asking(toolset), Num())
    assert result.final_state == Text(text="done"), result.failure
    assert errors == []


async def test_an_effect_whose_errors_go_to_the_model_is_refused() -> None:
    """G13: The model would call it again after a lost connection, whatever became of the call."""

    class Remote(FunctionToolset[None]):  # As MCPToolset, which needs a server.
        tool_error_behavior = "retry"

    toolset: Any = Remote(id="bank")
    toolset.add_function(_double, takes_ctx=False)
    runner = StromaRunner.quick(policy_map=NEVER)
    assert (await runner.run(_asking(toolset), Num())).status is RunStatus.COMPLETED
    result = await runner.run(_asking(toolset.prefixed("p").with_metadata(stroma={"effect": True})), Num())
    assert 'pass tool_error_behavior="error" to its MCPToolset' in result.failure.message


@pytest.mark.parametrize(
    "wrap",
    [
        lambda tools: tools.prefixed("p"),
        lambda tools: tools.filtered(lambda ctx, tool: True),
        lambda tools: tools.approval_required(lambda ctx, tool, arguments: False),
        lambda tools: tools.renamed({"twice": "_double"}),
        lambda tools: PreparedToolset(tools, lambda ctx, tools: tools),
        WrapperToolset,
    ],
)
async def test_tools_of_wrapped_toolsets_are_steps(wrap: Any) -> None:
    """G5: A tool of a wrapped toolset is a step, which has its own name whatever the model calls it."""
    toolset: Any = FunctionToolset(id="inner")
    toolset.add_function(_double, takes_ctx=False)
    store = InMemoryStore()
    result = await StromaRunner.quick(store=store, run_id="r").run(_asking(wrap(toolset)), Num())
    assert result.final_state == Text(text="done"), result.failure
    assert [one.node_id for one in store.attempts("r")] == ["f", "a.model", "a._double", "a.model"]


async def test_a_tool_that_is_not_a_step_may_cancel_the_agent() -> None:
    """ctx.cancel() cancels the agent, on replay as well; in a step it is refused."""

    async def stop(ctx: RunContext[None], c: int) -> str:
        ctx.cancel()
        return "stopped"

    pure: Any = FunctionToolset(id="pure")
    pure.add_function(stop, metadata={"stroma": False})
    runner = StromaRunner.quick(policy_map=NEVER)
    await survive(_asking(pure))
    assert (await runner.run(_asking(pure), Num())).final_state == Text(text="cancelled")
    step: Any = FunctionToolset(id="step")
    step.add_function(stop)
    result = await runner.run(_asking(step), Num())
    assert "cancel` is not supported inside a durable step" in result.failure.message


async def test_agents_run_in_parallel_and_inside_tools_of_others() -> None:
    """Agents in tasks of a body have steps of their own; one that a tool asks is part of its step."""
    world, store = World(), InMemoryStore()
    inner = world.agent()

    @stroma_flow("f", input=Num, output=Text)
    async def f(flow: Flow, state: Num) -> Text:
        results = await asyncio.gather(*(inner.run(f"go {n}") for n in range(3)))
        return Text(text=" ".join(one.output for one in results))

    result = await StromaRunner.quick(store=store, run_id="r").run(f, Num())
    assert result.final_state == Text(text="done done done"), result.failure
    assert len(store.attempts("r")) == 31


async def test_a_streamed_answer_is_one_step() -> None:
    """The text of run_stream comes from its request's step, which reports usage once; so do events."""
    seen: list[str] = []

    async def respond(messages: list[ModelMessage], info: AgentInfo) -> AsyncIterator[str]:
        yield "hello "
        yield "world"

    async def handle(ctx: Any, events: Any) -> None:
        async for event in events:
            seen.append(event.event_kind)

    durable = StromaDurability(event_stream_handler=handle)
    agent = Agent(FunctionModel(stream_function=respond), name="a", capabilities=[durable])

    @stroma_flow("f", input=Num, output=Text)
    async def f(flow: Flow, state: Num) -> Text:
        async with agent.run_stream("go") as streamed:
            parts = [part async for part in streamed.stream_text(delta=True)]
        return Text(text="".join(parts))

    store = InMemoryStore()
    async with StromaRunner.quick(store=store, run_id="r").stream(f, Num()) as stream:
        emitted = [event.data async for event in stream if event.kind == "node_event"]
    result = stream.result
    assert result.final_state == Text(text="hello world"), result.failure
    assert emitted == ["hello ", "world"]
    assert [one.tokens > 0 for one in store.attempts("r") if one.node_id == "a.model"] == [True]
    assert {"part_start", "part_delta"} <= set(seen)


async def test_an_answer_that_is_refused_is_asked_for_again() -> None:
    """Output that its class refuses goes back to the model, on replay as well."""

    def respond(messages: list[ModelMessage], info: AgentInfo) -> ModelResponse:
        (tool,) = info.output_tools
        n: Any = "x" if len(messages) == 1 else 7
        return ModelResponse(parts=[ToolCallPart(tool.name, {"n": n})])

    agent = Agent(FunctionModel(respond), name="a", output_type=Num, capabilities=[StromaDurability()])

    @agent.output_validator
    def check(output: Num) -> Num:
        return Num(n=output.n + 1)

    @stroma_flow("f", input=Num, output=Num)
    async def f(flow: Flow, state: Num) -> Num:
        return (await agent.run("go")).output

    await survive(f)
    assert (await StromaRunner.quick(policy_map=NEVER).run(f, Num())).final_state == Num(n=8)


async def test_toolsets_that_are_made_for_a_run_are_steps_too() -> None:
    """A dynamic toolset is resolved in its own step, as is its tool; a tool with False is no step."""
    calls: list[str] = []

    def respond(messages: list[ModelMessage], info: AgentInfo) -> ModelResponse:
        returned = any(part.part_kind == "tool-return" for message in messages for part in message.parts)
        names = [tool.name for tool in info.function_tools]
        return ModelResponse(
            parts=[TextPart("done")] if returned else [ToolCallPart(name, {}) for name in names]
        )

    def found() -> str:
        calls.append("found")
        return "found"

    def make(ctx: Any) -> FunctionToolset[None]:
        return FunctionToolset([found])

    toolset: Any = DynamicToolset(make, id="dynamic")
    agent = Agent(FunctionModel(respond), name="a", toolsets=[toolset], capabilities=[StromaDurability()])

    @agent.tool_plain(metadata={"stroma": False})
    async def pure() -> str:
        calls.append("pure")
        return "pure"

    store = InMemoryStore()
    result = await StromaRunner.quick(store=store, run_id="r").run(answering(agent), Num())
    assert result.final_state == Text(text="done"), result.failure
    assert sorted(calls) == ["found", "pure"]
    steps = {one.node_id for one in store.attempts("r")}
    assert {"a.dynamic.tools", "a.found", "a.model"} <= steps
    assert "a.pure" not in steps


@pytest.mark.parametrize("kind", ["function", "dynamic"])
async def test_a_toolset_that_is_added_in_a_run_is_refused(kind: str) -> None:
    """Its tools would be called without a record: the agent has to have it."""
    toolset: Any = FunctionToolset(id="added")
    if kind == "dynamic":
        toolset = DynamicToolset(lambda _: FunctionToolset(), id="added")
    agent = World().agent()

    @stroma_flow("f", input=Num, output=Num)
    async def f(flow: Flow, state: Num) -> Num:
        await agent.run("go", toolsets=[toolset])
        return state

    result = await StromaRunner.quick().run(f, Num())
    assert "cannot be added at runtime with Stroma" in result.failure.message
    assert (await agent.run("go", toolsets=[toolset])).output == "done"


def test_plain_functions_run_in_a_process_that_was_forked() -> None:
    """An agent whose plain functions have run in threads runs in a fork, which has none of these threads."""
    toolset: Any = FunctionToolset([_plain], id="plain")
    flow = _asking(toolset)

    def run() -> Any:
        return asyncio.run(asyncio.wait_for(StromaRunner.quick().run(flow, Num()), 20)).final_state

    assert run() == Text(text="done")
    child = os.fork()
    if child == 0:
        try:
            os._exit(0 if run() == Text(text="done") else 1)
        finally:
            os._exit(2)
    assert os.waitpid(child, 0)[1] == 0


async def test_a_failed_request_is_retried_as_a_step_is() -> None:
    """A rate limit is retried by the step's policy; a refused request stops the flow with its failure."""
    errors: list[Exception] = [ModelHTTPError(429, "gpt-4o"), ModelHTTPError(401, "gpt-4o")]

    def respond(messages: list[ModelMessage], info: AgentInfo) -> ModelResponse:
        raise errors.pop(0)

    agent = Agent(FunctionModel(respond), name="a", capabilities=[StromaDurability()])

    at_once = {"RECOVERABLE": FailurePolicy(max_retries=2, backoff_seconds=0)}
    result = await StromaRunner.quick(policy_map=at_once).run(answering(agent), Num())
    assert result.status is RunStatus.FAILED
    assert (result.failure.node_id, result.failure.reason) == ("a.model", "auth")
    assert errors == []
