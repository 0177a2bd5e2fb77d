"""datadog_hooks, without the agent: tracers, sockets and wrong addresses. See also test_consistency."""

import json
import socket
import threading
from typing import Any

import pytest
from tests.kit import passing, run_python
from tests.receivers.datadog import DatadogAgent, StatsdSocket
from tests.receivers.processes import fetch_json
from tests.telemetry.test_counted_once import Number, Tracer

from stroma import StromaRunner
from stroma.telemetry import datadog_hooks, otel_hooks

pytest_plugins = ["tests.receivers.fixtures"]


async def test_the_agents_name_is_looked_up_in_no_event_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    """A host of DogStatsD that does not resolve stops no event loop."""
    asked: list[int] = []

    def slow(*_: Any, **__: Any) -> Any:
        asked.append(threading.get_ident())
        raise socket.gaierror(-3, "Temporary failure in name resolution")

    monkeypatch.setattr(socket, "getaddrinfo", slow)
    tracer: Any = Tracer()
    tracer.flush = lambda: None
    runner = StromaRunner.quick(hooks=datadog_hooks(tracer=tracer, statsd="dd-agent.internal:8125"))

    a = runner.node("a", input=Number, output=Number)(passing())
    await runner.run([a], Number())
    await runner.flush()
    assert asked
    assert threading.get_ident() not in asked
    await runner.aclose()


PROGRAM = """
import asyncio, json, sys
from typing import Any
from ddtrace.trace import tracer
from pydantic import BaseModel, SecretStr
from stroma import *
from stroma.telemetry import datadog_hooks
from tests.kit import ONCE

class State(BaseModel):
    n: int = 0
    key: SecretStr = SecretStr("sk-hunter2")

async def main() -> None:
    content, statsd = sys.argv[1], sys.argv[2]
    hooks = datadog_hooks(service="letters", statsd=statsd, content=content)
    runner = StromaRunner.quick(hooks=hooks, policy_map=ONCE, pipeline="letters", tags=("beta", "eu"))

    @runner.node("flaky", input=State, output=State)
    async def flaky(state: State) -> Any:
        with tracer.trace("inner"):
            if current_node().attempt == 1:
                raise ConnectionError("no")
        return state, 10, 5, "gpt-4o-mini"

    def in_thread(state: State) -> Any:
        with tracer.trace("in thread"):
            return state

    thread = runner.node("thread", input=State, output=State, role="tool")(in_thread)

    @runner.node("bad", input=State, output=State)
    async def bad(state: State) -> Any:
        raise ValueError(f"no for {state.key.get_secret_value()}")

    given = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    await runner.run([flaky, parallel(thread, bad)], State(), run_id="r", traceparent=given)
    with tracer.trace("request") as request:
        await runner.run([flaky], State(), run_id="s")
        assert tracer.current_span() is request
        with tracer.trace("afterwards"):
            pass
        about = {"conversation": "thread-17", "user": "ada"}
        await runner.run([flaky], State(), run_id="t", traceparent=given, **about)
        assert tracer.current_span() is request, "of another trace, and what is current here stays so"
    await runner.run([flaky, parallel(thread, bad)], State(), run_id="r", resume=True)
    assert tracer.current_span() is None
    assert await runner.aclose(timeout_seconds=20)
    print(json.dumps(dict(hooks.errors)))

asyncio.run(main())
"""


def spans(agent: DatadogAgent, content: str, statsd: StatsdSocket) -> list[dict[str, Any]]:
    address = f"{statsd.host}:{statsd.port}"
    assert json.loads(run_python(content, address, code=PROGRAM, env=agent.environment())) == {}
    return [span for trace in agent.traces(at_least=3) for span in trace]


