"""Our spans by OpenInference's own published conventions: every kind is one of theirs, every name is theirs.

./dev test --framework instrumented
"""

import asyncio
from collections import Counter
from typing import Any

import pytest
from openinference.semconv.trace import (
    OpenInferenceMimeTypeValues,
    OpenInferenceSpanKindValues,
    SpanAttributes,
)
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from pydantic import BaseModel
from tests.kit import Item, retry_policies, words

from stroma import StromaRunner, Usage, map_over, parallel
from stroma.adapters import Guard
from stroma.telemetry import otel_hooks

pytestmark = pytest.mark.nightly

NAMES = {value for name, value in vars(SpanAttributes).items() if name.isupper()}
PREFIXES = tuple(words("llm. input. output. session. user. openinference. tool. agent. metadata tag."))


class State(BaseModel):
    n: int = 0
    items: list[int] = [1, 2]


async def produce(provider: TracerProvider) -> None:
    """A run with a group, a map, a retry and calls of models, and a guarded agent with a tool."""
    hooks = otel_hooks(tracer=provider, content="redacted", inference="always")
    runner = StromaRunner.quick(hooks=hooks, policy_map=retry_policies(1))

    @runner.node("paid", input=State, output=State)
    async def paid(state: State) -> Any:
        return state, Usage(100, 10, 40, 5, model="gpt-4o")

    @runner.node("free", input=State, output=State)
    async def free(state: State) -> State:
        return state

    @runner.node("item", input=Item, output=Item)
    async def item(state: Item) -> Item:
        return state

    nodes = [paid, parallel(paid, free), map_over("items", item, into="items")]
    await runner.run(nodes, State(), conversation="thread-17", user="ada")
    guard = Guard(runner)

    @guard.step("search", role="tool")
    async def search() -> str:
        return "found"

    @guard.step("agent", role="agent")
    async def agent() -> str:
        return await search()

    async with guard.run():
        await agent()


@pytest.fixture(scope="module")
def spans() -> list[dict[str, Any]]:
    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    asyncio.run(produce(provider))
    return [dict(span.attributes or {}) for span in exporter.get_finished_spans()]


def test_every_span_has_a_kind_of_theirs(spans: list[dict[str, Any]]) -> None:
    """Runs, groups, maps and nodes are chains, model calls LLM, agents and tools of a guard their own."""
    kinds = Counter(OpenInferenceSpanKindValues(about["openinference.span.kind"]) for about in spans)
    kind = OpenInferenceSpanKindValues
    assert kinds.keys() == {kind.CHAIN, kind.LLM, kind.AGENT, kind.TOOL}
    assert (kinds[kind.LLM], kinds[kind.AGENT], kinds[kind.TOOL]) == (2, 1, 1)


def test_every_name_is_one_of_theirs(spans: list[dict[str, Any]]) -> None:
    """What is called by one of their names is in their list of attributes, and mime types are in theirs."""
    used = {name for about in spans for name in about if name.startswith(PREFIXES)}
    expected = {"llm.cost.total", "llm.token_count.prompt_details.cache_read", "input.value", "session.id"}
    assert expected <= used
    assert used <= NAMES
    for about in spans:
        for name in ("input.mime_type", "output.mime_type"):
            if name in about:
                OpenInferenceMimeTypeValues(about[name])
