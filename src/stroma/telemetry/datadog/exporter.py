"""The exporter to Datadog."""

from __future__ import annotations

from contextvars import Token
from typing import TYPE_CHECKING, Any

from ddtrace.propagation.http import HTTPPropagator
from ddtrace.trace import Context

from stroma._utils.access import type_name
from stroma.engine.context import ReliabilityContext
from stroma.engine.execution import CURRENT, RunningNode
from stroma.failures.classes import FailureClass
from stroma.telemetry.content import Content
from stroma.telemetry.conventions import attribution_of, note_run, operation_of
from stroma.telemetry.metrics import Metric, MetricsObserver
from stroma.telemetry.observer import (
    CUT_SHORT,
    AttemptEnd,
    FlowPart,
    is_returned,
    place_key,
    redelivered_end_ns,
    span_id_at,
    waited_seconds,
    waits_since,
)
from stroma.trace.result import ExecutionResult

if TYPE_CHECKING:
    from datadog.dogstatsd.base import DogStatsd
    from ddtrace.trace import Span, Tracer


class Datadog(MetricsObserver):
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
        #: The tags of each metric: as many as there are series, which the labels bound.
        self._tags: dict[tuple[str, tuple[str, ...]], list[str]] = {}

    # ------------------------------------------------------------------ runs

    @property
    def destination(self) -> tuple[object, ...]:
        statsd: Any = self._statsd
        address = getattr(statsd, "host", statsd), getattr(statsd, "port", None)
        return self._tracer, *(address if isinstance(address[0], str) else (statsd, None))

    def run_started(self, run: ReliabilityContext, state: dict[str, Any]) -> None:
        super().run_started(run, state)
        if is_returned(run):
            return
        note_run(run)
        span = self._start_root(run)
        of_run = _RunSpan(span)
        span.set_tag("stroma.run.id", run.run_id)
        span.set_tag("stroma.pipeline", run.pipeline)
        span.set_tags({"gen_ai.operation.name": "invoke_workflow", "gen_ai.agent.name": run.pipeline})
        _attribute(span, run)
        self._show(span, "stroma.input", run, state)
        run.keep_trace(self.system, _traceparent_of(span))
        run.notes[self] = of_run
        of_run.here = self.enter(of_run)
        of_run.before = self._tracer.context_provider.active()
        self._tracer.context_provider.activate(span)

    def _start_root(self, run: ReliabilityContext) -> Span:
        """Start the span of a run: that of a killed process under its ids and start, else a new one."""
        parent = self._outer(run) or self._tracer.current_trace_context()
        before, lost = run.first_trace(self.system), self.lost_root(run)
        first = None if before is None else _context_of(before)
        if lost is not None and first is not None and (parent is None or parent.trace_id != first.trace_id):
            # Without a priority the sampler decides as in that process: by the id of the trace.
            parent = Context(first.trace_id)
        span = self._tracer.start_span(
            "stroma.run", child_of=parent, service=self._service, resource=run.pipeline, span_type="worker"
        )
        if first is not None and first.span_id is not None:
            if lost is None:
                span.link_span(first, {"stroma.link": "resumed from"})
            else:
                span.span_id, span.start_ns = first.span_id, lost[1]
        return span

    def run_ended(self, run: ReliabilityContext, result: ExecutionResult) -> None:
        super().run_ended(run, result)
        of_run: _RunSpan | None = run.notes.pop(self, None)
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

    def skipped(self, node: RunningNode) -> None:
        super().skipped(node)
        of_run: _RunSpan | None = node.ctx.notes.get(self)
        if of_run is not None:
            of_run.restored += 1
            self.begin_lost_parts(node)

    def waiting(self, node: RunningNode, reason: str, seconds: float) -> None:
        waits_since(node, self)
        super().waiting(node, reason, seconds)

    # ------------------------------------------------------------------ nodes

    def attempt_started(self, node: RunningNode, state: dict[str, Any]) -> None:
        if self not in node.notes:
            before = self._tracer.context_provider.active()
            of_node = self._begin(node, activate=True)
            of_node.active, of_node.before = True, before
            self._show(of_node.span, "stroma.input", node.ctx, state)
        waited = waited_seconds(node, self)
        if waited:
            node.notes[self].span.set_metric("stroma.node.wait_s", waited)

    def _begin(self, node: RunningNode, *, activate: bool) -> _NodeSpan:
        around = self.around(node)
        above: Any = None if around is None else around.span
        if around is None or node.is_called:
            current = self._tracer.current_trace_context()
            if around is None or (current is not None and current.trace_id == above.trace_id):
                above = current  # Else not the current span: see Observer.around().
        span = self._tracer.start_span(
            "stroma.node", child_of=above, service=self._service, resource=node.node_id, activate=activate
        )
        self._place(node.ctx, span, place_key(node))
        for name, value in (("run.id", node.run_id), ("pipeline", node.pipeline), ("node.id", node.node_id)):
            span.set_tag(f"stroma.{name}", value)
        span.set_tag("stroma.node.kind", node.kind)
        span.set_tags(operation_of(node))
        _attribute(span, node.ctx)
        if node.branch:
            span.set_tag("stroma.node.branch", node.branch)
        if node.redelivered:
            span.set_tag("stroma.redelivered", "true")
        node.notes[self] = record = _NodeSpan(span)
        return record

    def part_started(
        self, run: ReliabilityContext, part: FlowPart, around: _RunSpan | _NodeSpan
    ) -> _NodeSpan:
        name = f"stroma.{part.kind}"
        span = self._tracer.start_span(
            name, child_of=around.span, service=self._service, resource=part.name, activate=False
        )
        self._place(run, span, part.place)
        if part.start_ns is not None:
            span.start_ns = part.start_ns
        for key, value in (("run.id", run.run_id), ("pipeline", run.pipeline), ("node.branch", part.branch)):
            span.set_tag(f"stroma.{key}", value)
        span.set_tags(part.operation)
        _attribute(span, run)
        return _NodeSpan(span)

    def _place(self, run: ReliabilityContext, span: Span, place: str) -> None:
        """Give a span the id of its place in a run; see :func:`span_id_at`."""
        of_run: _RunSpan | None = run.notes.get(self)
        if of_run is not None:
            span.span_id = span_id_at(span.trace_id, of_run.span.span_id, place)

    def attempt_ended(self, node: RunningNode, ended: AttemptEnd) -> None:
        super().attempt_ended(node, ended)
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

    def retrying(
        self, node: RunningNode, attempt: int, delay_seconds: float, failure_class: FailureClass
    ) -> None:
        super().retrying(node, attempt, delay_seconds, failure_class)
        of_node: _NodeSpan | None = node.notes.get(self)
        if of_node is not None:
            of_node.ended = CUT_SHORT

    def node_ended(self, node: RunningNode) -> None:
        of_node: _NodeSpan | None = node.notes.pop(self, None)
        if of_node is None:
            return
        span, ended = of_node.span, of_node.ended
        span.set_metric("stroma.attempts", node.attempt)
        span.set_metric("stroma.tokens", of_node.tokens)
        span.set_metric("stroma.cost_usd", of_node.cost)
        if ended is not None:
            span.set_tag("stroma.outcome", ended.outcome)
            if ended.error is not None and node.redelivered:
                self._name_error(span, node.ctx, ended)
            elif ended.error is not None:
                self._mark(span, node.ctx, ended)
        ended_ns = redelivered_end_ns(node)
        span.finish(None if ended_ns is None else ended_ns / 1e9)
        if of_node.active and CURRENT.get() is node:
            # By itself the tracer makes the run's span active, or nothing, and not what was so for the
            # caller.
            self._tracer.context_provider.activate(of_node.before)

    # ------------------------------------------------------------------ metrics

    def send(self, metric: Metric, value: float, *labels: str) -> None:
        name, statsd = metric.datadog, self._statsd
        if name is None or statsd is None:
            return
        tags = self._tags.get((name, labels))
        if tags is None:
            pairs = zip(metric.labels, labels, strict=True)
            tags = self._tags[name, labels] = [f"{label}:{text}" for label, text in pairs]
        add = statsd.distribution if metric.kind == "seconds" else statsd.increment
        add(name, value, tags=tags)

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
        message = self._content.message(ended.message)
        if message is not None:
            span.set_tag("error.message", message)

    def _outer(self, run: ReliabilityContext) -> Context | None:
        traceparent = run.outer_trace(self.system)
        return None if traceparent is None else _context_of(traceparent)

    def flush(self, timeout_seconds: float) -> bool:
        self._tracer.flush()  # type: ignore[no-untyped-call]
        if self._own_client and self._statsd is not None:
            self._statsd.wait_for_pending()
        elif self._statsd is not None:
            self._statsd.flush()
        return True

    def close(self) -> None:
        if self._own_client and self._statsd is not None:
            self._statsd.close_socket()


