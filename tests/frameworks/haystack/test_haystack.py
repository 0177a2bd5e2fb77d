"""Haystack: real pipelines with and without the guard, sync and async, with a fake generator."""

import asyncio
import copy
from collections.abc import Callable
from typing import Any, ClassVar

import pytest
from haystack import Pipeline, SuperComponent, component
from haystack.components.agents import Agent
from haystack.components.generators.chat import OpenAIChatGenerator
from haystack.components.generators.utils import print_streaming_chunk
from haystack.components.routers import ConditionalRouter
from haystack.core.errors import BreakpointException, PipelineRuntimeError
from haystack.dataclasses import ChatMessage, StreamingChunk, ToolCall
from haystack.dataclasses.breakpoints import Breakpoint
from haystack.dataclasses.streaming_chunk import StreamingCallbackT
from haystack.tools import ComponentTool, Toolset
from haystack.utils import Secret
from tests.frameworks.contract import ANSWER, FrameworkContract, weather
from tests.frameworks.kit import Seen, fifty_at_once, guard_of, holds, lines_of, result_of, spent, tree

from stroma.adapters import Guard
from stroma.adapters.haystack import attach

try:
    from haystack import AsyncPipeline  # Before 3.0.
except ImportError:
    AsyncPipeline = Pipeline

KINDS = ["run", "run_async"]


@component
class Ask:
    """Makes a prompt of a text."""

    @component.output_types(messages=list[ChatMessage])
    def run(self, text: str) -> Any:
        return {"messages": [ChatMessage.from_user(text)]}


@component
class Script:
    """Answers what it is told to; what is an exception, it raises. Its async method is its sync one."""

    def __init__(self, *answers: Any, tokens: int = 10, choices: int = 1) -> None:
        self.answers, self.choices = list(answers), choices
        self.asked: list[Any] = []
        self.break_after: int | None = None
        self.meta: Any = {
            "model": "gpt-4o",
            "usage": {"prompt_tokens": tokens - 1, "completion_tokens": 1, "total_tokens": tokens},
        }

    @component.output_types(replies=list[ChatMessage])
    def run(self, messages: list[ChatMessage], streaming_callback: Any = None) -> Any:
        self.asked.append([message.text for message in messages])
        messages.clear()  # It does not own them.
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        for n, word in enumerate(answer.split() if streaming_callback else ()):
            if n == self.break_after:
                raise TimeoutError("lost")
            streaming_callback(StreamingChunk(word))
        return {"replies": [ChatMessage.from_assistant(answer, meta=self.meta)] * self.choices}

    @component.output_types(replies=list[ChatMessage])
    async def run_async(self, messages: list[ChatMessage], streaming_callback: Any = None) -> Any:
        return self.run(messages, streaming_callback)


def pipeline_of(script: Script, kind: str = "run", *more: Script) -> Any:
    pipeline = Pipeline() if kind == "run" else AsyncPipeline()
    pipeline.add_component("ask", Ask())
    pipeline.add_component("llm", script)
    pipeline.connect("ask.messages", "llm.messages")
    for n, other in enumerate(more):
        pipeline.add_component(f"llm{n}", other)
        pipeline.connect(f"{'llm' if n == 0 else f'llm{n - 1}'}.replies", f"llm{n}.messages")
    return pipeline


def run(pipeline: Any, kind: str, data: Any = None) -> Any:
    data = {"ask": {"text": "hello"}} if data is None else data
    return pipeline.run(data) if kind == "run" else asyncio.run(pipeline.run_async(data))


@component
class Station:
    """Calls a function."""

    def __init__(self, tool: Any) -> None:
        self.tool = tool

    @component.output_types(celsius=int)
    def run(self, city: str) -> Any:
        return self.tool(city)


@component
class Tell:
    """Makes a prompt of a number."""

    @component.output_types(messages=list[ChatMessage])
    def run(self, celsius: int) -> Any:
        return {"messages": [ChatMessage.from_user(str(celsius))]}


