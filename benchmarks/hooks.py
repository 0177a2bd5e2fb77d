"""What watching costs per node: beside the same run that nobody watches, and beside the SDK alone.

    ./dev run python -m benchmarks.hooks            # each set of hooks: least CPU time of rounds that take
    turns ./dev run python -m benchmarks.hooks --instructions  # the same, counted: other work on the machine
    changes nothing ./dev run python -m benchmarks.hooks --unset    # no hooks at all, against a build without
    them: instructions

The nodes validate a small state and do nothing else, so this is the worst case: a node that waits for a model
takes ten thousand times as long. Exporters hold what they make in memory, and DogStatsD sends to a socket
that nobody reads; what sending costs is up to the SDKs. "SDK" makes the same spans, events, metrics and lines
with the same names and numbers of attributes by hand: in a loop, where the processor's caches hold all of it,
and called by the nodes of the same run, as a program without our hooks would. Samples take turns, and the
least of each counts, since other work on the machine slows all of them. `--instructions` and `--unset` need
valgrind.
"""

from __future__ import annotations

import argparse
import asyncio
import compileall
import gc
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import BaseModel

ROUNDS = 15
NODES = 100
SOURCE = Path(__file__).parents[1] / "src" / "stroma"


class State(BaseModel):
    i: int
    s: str


def sentry_client(**options: Any) -> Any:
    """Return a client of Sentry's SDK that sends nothing anywhere."""
    import sentry_sdk
    from sentry_sdk.transport import Transport

    class Nowhere(Transport):
        def capture_envelope(self, envelope: Any) -> None:
            return None

    return sentry_sdk.Client(
        "http://key@localhost/1", transport=Nowhere, default_integrations=False, **options
    )


def nodes(by_hand: ByHand | None = None) -> list[Any]:
    """Return the nodes of a pipeline, which do the work of hooks themselves if ``by_hand`` is given."""
    from stroma import NodeContract, stroma_node

    runs: list[Any] = []

    def make(n: int) -> Any:
        async def node(state: State) -> Any:
            if by_hand is not None:
                if n == 0:
                    runs.append(by_hand.begin())
                by_hand.one(n, runs[-1])
                if n == NODES - 1:
                    by_hand.end(runs.pop())
            return {"i": state.i + 1, "s": state.s}, 3, 4, "gpt-4o-mini"

        contract: Any = NodeContract(node_id=f"n{n}", input_schema=State, output_schema=State)
        return stroma_node(f"n{n}", contract)(node)

    return [make(n) for n in range(NODES)]


def sets() -> dict[str, Callable[[], Any]]:
    """By name: what makes the hooks."""
    from stroma import NodeHooks
    from stroma.telemetry import datadog_hooks, log_hooks, otel_hooks, prometheus_hooks, sentry_hooks

    async def watch(*_: Any) -> None:
        return None

    def otel(**options: Any) -> Any:
        from opentelemetry.sdk.metrics import MeterProvider
        from opentelemetry.sdk.metrics.export import InMemoryMetricReader
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult

        class Nowhere(SpanExporter):
            def export(self, spans: Any) -> SpanExportResult:
                return SpanExportResult.SUCCESS

        tracer = TracerProvider(shutdown_on_exit=False)
        tracer.add_span_processor(BatchSpanProcessor(Nowhere()))
        return otel_hooks(tracer=tracer, meter=MeterProvider([InMemoryMetricReader()]), **options)

    def prometheus() -> Any:
        from prometheus_client import CollectorRegistry

        return prometheus_hooks(registry=CollectorRegistry())

    def sentry(**options: Any) -> Any:
        client = sentry_client(**options)
        return sentry_hooks(client=client)

    def datadog() -> Any:
        from ddtrace.trace import tracer

        tracer.enabled = False  # Spans are made, and not sent.
        return datadog_hooks(tracer=tracer, statsd=f"127.0.0.1:{_unread_port()}")

    def logs() -> Any:
        import logging

        logger = logging.getLogger("benchmark")
        logger.propagate = False
        logger.addHandler(logging.NullHandler())
        logger.setLevel(logging.INFO)
        return log_hooks(logger)

    three = dict.fromkeys(("on_node_start", "on_node_success", "on_node_failure"), watch)
    return {
        "three hooks that do nothing": lambda: NodeHooks(**three),
        "prometheus_hooks": prometheus,
        "otel_hooks": otel,
        'otel_hooks(content="redacted")': lambda: otel(content="redacted"),
        "sentry_hooks, no tracing": sentry,
        "sentry_hooks, all traced": lambda: sentry(traces_sample_rate=1.0),
        "datadog_hooks": datadog,
        "log_hooks": logs,
    }


