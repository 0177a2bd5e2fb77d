"""A backend that is down, slow or raises changes no run, delays none, and is named once."""

import asyncio
import logging
import threading
import time
from typing import Any

import pytest
import sentry_sdk
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from prometheus_client import CollectorRegistry
from tests.kit import ONCE, Num, run_python
from tests.receivers.broken import BrokenBackend

from stroma import RunStatus, StromaRunner, current_node
from stroma.engine import NodeExecution, ReliabilityContext
from stroma.telemetry import datadog_hooks, log_hooks, otel_hooks, prometheus_hooks, sentry_hooks
from stroma.telemetry.observer import AttemptEnd, Observer


def quick(hooks: Any) -> StromaRunner:
    return StromaRunner.quick(hooks=hooks, policy_map=ONCE)


def flaky(runner: StromaRunner) -> Any:
    @runner.node("flaky", input=Num, output=Num)
    async def node(state: Num) -> Any:
        if current_node().attempt == 1:
            raise ConnectionError("no")
        return state, 10, 5, "gpt-4o-mini"

    return node


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["refuses", "hangs", "fails", "resets"])
async def test_a_server_that_is_down_delays_nothing(mode: Any) -> None:
    """Backends that refuse, never answer, fail or hang up slow no run, and flush() keeps its limit."""
    with BrokenBackend(mode) as broken:
        provider = TracerProvider()
        exporter = OTLPSpanExporter(endpoint=f"{broken.url}/v1/traces", timeout=1)
        provider.add_span_processor(BatchSpanProcessor(exporter))
        address = broken.url.removeprefix("http://")
        client = sentry_sdk.Client(
            f"http://key@{address}/1", traces_sample_rate=1.0, default_integrations=False
        )
        hooks = otel_hooks(tracer=provider) | sentry_hooks(client=client)
        runner = quick(hooks)
        started = time.perf_counter()
        for _ in range(20):
            result = await runner.run([flaky(runner)], Num())
            assert result.status is RunStatus.COMPLETED
            assert result.hook_errors == []
        assert time.perf_counter() - started < 3, "20 runs waited for a backend"
        has_started = time.perf_counter()
        await runner.flush(timeout_seconds=0.3)
        assert time.perf_counter() - has_started < 2
        threading.Thread(target=provider.shutdown, daemon=True).start()
        client.close(timeout=0.1)


class Raising:
    """Whatever is asked of it raises."""

    def __getattr__(self, name: str) -> Any:
        def call(*_: Any, **__: Any) -> Any:
            raise OSError(f"{name}: the backend is gone")

        return call


class FailsLater(Observer):
    """Every event raises."""

    name = "the backend"

    def _gone(self, *_: Any) -> None:
        raise OSError("gone")

    def run_started(self, run: ReliabilityContext, state: dict[str, Any]) -> None:
        self._gone()

    def run_ended(self, run: ReliabilityContext, result: Any) -> None:
        self._gone()

    def attempt_started(self, node: NodeExecution, state: dict[str, Any]) -> None:
        self._gone()

    def attempt_ended(self, node: NodeExecution, ended: AttemptEnd) -> None:
        self._gone()

    def retrying(self, node: NodeExecution, *_: Any) -> None:
        self._gone()

    def node_ended(self, node: NodeExecution) -> None:
        self._gone()

    def flush(self, timeout_seconds: float) -> bool:
        raise OSError("gone")


@pytest.mark.core
async def test_errors_are_counted_and_logged_once_per_kind(caplog: pytest.LogCaptureFixture) -> None:
    """An exporter that raises on every call costs nothing: each kind is logged once and then counted."""
    hooks = FailsLater().hooks()
    runner = quick(hooks)
    for _ in range(50):
        result = await runner.run([flaky(runner)], Num())
        assert result.status is RunStatus.COMPLETED
        assert result.hook_errors == []
    assert await runner.flush() is False
    assert hooks.errors == {
        "on_run_start: OSError": 50,
        "on_node_start: OSError": 100,
        "on_node_failure: OSError": 50,
        "on_node_retry: OSError": 50,
        "on_node_success: OSError": 50,
        "at_end: OSError": 50,
        "on_run_end: OSError": 50,
        "flush: OSError": 1,
    }
    logged = [record for record in caplog.records if record.name == "stroma.telemetry"]
    assert len(logged) == len(hooks.errors)
    assert all(record.exc_info for record in logged)


