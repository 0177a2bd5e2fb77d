"""What Langfuse, Datadog's LLM Observability and Sentry make of our spans, field by field.

Their mappings are part of their servers, which cannot be installed here. The tables below state what they
have published, as facts: langfuse/langfuse, packages/shared/src/server/otel, of 22 August 2026; Datadog's
"Attribute mapping reference" of OpenTelemetry and OpenInference, of October 2026; getsentry/sentry-docs,
develop-docs/sdk/telemetry/traces/modules/ai-agents.mdx, and getsentry/sentry-conventions, of August 2026.
Phoenix and MLflow are asked themselves (tests/frameworks).
"""

import json
from collections.abc import Mapping
from typing import Any, Final

import pytest
from tests.kit import Num, passing
from tests.receivers.sentry import RecordedSentry
from tests.telemetry.test_opentelemetry import Seen

from stroma import Pipeline, StromaRunner, current_run, execute_step
from stroma.adapters import Guard
from stroma.telemetry import sentry_hooks

#: The attributes that Langfuse reads for each field, the first that is there.
LANGFUSE: Final[dict[str, tuple[str, ...]]] = {
    "sessionId": ("langfuse.session.id", "session.id", "gen_ai.conversation.id"),
    "userId": ("langfuse.user.id", "user.id"),
    "model": ("gen_ai.response.model", "gen_ai.request.model", "llm.response.model", "llm.model_name"),
    "input": ("input.value", "gen_ai.input.messages", "gen_ai.tool.call.arguments"),
    "output": ("output.value", "gen_ai.output.messages", "gen_ai.tool.call.result"),
    "cost": ("gen_ai.usage.cost", "llm.cost.total"),
    "tags": ("langfuse.trace.tags", "langfuse.tags", "tag.tags"),
}
#: The type of an observation, by the first attribute of a span that has a value which it knows.
LANGFUSE_TYPES: Final = {
    "openinference.span.kind": {
        "CHAIN": "CHAIN",
        "RETRIEVER": "RETRIEVER",
        "LLM": "GENERATION",
        "AGENT": "AGENT",
        "TOOL": "TOOL",
    },
    "gen_ai.operation.name": {
        "chat": "GENERATION",
        "text_completion": "GENERATION",
        "generate_content": "GENERATION",
        "invoke_agent": "AGENT",
        "execute_tool": "TOOL",
    },
}
#: The same of a span without such a value, by the first attribute that is there.
LANGFUSE_HINTS: Final = {
    "gen_ai.tool.name": "TOOL",
    "gen_ai.request.model": "GENERATION",
    "gen_ai.response.model": "GENERATION",
    "llm.model_name": "GENERATION",
}
#: What it calls tokens, by the names below gen_ai.usage and llm.token_count; others are kinds of their own.
LANGFUSE_TOKENS: Final = {
    "input_tokens": "input",
    "prompt": "input",
    "output_tokens": "output",
    "completion": "output",
    "total": "total",
    "cache_read.input_tokens": "input_cached_tokens",
    "prompt_details.cache_read": "input_cached_tokens",
    "prompt_details.cache_write": "input_cache_creation",
}
#: The kind of a span in Datadog's LLM Observability, by the first attribute that is there; else a workflow.
DATADOG_KINDS: Final = {
    "gen_ai.operation.name": {
        "chat": "llm",
        "completion": "llm",
        "text_completion": "llm",
        "generate_content": "llm",
        "embeddings": "embedding",
        "execute_tool": "tool",
        "invoke_agent": "agent",
        "create_agent": "agent",
    },
    "openinference.span.kind": {
        "LLM": "llm",
        "EMBEDDING": "embedding",
        "TOOL": "tool",
        "AGENT": "agent",
        "RETRIEVER": "retrieval",
    },
}
DATADOG: Final[dict[str, tuple[str, ...]]] = {
    "name": ("gen_ai.tool.name",),
    "session_id": ("gen_ai.conversation.id", "session.id"),
    "user_id": ("user.id",),
    "tags": ("tag.tags",),
    "model_name": ("gen_ai.response.model", "gen_ai.request.model", "llm.model_name"),
    "model_provider": ("gen_ai.provider.name", "llm.provider"),
    "input_tokens": ("gen_ai.usage.input_tokens",),
    "output_tokens": ("gen_ai.usage.output_tokens",),
    "cache_read_input_tokens": ("llm.token_count.prompt_details.cache_read",),
    "input": ("gen_ai.input.messages", "gen_ai.tool.call.arguments", "input.value"),
    "output": ("gen_ai.output.messages", "gen_ai.tool.call.result", "output.value"),
}
ANSWER: Final = {
    "model": "gpt-4o-mini",
    "choices": [{"index": 0, "message": {"role": "assistant", "content": "It is 4 C"}}],
    "usage": {
        "prompt_tokens": 100,
        "completion_tokens": 20,
        "total_tokens": 120,
        "prompt_tokens_details": {"cached_tokens": 40},
    },
}
COST: Final = (60 * 0.15 + 40 * 0.075 + 20 * 0.6) / 1e6