def _unread_port() -> int:
    """Return the port of a UDP socket that nobody reads: a closed one answers each packet with an error."""
    receiver = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    receiver.bind(("127.0.0.1", 0))
    _receivers.append(receiver)
    return int(receiver.getsockname()[1])


_receivers: list[socket.socket] = []


class ByHand(NamedTuple):
    """The work of a set of hooks as a program does it with the SDK alone.

    Attributes:
        begin: what a run begins with; returns what the other two get.
        one: the work for the node of this number.
        end: what it ends with.
    """

    begin: Callable[[], Any]
    one: Callable[[int, Any], None]
    end: Callable[[Any], None]

    def work(self) -> None:
        """Do the work of one run in a loop."""
        run = self.begin()
        for number in range(NODES):
            self.one(number, run)
        self.end(run)


def nothing(*_: Any) -> None:
    """Begin or end a run of which nothing is recorded."""


def alone() -> dict[str, Callable[[], ByHand]]:
    """By name of the hooks: what does their work for one run with the SDK alone."""

    def otel() -> ByHand:
        from opentelemetry import context, trace
        from opentelemetry.sdk.metrics import MeterProvider
        from opentelemetry.sdk.metrics.export import InMemoryMetricReader
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult

        class Nowhere(SpanExporter):
            def export(self, spans: Any) -> SpanExportResult:
                return SpanExportResult.SUCCESS

        provider = TracerProvider(shutdown_on_exit=False)
        provider.add_span_processor(BatchSpanProcessor(Nowhere()))
        tracer = provider.get_tracer("alone")
        meter = MeterProvider([InMemoryMetricReader()]).get_meter("alone")
        executions, tokens, cost = map(meter.create_counter, ("executions", "tokens", "cost"))
        seconds = meter.create_histogram("seconds")

        def one(number: int, run: Any) -> None:
            about = {"pipeline": "pipeline", "run": "r", "session": "r", "kind": "CHAIN", "id": f"n{number}"}
            inside = trace.set_span_in_context(run)
            span = tracer.start_span(
                "node", inside, attributes={**about, "node.kind": "node", "position": number}
            )
            token = context.attach(trace.set_span_in_context(span, inside))
            span.set_attribute("input", "{}")
            place = {"pipeline": "pipeline", "node": f"n{number}"}
            executions.add(1, {**place, "outcome": "success", "failure_class": ""})
            seconds.record(0.001, place)
            model = {**place, "model": "gpt-4o-mini"}
            tokens.add(3, {**model, "direction": "input"})
            tokens.add(4, {**model, "direction": "output"})
            cost.add(0.001, model)
            span.add_event("attempt", {"attempt": 1, "outcome": "success", "seconds": 0.001, "tokens": 7})
            call = tracer.start_span(
                "chat",
                trace.set_span_in_context(span, inside),
                start_time=time.time_ns(),
                attributes={**about, **{f"call.{n}": n for n in range(15)}},
            )
            call.set_attribute("outcome", "success")
            call.end()
            context.detach(token)
            span.set_attributes(
                {"attempts": 1, "tokens": 7, "cost": 0.001, "output": "{}", "outcome": "success"}
            )
            span.end()

        def begin() -> Any:
            return tracer.start_span("run", attributes={"pipeline": "pipeline"})

        return ByHand(begin, one, lambda run: run.end())

    def prometheus() -> ByHand:
        from prometheus_client import CollectorRegistry, Counter, Histogram

        registry = CollectorRegistry()
        place = ("pipeline", "node")
        executions = Counter("executions", "-", (*place, "outcome", "failure_class"), registry=registry)
        tokens = Counter("tokens", "-", (*place, "model", "direction"), registry=registry)
        cost = Counter("cost", "-", (*place, "model"), registry=registry)
        seconds = Histogram("seconds", "-", place, registry=registry)

        def one(number: int, _: Any) -> None:
            at = ("pipeline", f"n{number}")
            executions.labels(*at, "success", "").inc()
            seconds.labels(*at).observe(0.001)
            tokens.labels(*at, "gpt-4o-mini", "input").inc(3)
            tokens.labels(*at, "gpt-4o-mini", "output").inc(4)
            cost.labels(*at, "gpt-4o-mini").inc(0.001)

        return ByHand(nothing, one, nothing)

    def datadog() -> ByHand:
        from datadog.dogstatsd.base import DogStatsd
        from ddtrace.trace import tracer

        tracer.enabled = False
        statsd = DogStatsd(
            host="127.0.0.1",
            port=_unread_port(),
            disable_telemetry=True,
            disable_buffering=False,
            disable_background_sender=False,
            sender_queue_size=1000,
        )

        def one(number: int, run: Any) -> None:
            before = tracer.context_provider.active()
            span = tracer.start_span("stroma.node", child_of=run, resource=f"n{number}", activate=True)
            for name in ("run.id", "pipeline", "node.id", "node.kind", "input", "output", "outcome"):
                span.set_tag(f"stroma.{name}", "value")
            for name in ("attempts", "tokens", "cost_usd"):
                span.set_metric(f"stroma.{name}", 7)
            place = ["pipeline:pipeline", f"node_id:n{number}"]
            statsd.increment("stroma.node.executions", 1, tags=[*place, "outcome:success", "failure_class:"])
            statsd.distribution("stroma.node.duration", 0.001, tags=place)
            model = [*place, "model:gpt-4o-mini"]
            statsd.increment("stroma.tokens", 3, tags=[*model, "direction:input"])
            statsd.increment("stroma.tokens", 4, tags=[*model, "direction:output"])
            statsd.increment("stroma.cost_usd", 0.001, tags=model)
            span.finish()
            tracer.context_provider.activate(before)

        def begin() -> Any:
            return tracer.start_span("stroma.run", resource="pipeline")

        return ByHand(begin, one, lambda run: run.finish())

    def logs() -> ByHand:
        import logging

        logger = logging.getLogger("alone")
        logger.propagate = False
        logger.addHandler(logging.NullHandler())
        logger.setLevel(logging.INFO)
        names = ("run_id", "pipeline", "node_id", "position", "branch", "attempt", "outcome", "duration_ms")

        def one(number: int, _: Any) -> None:
            fields: dict[str, Any] = dict.fromkeys((*names, "tokens", "cost_usd", "model", "output"), number)
            text = " ".join(f"{name}={value}" for name, value in fields.items())
            logger.info("node success: %s", text, extra=fields)

        return ByHand(nothing, one, nothing)

    def sentry(**options: Any) -> ByHand:
        import sentry_sdk

        client = sentry_client(**options)

        def one(number: int, run: Any) -> None:
            with sentry_sdk.isolation_scope() as isolation:
                scope = sentry_sdk.get_current_scope()
                scope.set_client(client)
                isolation.set_tag("stroma.node", f"n{number}")
                span = run.start_child(op="gen_ai.execute_tool", name=f"n{number}")
                scope.span = span
                for name in ("operation", "tool", "id", "kind", "input", "output", "attempts", "outcome"):
                    span.set_data(name, "value")
                span.set_status("ok")
                span.finish(scope)

        around: list[Any] = []

        def begin() -> Any:
            around.append(sentry_sdk.isolation_scope())
            around[-1].__enter__()
            scope = sentry_sdk.get_current_scope()
            scope.set_client(client)
            run = sentry_sdk.start_transaction(op="gen_ai.invoke_agent", name="pipeline")
            scope.span = run
            return run

        def end(run: Any) -> None:
            run.finish(sentry_sdk.get_current_scope())
            around.pop().__exit__(None, None, None)

        return ByHand(begin, one, end)

    return {
        "prometheus_hooks": prometheus,
        "otel_hooks": otel,
        "sentry_hooks, no tracing": sentry,
        "sentry_hooks, all traced": lambda: sentry(traces_sample_rate=1.0),
        "datadog_hooks": datadog,
        "log_hooks": logs,
    }


