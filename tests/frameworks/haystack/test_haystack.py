"""Haystack: real pipelines with and without the guard, sync and async, with a fake generator and no network."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, ClassVar

import pytest
from haystack import Pipeline, component
from haystack.components.routers import ConditionalRouter
from haystack.core.errors import BreakpointException, PipelineRuntimeError
from haystack.dataclasses import ChatMessage, StreamingChunk
from haystack.dataclasses.breakpoints import Breakpoint
from tests.frameworks.contract import ANSWER, FrameworkContract, weather
from tests.frameworks.kit import guard_of, holds, lines_of

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
        self.answers, self.tokens, self.choices = list(answers), tokens, choices
        self.asked: list[Any] = []
        self.break_after: int | None = None

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
        meta = {
            "model": "gpt-4o",
            "usage": {"prompt_tokens": self.tokens - 1, "completion_tokens": 1, "total_tokens": self.tokens},
        }
        return {"replies": [ChatMessage.from_assistant(answer, meta=meta)] * self.choices}

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


def test_a_pipeline_inside_a_component_is_part_of_the_run() -> None:
    """Its components are steps inside the component's step."""
    guard = guard_of()
    inner = pipeline_of(Script("deep"))

    @component
    class Around:
        def __init__(self) -> None:
            self.pipeline = inner

        @component.output_types(answer=str)
        def run(self, text: str) -> Any:
            return {"answer": self.pipeline.run({"ask": {"text": text}})["llm"]["replies"][0].text}

    outer = Pipeline()
    outer.add_component("around", Around())
    assert attach(outer, guard).run({"around": {"text": "x"}})["around"]["answer"] == "deep"
    assert lines_of(guard) == ["around success", "  ask success", "  llm success 10"]


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
