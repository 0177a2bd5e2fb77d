"""Spans of guarded steps among those of the framework that calls them: one trace, one tree."""

import asyncio
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from tests.kit import ONCE

from stroma import NodeHooks, StromaRunner, current_node
from stroma.adapters import Guard
from stroma.telemetry import otel_hooks


class Spans:
    """A guard and a framework with one provider; what they send."""

    def __init__(self) -> None:
        self.exporter, provider = InMemorySpanExporter(), TracerProvider()
        provider.add_span_processor(SimpleSpanProcessor(self.exporter))
        self.framework = provider.get_tracer("framework")
        #: The current spans in the hooks of the run.
        self.seen: list[str | None] = []

        async def see(*_: Any) -> None:
            self.seen.append(getattr(trace.get_current_span(), "name", None))

        hooks = otel_hooks(tracer=provider) | NodeHooks(on_run_start=see, on_run_end=see)
        self.guard = Guard(StromaRunner.quick(hooks=hooks, policy_map=ONCE))

    @property
    def parents(self) -> dict[str, str | None]:
        """Return the name of the span around each, if it is of the same trace."""
        spans = self.exporter.get_finished_spans()
        assert len({span.context.trace_id for span in spans}) == 1, "more than one trace"
        names = {span.context.span_id: span.name for span in spans}
        return {span.name: None if span.parent is None else names[span.parent.span_id] for span in spans}


TREE = {
    "invoke_workflow pipeline": None,
    "framework.run": "invoke_workflow pipeline",
    "stroma.node agent": "framework.run",
    "framework.chat": "stroma.node agent",
    "stroma.node model": "framework.chat",
}


@pytest.mark.parametrize("kind", ["with", "async with", "over", "aover"])
def test_a_run_and_its_steps_stand_in_the_framework_s_own_trace(kind: str) -> None:
    """One trace, one tree: ``guard.run()`` makes its span current, and a step opens under the current one.

    The span of the run is current in its start hooks and in its end hooks.
    """
    spans = Spans()
    guard, span = spans.guard, spans.framework.start_as_current_span
    model: Any = guard.wrap("model", lambda: "answer")

    @guard.step("agent")
    def agent() -> str:
        with span("framework.chat"):
            return str(model())

    def parts() -> Iterator[str]:
        with span("framework.run"):
            answer = agent()
        yield answer
        yield "end"

    async def aparts() -> Any:
        for part in parts():
            yield part

    async def main() -> None:
        if kind == "async with":
            async with guard.run():
                list(parts())
        else:
            async for _ in guard.aover(aparts):
                assert not trace.get_current_span().get_span_context().is_valid, "it is the caller's code"

    if kind == "with":
        with guard.run():
            list(parts())
    elif kind == "over":
        for _ in guard.over(parts):
            assert not trace.get_current_span().get_span_context().is_valid, "it is the caller's code"
    else:
        asyncio.run(main())
    assert spans.parents == TREE
    assert spans.seen == ["invoke_workflow pipeline"] * 2
    assert not trace.get_current_span().get_span_context().is_valid, "the run has ended"


async def test_async_steps_stand_in_the_same_tree() -> None:
    """The span of an async step is current in its function, as that of a sync one is."""
    spans = Spans()
    guard, span = spans.guard, spans.framework.start_as_current_span

    @guard.step("model")
    async def model() -> str:
        return "answer"

    @guard.step("agent")
    async def agent() -> str:
        with span("framework.chat"):
            return await model()

    async with guard.run():
        with span("framework.run"):
            await agent()
    assert spans.parents == TREE


def test_a_step_in_a_thread_without_context_stands_under_its_run() -> None:
    """Frameworks begin threads of their own: no step there begins a trace."""
    spans = Spans()
    model = spans.guard.wrap("model", lambda: "answer")

    def work() -> None:
        with spans.framework.start_as_current_span("of another trace"):
            model()

    with spans.guard.run():
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    finished = {span.name: span for span in spans.exporter.get_finished_spans()}
    parent = finished["stroma.node model"].parent
    assert parent.span_id == finished["invoke_workflow pipeline"].context.span_id


@pytest.mark.parametrize(
    "attributes", [{"gen_ai.operation.name": "chat"}, {"openinference.span.kind": "LLM"}]
)
def test_tokens_are_in_one_span_for_each_call(attributes: dict[str, str]) -> None:
    """Where the framework has a span around a model call, ours counts tokens of failed attempts only."""
    spans, errors = Spans(), [TimeoutError("slow")]

    def model() -> str:
        current_node().report_usage(input_tokens=3, output_tokens=1)
        if errors:
            raise errors.pop()
        return "answer"

    step = spans.guard.wrap("model", model)
    with spans.guard.run(), spans.framework.start_as_current_span("framework.chat", attributes=attributes):
        step()
    with spans.guard.run(), spans.framework.start_as_current_span("framework.other"):
        step()
    counted = [
        (span.name, span.attributes["stroma.node.attempt"])
        for span in spans.exporter.get_finished_spans()
        if span.attributes is not None and "gen_ai.usage.input_tokens" in span.attributes
    ]
    assert counted == [("chat", 1), ("chat", 1)], (
        "of the failed attempt, and of the call without a span around it"
    )