def _sample_alone(by_hand: ByHand) -> float:
    """CPU microseconds per node of an SDK alone, in a loop."""
    gc.collect()
    begin = time.process_time()
    for _ in range(20):  # For as long as the sample of hooks beside it.
        by_hand.work()
    return (time.process_time() - begin) / (20 * NODES) * 1e6


async def _sample(hooks: Any, pipeline: list[Any]) -> float:
    """CPU microseconds per node."""
    from stroma import StromaRunner

    gc.collect()
    begin = time.process_time()
    for _ in range(5):
        result = await StromaRunner.quick(hooks=hooks).run(pipeline, State(i=0, s="hello"))
        assert result.status == "COMPLETED"
        assert result.total_tokens == 7 * NODES
    return (time.process_time() - begin) / (5 * NODES) * 1e6


async def watched() -> None:
    pipeline = nodes()
    made = {"none": None, **{name: make() for name, make in sets().items()}}
    raw = {name: make() for name, make in alone().items()}
    pipelines = {name: nodes(work) for name, work in raw.items()}
    costs: dict[str, list[float]] = {name: [] for name in made}
    in_loop: dict[str, list[float]] = {name: [] for name in raw}
    in_nodes: dict[str, list[float]] = {name: [] for name in raw}
    for round_ in range(ROUNDS + 1):
        samples = [(costs, name, await _sample(hooks, pipeline)) for name, hooks in made.items()]
        samples += [(in_loop, name, _sample_alone(work)) for name, work in raw.items()]
        samples += [(in_nodes, name, await _sample(None, own)) for name, own in pipelines.items()]
        if round_:  # The first one fills caches.
            for into, name, cost in samples:
                into[name].append(cost)
    base = min(costs["none"])
    print(
        "| hooks | us a node | more than none | SDK in a loop | times that | SDK in the nodes | times that |\n"
        "| --- | --- | --- | --- | --- | --- | --- |"
    )
    for name, found in costs.items():
        more = min(found) - base
        line = f"| {name} | {min(found):.1f} | {more:+.1f} | "
        if name in raw:
            loop, by_nodes = min(in_loop[name]), min(in_nodes[name]) - base
            line += f"{loop:.1f} | {more / loop:.1f} | {by_nodes:.1f} | {more / by_nodes:.1f} |"
        print(line if name in raw else line + " | | | |")
    sys.stdout.flush()
    os._exit(0)  # No tracer that is told to send nothing may wait for its agent.