@holds("sync and async")
class TestHaystack(FrameworkContract):
    KINDS = KINDS
    GOOD = (ANSWER,)
    STEPS = ("weather success", "tell success", "llm success 10")
    TOKENS = 10
    MODEL = "llm"
    UNKNOWN = r"unknown component 'wether'; .* 'llm', 'tell', 'weather'"
    WRAPPERS = (PipelineRuntimeError,)
    DATA: ClassVar[dict[str, Any]] = {"weather": {"city": "Oslo"}}

    def script(self, *answers: Any, break_after: int | None = None) -> Script:
        instance = Script(*answers)
        instance.break_after = break_after
        return instance

    def program(self, script: Script, guard: Any = None, contracts: Any = None, tool: Any = weather) -> Any:
        """Return how a pipeline is made for one way of calling it."""

        def make(kind: str) -> Any:
            pipeline = Pipeline() if kind == "run" else AsyncPipeline()
            for name, part in (("weather", Station(tool)), ("tell", Tell()), ("llm", script)):
                pipeline.add_component(name, part)
            pipeline.connect("weather.celsius", "tell.celsius")
            pipeline.connect("tell.messages", "llm.messages")
            return pipeline if guard is None else attach(pipeline, guard, contracts)

        return make

    def call(self, program: Any, kind: str, guard: Any = None) -> Any:
        pipeline = program(kind)
        data = self.DATA if "weather" in pipeline.graph else None
        return run(pipeline, kind, data)["llm"]["replies"][0].text

    def nested(self, guard: Guard, die: Callable[[], None]) -> str:
        """A component with a pipeline of its own inside, killed when that has ended."""
        inner = pipeline_of(Script("deep"))

        @component
        class Around:
            def __init__(self) -> None:
                self.pipeline = inner

            @component.output_types(answer=str)
            def run(self, text: str) -> Any:
                result = self.pipeline.run({"ask": {"text": text}})
                die()
                return {"answer": result["llm"]["replies"][0].text}

        outer = Pipeline()
        outer.add_component("around", Around())
        return str(attach(outer, guard).run({"around": {"text": "x"}})["around"]["answer"])

    def endless(self, guard: Any) -> tuple[Any, Script]:
        script, more = self.script(*["more"] * 5), [self.script() for _ in range(4)]
        for each in more:
            each.answers, each.asked = script.answers, script.asked

        def make(kind: str) -> Any:
            return attach(pipeline_of(script, kind, *more), guard)

        return make, script

    def stream(self, script: Script, guard: Guard, seen: list[str]) -> None:
        callback = {"streaming_callback": lambda chunk: seen.append(chunk.content)}
        run(self.program(script, guard)("run"), "run", {**self.DATA, "llm": callback})


@pytest.mark.parametrize("kind", KINDS)
def test_a_retry_has_unchanged_inputs(kind: str) -> None:
    script = Script(TimeoutError("slow"), ConnectionError("gone"), "hi")
    assert run(attach(pipeline_of(script, kind), guard_of()), kind)["llm"]["replies"][0].text == "hi"
    assert script.asked == [["hello"]] * 3


def test_choices_of_one_answer_are_paid_for_once() -> None:
    guard = guard_of()
    run(attach(pipeline_of(Script("hi", choices=3)), guard), "run")
    assert lines_of(guard) == ["ask success", "llm success 10"]


@pytest.mark.parametrize(
    ("cached", "cost"),
    [
        ({"cache_read_input_tokens": 1_000_000}, 0.10),
        ({"cache_creation_input_tokens": 1_000_000}, 1.25),
        (
            {
                "cache_creation_input_tokens": 1_000_000,
                "cache_creation": {"ephemeral_1h_input_tokens": 1_000_000},
            },
            2.00,
        ),
    ],
)
def test_cached_tokens_have_their_price(cached: Any, cost: float) -> None:
    """Haystack puts the usage of Anthropic in the format of OpenAI beside its own names for the cache."""
    script, guard = Script("hi"), guard_of()
    script.meta = {"model": "claude-haiku-4-5", "usage": {"prompt_tokens": 1_000_000, **cached}}
    run(attach(pipeline_of(script), guard), "run")
    assert result_of(guard).total_cost_usd == pytest.approx(cost)


def test_parts_of_an_async_pipeline_are_one_run() -> None:
    guard = guard_of()
    pipeline = attach(pipeline_of(Script("hi"), "run_async"), guard)

    async def main() -> list[Any]:
        return [part async for part in pipeline.run_async_generator({"ask": {"text": "x"}})]

    assert len(asyncio.run(main())) >= 2
    assert lines_of(guard) == ["ask success", "llm success 10"]


