"""Names and roles in OpenTelemetry: the conventions' release 0.1.0, with kinds and content for backends."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry
from pydantic import BaseModel, SecretStr, ValidationError
from tests.kit import computing, passing
from tests.receivers.sentry import RecordedSentry
from tests.telemetry.test_counted_once import Number
from tests.telemetry.test_opentelemetry import Seen, quick

from stroma import NodeContract, Pipeline, StromaRunner, Usage, parallel, stroma_node
from stroma.adapters import Guard
from stroma.telemetry import otel_hooks, prometheus_hooks, sentry_hooks
from stroma.telemetry.inference import _PROVIDERS


class State(BaseModel):
    n: int = 0
    key: SecretStr = SecretStr("sk-hunter2")


async def run_once(seen: Seen, **options: Any) -> None:
    runner = quick(seen.hooks(**options))
    add = runner.node("add", input=State, output=State)(computing(lambda state: State(n=state.n + 1)))
    await runner.run(Pipeline("sums", [add]), State())


@pytest.mark.core
async def test_names_of_the_latest_conventions() -> None:
    """A run is an agent invocation by its pipeline's name; names that the conventions removed are gone."""
    seen = Seen()
    await run_once(seen)
    run, node = seen.span("invoke_workflow sums"), seen.span("stroma.node add")
    assert (
        dict(run.attributes or {}).items()
        >= {
            "gen_ai.operation.name": "invoke_workflow",
            "gen_ai.agent.name": "sums",
            "stroma.pipeline": "sums",
        }.items()
    )
    scope = run.instrumentation_scope
    assert (scope.name, scope.schema_url) == ("stroma", "https://opentelemetry.io/schemas/gen-ai/0.1.0")
    assert scope.version
    assert list(seen.points("gen_ai.invoke_agent.duration")) == [
        (("gen_ai.agent.name", "sums"), ("stroma.status", "COMPLETED"))
    ]
    assert not seen.points("gen_ai.invoke_workflow.duration")
    for span in (run, node):
        assert "gen_ai.workflow.name" not in (span.attributes or {})
        assert "gen_ai.conversation.id" not in (span.attributes or {})  # Nobody gave one.


@pytest.mark.core
async def test_kinds_and_content_that_backends_show() -> None:
    """Runs, groups and nodes are chains; with content on, input and output stand where backends read them."""
    seen = Seen()
    await run_once(seen, content="redacted")
    for name, given, taken in (("invoke_workflow sums", 0, 1), ("stroma.node add", 0, 1)):
        shown = dict(seen.span(name).attributes or {})
        assert shown["openinference.span.kind"] == "CHAIN"
        assert json.loads(shown["input.value"])["n"] == given
        assert json.loads(shown["output.value"])["n"] == taken
        assert shown["input.mime_type"] == shown["output.mime_type"] == "application/json"
        assert "hunter2" not in str(shown)


async def test_without_the_vocabulary() -> None:
    """vocabulary="none" leaves all names of OpenInference out, and content under ours."""
    seen = Seen()
    await run_once(seen, content="redacted", vocabulary="none")
    for span in seen.spans:
        shown = dict(span.attributes or {})
        assert not [name for name in shown if name.startswith(("openinference", "input.", "output.", "llm."))]
        assert json.loads(shown["stroma.output"])["n"] == 1


#: Names, types and values of the registry of the conventions.
REGISTRY = json.loads(Path(__file__).with_name("gen_ai_registry.json").read_text("utf-8"))
TYPES = {"string": str, "int": int, "double": float, "boolean": bool}
#: What backends read, and no release of the conventions has: Langfuse's name of the cost.
NOT_OF_THE_CONVENTIONS = {"gen_ai.usage.cost"}


async def test_names_types_and_values_are_those_of_the_registry() -> None:
    """Every gen_ai attribute that is sent is in the registry by type, operations and providers by value."""
    seen = Seen()
    runner = quick(seen.hooks(inference="auto", content="redacted"))

    def node(role: Any) -> Any:
        @runner.node(f"a {role}", input=State, output=State, role=role)
        async def add(state: State) -> Any:
            return state, Usage(100, 20, 40, 10, model="claude-sonnet-4-5")

        return add

    nodes = [node(role) for role in ("agent", "tool", "retriever", "chain")]
    await runner.run(Pipeline("sums", nodes), State(), conversation="c-1", user="ada")
    sent: dict[str, set[Any]] = {}
    for span in seen.spans:
        for name, value in dict(span.attributes or {}).items():
            if name.startswith("gen_ai."):
                sent.setdefault(name, set()).add(value)
    assert sent.keys() - NOT_OF_THE_CONVENTIONS <= REGISTRY["attributes"].keys()
    for name in sent.keys() - NOT_OF_THE_CONVENTIONS:
        assert {type(value) for value in sent[name]} == {TYPES[REGISTRY["attributes"][name]]}, name
    assert sent["gen_ai.operation.name"] <= set(REGISTRY["operations"])
    assert sent["gen_ai.provider.name"] == {"anthropic"}
    assert set(_PROVIDERS.values()) <= set(REGISTRY["providers"])
    assert all(seen.points(name) for name in REGISTRY["histograms"])


def test_names_in_the_source_are_those_of_the_registry() -> None:
    """No exporter to OpenTelemetry writes a gen_ai name that the registry lacks, but old ones on request."""
    folder = Path(otel_hooks.__code__.co_filename).parents[1]
    files = [
        *folder.glob("*.py"),
        *(folder / "opentelemetry").glob("*.py"),
        *(folder / "datadog").glob("*.py"),
    ]
    names = {
        name for file in files for name in re.findall(r'"(gen_ai\.[a-z_.]*[a-z])"', file.read_text("utf-8"))
    }
    earlier = {*REGISTRY["removed"], "gen_ai.invoke_workflow.duration"}
    assert names - REGISTRY["attributes"].keys() <= {
        *REGISTRY["histograms"],
        *earlier,
        *NOT_OF_THE_CONVENTIONS,
    }