def spans(**options: Any) -> dict[str, dict[str, Any]]:
    """Run an agent that asks a model and calls a tool, and return the attributes of its spans by name."""
    seen = Seen()
    hooks = seen.hooks(content="redacted", inference="auto", **options)
    guard = Guard(StromaRunner.quick(hooks=hooks, tags=("beta", "eu"), pipeline="trip"))
    about: Any = {"messages": lambda args, _: args[0], "usage": lambda answer: answer}
    model = guard.wrap("model", lambda messages: ANSWER, **about)
    tool = guard.wrap("weather", lambda city: "4 C", role="tool")
    agent = guard.wrap("agent", lambda: (model("how warm?"), tool("Oslo"))[1], role="agent")
    with guard.run({"city": "Oslo"}, conversation="thread-17", user="ada"):
        agent()
    return {span.name: dict(span.attributes or {}) for span in seen.spans}


def first(about: Mapping[str, Any], names: tuple[str, ...]) -> Any:
    return next((about[name] for name in names if about.get(name)), None)


def in_langfuse(about: Mapping[str, Any]) -> dict[str, Any]:
    """Return the observation that Langfuse makes of a span."""
    kinds = [types[about[name]] for name, types in LANGFUSE_TYPES.items() if about.get(name) in types]
    kinds += [kind for name, kind in LANGFUSE_HINTS.items() if name in about]
    usage: dict[str, Any] = {}
    for name, value in about.items():
        for prefix in ("gen_ai.usage.", "llm.token_count."):
            kind = name.removeprefix(prefix)
            if kind != name and name != "gen_ai.usage.cost":
                usage[LANGFUSE_TOKENS.get(kind, kind)] = value
    if "input" in usage:  # Tokens of a cache are counted apart.
        usage["input"] -= usage.get("input_cached_tokens", 0) + usage.get("input_cache_creation", 0)
    fields = {field: first(about, names) for field, names in LANGFUSE.items()}
    return {"type": [*kinds, "SPAN"][0], "usage": usage, **fields}


@pytest.mark.parametrize("vocabulary", ["openinference", "none"])
def test_observations_in_langfuse(vocabulary: Any) -> None:
    """Types, session and user of each, and the messages, model, tokens and cost of a model call."""
    found = {name: in_langfuse(about) for name, about in spans(vocabulary=vocabulary).items()}
    step = "CHAIN" if vocabulary == "openinference" else "SPAN"
    assert {name: observation["type"] for name, observation in found.items()} == {
        "invoke_workflow trip": step,
        "invoke_agent agent": "AGENT",
        "stroma.node model": step,
        "chat gpt-4o-mini": "GENERATION",
        "execute_tool weather": "TOOL",
    }
    for observation in found.values():
        assert (observation["sessionId"], observation["userId"]) == ("thread-17", "ada")
    call = found["chat gpt-4o-mini"]
    assert (call["model"], call["cost"]) == ("gpt-4o-mini", pytest.approx(COST))
    whole = {"total": 120} if vocabulary == "openinference" else {}
    assert call["usage"] == {"input": 60, "input_cached_tokens": 40, "output": 20, **whole}
    assert "how warm?" in call["input"]
    assert "It is 4 C" in call["output"]
    others = [observation for name, observation in found.items() if not name.startswith("chat")]
    assert not any(observation["usage"] or observation["cost"] for observation in others)
    if vocabulary == "openinference":  # Our own names for states and tags are none of its.
        assert json.loads(found["invoke_workflow trip"]["input"]) == {"city": "Oslo"}
        assert found["execute_tool weather"]["output"] == "4 C"
        assert found["invoke_workflow trip"]["tags"] == ("beta", "eu")


