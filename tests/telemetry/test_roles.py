"""What a node is to traces: agents, tools and retrievers have the conventions' names, others none."""

from typing import Any

import pytest
from prometheus_client import CollectorRegistry
from pydantic import ValidationError
from tests.kit import passing
from tests.receivers.sentry import RecordedSentry
from tests.telemetry.test_counted_once import Number
from tests.telemetry.test_opentelemetry import Seen

from stroma import NodeContract, Pipeline, StromaRunner, Usage, parallel, stroma_node
from stroma.adapters import Guard
from stroma.telemetry import prometheus_hooks, sentry_hooks

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
