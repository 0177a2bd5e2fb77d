"""Haystack: real pipelines with and without the guard, sync and async, with a fake generator and no network."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from haystack import Pipeline, component
from haystack.components.routers import ConditionalRouter
from haystack.core.errors import BreakpointException, PipelineRuntimeError
from haystack.dataclasses import ChatMessage, StreamingChunk
from haystack.dataclasses.breakpoints import Breakpoint
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
from stroma.adapters.haystack import attach

try:
    from haystack import AsyncPipeline  # Before 3.0.
except ImportError:
    AsyncPipeline = Pipeline

KINDS = ["run", "run_async"]


class Text(BaseModel):
    text: str


class Messages(BaseModel):
    messages: list[Any]


class Replies(BaseModel):
    replies: list[Any]


class Narrow(BaseModel):
    text: int


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


def lines_of(guard: Guard) -> list[str]:
    assert guard.last is not None
    assert guard.last.result is not None
    return tree(guard.last.result)


@holds("same answer", "sync and async")
@pytest.mark.parametrize("kind", KINDS)
def test_a_pipeline_gives_the_same_answer_with_and_without_the_guard(kind: str) -> None:
    """And tokens count once, though the async method calls the sync one."""
    guard = guard_of()
    plain = pipeline_of(Script("hi"), kind)
    guarded = attach(
        pipeline_of(Script("hi"), kind), guard, {"ask": (Text, Messages), "llm": (Messages, Replies)}
    )
    expected, got = run(plain, kind), run(guarded, kind)
    assert got["llm"]["replies"][0].text == expected["llm"]["replies"][0].text == "hi"
    assert lines_of(guard) == ["ask success", "llm success 10"]
    assert guard.last is not None
    assert guard.last.result is not None
    assert guard.last.result.status is RunStatus.COMPLETED
    assert guard.last.result.total_cost_usd > 0


def test_choices_of_one_answer_are_paid_for_once() -> None:
    guard = guard_of()
    run(attach(pipeline_of(Script("hi", choices=3)), guard), "run")
    assert lines_of(guard) == ["ask success", "llm success 10"]


@holds("violations")
@pytest.mark.parametrize("kind", KINDS)
def test_violations_are_caught_at_their_component(kind: str) -> None:
    """G1; the framework wraps what a component raises, and what stopped it is found behind that."""
    for name, contract, direction in (
        ("ask", (Narrow, Messages), "input"),
        ("llm", (Messages, Text), "output"),
    ):
        guard = guard_of()
        script = Script("hi")
        with pytest.raises(PipelineRuntimeError) as caught:
            run(attach(pipeline_of(script, kind), guard, {name: contract}), kind)
        found = what_stopped(caught.value)
        assert isinstance(found, ContractViolation)
        assert (found.node_id, found.direction) == (name, direction)
        assert guard.stopped is not None
        assert guard.stopped.exception is found
        assert len(script.asked) == (1 if name == "llm" else 0)


@holds("retries")
@pytest.mark.parametrize("kind", KINDS)
def test_transient_failures_are_retried_on_unchanged_inputs_and_terminal_ones_are_not(kind: str) -> None:
    script = Script(TimeoutError("slow"), ConnectionError("gone"), "hi")
    assert run(attach(pipeline_of(script, kind), guard_of()), kind)["llm"]["replies"][0].text == "hi"
    assert script.asked == [["hello"]] * 3
    script = Script(PermissionError("no"), "never")
    guard = guard_of(classifiers=[lambda e, c: FailureClass.TERMINAL])
    with pytest.raises(PipelineRuntimeError):
        run(attach(pipeline_of(script, kind), guard), kind)
    assert len(script.asked) == 1
    assert guard.last is not None
    assert guard.last.result is not None
    assert guard.last.result.status is RunStatus.FAILED


@holds("budget")
@pytest.mark.parametrize("kind", KINDS)
def test_the_budget_stops_the_pipeline_to_the_token(kind: str) -> None:
    """The component that crosses the limit is the last that is called."""
    last = Script("never")
    guard = guard_of(budget=ExecutionBudget(max_tokens_total=15))
    with pytest.raises(PipelineRuntimeError) as caught:
        run(attach(pipeline_of(Script("a"), kind, Script("b"), last), guard), kind)
    assert isinstance(what_stopped(caught.value), BudgetExceeded)
    assert last.asked == []
    assert guard.last is not None
    assert guard.last.result is not None
    assert (guard.last.result.total_tokens, guard.last.result.status) == (20, RunStatus.PARTIAL)
    assert isinstance(guard.stopped and guard.stopped.exception, BudgetExceeded)


@holds("hooks")
@pytest.mark.parametrize("kind", KINDS)
def test_hooks_fire_in_order(kind: str) -> None:
    seen = Seen()
    run(attach(pipeline_of(Script(TimeoutError(), "hi"), kind), guard_of(seen)), kind)
    assert seen.lines == [
        "run start",
        "start ask",
        "success ask",
        "start llm",
        "failure llm",
        "retry llm",
        "start llm",
        "success llm",
        "run end COMPLETED",
    ]


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


@holds("streams")
def test_a_stream_is_not_retried_after_its_first_chunk() -> None:
    """Rule 9."""
    script, seen = Script("one two three", "again"), []
    script.break_after = 2
    pipeline = attach(pipeline_of(script), guard_of())
    callback = lambda chunk: seen.append(chunk.content)  # noqa: E731
    with pytest.raises(PipelineRuntimeError, match="lost"):
        run(pipeline, "run", {"ask": {"text": "x"}, "llm": {"streaming_callback": callback}})
    assert (seen, len(script.asked)) == (["one", "two"], 1)


def test_parts_of_an_async_pipeline_are_one_run() -> None:
    guard = guard_of()
    pipeline = attach(pipeline_of(Script("hi"), "run_async"), guard)

    async def main() -> list[Any]:
        return [part async for part in pipeline.run_async_generator({"ask": {"text": "x"}})]

    assert len(asyncio.run(main())) >= 2
    assert lines_of(guard) == ["ask success", "llm success 10"]


@holds("unknown")
def test_a_contract_for_an_unknown_component_is_an_error() -> None:
    with pytest.raises(UnknownNode, match=r"no component 'lmm' .* 'ask', 'llm'"):
        attach(pipeline_of(Script()), guard_of(), {"lmm": (Messages, Replies)})


@holds("journal")
def test_a_run_of_a_pipeline_is_a_run_in_the_journal(tmp_path: Any) -> None:
    with SQLiteStore(tmp_path / "runs.db") as store:
        run(attach(pipeline_of(Script("hi")), guard_of(store=store)), "run")
        (record,) = store.list_runs()
        assert (record.status, record.tokens) == ("COMPLETED", 10)
        assert [a.node_id for a in store.attempts(record.run_id)] == ["ask", "llm"]


@component
class Flaky:
    """Uses some tokens each time, and fails twice."""

    def __init__(self) -> None:
        self.calls = 0

    @component.output_types(text=str)
    def run(self, text: str) -> Any:
        pay()
        self.calls += 1
        if self.calls < 3:
            raise TimeoutError("slow")
        return {"text": text}


@holds("failed attempts")
@pytest.mark.parametrize("kind", KINDS)
def test_what_failed_attempts_used_counts(kind: str) -> None:
    guard = guard_of()
    pipeline = Pipeline() if kind == "run" else AsyncPipeline()
    pipeline.add_component("flaky", Flaky())
    assert run(attach(pipeline, guard), kind, {"flaky": {"text": "x"}}) == {"flaky": {"text": "x"}}
    assert result_of(guard).total_tokens == 3 * PAID
    assert lines_of(guard) == [f"flaky failure {PAID}"] * 2 + [f"flaky success {PAID}"]


@holds("control flow")
@pytest.mark.parametrize("kind", KINDS)
def test_routers_route_as_ever(kind: str) -> None:
    """Which way a pipeline goes is what its router says, and a branch that is not taken is no step."""
    told = []
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
        made = [run(pipeline, kind, {"router": {"text": text}}) for text in ("a long one", "no")]
        told.append([made[0]["ask"]["messages"][0].text, made[1]])
        if guard is not None:
            assert lines_of(guard) == ["router success"]
    assert told[0] == told[1] == ["a long one", {"router": {"short": "no"}}]


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
