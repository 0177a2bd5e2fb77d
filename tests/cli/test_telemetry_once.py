"""`stroma run` with exporters in the pipeline's config, on the command line and in the environment."""

import signal
from typing import Any

import pytest
from tests.receivers.datadog import DatadogAgent, StatsdSocket
from tests.receivers.otlp import OtlpReceiver
from tests.receivers.processes import fetch, free_port
from tests.receivers.sentry import SentryServer

pytest_plugins = ["tests.receivers.fixtures"]

PIPELINE = """
    import asyncio, os
    from pydantic import BaseModel
    from stroma import NodeContract, Pipeline, RunConfig, stroma_node
    from stroma.telemetry import datadog_hooks, otel_hooks, prometheus_hooks, sentry_hooks

    class Text(BaseModel):
        text: str = "x"

    @stroma_node("ask", NodeContract(node_id="ask", input_schema=Text, output_schema=Text))
    async def ask(state: Text):
        exec(os.environ.get("ASK", "pass"), globals())
        if "ASK_AWAITS" in os.environ:
            print("asked", flush=True)
            await asyncio.sleep(60)
        return {"text": "x"}, 1000, 0, "gpt-4o-mini"

    hooks = eval(os.environ["HOOKS"], globals())
    pipeline = Pipeline("p", [ask], config=RunConfig(hooks=hooks))
"""
TARGET = ("run", "own.py:pipeline", '{"text": "a"}')


@pytest.fixture
def own(stroma: Any) -> Any:
    stroma.file("own.py", PIPELINE)
    return stroma


@pytest.mark.slow
@pytest.mark.parametrize("by", ["option", "variable"])
def test_otlp_counts_once(own: Any, otlp: OtlpReceiver, by: str) -> None:
    """``otel_hooks()`` of a pipeline and --otel, or its variable, are one, with the pipeline's settings."""
    options = ("--otel", otlp.url) if by == "option" else ()
    env = {"HOOKS": "otel_hooks(content='redacted')"}
    if not options:
        env["OTEL_EXPORTER_OTLP_ENDPOINT"] = otlp.url
    done = own(*TARGET, *options, env=env)
    assert done.code == 0, done
    spans = [span for span in otlp.spans() if span["name"].startswith("invoke_workflow")]
    assert len(spans) == 1
    assert spans[0]["attributes"]["input.value"] == '{"text": "a"}'
    assert sum(point["value"] for point in otlp.points("stroma.node.executions")) == 1


@pytest.mark.slow
@pytest.mark.parametrize("by", ["option", "variable"])
def test_a_pipelines_own_provider_counts_once(own: Any, otlp: OtlpReceiver, by: str) -> None:
    """An option takes the place of a pipeline's own provider, a variable does not: spans arrive once."""
    own.file(
        "provider.py",
        """
        import os
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import SimpleSpanProcessor

        provider = TracerProvider()
        exporter = OTLPSpanExporter(endpoint=os.environ["OURS"] + "/v1/traces")
        provider.add_span_processor(SimpleSpanProcessor(exporter))
        """,
    )
    env = {
        "HOOKS": "otel_hooks(tracer=__import__('provider').provider, content='redacted')",
        "OURS": otlp.url,
        "PYTHONPATH": str(own.home),
    }
    options = ("--otel", otlp.url) if by == "option" else ()
    if not options:
        env["OTEL_EXPORTER_OTLP_ENDPOINT"] = otlp.url
    done = own(*TARGET, *options, env=env)
    assert done.code == 0, done
    (span,) = [span for span in otlp.spans() if span["name"].startswith("invoke_workflow")]
    assert span["attributes"]["input.value"] == '{"text": "a"}'


@pytest.mark.slow
@pytest.mark.parametrize(
    "hooks",
    ["prometheus_hooks()", "prometheus_hooks(registry=__import__('prometheus_client').CollectorRegistry())"],
    ids=["default", "own registry"],
)
def test_prometheus_counts_once(own: Any, hooks: str) -> None:
    """``prometheus_hooks()`` of a pipeline and --prometheus are one: the pipeline's counts are served."""
    port = free_port()
    process = own.popen(*TARGET, "--prometheus", str(port), env={"HOOKS": hooks, "ASK_AWAITS": "1"})
    for line in process.stderr:
        if "asked" in line:
            break
    page = fetch(f"http://127.0.0.1:{port}/metrics").decode()
    assert 'stroma_runs_in_progress{pipeline="p"} 1.0' in page
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=30)


@pytest.mark.slow
@pytest.mark.parametrize("by", ["option", "variable"])
@pytest.mark.parametrize("started", [False, True], ids=["no client", "a client of its own"])
def test_sentry_counts_once(own: Any, sentry_server: SentryServer, by: str, started: bool) -> None:
    """``sentry_hooks()`` of a pipeline and --sentry, or SENTRY_DSN, are one: a failure is one issue."""
    options = ("--sentry", sentry_server.dsn) if by == "option" else ()
    init = (
        f"__import__('sentry_sdk').init({sentry_server.dsn!r}, default_integrations=False) and "
        if started
        else ""
    )
    env = {"HOOKS": f"{init}sentry_hooks()", "ASK": "raise ValueError('no')"}
    if not options:
        env["SENTRY_DSN"] = sentry_server.dsn
    assert own(*TARGET, *options, env=env).code == 1
    assert len(sentry_server.events) == 1


@pytest.mark.slow
@pytest.mark.parametrize("by", ["option", "variable"])
def test_datadog_counts_once(own: Any, datadog_agent: DatadogAgent, statsd: StatsdSocket, by: str) -> None:
    """``datadog_hooks()`` of a pipeline and --datadog, or DD_TRACE_AGENT_URL, are one."""
    address = f"127.0.0.1:{datadog_agent.port}"
    env = {
        "HOOKS": f"datadog_hooks(statsd='127.0.0.1:{statsd.port}')",
        "DD_DOGSTATSD_PORT": str(statsd.port),
        "DD_REMOTE_CONFIGURATION_ENABLED": "false",
        "DD_TRACE_AGENT_URL": f"http://{address}",
    }
    options = ("--datadog", address) if by == "option" else ()
    done = own(*TARGET, *options, env=env)
    assert done.code == 0, done
    spans = [span["name"] for trace in datadog_agent.traces(at_least=1) for span in trace]
    assert sorted(spans) == ["stroma.node", "stroma.run"]
    assert [line.value for line in statsd.statistics() if line.name == "stroma.runs"] == ["1"]
