"""One run, and what three systems say of it: a tree of spans, counters, and log lines. Nothing leaves the process.

    pip install 'stroma-runner[otel,prometheus]'
    python examples/telemetry.py

A model is overloaded once and answers the second time; the ledger refuses the key until it is corrected,
so the first process fails and the second resumes its run. To send the same to a real system, give the
provider an OTLP exporter in a BatchSpanProcessor, and serve the registry with
prometheus_client.start_http_server(9464).
"""

import asyncio
import logging

from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from prometheus_client import CollectorRegistry, generate_latest
from pydantic import BaseModel

from stroma import (
    AsyncInMemoryStore,
    FailureClass,
    FailurePolicy,
    StromaRunner,
    Usage,
    current_node,
    parallel,
)
from stroma.telemetry import log_hooks, otel_hooks, prometheus_hooks

spans, registry = InMemorySpanExporter(), CollectorRegistry()
provider = TracerProvider()
provider.add_span_processor(SimpleSpanProcessor(spans))  # BatchSpanProcessor for whatever has a network in it
tracer = provider.get_tracer("invoices")
runner = StromaRunner.quick(
    store=AsyncInMemoryStore(),
    hooks=otel_hooks(tracer=provider) | prometheus_hooks(registry=registry) | log_hooks(),
    policy_map={FailureClass.RECOVERABLE: FailurePolicy(max_retries=2, backoff_seconds=0.01)},
    pipeline="invoices",
)
ledger = {"key": "expired"}


class Invoice(BaseModel):
    text: str = "Invoice 2081, Acme Ltd, 1,240.00 EUR"
    kind: str = ""
    total: float = 0.0


@runner.node
async def classify(state: Invoice) -> tuple[Invoice, Usage]:
    with tracer.start_as_current_span(
        "chat gpt-4o-mini"
    ) as call:  # as the instrumentation of an LLM client does
        if current_node().attempt == 1:
            raise ConnectionError("overloaded, try again")
        call.set_attributes({"gen_ai.usage.input_tokens": 412, "gen_ai.usage.output_tokens": 9})
    return Invoice(text=state.text, kind="supplier"), Usage(
        input_tokens=412, output_tokens=9, model="gpt-4o-mini"
    )


@runner.node("extract", input=Invoice, output=Invoice)
async def extract(state: Invoice) -> tuple[dict[str, object], Usage]:
    return {"text": state.text, "kind": state.kind or "supplier", "total": 1240.0}, Usage(
        input_tokens=898, output_tokens=64, model="gpt-4o"
    )


class Refused(PermissionError):
    status_code = 401  # what clients of HTTP services carry: a failure for good


@runner.node
async def post(state: Invoice) -> Invoice:
    if ledger["key"] == "expired":
        raise Refused("the ledger refuses this key")
    return state


def show(parent: ReadableSpan | None = None, depth: int = 0) -> None:
    """The spans as a tree, each with how it ended and what happened in it."""
    above = parent.context.span_id if parent and parent.context else None
    for span in spans.get_finished_spans():
        if (None if span.parent is None else span.parent.span_id) == above:
            attempts = (span.attributes or {}).get("stroma.node.attempts", 1)
            print(
                "  " * depth + span.name,
                *(["ERROR", span.status.description] if not span.status.is_unset else []),
                *([f"{attempts} attempts"] if attempts != 1 else []),
                *(["linked to the first run"] if span.links else []),
                sep=", ",
            )
            show(span, depth + 1)


async def main() -> None:
    nodes = [parallel(classify, extract), post]
    await runner.run(nodes, Invoice(), run_id="invoice-2081")
    ledger["key"] = "fresh"
    await runner.run(nodes, Invoice(), run_id="invoice-2081", resume=True)
    await runner.aclose()
    print("\nspans:")
    show()
    print("\nmetrics:")
    counters = (
        "stroma_runs_total",
        "stroma_node_retries_total",
        "stroma_nodes_skipped_total",
        "stroma_cost_usd_total",
    )
    for line in generate_latest(registry).decode().splitlines():
        if line.startswith(counters):
            print(line)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message).100s")
    logging.getLogger("stroma").setLevel(logging.ERROR)  # the engine's own lines say the same
    logging.getLogger("stroma.events").setLevel(logging.INFO)
    asyncio.run(main())
