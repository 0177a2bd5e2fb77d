"""Each receiver takes what the real SDK of its system sends, and misbehaves as it is told to."""

from __future__ import annotations

import asyncio
import gzip
import pathlib
import socket
import subprocess
import sys
import time
import urllib.error
from typing import Any

import pytest
import sentry_sdk
from datadog.dogstatsd import DogStatsd
from opentelemetry import trace
from opentelemetry.exporter.otlp.proto.http import Compression
from opentelemetry.exporter.otlp.proto.http._log_exporter import OTLPLogExporter
from opentelemetry.exporter.otlp.proto.http.metric_exporter import OTLPMetricExporter
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk._logs import LoggerProvider
from opentelemetry.sdk._logs.export import SimpleLogRecordProcessor
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import PeriodicExportingMetricReader
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, start_http_server
from tests.receivers.broken import BrokenBackend
from tests.receivers.datadog import DatadogAgent, StatsdSocket, agent_program
from tests.receivers.otlp import OtlpReceiver
from tests.receivers.processes import fetch
from tests.receivers.prometheus import PrometheusServer, SharedPrometheus, check_metrics
from tests.receivers.sentry import RecordedSentry

pytest_plugins = ["tests.receivers.fixtures"]


def tracer_to(url: str, **options: Any) -> tuple[TracerProvider, trace.Tracer]:
    provider = TracerProvider(resource=Resource({"service.name": "letters"}))
    exporter = OTLPSpanExporter(endpoint=f"{url}/v1/traces", **options)
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    return provider, provider.get_tracer("stroma")