def _attribute(span: Span, run: ReliabilityContext) -> None:
    """Set the conversation, user and tags of a run on a span; the user under Datadog's own name."""
    for name, value in attribution_of(run).items():
        span.set_tag(
            "usr.id" if name == "user.id" else name, ",".join(value) if isinstance(value, tuple) else value
        )


class _RunSpan:
    """The span of a run until it ends."""

    __slots__ = ("before", "here", "restored", "span")

    def __init__(self, span: Span) -> None:
        self.span = span
        self.restored = 0
        #: What undoes that the run is current, and what was active before.
        self.here: Token[Any] | None = None
        self.before: Span | Context | None = None


class _NodeSpan:
    """The span of a node, and what its end needs."""

    __slots__ = ("active", "before", "cost", "ended", "span", "tokens")

    def __init__(self, span: Span) -> None:
        self.span = span
        #: Whether the span was made active, and what was before.
        self.active = False
        self.before: Span | Context | None = None
        self.ended: AttemptEnd | None = None
        self.tokens = 0
        self.cost = 0.0


def _traceparent_of(span: Span) -> str:
    """Return what other processes link to, or put their spans under."""
    return f"00-{span.trace_id:032x}-{span.span_id:016x}-01"


def _context_of(traceparent: str) -> Context | None:
    """Return the context of a span of another process; None for a text that is none."""
    parent_context = HTTPPropagator.extract({"traceparent": traceparent})  # type: ignore[no-untyped-call]
    return parent_context if parent_context.trace_id else None
