"""What a killed process did not tell and its successor does is a whole span and counts once."""

import asyncio
import os
import pathlib
import signal
from datetime import datetime
from typing import Any

import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import StatusCode
from prometheus_client import CollectorRegistry
from tests.kit import ONCE, Num
from tests.receivers.sentry import RecordedSentry

from stroma import NodeHooks, RunStatus, SQLiteStore, StromaRunner, current_node
from stroma.telemetry import otel_hooks, prometheus_hooks, sentry_hooks

pytest_plugins = ["tests.receivers.fixtures"]


class Unavailable(ConnectionError):
    pass


async def die(*_: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def run(path: pathlib.Path, hooks: Any) -> Any:
    store = SQLiteStore(path / "runs.db")
    runner = StromaRunner.quick(
        store=store, hooks=hooks, policy_map=ONCE, hook_delivery="at_least_once", resume=True
    )

    @runner.node("flaky", input=Num, output=Num)
    async def flaky(state: Num) -> Any:
        await asyncio.sleep(0.02)
        if current_node().attempt == 1 and state.n:
            raise Unavailable("no")
        return state, 10, 5, "gpt-4o-mini"

    async def go() -> Any:
        async with store:
            return await runner.run([flaky], Num(n=1 if (path / "fails").exists() else 0), run_id="r")

    return asyncio.run(go())


@pytest.mark.slow
@pytest.mark.parametrize("event", ["success", "failure"])
def test_a_redelivered_end_is_whole(event: str, tmp_path: pathlib.Path, sentry: RecordedSentry) -> None:
    """It has the attempt's times, tokens and error type, under the resumed run; only failures are errors."""
    if event == "failure":
        (tmp_path / "fails").touch()
    child = os.fork()
    if child == 0:
        run(tmp_path, NodeHooks(**{f"on_node_{event}": die}))
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL

    entry, registry = InMemorySpanExporter(), CollectorRegistry()
    tracer = TracerProvider()
    tracer.add_span_processor(SimpleSpanProcessor(entry))
    metrics = prometheus_hooks(registry=registry)
    sets = [otel_hooks(tracer=tracer), metrics, sentry_hooks(client=sentry.client)]
    result = run(tmp_path, sets)
    assert result.status is RunStatus.RESUMED
    assert [dict(hooks.errors) for hooks in sets] == [{}, {}, {}]
    nodes = sorted(
        (span for span in entry.get_finished_spans() if span.name == "stroma.node flaky"),
        key=lambda span: span.start_time or 0,
    )
    (root,) = [span for span in entry.get_finished_spans() if span.name == "invoke_workflow pipeline"]
    assert {span.parent.span_id for span in nodes if span.parent} == {root.context.span_id}
    report = nodes[0]
    start, end = report.start_time or 0, report.end_time or 0
    assert end < (root.start_time or 0)
    assert end - start >= 20_000_000
    assert dict(report.attributes or {})["stroma.outcome"] == event
    assert dict(report.attributes or {})["stroma.tokens"] == (15 if event == "success" else 0)
    assert {span.status.status_code for span in nodes} == {StatusCode.UNSET}
    ends = [event.attributes or {} for event in report.events if event.name == "stroma.attempt"]
    kinds = [about.get("error.type") for about in ends]
    assert kinds == [f"{Unavailable.__module__}.Unavailable" if event == "failure" else None]
    labels = {
        "pipeline": "pipeline",
        "node_id": "flaky",
        "outcome": "success",
        "failure_class": "",
        "reason": "",
    }
    assert registry.get_sample_value("stroma_node_executions_total", labels) == 1
    own = [span for span in sentry.transport.spans if span["op"] == "function"]
    assert len(nodes) == len(own)
    told = min(own, key=lambda span: span["start_timestamp"])
    times = [datetime.fromisoformat(told[name]).timestamp() for name in ("start_timestamp", "timestamp")]
    assert times == pytest.approx([start / 1e9, end / 1e9], abs=1e-5)
    assert {span.get("status") for span in own} == {"ok"}
    assert sentry.transport.events == []