class TestOtlp:
    def test_spans(self, otlp: OtlpReceiver) -> None:
        """Spans arrive with parents, attributes, events, links and status."""
        provider, tracer = tracer_to(otlp.url, compression=Compression.Gzip)
        earlier = trace.SpanContext(trace_id=7, span_id=9, is_remote=True, trace_flags=trace.TraceFlags(1))
        with tracer.start_as_current_span("invoke_workflow triage", links=[trace.Link(earlier)]) as run:
            with tracer.start_as_current_span("stroma.node classify") as node:
                node.set_attribute("stroma.node.attempt", 2)
                node.add_event("stroma.retry", {"delays": [0.5, 1.0]})
                node.set_status(trace.StatusCode.ERROR, "it failed")
        provider.shutdown()
        otlp.spans(at_least=2)
        child, root = otlp.span("stroma.node classify"), otlp.span("invoke_workflow triage")
        assert child["parent_span_id"] == root["span_id"] == f"{run.get_span_context().span_id:016x}"
        assert child["trace_id"] == root["trace_id"]
        assert root["parent_span_id"] == ""
        assert (root["kind"], root["scope"], root["status"]) == ("INTERNAL", "stroma", "UNSET")
        assert root["resource"]["service.name"] == "letters"
        assert [(link["trace_id"], link["span_id"]) for link in root["links"]] == [(f"{7:032x}", f"{9:016x}")]
        assert child["attributes"] == {"stroma.node.attempt": 2}
        assert (child["status"], child["status_message"]) == ("ERROR", "it failed")
        assert [(at["name"], at["attributes"]) for at in child["events"]] == [
            ("stroma.retry", {"delays": [0.5, 1.0]})
        ]
        assert root["start"] <= child["start"] <= child["end"] <= root["end"]

    def test_metrics(self, otlp: OtlpReceiver) -> None:
        """A cumulative series stands there once, with its newest value; histograms have their buckets."""
        reader = PeriodicExportingMetricReader(OTLPMetricExporter(f"{otlp.url}/v1/metrics"), 3_600_000)
        provider = MeterProvider([reader])
        meter = provider.get_meter("stroma")
        executions = meter.create_counter("stroma.node.executions", "{attempt}")
        duration = meter.create_histogram(
            "stroma.node.duration", "s", explicit_bucket_boundaries_advisory=[1, 5]
        )
        for seconds in (0.5, 2.0):
            executions.add(1, {"stroma.node.id": "classify"})
            duration.record(seconds)
            provider.force_flush()
        executions.add(3, {"stroma.node.id": "draft"})
        provider.shutdown()
        (classify, draft) = otlp.points("stroma.node.executions")
        assert (classify["value"], draft["value"]) == (2, 3)
        assert (classify["kind"], classify["monotonic"], classify["temporality"]) == (
            "sum",
            True,
            "CUMULATIVE",
        )
        assert classify["attributes"] == {"stroma.node.id": "classify"}
        (histogram,) = otlp.points("stroma.node.duration")
        assert (histogram["count"], histogram["sum"], histogram["unit"]) == (2, 2.5, "s")
        assert (histogram["bounds"], histogram["buckets"]) == ([1, 5], [1, 1, 0])

    def test_logs(self, otlp: OtlpReceiver) -> None:
        """A log record arrives with the span that it belongs to."""
        provider = LoggerProvider()
        provider.add_log_record_processor(
            SimpleLogRecordProcessor(OTLPLogExporter(endpoint=f"{otlp.url}/v1/logs"))
        )
        with TracerProvider().get_tracer("stroma").start_as_current_span("node") as span:
            provider.get_logger("stroma").emit(
                body="retry", severity_text="INFO", attributes={"stroma.node.attempt": 1}
            )
        provider.shutdown()
        (record,) = otlp.logs(at_least=1)
        assert (record["body"], record["severity"], record["scope"]) == ("retry", "INFO", "stroma")
        assert record["attributes"] == {"stroma.node.attempt": 1}
        assert record["span_id"] == f"{span.get_span_context().span_id:016x}"

    def test_failed_posts_are_retried(self, otlp: OtlpReceiver) -> None:
        """A span that met a 503 arrives at the next try, once, and not before the time that the answer
        named."""
        otlp.fail(1, retry_after=1)
        provider, tracer = tracer_to(otlp.url)
        tracer.start_span("late").end()
        provider.shutdown()
        assert [span["name"] for span in otlp.spans(at_least=1)] == ["late"]
        first, second = otlp.posts(at_least=2)
        assert (first["status"], second["status"]) == (503, 200)
        assert second["time"] - first["time"] >= 0.9

    def test_refuses_and_listens_again(self, otlp: OtlpReceiver) -> None:
        """While it refuses nothing arrives, also over a connection that was open; afterwards it is at the
        same port."""
        provider, tracer = tracer_to(otlp.url, timeout=0.3)
        tracer.start_span("before").end()
        otlp.refuse()
        with pytest.raises(OSError):
            socket.create_connection(("127.0.0.1", otlp.port), timeout=5)
        tracer.start_span("lost").end()
        otlp.listen()
        tracer.start_span("after").end()
        provider.shutdown()
        assert [span["name"] for span in otlp.spans(at_least=2)] == ["before", "after"]

    def test_slow(self, otlp: OtlpReceiver) -> None:
        """It answers only after the time that it was told, and immediately again once it is cleared."""
        otlp.slow(0.3)
        started = time.monotonic()
        fetch_post(f"{otlp.url}/v1/traces", b"")
        assert time.monotonic() - started >= 0.3
        otlp.clear()
        assert otlp.posts() == []

    @pytest.mark.parametrize(
        ("path", "body", "headers", "status"),
        [
            ("/v1/traces", b"\xff\xff", {}, 400),
            ("/v1/traces", b"not gzip", {"Content-Encoding": "gzip"}, 400),
            ("/v1/metrics", gzip.compress(b"\xff"), {"Content-Encoding": "gzip"}, 400),
            ("/v1/traces", b"{", {"Content-Type": "application/json"}, 400),
            ("/v1/traces", b"", {"Content-Type": "text/plain"}, 415),
            ("/v2/traces", b"", {}, 404),
        ],
        ids=["no protobuf", "no gzip", "no protobuf in gzip", "no json", "plain text", "other path"],
    )
    def test_what_it_cannot_read(
        self, otlp: OtlpReceiver, path: str, body: bytes, headers: dict[str, str], status: int
    ) -> None:
        """What is no OTLP is an error to its sender, and is not kept."""
        with pytest.raises(urllib.error.HTTPError) as caught:
            fetch_post(otlp.url + path, body, **headers)
        assert caught.value.code == status
        assert otlp.spans() == otlp.metrics() == []


def fetch_post(url: str, body: bytes, **headers: str) -> None:
    import urllib.request

    request = urllib.request.Request(url, body, {"Content-Type": "application/x-protobuf", **headers})
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=20):
        pass


def registry_of_a_run() -> CollectorRegistry:
    registry = CollectorRegistry()
    runs = Counter("stroma_runs", "Runs that ended.", ["pipeline", "status"], registry=registry)
    runs.labels("triage", "COMPLETED").inc(3)
    runs.labels("triage", "FAILED").inc()
    durations = Histogram(
        "stroma_node_duration_seconds",
        "Time in a node's function.",
        ["pipeline", "node_id"],
        buckets=[0.1, 1, 10],
        registry=registry,
    )
    for seconds in (0.05, 0.5, 0.5, 5):
        durations.labels("triage", "classify").observe(seconds)
    return registry


