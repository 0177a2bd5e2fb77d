"""What watching costs per node, as ratios to the same run that nobody watches.

    ./dev run python -m benchmarks.hooks            # each set of hooks: CPU time, medians of rounds that take turns
    ./dev run python -m benchmarks.hooks --unset    # no hooks at all, against a build without them: instructions

The nodes validate a small state and do nothing else, so this is the worst case: a node that waits for a model takes ten
thousand times as long. Exporters hold what they make in memory; what sending costs is up to their SDKs.
`--unset` needs valgrind.
"""

from __future__ import annotations

import argparse
import asyncio
import compileall
import gc
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pydantic import BaseModel

ROUNDS = 15
NODES = 100
SOURCE = Path(__file__).parents[1] / "src" / "stroma"


class State(BaseModel):
    i: int
    s: str


def nodes() -> list[Any]:
    from stroma import NodeContract, stroma_node

    def make(n: int) -> Any:
        async def node(state: State) -> Any:
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
        import sentry_sdk
        from sentry_sdk.transport import Transport

        class Nowhere(Transport):
            def capture_envelope(self, envelope: Any) -> None:
                return None

        client = sentry_sdk.Client(
            "http://key@localhost/1", transport=Nowhere, default_integrations=False, **options
        )
        return sentry_hooks(client=client)

    def datadog() -> Any:
        from ddtrace.trace import tracer

        tracer.enabled = False  # Spans are made, and not sent.
        return datadog_hooks(tracer=tracer, statsd="127.0.0.1:9")

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
    costs: dict[str, list[float]] = {name: [] for name in made}
    for round_ in range(ROUNDS + 1):
        for name, hooks in made.items():
            cost = await _sample(hooks, pipeline)
            if round_:
                costs[name].append(cost)
    base = statistics.median(costs["none"])
    print("| hooks | us a node | more than none | ratio |\n| --- | --- | --- | --- |")
    for name, found in costs.items():
        ratio = statistics.median(a / b for a, b in zip(found, costs["none"], strict=True))
        cost = statistics.median(found)
        print(f"| {name} | {cost:.2f} | {cost - base:+.2f} | {ratio:.2f} |")
    os._exit(0)  # No tracer that is told to send nothing may wait for its agent.


# ---------------------------------------------------------------------- without any

_ASKS = re.compile(
    r"\b(if|elif) (?:begun and |ctx\.limits and )?"
    r"(?:(?:ctx\.)?fire\.on_\w+ is not None(?: and reached is not None)?|ctx\.delivers|run\._at_end is not None):"
)
_FILES = ("_engine.py", "_run.py", "_restore.py", "_announce.py")


def unset() -> None:
    """Instructions of the same runs with the package as it is, and with every question about hooks taken out."""
    with tempfile.TemporaryDirectory() as folder:
        stripped = Path(folder) / "stroma"
        shutil.copytree(SOURCE, stripped, ignore=shutil.ignore_patterns("__pycache__"))
        removed = 0
        for name in _FILES:
            text, count = _ASKS.subn(r"\1 False:", (stripped / name).read_text())
            (stripped / name).write_text(text)
            removed += count
        for package in (SOURCE, stripped):  # Else the first start of each compiles it.
            compileall.compile_dir(package, quiet=1)
        # The difference of many and few runs is free of what starting costs.
        as_it_is, without = (
            _instructions(path, 220) - _instructions(path, 20) for path in (SOURCE.parent, Path(folder))
        )
    per_node = (as_it_is - without) / (200 * NODES)
    print(
        f"{removed} questions about hooks taken out: {as_it_is:,} instructions as it is, {without:,} without them; "
        f"{100 * (as_it_is / without - 1):+.2f} %, {per_node:+.1f} a node"
    )


def _instructions(path: Path, runs: int) -> int:
    env = {**os.environ, "PYTHONPATH": f"{path}:{SOURCE.parents[1]}", "PYTHONHASHSEED": "0"}
    with tempfile.NamedTemporaryFile() as out:
        command = ["valgrind", "--tool=callgrind", f"--callgrind-out-file={out.name}"]
        program = [sys.executable, "-m", "benchmarks.hooks", "--child", str(runs)]
        done = subprocess.run([*command, *program], env=env, capture_output=True, text=True, check=True)
    found = re.search(r"Collected : (\d+)", done.stderr)
    assert found is not None, done.stderr
    return int(found[1])


async def _child(runs: int) -> None:
    import stroma

    assert str(Path(stroma.__file__).parents[1]) == os.environ["PYTHONPATH"].split(":")[0]
    pipeline = nodes()
    from stroma import StromaRunner

    gc.disable()
    for _ in range(runs):
        await StromaRunner.quick().run(pipeline, State(i=0, s="hello"))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m benchmarks.hooks")
    parser.add_argument("--unset", action="store_true")
    parser.add_argument("--child", type=int, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child is not None:
        asyncio.run(_child(given.child))
    elif given.unset:
        unset()
    else:
        asyncio.run(watched())
