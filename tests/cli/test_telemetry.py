"""`stroma run` sends telemetry where it is told to, once, and all of it has left when the command ends."""

import http.server
import json
import signal
import socket
from pathlib import Path
from typing import Any

import pytest
from tests.kit import words
from tests.receivers.datadog import DatadogAgent, StatsdSocket
from tests.receivers.otlp import OtlpReceiver
from tests.receivers.processes import free_port
from tests.receivers.sentry import SentryServer

pytest_plugins = ["tests.receivers.fixtures"]

TARGET = ("run", "sums.py:pipeline", '{"start": 1}')
#: A pipeline with an exporter of its own.
OWN = """
    import os
    from pydantic import BaseModel
    from stroma import NodeContract, Pipeline, RunConfig, stroma_node
    from stroma.telemetry import datadog_hooks, otel_hooks, prometheus_hooks, sentry_hooks

    class Text(BaseModel):
        text: str = "x"

    @stroma_node("ask", NodeContract(node_id="ask", input_schema=Text, output_schema=Text))
    async def ask(state: Text):
        exec(os.environ.get("ASK", "pass"), globals())
        return {"text": "x"}, 1000, 0, "gpt-4o-mini"

    hooks = eval(os.environ["HOOKS"], globals())
    pipeline = Pipeline("p", [ask], config=RunConfig(hooks=hooks))
"""
OWN_TARGET = ("run", "own.py:pipeline", '{"text": "a"}')
#: Code of a node that prints the metrics that are served while it runs.
SHOW_METRICS = (
    "import urllib.request; print(urllib.request.urlopen('http://127.0.0.1:%d/metrics').read().decode())"
)
by_option_or_variable = pytest.mark.parametrize("by", ["option", "variable"])


