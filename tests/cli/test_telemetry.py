"""`stroma run` sends telemetry where it is told to, and all of it has left when the command ends."""

import http.server
import json
import signal
from pathlib import Path
from typing import Any

import pytest
from tests.receivers.datadog import DatadogAgent, StatsdSocket
from tests.receivers.otlp import OtlpReceiver
from tests.receivers.processes import fetch, free_port
from tests.receivers.sentry import SentryServer

pytest_plugins = ["tests.receivers.fixtures"]

GOOD = '{"start": 1}'
FAIL = {"SECOND": "raise ValueError('no')"}
TARGET = ("run", "sums.py:pipeline", GOOD)


def test_otlp(stroma: Any, otlp: OtlpReceiver) -> None:
    """--otel ENDPOINT: spans and metrics arrive before the command ends, in TRACEPARENT's trace."""
    value = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    done = stroma(*TARGET, "--otel", otlp.url, env={"TRACEPARENT": value})
    assert done.code == 0, done
    run = otlp.span("invoke_workflow sums")
    assert (run["trace_id"], run["parent_span_id"]) == (value[3:35], value[36:52])
    assert otlp.span("stroma.node second")["parent_span_id"] == run["span_id"]
    assert sum(point["value"] for point in otlp.points("stroma.node.executions")) == 3


def test_otlp_by_the_environment(stroma: Any, otlp: OtlpReceiver) -> None:
    """OTEL_EXPORTER_OTLP_ENDPOINT and OTEL_SERVICE_NAME are enough; OTEL_SDK_DISABLED switches it off."""
    env = {"OTEL_EXPORTER_OTLP_ENDPOINT": otlp.url, "OTEL_SERVICE_NAME": "letters"}
    assert stroma(*TARGET, env={**env, "OTEL_SDK_DISABLED": "true"}).code == 0
    assert otlp.spans() == []
    assert stroma(*TARGET, env=env).code == 0
    assert otlp.span("invoke_workflow sums")["resource"]["service.name"] == "letters"


def test_an_address_of_traces_alone(stroma: Any, otlp: OtlpReceiver) -> None:
    """Where only traces have an address, or metrics are switched off, no metrics are sent to anywhere."""
    only = {"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": f"{otlp.url}/v1/traces"}
    off = {"OTEL_EXPORTER_OTLP_ENDPOINT": otlp.url, "OTEL_METRICS_EXPORTER": "none"}
    for number, env in enumerate((only, off), 1):
        done = stroma(*TARGET, "-q", env=env)
        assert (done.code, done.err) == (0, "printed by a node\n")
        assert len(otlp.spans()) == 6 * number  # The run, three nodes, and the calls of two of them.
    assert otlp.points("stroma.node.executions") == []


@pytest.mark.parametrize(
    ("attributes", "name"), [("service.name=mail,team=a", "mail"), ("team=a", "stroma"), (None, "stroma")]
)
def test_the_name_of_the_service(stroma: Any, otlp: OtlpReceiver, attributes: str | None, name: str) -> None:
    """It is stroma, unless OTEL_RESOURCE_ATTRIBUTES says another."""
    env = {} if attributes is None else {"OTEL_RESOURCE_ATTRIBUTES": attributes}
    assert stroma(*TARGET, "--otel", otlp.url, env=env).code == 0
    resource = otlp.span("invoke_workflow sums")["resource"]
    assert resource["service.name"] == name
    assert resource.get("team") == (None if attributes is None else "a")


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
def test_prometheus(stroma: Any) -> None:
    """--prometheus HOST:PORT serves the metrics while the run goes on."""
    port = free_port()
    env = {"SECOND_AWAITS": "asyncio.sleep(60)"}
    process = stroma.popen(*TARGET, "--prometheus", f"localhost:{port}", env=env)
    seen = ""
    for line in process.stderr:
        seen += line
        if "second" in line and "start" in line:
            break
    assert f"http://localhost:{port}/metrics" in seen
    page = fetch(f"http://127.0.0.1:{port}/metrics").decode()
    assert 'stroma_runs_in_progress{pipeline="sums"} 1.0' in page
    assert (
        'stroma_node_executions_total{failure_class="",node_id="first",outcome="success",'
        'pipeline="sums",reason=""} 1.0' in page
    )
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=30)
    assert process.returncode == 130


@pytest.mark.parametrize("by", ["option", "variable"])
def test_sentry(stroma: Any, sentry_server: SentryServer, by: str) -> None:
    """--sentry DSN, or SENTRY_DSN: a failed run is one issue, which has arrived when the command ends."""
    options = ("--sentry", sentry_server.dsn) if by == "option" else ()
    env = {**FAIL, **({} if options else {"SENTRY_DSN": sentry_server.dsn})}
    assert stroma(*TARGET, *options, env=env).code == 1
    (event,) = sentry_server.events
    assert event["fingerprint"] == ["stroma", "sums", "second", "AMBIGUOUS", "ValueError"]


def test_datadog(stroma: Any, datadog_agent: DatadogAgent, statsd: StatsdSocket) -> None:
    """--datadog HOST:PORT: spans reach the agent, metrics its DogStatsD port."""
    env = {"DD_DOGSTATSD_PORT": str(statsd.port), "DD_REMOTE_CONFIGURATION_ENABLED": "false"}
    done = stroma(*TARGET, "--datadog", f"127.0.0.1:{datadog_agent.port}", env=env)
    assert done.code == 0, done
    (trace,) = datadog_agent.traces(at_least=1)
    assert sorted((span["name"], span["resource"]) for span in trace) == [
        ("stroma.node", "first"),
        ("stroma.node", "second"),
        ("stroma.node", "third"),
        ("stroma.run", "sums"),
    ]
    runs = [line for line in statsd.statistics() if line.name == "stroma.runs"]
    assert [(line.value, line.tags["status"]) for line in runs] == [("1", "COMPLETED")]


@pytest.mark.slow
def test_a_backend_that_is_down(stroma: Any) -> None:
    """A run is what it is, whoever is not there to hear of it."""
    port = free_port()
    done = stroma(*TARGET, "--otel", f"http://127.0.0.1:{port}", "--sentry", f"http://k@127.0.0.1:{port}/1")
    assert (done.code, json.loads(done.out)) == (0, {"n": 4})


@pytest.mark.slow
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


@pytest.mark.slow
def test_a_port_that_is_taken(stroma: Any) -> None:
    """--prometheus on a port in use is an error of the environment; nothing was called."""
    with http.server.HTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler) as taken:
        done = stroma(*TARGET, "--prometheus", str(taken.server_address[1]))
    assert done.code == 3
    assert "pass another port" in done.err
    assert stroma.calls() == []


def test_assets(inside: Any, tmp_path: Path) -> None:
    """`stroma telemetry assets DIR` writes the dashboards and rules, and over nothing that was changed."""
    done = inside("telemetry", "assets", "out", "--json")
    assert done.code == 0, done
    paths = [Path(path) for path in json.loads(done.out)["paths"]]
    assert [path.name for path in paths] == [
        "datadog-dashboard.json",
        "grafana-dashboard.json",
        "prometheus-alerts.test.yml",
        "prometheus-alerts.yml",
        "prometheus-recording.test.yml",
        "prometheus-recording.yml",
    ]
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