# ---------------------------------------------------------------------- without any

#: The questions about hooks that a run or a node without any asks.
_ASKS = re.compile(
    r"\b(if|elif) (?:ctx\.account\.limits and )?"
    r"(?:(?:self\.)?ctx\.fire\.on_\w+ is not None|calls is not None"
    r"|ctx\.fire\.delivers(?: and self\.row is not None)?):"
)
_FILES = ("attempt.py", "lifecycle.py", "restore.py")


def strip_questions(package: Path) -> int:
    """Take the questions about hooks out of a copy of the package; return how many there were."""
    removed = 0
    for name in _FILES:
        path = package / "engine" / name
        text, count = _ASKS.subn(r"\1 False:", path.read_text())
        assert count, f"{path} asks nothing about hooks; name the files that do in _FILES"
        path.write_text(text)
        removed += count
    return removed


def unset() -> None:
    """Instructions of the same runs with the package as it is, and with every question about hooks taken out."""
    with tempfile.TemporaryDirectory() as folder:
        stripped = Path(folder) / "stroma"
        shutil.copytree(SOURCE, stripped, ignore=shutil.ignore_patterns("__pycache__"))
        removed = strip_questions(stripped)
        for package in (SOURCE, stripped):  # Else the first start of each compiles it.
            compileall.compile_dir(package, quiet=1)
        # The difference of many and few runs is free of what starting costs.
        as_it_is, without = (_instructions(path, 200) for path in (SOURCE.parent, Path(folder)))
    per_node = (as_it_is - without) / (200 * NODES)
    print(
        f"{removed} questions about hooks taken out: {as_it_is:,} instructions as it is, {without:,} without them; "
        f"{100 * (as_it_is / without - 1):+.2f} %, {per_node:+.1f} a node"
    )