ROLES = ("agent", "tool", "retriever", "chain", None)


def nodes_of_each_role(runner: StromaRunner) -> list[Any]:
    return [runner.node(f"a {role}", input=Number, output=Number, role=role)(passing()) for role in ROLES]


@pytest.mark.parametrize("vocabulary", ["openinference", "none"])
async def test_roles_in_opentelemetry(vocabulary: Any) -> None:
    """The spans of agents, tools and retrievers have the operation, the name and the kind of their role."""
    seen = Seen()
    runner = StromaRunner.quick(hooks=seen.hooks(vocabulary=vocabulary))
    nodes = nodes_of_each_role(runner)
    await runner.run([*nodes, parallel(*nodes[:2])], Number())
    named = {
        span.name: {
            name.removeprefix("gen_ai."): value
            for name, value in dict(span.attributes or {}).items()
            if name.startswith("gen_ai.") or name == "openinference.span.kind"
        }
        for span in seen.spans
    }
    kinds = ["AGENT", "TOOL", "RETRIEVER", "CHAIN", "CHAIN", "CHAIN"]
    expected: dict[str, dict[str, str]] = {
        "invoke_agent a agent": {"operation.name": "invoke_agent", "agent.name": "a agent"},
        "execute_tool a tool": {"operation.name": "execute_tool", "tool.name": "a tool"},
        "retrieval a retriever": {"operation.name": "retrieval"},
        "stroma.node a chain": {},
        "stroma.node a None": {},
        "stroma.node parallel(a agent, a tool)": {},
    }
    if vocabulary == "openinference":
        for about, kind in zip(expected.values(), kinds, strict=True):
            about["openinference.span.kind"] = kind
    del named["invoke_workflow pipeline"]
    assert named == expected


@pytest.mark.parametrize("mode", ["static", "stream"])
async def test_roles_in_sentry(mode: str) -> None:
    """Agents and tools are gen_ai operations by name; other nodes and groups are functions."""
    with RecordedSentry(trace_lifecycle=mode) as sentry:
        runner = StromaRunner.quick(hooks=sentry_hooks(client=sentry.client))
        nodes = nodes_of_each_role(runner)
        await runner.run(Pipeline("all", [*nodes, parallel(nodes[3], nodes[4])]), Number())
        sentry.client.flush()
    about = {
        span["name"]: (
            span["op"],
            span["data"].get("gen_ai.agent.name"),
            span["data"].get("gen_ai.tool.name"),
        )
        for span in sentry.transport.spans
    }
    assert about == {
        "all": ("gen_ai.invoke_agent", "all", None),
        "invoke_agent a agent": ("gen_ai.invoke_agent", "a agent", None),
        "execute_tool a tool": ("gen_ai.execute_tool", None, "a tool"),
        "retrieval a retriever": ("gen_ai.retrieval", None, None),
        "a chain": ("function", None, None),
        "a None": ("function", None, None),
        "parallel(a chain, a None)": ("function", None, None),
    }


async def test_the_role_of_a_contract_precedes_that_of_the_framework() -> None:
    """A role in the contract holds in a guarded call, too; a role that does not exist is refused."""
    seen = Seen()
    guard = Guard(StromaRunner.quick(hooks=seen.hooks()))
    contract = NodeContract(node_id="look up", input_schema=Number, output_schema=Number, role="retriever")
    look_up = guard.wrap("look up", lambda state: state, contract=contract, role="tool")
    with guard.run():
        look_up(Number())
    seen.span("retrieval look up")
    with pytest.raises(ValidationError, match="role"):
        NodeContract(node_id="a", input_schema=Number, output_schema=Number, role="robot")


async def test_spend_is_counted_by_agent() -> None:
    """Tokens and cost of a model belong to the innermost agent around it, on the span and as a label."""
    seen, registry = Seen(), CollectorRegistry()
    hooks = seen.hooks(inference="auto") | prometheus_hooks(registry=registry)
    guard = Guard(StromaRunner.quick(hooks=hooks))
    model = guard.wrap("model", lambda tokens: tokens, usage=lambda n: Usage(n, 1, model="gpt-4o-mini"))
    inner = guard.wrap("inner", lambda: model(30), role="agent")
    outer = guard.wrap("outer", lambda: (model(20), inner()), role="agent")
    with guard.run():
        model(10)
        outer()
    agents = {
        (span.attributes or {})["gen_ai.usage.input_tokens"]: (span.attributes or {}).get("gen_ai.agent.name")
        for span in seen.named("chat gpt-4o-mini")
    }
    assert agents == {10: None, 20: "outer", 30: "inner"}
    place = {"pipeline": "pipeline", "node_id": "model", "model": "gpt-4o-mini"}
    for agent, tokens in (("", 10), ("outer", 20), ("inner", 30)):
        labels = {**place, "agent": agent, "direction": "input"}
        assert registry.get_sample_value("stroma_tokens_total", labels) == tokens
    by_agent = {dict(key)["gen_ai.agent.name"] for key in seen.points("stroma.cost")}
    assert by_agent == {"", "outer", "inner"}


async def test_a_node_without_a_runner_has_a_role() -> None:
    """stroma_node takes the role with the contract."""
    seen = Seen()

    @stroma_node("pay", NodeContract(node_id="pay", input_schema=Number, output_schema=Number, role="tool"))
    async def pay(state: Number) -> Number:
        return state

    await StromaRunner.quick(hooks=seen.hooks()).run([pay], Number())
    seen.span("execute_tool pay")