async def test_clients_that_raise() -> None:
    """A DogStatsD client or a logger that raises on every call changes nothing."""
    hooks = [datadog_hooks(tracer=Raising(), statsd=Raising()), log_hooks(Raising())]
    runner = quick(hooks)
    result = await runner.run([flaky(runner)], Num())
    assert result.status is RunStatus.COMPLETED
    assert result.hook_errors == []
    assert all(sum(one.errors.values()) for one in hooks)


async def test_flush_keeps_its_limit_whatever_an_exporter_does(caplog: pytest.LogCaptureFixture) -> None:
    """A flush that never returns is given up after its limit, and the others are flushed all the same."""
    ended = threading.Event()
    flushed: list[str] = []

    class Hangs(Observer):
        name = "a slow one"

        def run_started(self, run: ReliabilityContext, state: dict[str, Any]) -> None: ...

        def flush(self, timeout_seconds: float) -> bool:
            return ended.wait(60)

        def close(self) -> None:
            flushed.append("closed")

    class Quick(Observer):
        def run_started(self, run: ReliabilityContext, state: dict[str, Any]) -> None: ...

        def flush(self, timeout_seconds: float) -> bool:
            flushed.append("flushed")
            return True

    runner = quick([Hangs().hooks(), Quick().hooks()])
    with caplog.at_level(logging.WARNING):
        assert await runner.flush(timeout_seconds=0.05) is False
        assert flushed == ["flushed"]
        assert await runner.aclose(timeout_seconds=0.05) is False
    assert flushed == ["flushed", "flushed", "closed"], "what was opened is closed all the same"
    # An exporter of another test may still be giving up on its backend.
    ours = [record for record in caplog.records if record.name.startswith("stroma")]
    assert [record.getMessage() for record in ours] == [
        "a slow one: not everything was sent within 0.05 s"
    ] * 2
    ended.set()
    assert await quick([Quick().hooks()]).aclose() is True
    assert await StromaRunner.quick().flush() is True


@pytest.mark.parametrize(
    ("factory", "module", "line"),
    [
        (otel_hooks, "opentelemetry", "pip install 'stroma-runner[otel]'"),
        (prometheus_hooks, "prometheus_client", "pip install 'stroma-runner[prometheus]'"),
        (datadog_hooks, "ddtrace", "pip install 'stroma-runner[datadog]'"),
        (
            lambda: datadog_hooks(tracer=Raising(), statsd="a:1"),
            "datadog",
            "pip install 'stroma-runner[datadog]'",
        ),
        (sentry_hooks, "sentry_sdk", "pip install 'stroma-runner[sentry]'"),
    ],
)
def test_a_missing_sdk(factory: Any, module: str, line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without its SDK a factory says which package is required, and the line that installs it."""
    import sys

    for name in [name for name in sys.modules if name == module or name.startswith(f"{module}.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, module, None)
    message = f"is required for .*{line}".replace("[", r"\[").replace("(", r"\(")
    with pytest.raises(ImportError, match=message):
        factory()


@pytest.mark.slow
def test_importing_the_hooks_imports_no_sdk() -> None:
    """`stroma.telemetry` and its names, but the processor of OpenTelemetry's SDK, import none of the SDKs."""
    program = (
        "import sys, stroma.telemetry as t; [getattr(t, n) for n in t.__all__ if n != "
        "'AttributionProcessor'];"
        "print([m for m in ('opentelemetry', 'prometheus_client', 'ddtrace', 'datadog', 'sentry_sdk', "
        "'structlog') if m in sys.modules])"
    )
    assert run_python(code=program) == "[]\n"


async def test_two_threads_at_once() -> None:
    """One set of hooks serves runners in several threads and loops: the counts are the sum."""
    registry = CollectorRegistry()
    runner = quick(prometheus_hooks(registry=registry))
    node = flaky(runner)

    def work() -> None:
        async def runs() -> None:
            for _ in range(20):
                await runner.run([node], Num())

        asyncio.run(runs())

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        await asyncio.to_thread(thread.join)
    labels = {"pipeline": "pipeline", "status": "COMPLETED"}
    assert registry.get_sample_value("stroma_runs_total", labels) == 80