def counted() -> None:
    """Instructions per node: of hooks, and of the SDK alone in the nodes."""
    base = _instructions(SOURCE.parent, 20)
    print("| hooks | thousands a node | SDK in the nodes | times that |\n| --- | --- | --- | --- |")
    for name in alone():
        ours, by_hand = (
            (_instructions(SOURCE.parent, 20, option, name) - base) / (20_000 * NODES)
            for option in ("--hooks", "--by-hand")
        )
        print(f"| {name} | {ours:.0f} | {by_hand:.0f} | {ours / by_hand:.1f} |", flush=True)


def _instructions(path: Path, runs: int, *options: str) -> int:
    """Return the instructions of some runs, as the difference of two processes: it is free of what starting costs."""
    return _instructions_of_process(path, runs + 5, *options) - _instructions_of_process(path, 5, *options)


def _instructions_of_process(path: Path, runs: int, *options: str) -> int:
    env = {**os.environ, "PYTHONPATH": f"{path}:{SOURCE.parents[1]}", "PYTHONHASHSEED": "0"}
    with tempfile.NamedTemporaryFile() as out:
        command = ["valgrind", "--tool=callgrind", f"--callgrind-out-file={out.name}"]
        program = [sys.executable, "-m", "benchmarks.hooks", "--child", str(runs), *options]
        done = subprocess.run([*command, *program], env=env, capture_output=True, text=True, check=True)
    found = re.search(r"Collected : (\d+)", done.stderr)
    assert found is not None, done.stderr
    return int(found[1])


async def _child(runs: int, hooks: str | None, by_hand: str | None) -> None:
    import stroma

    assert str(Path(stroma.__file__).parents[1]) == os.environ["PYTHONPATH"].split(":")[0]
    made = None if hooks is None else sets()[hooks]()
    pipeline = nodes(None if by_hand is None else alone()[by_hand]())
    from stroma import StromaRunner

    gc.disable()
    for _ in range(runs):
        await StromaRunner.quick(hooks=made).run(pipeline, State(i=0, s="hello"))
    sys.stderr.flush()
    os._exit(0)  # As in watched().


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m benchmarks.hooks")
    parser.add_argument("--unset", action="store_true")
    parser.add_argument("--instructions", action="store_true")
    for option in ("--child", "--hooks", "--by-hand"):
        parser.add_argument(option, type=int if option == "--child" else str, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child is not None:
        asyncio.run(_child(given.child, given.hooks, given.by_hand))
    elif given.unset:
        unset()
    elif given.instructions:
        counted()
    else:
        asyncio.run(watched())