class TestPrometheus:
    def test_shared_server(self, prometheus: SharedPrometheus) -> None:
        """A registry is scraped while it is exposed, PromQL gives its numbers, and afterwards they are
        gone."""
        with prometheus.exposing(registry_of_a_run()):
            prometheus.scraped()
            assert prometheus.value("sum(stroma_runs_total)") == 4
            assert prometheus.value('stroma_runs_total{status="FAILED"}') == 1
            (result,) = prometheus.query('stroma_runs_total{status="COMPLETED"}')
            assert (result[0]["pipeline"], result[1]) == ("triage", 3)
            median = "histogram_quantile(0.5, sum by (le) (stroma_node_duration_seconds_bucket))"
            assert prometheus.value(median) == pytest.approx(0.55)
        assert prometheus.query("stroma_runs_total") == []

    @pytest.mark.slow
    def test_own_server(self, tmp_path: pathlib.Path) -> None:
        """A server of its own scrapes any target and evaluates alert rules."""
        rules = tmp_path / "rules.yml"
        rules.write_text(
            "groups: [{name: g, rules: [{alert: Busy, expr: stroma_runs_in_progress > 1, labels: {severity: "
            "page}}]}]"
        )
        registry = CollectorRegistry()
        running = Gauge("stroma_runs_in_progress", "Runs not ended yet.", ["pipeline"], registry=registry)
        running.labels("triage").set(2)
        web, thread = start_http_server(0, "127.0.0.1", registry)
        try:
            with PrometheusServer([f"127.0.0.1:{web.server_port}"], rules=[rules]) as server:
                server.scraped()
                assert server.value("stroma_runs_in_progress") == 2
                server.wait_for('count(ALERTS{alertname="Busy",alertstate="firing"})', 1)
                (alert,) = server.alerts()
                assert alert["labels"]["severity"] == "page"
                running.labels("triage").set(0)
                server.wait_for("stroma_runs_in_progress", 0)
        finally:
            web.shutdown()
            web.server_close()
            thread.join()

    @pytest.mark.slow
    def test_check_metrics(self) -> None:
        """promtool has nothing to say about a good registry, and names what is wrong with another."""
        check_metrics(registry_of_a_run())
        registry = CollectorRegistry()
        Gauge("stroma_duration_ms", "", registry=registry)
        with pytest.raises(AssertionError, match="stroma_duration_ms"):
            check_metrics(registry)


DDTRACE = """
import asyncio
from ddtrace.trace import tracer

async def node(name):
    with tracer.trace("stroma.node", resource=name) as span:
        span.set_tag("stroma.node.id", name)
        await asyncio.sleep(0)

async def main():
    with tracer.trace("stroma.run", service="letters", resource="triage"):
        async with asyncio.TaskGroup() as group:
            for name in ("classify", "draft"):
                group.create_task(node(name))

asyncio.run(main())
tracer.flush()
"""


class TestDatadog:
    def test_traces(self, datadog_agent: DatadogAgent) -> None:
        """What ddtrace sends from a process arrives as one trace, parallel nodes under their run."""
        done = subprocess.run(
            [sys.executable, "-c", DDTRACE],
            env=datadog_agent.environment(),
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )
        assert done.returncode == 0, done.stderr
        (trace,) = datadog_agent.traces(at_least=1)
        (run,) = [span for span in trace if span["name"] == "stroma.run"]
        nodes = {span["resource"]: span for span in trace if span["name"] == "stroma.node"}
        assert (run["service"], run["resource"], run["parent_id"]) == ("letters", "triage", 0)
        assert set(nodes) == {"classify", "draft"}
        assert {span["parent_id"] for span in nodes.values()} == {run["span_id"]}
        assert nodes["draft"]["meta"]["stroma.node.id"] == "draft"

    def test_the_agent_is_installed_once(self, datadog_agent: DatadogAgent) -> None:
        """A second look for the program only finds it."""
        started = time.monotonic()
        assert agent_program().exists()
        assert time.monotonic() - started < 1

    def test_cleared(self, datadog_agent: DatadogAgent) -> None:
        """Each test finds an agent that knows nothing."""
        assert datadog_agent.traces() == []

    def test_statsd(self, statsd: StatsdSocket) -> None:
        """What the DogStatsD client sent is in the lines at once, and taken apart on request."""
        client = DogStatsd(
            statsd.host,
            statsd.port,
            constant_tags=["env:test"],
            disable_telemetry=True,
            disable_buffering=True,
        )
        client.increment("stroma.runs", tags=["pipeline:triage", "status:COMPLETED"])
        client.distribution("stroma.run.duration", 1.5)
        client.close_socket()
        assert statsd.lines() == [
            "stroma.runs:1|c|#pipeline:triage,status:COMPLETED,env:test",
            "stroma.run.duration:1.5|d|#env:test",
        ]
        runs, duration = statsd.statistics()
        assert (runs.name, runs.value, runs.type) == ("stroma.runs", "1", "c")
        assert runs.tags == {"env": "test", "pipeline": "triage", "status": "COMPLETED"}
        assert (duration.value, duration.type) == ("1.5", "d")

    def test_statsd_many(self, statsd: StatsdSocket) -> None:
        """Thousands of lines in a row are all there."""
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
            for number in range(5000):
                sender.sendto(f"stroma.runs:{number}|c".encode(), (statsd.host, statsd.port))
        assert len(statsd.lines()) == 5000