@pytest.fixture
def inside(inside: Any, stroma: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Call the command in this process; it sets no provider for later tests."""
    monkeypatch.setattr("opentelemetry.trace.set_tracer_provider", lambda provider: None)
    monkeypatch.setattr("opentelemetry.metrics.set_meter_provider", lambda provider: None)
    stroma.file("own.py", OWN)
    return inside


def test_otlp(stroma: Any, otlp: OtlpReceiver) -> None:
    """--otel ENDPOINT: spans and metrics arrive before the command ends, in TRACEPARENT's trace."""
    value = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    done = stroma(*TARGET, "--otel", otlp.url, env={"TRACEPARENT": value})
    assert done.code == 0, done
    run = otlp.span("invoke_workflow sums")
    assert (run["trace_id"], run["parent_span_id"]) == (value[3:35], value[36:52])
    assert otlp.span("stroma.node second")["parent_span_id"] == run["span_id"]
    assert sum(point["value"] for point in otlp.points("stroma.node.executions")) == 3


@pytest.mark.parametrize(
    ("env", "name"),
    [
        ({"OTEL_SERVICE_NAME": "letters"}, "letters"),
        ({"OTEL_RESOURCE_ATTRIBUTES": "service.name=mail,team=a"}, "mail"),
        ({}, "stroma"),
    ],
)
def test_otlp_by_the_environment(inside: Any, otlp: OtlpReceiver, env: dict[str, str], name: str) -> None:
    """OTEL_EXPORTER_OTLP_ENDPOINT is enough, and a variable names the service; it is stroma by default."""
    env = {"OTEL_EXPORTER_OTLP_ENDPOINT": otlp.url, **env}
    assert inside(*TARGET, env={**env, "OTEL_SDK_DISABLED": "true"}).code == 0
    assert otlp.spans() == []
    assert inside(*TARGET, env=env).code == 0
    resource = otlp.span("invoke_workflow sums")["resource"]
    assert resource["service.name"] == name
    assert resource.get("team") == ("a" if name == "mail" else None)


def test_an_address_of_traces_alone(inside: Any, otlp: OtlpReceiver) -> None:
    """Where only traces have an address, or metrics are switched off, no metrics are sent to anywhere."""
    only = {"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": f"{otlp.url}/v1/traces"}
    off = {"OTEL_EXPORTER_OTLP_ENDPOINT": otlp.url, "OTEL_METRICS_EXPORTER": "none"}
    for number, env in enumerate((only, off), 1):
        done = inside(*TARGET, "-q", env=env)
        assert (done.code, done.err) == (0, "printed by a node\n")
        assert len(otlp.spans()) == 6 * number  # The run, three nodes, and the calls of two of them.
    assert otlp.points("stroma.node.executions") == []


def test_sigterm_flushes(stroma: Any, otlp: OtlpReceiver) -> None:
    """SIGTERM lets the node in flight finish, and what it made is sent before the process ends."""
    env = {"SECOND_AWAITS": "asyncio.sleep(1)"}
    process = stroma.popen(*TARGET, "--otel", otlp.url, env=env)
    for line in process.stderr:
        if "second" in line and "start" in line:
            break
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 0, err
    assert otlp.span("stroma.node second")["attributes"]["stroma.outcome"] == "success"
    assert otlp.span("invoke_workflow sums")["attributes"]["stroma.status"] == "INTERRUPTED"


@pytest.mark.slow
@pytest.mark.parametrize(
    "hooks",
    [
        "()",
        "prometheus_hooks()",
        "prometheus_hooks(registry=__import__('prometheus_client').CollectorRegistry())",
    ],
    ids=["none of its own", "default", "own registry"],
)
def test_prometheus(stroma: Any, hooks: str) -> None:
    """--prometheus serves the metrics of the run, those of the pipeline's own ``prometheus_hooks()`` too."""
    stroma.file("own.py", OWN)
    port = free_port()
    env = {"HOOKS": hooks, "ASK": SHOW_METRICS % port}
    done = stroma(*OWN_TARGET, "--prometheus", f"localhost:{port}", env=env)
    assert done.code == 0, done
    assert f"http://localhost:{port}/metrics" in done.err
    assert 'stroma_runs_in_progress{pipeline="p"} 1.0' in done.err


@by_option_or_variable
def test_sentry(inside: Any, sentry_server: SentryServer, by: str) -> None:
    """--sentry DSN, or SENTRY_DSN: a failed run is one issue, which has arrived when the command ends."""
    options = ("--sentry", sentry_server.dsn) if by == "option" else ()
    env = {"SECOND": "raise ValueError('no')", **({} if options else {"SENTRY_DSN": sentry_server.dsn})}
    assert inside(*TARGET, *options, env=env).code == 1
    (event,) = sentry_server.events
    assert event["fingerprint"] == ["stroma", "sums", "second", "AMBIGUOUS", "ValueError"]


@pytest.mark.slow
def test_a_backend_that_is_down(stroma: Any) -> None:
    """A run is what it is, whoever is not there to hear of it."""
    port = free_port()
    done = stroma(*TARGET, "--otel", f"http://127.0.0.1:{port}", "--sentry", f"http://k@127.0.0.1:{port}/1")
    assert (done.code, json.loads(done.out)) == (0, {"n": 4})


@pytest.mark.parametrize(
    ("option", "text"),
    [
        (("--otel", "localhost:4318"), "pass a URL"),
        (("--datadog", "localhost"), "pass HOST:PORT"),
        (("--prometheus", "many"), "pass PORT or HOST:PORT"),
        (("--sentry", "no dsn"), "correct the value"),
    ],
)
def test_wrong_addresses(inside: Any, option: tuple[str, str], text: str) -> None:
    """What is no address is refused before anything runs, with exit code 2."""
    done = inside(*TARGET, *option)
    assert done.code == 2, done
    assert text in done.err
    assert done.out == ""


def test_a_port_that_is_taken(stroma: Any, inside: Any) -> None:
    """--prometheus on a port in use is an error of the environment; nothing was called. The address that is
    printed can be opened, also of IPv6."""
    with http.server.HTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler) as taken:
        done = inside(*TARGET, "--prometheus", str(taken.server_address[1]))
    assert done.code == 3
    assert "pass another port" in done.err
    assert stroma.calls() == []
    if socket.has_dualstack_ipv6():
        assert "metrics are at http://[::1]:" in inside(*TARGET, "--prometheus", "[::1]:0").err