@pytest.mark.core
def test_spans_at_the_agent(datadog_agent: DatadogAgent, statsd: StatsdSocket) -> None:
    """Runs and nodes arrive with resource, operation, parents, links, errors and labels, without content."""
    result = spans(datadog_agent, "none", statsd)
    ids = {span["span_id"]: span for span in result}

    def above(span: dict[str, Any]) -> Any:
        parent = ids.get(span["parent_id"])
        return None if parent is None else (parent["name"], parent["resource"])

    first, under_request, _, resumed = sorted(
        (span for span in result if span["name"] == "stroma.run"), key=lambda span: span["start"]
    )
    assert {span["service"] for span in (first, under_request, resumed)} == {"letters"}
    assert first["parent_id"] == 0xB7AD6B7169203331
    assert above(under_request) == ("request", "request")
    assert above(next(span for span in result if span["name"] == "afterwards")) == ("request", "request")
    link = (
        json.loads(resumed["meta"]["_dd.span_links"])[0]
        if "_dd.span_links" in resumed["meta"]
        else resumed["span_links"][0]
    )
    assert int(str(link["span_id"]), 16 if isinstance(link["span_id"], str) else 10) == first["span_id"]
    places = {
        (span["name"], span["resource"]): above(span) for span in result if span["name"] != "stroma.run"
    }
    run = ("stroma.run", "letters")
    assert places["stroma.node", "parallel(thread, bad)"] == run
    assert places["stroma.node", "thread"] == ("stroma.node", "parallel(thread, bad)")
    assert places["in thread", "in thread"] == ("stroma.node", "thread")
    assert places["inner", "inner"] == ("stroma.node", "flaky")
    operations = {
        span["resource"]: [
            span["meta"].get(f"gen_ai.{name}") for name in ("operation.name", "tool.name", "agent.name")
        ]
        for span in result
        if span["name"].startswith("stroma")
    }
    assert operations == {
        "letters": ["invoke_workflow", None, "letters"],
        "thread": ["execute_tool", "thread", None],
        **{name: [None, None, None] for name in ("flaky", "parallel(thread, bad)", "bad")},
    }
    errors = {span["resource"] for span in result if span["error"] and span["name"].startswith("stroma")}
    assert errors == {"letters", "bad", "parallel(thread, bad)"}
    assert under_request["error"] == 0
    bad = next(span for span in result if span["resource"] == "bad")
    assert bad["meta"]["error.type"] == "ValueError"
    assert "no for" not in json.dumps([span for span in result if span["name"].startswith("stroma")])
    for span in result:
        if span["name"].startswith("stroma"):
            about = [span["meta"].get(name) for name in ("gen_ai.conversation.id", "usr.id", "stroma.tags")]
            is_attributed = span["meta"]["stroma.run.id"] == "t"
            assert about == [*(("thread-17", "ada") if is_attributed else (None, None)), "beta,eu"]
    names = {line.name for line in statsd.statistics()}
    assert {
        "stroma.runs",
        "stroma.run.duration",
        "stroma.node.executions",
        "stroma.node.retries",
        "stroma.tokens",
    } <= names


def test_redacted_content(datadog_agent: DatadogAgent, statsd: StatsdSocket) -> None:
    """With content="redacted" states and messages are tags, but for secrets."""
    findings = [
        span for span in spans(datadog_agent, "redacted", statsd) if span["name"].startswith("stroma")
    ]
    bad = next(span for span in findings if span["resource"] == "bad")
    assert bad["meta"]["error.message"] == "no for **********"
    assert json.loads(bad["meta"]["stroma.input"]) == {"n": 0, "key": "[redacted]"}
    assert "hunter2" not in json.dumps(findings)


@pytest.mark.parametrize("wrong", ["localhost", "8125", ":8125", "localhost:", "localhost:http"])
def test_an_address_that_is_none(wrong: str) -> None:
    """An address without host and port is refused at once, with how it should look."""
    with pytest.raises(ValueError, match="host:port"):
        datadog_hooks(statsd=wrong)


async def test_llm_observability_gets_runs_and_calls(datadog_agent: DatadogAgent) -> None:
    """Spans of otel_hooks() reach Datadog's LLM Observability by OTLP, with operations, models and tokens."""
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    provider = TracerProvider()
    headers = {"dd-api-key": "none", "dd-otlp-source": "llmobs"}
    exporter = OTLPSpanExporter(endpoint=f"{datadog_agent.otlp_url}/v1/traces", headers=headers)
    provider.add_span_processor(BatchSpanProcessor(exporter))
    runner = StromaRunner.quick(hooks=otel_hooks(tracer=provider), pipeline="letters")

    @runner.node("a", input=Number, output=Number)
    async def a(state: Number) -> Any:
        return state, 120, 40, "gpt-4o-mini"

    await runner.run([a], Number(), conversation="thread-17")
    assert await runner.flush()
    provider.shutdown()
    received = fetch_json(f"{datadog_agent.otlp_url}/test/session/traces")
    spans = {
        span["name"]: {entry["key"]: next(iter(entry["value"].values())) for entry in span["attributes"]}
        for request in received
        for resource in request["resource_spans"]
        for scope in resource["scope_spans"]
        for span in scope["spans"]
    }
    assert set(spans) == {"invoke_workflow letters", "stroma.node a", "chat gpt-4o-mini"}
    assert {about["gen_ai.conversation.id"] for about in spans.values()} == {"thread-17"}
    run, call = spans["invoke_workflow letters"], spans["chat gpt-4o-mini"]
    assert (run["gen_ai.operation.name"], run["gen_ai.agent.name"]) == ("invoke_workflow", "letters")
    assert (call["gen_ai.operation.name"], call["gen_ai.request.model"]) == ("chat", "gpt-4o-mini")
    assert call["gen_ai.provider.name"] == "openai"
    assert (call["gen_ai.usage.input_tokens"], call["gen_ai.usage.output_tokens"]) == ("120", "40")