class TestSentry:
    async def test_event_and_spans(self, sentry: RecordedSentry) -> None:
        """An event points at the span in which it was captured; parallel spans are siblings."""

        async def node(name: str, fails: bool) -> None:
            with sentry_sdk.new_scope() as scope:
                with scope.start_span(op="stroma.node", name=name):
                    await asyncio.sleep(0)
                    if fails:
                        sentry.client.capture_event(
                            {"message": "it failed", "fingerprint": ["stroma", name]}, scope=scope
                        )

        with sentry_sdk.isolation_scope() as scope:
            scope.set_client(sentry.client)
            with sentry_sdk.start_transaction(op="stroma.run", name="triage"):
                await asyncio.gather(node("classify", False), node("draft", True))
        root, draft = sentry.transport.span("triage"), sentry.transport.span("draft")
        (event,) = sentry.transport.events
        assert (event["message"], event["fingerprint"]) == ("it failed", ["stroma", "draft"])
        assert event["contexts"]["trace"]["span_id"] == draft["span_id"]
        assert draft["op"] == "stroma.node"
        assert sentry.transport.span("classify")["parent_span_id"] == root["span_id"]
        assert draft["parent_span_id"] == root["span_id"]

    def test_streamed_spans(self, sentry: RecordedSentry) -> None:
        """gen_ai spans leave their transaction, and are found all the same."""
        with sentry_sdk.isolation_scope() as scope:
            scope.set_client(sentry.client)
            with sentry_sdk.start_transaction(op="stroma.run", name="triage") as run:
                with sentry_sdk.start_span(op="gen_ai.chat", name="chat gpt") as chat:
                    chat.set_data("gen_ai.usage.input_tokens", 12)
        (transaction,) = sentry.transport.transactions
        assert transaction["spans"] == []
        (streamed,) = sentry.transport.streamed_spans
        assert streamed["attributes"]["gen_ai.usage.input_tokens"] == 12
        result = sentry.transport.span("chat gpt")
        assert (result["op"], result["parent_span_id"]) == ("gen_ai.chat", run.span_id)

    def test_the_global_client_is_left_alone(self, sentry: RecordedSentry) -> None:
        """Recording changes nothing for code that uses the SDK without the recorded client."""
        sentry_sdk.capture_message("for nobody")
        assert sentry.transport.envelopes == []
        assert not sentry_sdk.get_client().is_active()


class TestBroken:
    def test_refuses(self) -> None:
        """No connection is made."""
        with BrokenBackend("refuses") as backend:
            with pytest.raises(ConnectionRefusedError):
                socket.create_connection((backend.host, backend.port), timeout=5)
            assert backend.connections == 0

    def test_hangs(self) -> None:
        """A connection is made, and nothing comes over it."""
        with BrokenBackend("hangs") as backend:
            with pytest.raises(TimeoutError):
                fetch(backend.url, b"hello", seconds=0.2)
            assert backend.connections == 1

    def test_fails(self) -> None:
        """Each request is answered with an error, several of them over one connection."""
        import http.client

        with BrokenBackend("fails") as backend:
            connection = http.client.HTTPConnection(backend.host, backend.port, timeout=5)
            for body in (b"hello", iter([b"in", b"chunks"])):
                connection.request("POST", "/v1/traces", body)
                answer = connection.getresponse()
                answer.read()
                assert answer.status == 500
            connection.close()
            assert backend.connections == 1

    def test_resets(self) -> None:
        """The connection breaks while the answer is awaited."""
        with BrokenBackend("resets") as backend:
            with socket.create_connection((backend.host, backend.port), timeout=5) as connection:
                connection.sendall(b"hello")
                with pytest.raises(ConnectionResetError):
                    connection.recv(1)

    @pytest.mark.parametrize("mode", ["refuses", "hangs", "fails", "resets"])
    def test_an_exporter_gives_up(self, mode: Any) -> None:
        """OpenTelemetry's exporter comes back from each of them within its own limit."""
        started = time.monotonic()
        with BrokenBackend(mode) as backend:
            provider, tracer = tracer_to(backend.url, timeout=0.5)
            tracer.start_span("lost").end()
            provider.shutdown()
        assert time.monotonic() - started < 10
