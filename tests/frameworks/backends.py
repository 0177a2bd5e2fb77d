"""What the tests of real tracing backends share: a run with everything that its bill can get wrong, and a
server."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from pydantic import BaseModel
from tests.kit import retry_policies

from stroma import AsyncInMemoryStore, Pipeline, StromaRunner, Usage, current_node, parallel
from stroma.telemetry import otel_hooks

SMALL, LARGE = "gpt-4o-mini", "gpt-4o"
#: Seconds that a server may take to start on a busy machine, and to show what it has received.
START, SHOW = 240, 60

#: (name, name of the parent) of every span of the run and of its resume, sorted.
TREE = sorted(
    [
        ("invoke_workflow triage", None),
        ("stroma.node flaky", "invoke_workflow triage"),
        ("chat gpt-4o-mini", "stroma.node flaky"),
        ("chat gpt-4o-mini", "stroma.node flaky"),
        ("stroma.node judge", "invoke_workflow triage"),
        ("chat gpt-4o", "stroma.node judge"),
        ("chat gpt-4o", "stroma.node judge"),
        ("stroma.node parallel(left, right)", "invoke_workflow triage"),
        ("stroma.node left", "stroma.node parallel(left, right)"),
        ("chat by the client", "stroma.node left"),
        ("stroma.node right", "stroma.node parallel(left, right)"),
        ("chat gpt-4o-mini", "stroma.node right"),
        ("stroma.node last", "invoke_workflow triage"),
        ("invoke_workflow triage", None),
        ("stroma.node last", "invoke_workflow triage"),
    ],
    key=str,
)

T = TypeVar("T")


class Ticket(BaseModel):
    n: int = 0


@dataclass(frozen=True)
class Sent:
    """What the results of the run and of its resume say that they used."""

    tokens: int
    cost_usd: float


async def send_run(endpoint: str, headers: Mapping[str, str], resource: Mapping[str, str]) -> Sent:
    """Send a run by OTLP over HTTP, and its resume as a second trace.

    One node is tried again after a call that was billed, one breaks its contract once, two run in parallel,
    the call of one of them is on the span of an instrumented client; the last one fails until the run is
    resumed.
    """
    provider = TracerProvider(resource=Resource.create(dict(resource)))
    exporter = OTLPSpanExporter(endpoint=endpoint, headers=dict(headers), timeout=SHOW)
    provider.add_span_processor(BatchSpanProcessor(exporter))
    client = provider.get_tracer("client")
    runner = StromaRunner.quick(
        hooks=otel_hooks(tracer=provider, content="redacted"),
        store=AsyncInMemoryStore(),
        policy_map=retry_policies(1),
        contract_retries={"judge": 1},
    )
    is_repaired = False

    @runner.node("flaky", input=Ticket, output=Ticket)
    async def flaky(state: Ticket) -> Any:
        node = current_node()
        if node.attempt == 1:
            node.report_usage(input_tokens=100, output_tokens=10, model=SMALL)
            raise ConnectionError("again")
        return state, Usage(1000, 100, model=SMALL)

    @runner.node("judge", input=Ticket, output=Ticket)
    async def judge(state: Ticket) -> Any:
        node = current_node()
        if node.attempt == 1:
            return {"n": "no number"}, Usage(500, 50, model=LARGE)
        return state, Usage(500, 60, 100, 0, model=LARGE)

    @runner.node("left", input=Ticket, output=Ticket)
    async def left(state: Ticket) -> Any:
        with client.start_as_current_span("chat by the client") as span:
            span.set_attributes(
                {
                    "gen_ai.operation.name": "chat",
                    "gen_ai.provider.name": "openai",
                    "gen_ai.request.model": SMALL,
                    "gen_ai.response.model": SMALL,
                    "gen_ai.usage.input_tokens": 7,
                    "gen_ai.usage.output_tokens": 3,
                }
            )
        return state, Usage(7, 3, model=SMALL)

    @runner.node("right", input=Ticket, output=Ticket)
    async def right(state: Ticket) -> Any:
        return {"n": state.n + 1}, Usage(9, 1, model=SMALL)

    @runner.node("last", input=Ticket, output=Ticket)
    async def last(state: Ticket) -> Any:
        if not is_repaired:
            raise NotImplementedError("stop")
        return {"n": 42}

    pipeline = Pipeline("triage", [flaky, judge, parallel(left, right), last])
    first = await runner.run(pipeline, Ticket(), run_id="r-1", conversation="thread-17", user="ada")
    is_repaired = True
    second = await runner.resume(pipeline, "r-1")
    assert (first.status.value, second.status.value) == ("FAILED", "RESUMED")
    assert await runner.flush(timeout_seconds=2 * SHOW)
    provider.shutdown()
    return Sent(first.total_tokens + second.total_tokens, first.total_cost_usd + second.total_cost_usd)


def free_port() -> int:
    """Return a port of loopback that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def serving(program: str, *arguments: str, home: Path, ready: str, **environment: str) -> Iterator[None]:
    """Run a program of this environment until the address ``ready`` answers, and end it afterwards."""
    command = [str(Path(sys.executable).with_name(program)), *arguments]
    env = {**os.environ, "DO_NOT_TRACK": "true", **environment}
    env["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{env.get('PATH', '')}"
    output = home / "output"
    with output.open("wb") as file:
        process = subprocess.Popen(
            command, env=env, cwd=home, stdout=file, stderr=file, start_new_session=True
        )
    try:

        def is_up() -> bool:
            assert process.poll() is None, output.read_text()[-3000:]
            try:
                with urllib.request.urlopen(ready, timeout=5) as response:
                    return bool(response.status == 200)
            except OSError:
                return False

        assert eventually(is_up, START), output.read_text()[-3000:]
        yield
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, 15)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, 9)
            process.wait()


def eventually(value: Callable[[], T], seconds: float = SHOW) -> T:
    """Return the first true value, or the last one when the time is up."""
    deadline = time.monotonic() + seconds
    while not (found := value()) and time.monotonic() < deadline:
        time.sleep(0.2)
    return found