@holds("control flow")
@pytest.mark.parametrize("kind", KINDS)
def test_routers_route_as_ever(kind: str) -> None:
    """Which way a pipeline goes is what its router says, and a branch that is not taken is no step."""
    events = []
    for guard in (None, guard_of()):
        routes = [
            {
                "condition": "{{ text|length > 3 }}",
                "output": "{{ text }}",
                "output_name": "long",
                "output_type": str,
            },
            {
                "condition": "{{ text|length <= 3 }}",
                "output": "{{ text }}",
                "output_name": "short",
                "output_type": str,
            },
        ]
        pipeline = Pipeline() if kind == "run" else AsyncPipeline()
        pipeline.add_component("router", ConditionalRouter(routes))
        pipeline.add_component("ask", Ask())
        pipeline.connect("router.long", "ask.text")
        if guard is not None:
            attach(pipeline, guard)
        outputs = [run(pipeline, kind, {"router": {"text": text}}) for text in ("a long one", "no")]
        events.append([outputs[0]["ask"]["messages"][0].text, outputs[1]])
        if guard is not None:
            assert lines_of(guard) == ["router success"]
    assert events[0] == events[1] == ["a long one", {"router": {"short": "no"}}]


@holds("control flow")
def test_a_breakpoint_comes_out_as_it_is() -> None:
    """It stops the pipeline where it was set: what is behind it is not called, and nothing is tried again."""
    script, guard = Script("never"), guard_of()
    with pytest.raises(BreakpointException):
        attach(pipeline_of(script), guard).run(
            {"ask": {"text": "x"}}, break_point=Breakpoint("llm", visit_count=0)
        )
    assert script.asked == []
    assert lines_of(guard) == ["ask success"]


@component
class Provider:
    """Calls each of its tools at once, then answers; writes each request into a ledger of tokens."""

    def __init__(self, ledger: list[int]) -> None:
        self.ledger = ledger

    @component.output_types(replies=list[ChatMessage])
    def run(self, messages: list[ChatMessage], tools: Any = None, streaming_callback: Any = None) -> Any:
        used = {"prompt_tokens": 10 + len(messages), "completion_tokens": len(self.ledger) % 7}
        self.ledger.append(sum(used.values()))
        meta = {"model": "gpt-4o", "usage": used}
        if tools and not messages[-1].tool_call_results:
            calls = [ToolCall(tool.name, {"text": "Oslo"}, id=tool.name) for tool in flatten(tools)]
            return {"replies": [ChatMessage.from_assistant(tool_calls=calls, meta=meta)]}
        return {"replies": [ChatMessage.from_assistant("4 C", meta=meta)]}

    @component.output_types(replies=list[ChatMessage])
    async def run_async(
        self, messages: list[ChatMessage], tools: Any = None, streaming_callback: Any = None
    ) -> Any:
        if streaming_callback is not None:
            await streaming_callback(StreamingChunk("4 C"))
        return self.run(messages, tools)


def flatten(tools: Any) -> list[Any]:
    return [one for tool in tools for one in (flatten(tool) if isinstance(tool, Toolset) else [tool])]


def tool_of(name: str, ledger: list[int]) -> ComponentTool:
    """Return a pipeline with a model of its own as a tool."""
    inner = Pipeline()
    inner.add_component("ask", Ask())
    inner.add_component("llm", Provider(ledger))
    inner.connect("ask.messages", "llm.messages")
    around = SuperComponent(
        inner, input_mapping={"text": ["ask.text"]}, output_mapping={"llm.replies": "replies"}
    )
    return ComponentTool(around, name=name, description="Asks a model.")


def agent_of(ledger: list[int], chunks: list[str], guard: Guard | None = None) -> Any:
    """Return an agent in a pipeline: two tools with models inside, in parallel, and streamed answers."""

    async def chunk(chunk: StreamingChunk) -> None:
        chunks.append(chunk.content)

    tools = [tool_of("north", ledger), Toolset([tool_of("south", ledger)])]
    pipeline = AsyncPipeline()
    pipeline.add_component(
        "agent", Agent(chat_generator=Provider(ledger), tools=tools, streaming_callback=chunk)
    )
    return pipeline if guard is None else attach(pipeline, guard)


ASKED: dict[str, Any] = {"agent": {"messages": [ChatMessage.from_user("How warm is it?")]}}