def test_spans_in_datadogs_llm_observability() -> None:
    """By OTLP: kinds, session, user and tags, states; model, provider, tokens and messages of calls."""
    sent = spans()

    def kind_of(about: Mapping[str, Any]) -> str:
        (name, kinds), *_ = [one for one in DATADOG_KINDS.items() if one[0] in about]
        return kinds.get(about[name], "workflow")

    assert {name: kind_of(about) for name, about in sent.items()} == {
        "invoke_workflow trip": "workflow",
        "invoke_agent agent": "agent",
        "stroma.node model": "workflow",
        "chat gpt-4o-mini": "llm",
        "execute_tool weather": "tool",
    }
    found = {
        name: {field: first(about, names) for field, names in DATADOG.items()} for name, about in sent.items()
    }
    assert {(span["session_id"], span["user_id"]) for span in found.values()} == {("thread-17", "ada")}
    run, tool = found["invoke_workflow trip"], found["execute_tool weather"]
    assert (json.loads(run["input"]), run["tags"]) == ({"city": "Oslo"}, ("beta", "eu"))
    assert (tool["name"], tool["output"]) == ("weather", "4 C")
    call = found["chat gpt-4o-mini"]
    assert (call["model_name"], call["model_provider"]) == ("gpt-4o-mini", "openai")
    assert (call["input_tokens"], call["output_tokens"]) == (100, 20)
    assert call["cache_read_input_tokens"] == 40
    assert json.loads(call["input"]) == [
        {"role": "user", "parts": [{"type": "text", "content": "how warm?"}]}
    ]
    assert json.loads(call["output"])[0]["role"] == "assistant"
    assert sum(span["input_tokens"] or 0 for span in found.values()) == 100


@pytest.mark.parametrize("mode", ["static", "stream"])
async def test_spans_in_sentrys_agents_module(mode: str) -> None:
    """The op of an agent, a tool and a run is gen_ai.{operation}; other nodes have none of that family."""
    with RecordedSentry(trace_lifecycle=mode) as sentry:
        runner = StromaRunner.quick(hooks=sentry_hooks(client=sentry.client))

        def node(id: str, role: Any) -> Any:
            return runner.node(id, input=Num, output=Num, role=role)(passing())

        search: Any = node("search", "tool")

        @runner.node("planner", input=Num, output=Num, role="agent")
        async def planner(state: Num) -> Num:
            await execute_step("search", search, state, current_run())
            return state

        nodes = [planner, node("plain", None)]
        await runner.run(Pipeline("trip", nodes), Num(), conversation="thread-17")
        sentry.client.flush()
        found = {span["name"]: span for span in sentry.transport.spans}
    assert {name: span["op"] for name, span in found.items()} == {
        "trip": "gen_ai.invoke_agent",
        "invoke_agent planner": "gen_ai.invoke_agent",
        "execute_tool search": "gen_ai.execute_tool",
        "plain": "function",
    }
    for name, attribute, value in (
        ("trip", "gen_ai.agent.name", "trip"),
        ("invoke_agent planner", "gen_ai.agent.name", "planner"),
        ("execute_tool search", "gen_ai.tool.name", "search"),
        ("execute_tool search", "gen_ai.agent.name", "planner"),
    ):
        data = found[name]["data"]
        assert (data[attribute], f"gen_ai.{data['gen_ai.operation.name']}") == (value, found[name]["op"])
        assert data["gen_ai.pipeline.name"] == "trip"
    assert all(span["data"]["gen_ai.conversation.id"] == "thread-17" for span in found.values())
