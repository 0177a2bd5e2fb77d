"""Spans of real instrumentations of frameworks: each belongs to the run, node, conversation and user that it is part of.

./dev test --framework instrumented
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import agents
import httpx
import pytest
from openai import AsyncOpenAI
from openinference.instrumentation.langchain import LangChainInstrumentor
from openinference.instrumentation.openai_agents import OpenAIAgentsInstrumentor
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from pydantic_ai import Agent
from pydantic_ai.models.instrumented import InstrumentationSettings
from tests.frameworks.contract import ANSWER, CALL
from tests.frameworks.kit import guard_of, result_of
from tests.frameworks.langchain import test_langchain
from tests.frameworks.langgraph import test_langgraph
from tests.frameworks.openai_agents import test_openai_agents
from tests.frameworks.pydantic_ai import test_pydantic_ai

from stroma.adapters import Guard
from stroma.telemetry import otel_hooks

pytestmark = [pytest.mark.nightly, pytest.mark.timeout(300)]


WAYS = ["run", "run_sync"]


class OpenAIAgents(test_openai_agents.TestOpenAIAgents):
    """With the SDK's own model, which makes the spans of calls, and answers in place of a provider."""

    __test__ = False
    KINDS = WAYS

    def script(self, *answers: Any, break_after: int | None = None) -> Any:
        left = list(answers)

        def complete(_: httpx.Request) -> httpx.Response:
            answer = left.pop(0)
            message: dict[str, Any] = {"role": "assistant"}
            if isinstance(answer, str):
                message["content"] = answer
            else:
                function = {"name": answer[0], "arguments": json.dumps(answer[1])}
                message["tool_calls"] = [{"id": "call", "type": "function", "function": function}]
            return httpx.Response(
                200,
                json={
                    "id": "1",
                    "object": "chat.completion",
                    "created": 0,
                    "model": "gpt-4o",
                    "choices": [{"index": 0, "finish_reason": "stop", "message": message}],
                    "usage": {"prompt_tokens": 9, "completion_tokens": 1, "total_tokens": 10},
                },
            )

        transport = httpx.AsyncClient(transport=httpx.MockTransport(complete))
        client: Any = AsyncOpenAI(api_key="none", http_client=transport)  # type: ignore[arg-type, unused-ignore]
        return agents.OpenAIChatCompletionsModel("gpt-4o", client)


PROGRAMS: dict[str, Any] = {
    "langchain": test_langchain.TestLangChain(),
    "langgraph": test_langgraph.TestLangGraph(),
    "openai_agents": OpenAIAgents(),
    "pydantic_ai": test_pydantic_ai.TestPydanticAI(),
}
EVERY_WAY = [(name, kind) for name, program in PROGRAMS.items() for kind in program.KINDS]


class Instrumented:
    """A provider that the frameworks' instrumentations and the hooks send to."""

    def __init__(self) -> None:
        self.exporter = InMemorySpanExporter()
        self.provider = TracerProvider()
        self.provider.add_span_processor(SimpleSpanProcessor(self.exporter))

    def guard(self, conversation: str) -> Guard:
        hooks = otel_hooks(tracer=self.provider)
        return guard_of(hooks=hooks, conversation=conversation, user=f"user of {conversation}")

    @property
    def spans(self) -> list[ReadableSpan]:
        return list(self.exporter.get_finished_spans())

    @property
    def of_others(self) -> list[ReadableSpan]:
        """The spans of instrumentations inside of runs; Pydantic AI's own of an agent is around the run."""
        return [
            span
            for span in self.spans
            if span.instrumentation_scope and span.instrumentation_scope.name != "stroma" and span.parent
        ]


@pytest.fixture(scope="module")
def instrumented() -> Iterator[Instrumented]:
    found = Instrumented()
    agents.set_tracing_disabled(False)
    LangChainInstrumentor().instrument(tracer_provider=found.provider)
    OpenAIAgentsInstrumentor().instrument(tracer_provider=found.provider)
    Agent.instrument_all(InstrumentationSettings(tracer_provider=found.provider))
    yield found
    Agent.instrument_all(False)
    OpenAIAgentsInstrumentor().uninstrument()
    LangChainInstrumentor().uninstrument()
    agents.set_tracing_disabled(True)


def attributes(span: ReadableSpan) -> dict[str, Any]:
    return dict(span.attributes or {})


def is_call(span: ReadableSpan) -> bool:
    """Return True for the span of a call of a model."""
    about = attributes(span)
    return about.get("openinference.span.kind") == "LLM" or about.get("gen_ai.operation.name") == "chat"


def tokens_on(span: ReadableSpan) -> int:
    about = attributes(span)
    names = ("llm.token_count.prompt", "llm.token_count.completion")
    if not any(name in about for name in names):
        names = ("gen_ai.usage.input_tokens", "gen_ai.usage.output_tokens")
    return sum(about.get(name, 0) for name in names)


def answer(name: str, kind: str, guard: Guard) -> Any:
    """Have a scripted model answer, after a call of its tool where the framework's program is an agent."""
    program = PROGRAMS[name]
    script = program.script(*([ANSWER] if name == "langgraph" else [CALL, ANSWER]))
    return program.call(program.program(script, guard), kind, guard)


@pytest.mark.parametrize(("name", "kind"), EVERY_WAY)
def test_every_span_of_an_instrumentation_is_attributed(
    name: str, kind: str, instrumented: Instrumented
) -> None:
    """All spans that an instrumentation makes in a run say its pipeline, run, conversation and user; calls of models and
    tools say their node, also where two runs of the same program take place at once."""
    instrumented.exporter.clear()
    guards = {conversation: instrumented.guard(conversation) for conversation in ("first", "second")}
    with ThreadPoolExecutor(2) as threads:
        found = list(threads.map(lambda guard: answer(name, kind, guard), guards.values()))
    assert found == [ANSWER, ANSWER]
    run_ids = {conversation: result_of(guard).run_id for conversation, guard in guards.items()}
    calls = [span for span in instrumented.of_others if is_call(span)]
    assert len(calls) == (2 if name == "langgraph" else 4)
    for span in instrumented.of_others:
        about = attributes(span)
        conversation = about.get("gen_ai.conversation.id")
        assert conversation in guards, (span.name, about)
        assert about["stroma.run.id"] == run_ids[conversation], span.name
        assert about["user.id"] == f"user of {conversation}", span.name
        assert "stroma.pipeline" in about
    # The span of a call is around the step with Pydantic AI, and inside of it with the others.
    node_id = {"langgraph": "tell", "pydantic_ai": "forecaster"}.get(name, "model")
    assert {attributes(span).get("stroma.node.id") for span in calls} == {node_id}


@pytest.mark.parametrize(("name", "kind"), EVERY_WAY)
def test_each_token_is_on_one_span(name: str, kind: str, instrumented: Instrumented) -> None:
    """The spans of model calls have the tokens of the run in sum: those of the instrumentation where it reports any, else ours."""
    instrumented.exporter.clear()
    guard = instrumented.guard("bill")
    assert answer(name, kind, guard) == ANSWER
    total = result_of(guard).total_tokens
    assert sum(tokens_on(span) for span in instrumented.spans if is_call(span)) == total > 0