def test_fifty_agents_at_once_spend_what_the_provider_has_counted() -> None:
    """All spend is counted, to the token: of an agent, and of components as its tools, in parallel."""
    plain, plain_chunks = list[int](), list[str]()
    expected = run(agent_of(plain, plain_chunks), "run_async", ASKED)["agent"]["messages"][-1].text
    ledger, chunks, seen = list[int](), list[str](), Seen()
    pipeline = agent_of(ledger, chunks, guard := guard_of(seen))

    assert {
        answer["agent"]["messages"][-1].text for answer in fifty_at_once(lambda _: pipeline.run_async(ASKED))
    } == {expected}
    assert (len(ledger), len(chunks)) == (50 * len(plain), 50 * len(plain_chunks))
    assert spent(seen, guard) == (50, sum(ledger))
    nodes = {event.node_id for event in seen.results[0].trace.walk()}
    assert nodes >= {"agent", "agent.chat_generator", "north", "south", "llm"}


def test_a_tool_of_a_single_run_is_counted() -> None:
    """A component that comes as a tool with the call is guarded as one that was there."""
    ledger, seen = list[int](), Seen()
    pipeline = agent_of(ledger, [], guard := guard_of(seen))
    run(pipeline, "run_async", {"agent": {**ASKED["agent"], "tools": [tool_of("west", ledger)]}})
    assert spent(seen, guard) == (1, sum(ledger))
    assert "west" in {event.node_id for event in seen.results[0].trace.walk()}


def test_a_component_that_is_added_later_is_guarded() -> None:
    """No component is left out in silence: what is added after attach() is a step of the next run."""
    guard = guard_of()
    pipeline = attach(pipeline_of(Script("one")), guard)
    pipeline.add_component("late", Script("two"))
    pipeline.connect("llm.replies", "late.messages")
    run(pipeline, "run")
    assert lines_of(guard) == ["ask success", "llm success 10", "late success 10"]


@pytest.mark.parametrize("copying", [copy.copy, copy.deepcopy])
def test_a_copy_is_guarded_and_calls_itself(copying: Any) -> None:
    """Copies rebind: a component's copy runs on its own attributes, as a step of the same guard."""
    guard = guard_of()
    pipeline = attach(pipeline_of(Script("one")), guard)
    copied = copying(pipeline.get_component("llm"))
    copied.answers = ["two"]
    with guard.run() as made:
        assert copied.run(messages=[])["replies"][0].text == "two"
    assert tree(made.result) == ["llm success 10"]
    assert run(pipeline, "run")["llm"]["replies"][0].text == "one"


KEY = Secret.from_env_var("NO_KEY")


def test_a_component_is_stored_as_without_the_guard(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a pipeline is written as does not change, a callback of its generator among it."""
    monkeypatch.setenv("NO_KEY", "none")
    plain, guarded = Pipeline(), Pipeline()
    for pipeline in (plain, guarded):
        pipeline.add_component("llm", OpenAIChatGenerator(KEY, streaming_callback=print_streaming_chunk))
    assert attach(guarded, guard_of()).to_dict() == plain.to_dict()


@component
class Streaming:
    """Streams its answer if somebody listens."""

    @component.output_types(replies=list[ChatMessage])
    def run(self, messages: list[ChatMessage], streaming_callback: StreamingCallbackT | None = None) -> Any:
        if streaming_callback is not None:
            streaming_callback(StreamingChunk("hi"))
        return {"replies": [ChatMessage.from_assistant("hi")]}


def test_the_default_of_a_super_component_is_left_to_what_is_inside() -> None:
    """A sentinel default is never wrapped: an optional streaming_callback is the inner component's."""
    for guard in (None, guard_of()):
        inner = Pipeline()
        inner.add_component("llm", Streaming())
        outer = Pipeline()
        outer.add_component("s", SuperComponent(inner))
        if guard is not None:
            attach(outer, guard)
        data = {"s": {"messages": [ChatMessage.from_user("?")]}}
        assert outer.run(data)["s"]["replies"][0].text == "hi"


def test_an_agent_that_is_in_no_pipeline_is_refused() -> None:
    """attach() takes pipelines, and says to put an Agent into one."""
    agent = Agent(chat_generator=OpenAIChatGenerator(api_key=Secret.from_token("x")))
    with pytest.raises(TypeError, match="got Agent; add it to a Pipeline"):
        attach(agent, guard_of())
