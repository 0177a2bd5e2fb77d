"""The exporter to Datadog."""

from __future__ import annotations

from time import perf_counter
from typing import TYPE_CHECKING, Any

from stroma.engine.context import ReliabilityContext
from stroma.engine.execution import NodeExecution, current_node_or_none
from stroma.failures.classes import FailureClass
from stroma.failures.failure import type_name
from stroma.telemetry.content import Content
from stroma.telemetry.conventions import attribution_of, note_run, operation_of
from stroma.telemetry.datadog.losses import watch_client, watch_writer
from stroma.telemetry.datadog.metrics import DatadogMetrics
from stroma.telemetry.datadog.spans import DatadogNode, DatadogRun, context_of, traceparent_of
from stroma.telemetry.losses import Losses
from stroma.telemetry.observer import (
    CUT_SHORT,
    AttemptEnd,
    Observer,
    is_returned,
    waited_seconds,
    waits_since,
)
from stroma.telemetry.parts import FlowPart
from stroma.trace.result import ExecutionResult

if TYPE_CHECKING:
    from datadog.dogstatsd.base import DogStatsd
    from ddtrace.trace import Context, Span, Tracer

__all__ = ["Datadog"]


class Datadog(Observer):
    """The hooks of :func:`stroma.telemetry.datadog_hooks`."""

    name = "Datadog"
    system = "datadog"

    def __init__(
        self,
        tracer: Tracer,
        statsd: DogStatsd | None,
        service: str | None,
        content: Content,
        *,
        own_client: bool,
    ) -> None:
        super().__init__()
        self._tracer, self._statsd, self._service, self._content = tracer, statsd, service, content
        self._own_client = own_client
        self._metrics = DatadogMetrics(statsd)
        self._losses = Losses(self.name)
        self._watch_losses()

    # ------------------------------------------------------------------ runs

    @property
    def destination(self) -> object:
        statsd: Any = self._statsd
        address = getattr(statsd, "host", statsd), getattr(statsd, "port", None)
        return self._tracer, *(address if isinstance(address[0], str) else (statsd, None))

    def run_started(self, run: ReliabilityContext, state: dict[str, Any]) -> None:
        if is_returned(run):
            return
        note_run(run)
        parent = self._outer(run)
        span = self._tracer.start_span(
            "stroma.run",
            child_of=parent or self._tracer.current_trace_context(),
            service=self._service,
            resource=run.pipeline,
            span_type="worker",
        )
        of_run = DatadogRun(span)
        span.set_tag("stroma.run.id", run.run_id)
        span.set_tag("stroma.pipeline", run.pipeline)
        span.set_tags({"gen_ai.operation.name": "invoke_workflow", "gen_ai.agent.name": run.pipeline})
        _attribute(span, run)
        self._show(span, "stroma.input", run, state)
        began = run.first_trace(self.system)
        first = None if began is None else context_of(began)
        if first is not None:
            span.link_span(first, {"stroma.link": "resumed from"})
        run.keep_trace(self.system, traceparent_of(span))
        run.notes[self] = of_run
        of_run.here = self.enter(of_run)
        of_run.before = self._tracer.context_provider.active()
        self._tracer.context_provider.activate(span)

    def run_ended(self, run: ReliabilityContext, result: ExecutionResult) -> None:
        of_run: DatadogRun | None = run.notes.pop(self, None)
        if is_returned(run):
            self._metrics.run_returned(run, result.status.value)
            return
        if of_run is None:
            return
        span = of_run.span
        failed = AttemptEnd.finally_(result)
        span.set_tag("stroma.status", result.status.value)
        span.set_metric("stroma.tokens", result.total_tokens)
        span.set_metric("stroma.cost_usd", result.total_cost_usd)
        if of_run.restored:
            span.set_metric("stroma.nodes.restored", of_run.restored)
        if failed is not None:
            self._mark(span, run, failed)
        for part, ended_ns in self.ended_parts(run):
            part.span.finish(ended_ns / 1e9 if ended_ns else None)
        span.finish()
        if of_run.here is not None and self.here() is of_run:
            # A coroutine that is closed from elsewhere has left its context behind.
            self._tracer.context_provider.activate(of_run.before)
            self.leave(of_run.here)
        self._metrics.run_ended(run, result, perf_counter() - of_run.since)

    def hook_raised(self, run: ReliabilityContext | None, hook: str) -> None:
        if run is not None:
            self._metrics.hook_raised(run, hook)

    def skipped(self, node: NodeExecution) -> None:
        if is_returned(node.ctx):
            return
        self._metrics.restored(node)
        of_run: DatadogRun | None = node.ctx.notes.get(self)
        if of_run is not None:
            of_run.restored += 1

    def budget_warning(self, run: ReliabilityContext, dimension: str, used: float, limit: float) -> None:
        self._metrics.budget_warned(run, dimension)

    def waiting(self, node: NodeExecution, reason: str, seconds: float) -> None:
        waits_since(node, self)
        self._metrics.queued(node)

    def circuit_changed(self, run: ReliabilityContext, key: str, state: str) -> None:
        self._metrics.circuit_changed(run, key, state)

    # ------------------------------------------------------------------ nodes

    def attempt_started(self, node: NodeExecution, state: dict[str, Any]) -> None:
        if self not in node.notes:
            before = self._tracer.context_provider.active()
            of_node = self._begin(node, activate=True)
            of_node.active, of_node.before = True, before
            self._show(of_node.span, "stroma.input", node.ctx, state)
        waited = waited_seconds(node, self)
        if waited:
            node.notes[self].span.set_metric("stroma.node.wait_s", waited)

    def _begin(self, node: NodeExecution, *, activate: bool) -> DatadogNode:
        around = self.around(node)
        above: Any = None if around is None else around.span
        if around is None or node.is_called:
            current = self._tracer.current_trace_context()
            if around is None or (current is not None and current.trace_id == above.trace_id):
                above = current  # Else not the current span: see Observer.around().
        span = self._tracer.start_span(
            "stroma.node",
            child_of=above,
            service=self._service,
            resource=node.node_id,
            activate=activate,
        )
        for name, value in (("run.id", node.run_id), ("pipeline", node.pipeline), ("node.id", node.node_id)):
            span.set_tag(f"stroma.{name}", value)
        span.set_tag("stroma.node.kind", node.kind)
        span.set_tags(operation_of(node))
        _attribute(span, node.ctx)
        if node.branch:
            span.set_tag("stroma.node.branch", node.branch)
        if node.redelivered:
            span.set_tag("stroma.redelivered", "true")
        node.notes[self] = record = DatadogNode(span)
        return record

    def part_started(
        self, run: ReliabilityContext, part: FlowPart, around: DatadogRun | DatadogNode
    ) -> DatadogNode:
        name = "stroma.map" if part.is_map else "stroma.flow"
        span = self._tracer.start_span(
            name, child_of=around.span, service=self._service, resource=part.name, activate=False
        )
        for key, value in (("run.id", run.run_id), ("pipeline", run.pipeline), ("node.branch", part.branch)):
            span.set_tag(f"stroma.{key}", value)
        if not part.is_map:
            span.set_tags({"gen_ai.operation.name": "invoke_workflow", "gen_ai.agent.name": part.name})
        _attribute(span, run)
        return DatadogNode(span)

    def attempt_ended(self, node: NodeExecution, ended: AttemptEnd) -> None:
        usage = node.usage
        of_node = node.notes.get(self)
        if of_node is None:  # Input that broke its contract, or an end that is reported again after a crash.
            of_node = self._begin(node, activate=False)
            if node.started_ns is not None:
                of_node.span.start_ns = node.started_ns
        of_node.ended = ended
        of_node.tokens += usage.tokens
        of_node.cost += usage.cost_usd
        if ended.output is not None:
            self._show(of_node.span, "stroma.output", node.ctx, ended.output)
        self._metrics.attempt_ended(node, ended)

    def retrying(
        self, node: NodeExecution, attempt: int, delay_seconds: float, failure_class: FailureClass
    ) -> None:
        self._metrics.retried(node, failure_class.value)
        of_node: DatadogNode | None = node.notes.get(self)
        if of_node is not None:
            of_node.ended = CUT_SHORT

    def limit_cooled_down(self, run: ReliabilityContext, limit: str, seconds: float) -> None:
        self._metrics.limit_cooled_down(run, limit)

    def node_ended(self, node: NodeExecution) -> None:
        of_node: DatadogNode | None = node.notes.pop(self, None)
        if of_node is None:
            return
        span, ended = of_node.span, of_node.ended
        span.set_metric("stroma.attempts", node.attempt)
        span.set_metric("stroma.tokens", of_node.tokens)
        span.set_metric("stroma.cost_usd", of_node.cost)
        if ended is not None:
            span.set_tag("stroma.outcome", ended.outcome)
            if ended.error is not None and node.redelivered:  # It may have been retried since.
                self._name_error(span, node.ctx, ended)
            elif ended.error is not None:
                self._mark(span, node.ctx, ended)
        if node.redelivered and node.started_ns is not None:
            span.finish((node.started_ns + (node.duration_ms or 0.0) * 1e6) / 1e9)
        else:
            span.finish()
        if of_node.active and current_node_or_none() is node:
            # By itself the tracer makes the run's span active, or nothing, and not what was so for the
            # caller.
            self._tracer.context_provider.activate(of_node.before)

    # ------------------------------------------------------------------ small things

    def _show(self, span: Span, name: str, run: ReliabilityContext, state: dict[str, Any]) -> None:
        text = self._content.state(run, state)
        if text:
            span.set_tag(name, text)

    def _mark(self, span: Span, run: ReliabilityContext, ended: AttemptEnd) -> None:
        """Make a span an error. Not set_exc_info(): messages and stacks may hold what nodes were given."""
        span.error = 1
        self._name_error(span, run, ended)

    def _name_error(self, span: Span, run: ReliabilityContext, ended: AttemptEnd) -> None:
        assert ended.error is not None
        span.set_tag("error.type", type_name(ended.error))
        span.set_tag("stroma.failure_class", ended.class_name)
        if ended.reason is not None:
            span.set_tag("stroma.reason", ended.reason)
        message = self._content.message(run, ended.error)
        if message is not None:
            span.set_tag("error.message", message)

    def _outer(self, run: ReliabilityContext) -> Context | None:
        traceparent = run.outer_trace(self.system)
        return None if traceparent is None else context_of(traceparent)

    def flush(self, timeout_seconds: float) -> bool:
        self._watch_losses()
        self._tracer.flush()  # type: ignore[no-untyped-call]
        if self._own_client and self._statsd is not None:
            self._statsd.wait_for_pending()
        elif self._statsd is not None:
            self._statsd.flush()
        return self._losses.take() == 0

    def _watch_losses(self) -> None:
        """Count what the tracer's writer, and our own client of DogStatsD, drop."""
        watch_writer(self._losses, self._tracer)
        if self._own_client:
            watch_client(self._losses, self._statsd)

    def close(self) -> None:
        if self._own_client and self._statsd is not None:
            self._statsd.close_socket()


def _attribute(span: Span, run: ReliabilityContext) -> None:
    """Set the conversation, user and tags of a run on a span; the user under Datadog's own name."""
    for name, value in attribution_of(run).items():
        span.set_tag(
            "usr.id" if name == "user.id" else name, ",".join(value) if isinstance(value, tuple) else value
        )