@by_option_or_variable
@pytest.mark.parametrize("provider", ["", "tracer=__import__('provider').provider, "], ids=["", "its own"])
def test_otlp_counts_once(
    inside: Any, stroma: Any, otlp: OtlpReceiver, monkeypatch: pytest.MonkeyPatch, by: str, provider: str
) -> None:
    """``otel_hooks()`` of a pipeline and --otel, or its variable, are one, with the pipeline's settings.

    An option takes the place of a pipeline's own provider, a variable does not: spans arrive once.
    """
    stroma.file(
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
    monkeypatch.syspath_prepend(str(stroma.home))
    nowhere = "http://127.0.0.1:9"
    env = {"HOOKS": f"otel_hooks({provider}content='redacted')", "OURS": nowhere}
    options = ("--otel", otlp.url) if by == "option" else ()
    if not options:
        env["OURS"] = otlp.url
        env["OTEL_EXPORTER_OTLP_ENDPOINT"] = nowhere if provider else otlp.url
    # Hooks without a provider send to the global one, which the command sets in its own process.
    done = (inside if provider else stroma)(*OWN_TARGET, *options, env=env)
    assert done.code == 0, done
    (span,) = [span for span in otlp.spans() if span["name"].startswith("invoke_workflow")]
    assert span["attributes"]["input.value"] == '{"text": "a"}'
    if not provider:
        assert sum(point["value"] for point in otlp.points("stroma.node.executions")) == 1


@pytest.mark.slow
@by_option_or_variable
@pytest.mark.parametrize("started", [False, True], ids=["no client", "a client of its own"])
def test_sentry_counts_once(stroma: Any, sentry_server: SentryServer, by: str, started: bool) -> None:
    """``sentry_hooks()`` of a pipeline and --sentry, or SENTRY_DSN, are one: a failure is one issue."""
    stroma.file("own.py", OWN)
    options = ("--sentry", sentry_server.dsn) if by == "option" else ()
    init = f"__import__('sentry_sdk').init({sentry_server.dsn!r}, default_integrations=False) and "
    env = {"HOOKS": f"{init if started else ''}sentry_hooks()", "ASK": "raise ValueError('no')"}
    if not options:
        env["SENTRY_DSN"] = sentry_server.dsn
    assert stroma(*OWN_TARGET, *options, env=env).code == 1
    assert len(sentry_server.events) == 1


@pytest.mark.parametrize("by", ["option", "variable", "option without hooks"])
def test_datadog_counts_once(stroma: Any, datadog_agent: DatadogAgent, statsd: StatsdSocket, by: str) -> None:
    """--datadog, or DD_TRACE_AGENT_URL, and ``datadog_hooks()`` of a pipeline are one: spans and metrics.

    The pipeline's file may import the tracer, which reads its address then.
    """
    stroma.file("own.py", OWN)
    address = f"127.0.0.1:{datadog_agent.port}"
    env = {
        "HOOKS": "()" if "without" in by else f"datadog_hooks(statsd='127.0.0.1:{statsd.port}')",
        "DD_DOGSTATSD_PORT": str(statsd.port),
        "DD_REMOTE_CONFIGURATION_ENABLED": "false",
    }
    options = ("--datadog", address)
    if by == "variable":
        env["DD_TRACE_AGENT_URL"], options = f"http://{address}", ()
    done = stroma(*OWN_TARGET, *options, env=env)
    assert done.code == 0, done
    spans = [(span["name"], span["resource"]) for trace in datadog_agent.traces(at_least=1) for span in trace]
    assert sorted(spans) == [("stroma.node", "ask"), ("stroma.run", "p")]
    runs = [line for line in statsd.statistics() if line.name == "stroma.runs"]
    assert [(line.value, line.tags["status"]) for line in runs] == [("1", "COMPLETED")]


def test_assets(inside: Any, tmp_path: Path) -> None:
    """`stroma telemetry assets DIR` writes the dashboards and rules, and over nothing that was changed."""
    done = inside("telemetry", "assets", "out", "--json")
    assert done.code == 0, done
    paths = [Path(path) for path in json.loads(done.out)["paths"]]
    assert [path.name for path in paths] == words("""
        datadog-dashboard.json grafana-dashboard.json prometheus-alerts.test.yml prometheus-alerts.yml
        prometheus-recording.test.yml prometheus-recording.yml
    """)
    assert inside("telemetry", "assets", "out").code == 0
    changed = tmp_path / paths[1]
    entry = changed.read_bytes()
    changed.write_text("mine")
    done = inside("telemetry", "assets", "out")
    assert (done.code, changed.read_text()) == (2, "mine")
    assert "--force" in done.err
    assert inside("telemetry", "assets", "out", "--force").code == 0
    assert changed.read_bytes() == entry
    (tmp_path / "file").write_text("")
    assert inside("telemetry", "assets", "file/below").code == 3
