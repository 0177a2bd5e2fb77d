"""Spans of durable agents: one of each agent around its steps, and tokens once beside the framework's own
instrumentation.

./dev test --framework instrumented
"""

from typing import Any

import httpx
import pytest
from agents import Agent as OpenAIAgent
from agents import OpenAIChatCompletionsModel, function_tool
from langchain_core.language_models.fake_chat_models import GenericFakeChatModel
from langchain_core.messages import AIMessage
from langgraph.graph import START, MessagesState, StateGraph
from openai import AsyncOpenAI
from openinference.instrumentation.langchain import LangChainInstrumentor
from openinference.instrumentation.openai_agents import OpenAIAgentsInstrumentor
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from pydantic_ai import Agent
from pydantic_ai.messages import ModelMessage, ModelResponse, TextPart, ToolCallPart
from pydantic_ai.models.function import AgentInfo, FunctionModel
from pydantic_ai.models.instrumented import InstrumentationSettings
from pydantic_ai.usage import RequestUsage
from tests.frameworks.instrumented.provider import provider_of
from tests.kit import Num, Text

from stroma import Flow, InMemoryStore, StromaRunner, stroma_flow
from stroma.telemetry import otel_hooks

pytestmark = [pytest.mark.nightly, pytest.mark.timeout(300)]

#: Attributes with the tokens of a span, in both vocabularies.
TOKENS = (
    ("gen_ai.usage.input_tokens", "gen_ai.usage.output_tokens"),
    ("llm.token_count.prompt", "llm.token_count.completion"),
)
AGENT = "invoke_agent lead < invoke_workflow f"
INNER = f"invoke_agent reader < {AGENT}"
#: Spans of an agent whose tool is an agent with a tool.
TREE = {
    AGENT,
    INNER,
    f"stroma.node lead.model < {AGENT}",
    f"stroma.node reader.model < {INNER}",
    f"execute_tool reader.look < {INNER}",
}


async def spans_of(body: Any, provider: TracerProvider, memory: InMemorySpanExporter) -> list[str]:
    """Return the spans that a flow exports as "name < parents", once tokens are in them as often as used."""

    @stroma_flow("f", input=Num, output=Text)
    async def f(flow: Flow, state: Num) -> Text:
        return Text(text=str(await body()))

    runner = StromaRunner.quick(store=InMemoryStore(), hooks=otel_hooks(tracer=provider))
    result = await runner.run(f, Num(), run_id="r")
    assert result.failure is None, result.failure
    spans = {span.context.span_id: span for span in memory.get_finished_spans()}
    assert sum(map(tokens_of, spans.values())) == result.total_tokens > 0

    def path(span: ReadableSpan) -> str:
        return span.name if span.parent is None else f"{span.name} < {path(spans[span.parent.span_id])}"

    return sorted(path(span) for span in spans.values())


def tokens_of(span: ReadableSpan) -> int:
    about: Any = span.attributes
    return max(sum(about.get(key, 0) for key in keys) for keys in TOKENS)


@pytest.fixture
def memory() -> InMemorySpanExporter:
    return InMemorySpanExporter()


@pytest.fixture
def provider(memory: InMemorySpanExporter) -> TracerProvider:
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(memory))
    return provider


@pytest.mark.parametrize("is_instrumented", [False, True])
async def test_pydantic_ai(
    provider: TracerProvider, memory: InMemorySpanExporter, is_instrumented: bool
) -> None:
    """Each run of an agent of Pydantic AI is a span around its requests and tools; a sub-agent is inside."""
    pytest.importorskip("stroma.adapters._pydantic_ai_durability", exc_type=ImportError)
    from stroma.adapters.pydantic_ai import StromaDurability

    def respond(messages: list[ModelMessage], info: AgentInfo) -> ModelResponse:
        part = ToolCallPart(info.function_tools[0].name, {}) if len(messages) == 1 else TextPart("done")
        return ModelResponse(parts=[part], usage=RequestUsage(input_tokens=30, output_tokens=10))

    def agent_of(name: str) -> Agent[None, str]:
        agent = Agent(FunctionModel(respond), name=name, capabilities=[StromaDurability()])
        agent.instrument = InstrumentationSettings(tracer_provider=provider) if is_instrumented else None
        return agent

    lead, reader = agent_of("lead"), agent_of("reader")

    @lead.tool_plain(metadata={"stroma": False})
    async def ask() -> str:
        return (await reader.run("go")).output

    @reader.tool_plain
    async def look() -> str:
        return "seen"

    async def body() -> str:
        return (await lead.run("go")).output

    paths = await spans_of(body, provider, memory)
    assert set(paths) >= TREE
    assert paths.count(INNER) == 1


@pytest.mark.parametrize("is_instrumented", [False, True])
async def test_openai_agents(
    provider: TracerProvider, memory: InMemorySpanExporter, is_instrumented: bool
) -> None:
    """Each run of an agent of the OpenAI Agents SDK is a span around its requests and tools."""
    from stroma.adapters.openai_agents import DurableRunner

    instrumentor = OpenAIAgentsInstrumentor()
    if is_instrumented:
        instrumentor.instrument(tracer_provider=provider)

    @function_tool
    async def look() -> str:
        return "seen"

    def model_of(*answers: Any) -> OpenAIChatCompletionsModel:
        client: Any = httpx.AsyncClient(transport=provider_of(*answers))
        return OpenAIChatCompletionsModel("gpt-4o", AsyncOpenAI(api_key="none", http_client=client))

    reader = OpenAIAgent(name="reader", model=model_of(("look", {}), "read"), tools=[look])
    tools = [reader.as_tool("ask", "Ask.")]
    lead = OpenAIAgent(name="lead", model=model_of(("ask", {"input": "go"}), "done"), tools=tools)

    async def body() -> str:
        return str((await DurableRunner().run(lead, "go")).final_output)

    try:
        paths = await spans_of(body, provider, memory)
    finally:
        if is_instrumented:
            instrumentor.uninstrument()
    assert set(paths) >= TREE


@pytest.mark.parametrize("is_instrumented", [False, True])
async def test_langgraph(
    provider: TracerProvider, memory: InMemorySpanExporter, is_instrumented: bool
) -> None:
    """Each call of a graph that has a name is a span around its nodes."""
    from stroma.adapters.langgraph import durable

    used = {"input_tokens": 30, "output_tokens": 10, "total_tokens": 40}
    answer: Any = AIMessage("hello", usage_metadata=used)
    model = GenericFakeChatModel(messages=iter([answer]))
    instrumentor = LangChainInstrumentor()
    if is_instrumented:
        instrumentor.instrument(tracer_provider=provider)

    async def answer_it(state: MessagesState) -> Any:
        return {"messages": [await model.ainvoke(state["messages"])]}

    builder = StateGraph(MessagesState)
    builder.add_node("answer", answer_it)
    builder.add_edge(START, "answer")
    graph = durable(builder.compile(name="lead"))

    async def body() -> str:
        given: Any = {"messages": ["go"]}
        return str((await graph.ainvoke(given))["messages"][-1].content)

    try:
        paths = await spans_of(body, provider, memory)
    finally:
        if is_instrumented:
            instrumentor.uninstrument()
    assert {AGENT, f"stroma.node lead.answer < {AGENT}"} <= set(paths)
