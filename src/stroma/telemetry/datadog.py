"""Datadog: spans through ddtrace, metrics through DogStatsD."""

from __future__ import annotations

from collections.abc import Callable, Collection
from contextvars import Token
from time import perf_counter
from typing import TYPE_CHECKING, Any, Final

from stroma.engine.context import ReliabilityContext
from stroma.engine.execution import NodeExecution, current_node
from stroma.failures.classes import FailureClass
from stroma.telemetry.content import DENY_KEYS, Content, ContentMode, type_name
from stroma.telemetry.labels import MetricLabels
from stroma.telemetry.losses import LossCounter, Losses
from stroma.telemetry.observer import (
    CUT_SHORT,
    Ended,
    ExporterHooks,
    Observer,
    exceeded,
    is_returned,
    may_be_retried,
    missing,
    seconds_elsewhere,
    waited_seconds,
    waits_since,
)
from stroma.trace.result import ExecutionResult

if TYPE_CHECKING:
    from datadog.dogstatsd.base import DogStatsd
    from ddtrace.trace import Context, Span, Tracer

__all__ = ["datadog_hooks"]


def datadog_hooks(
    *,
    tracer: Tracer | None = None,
    statsd: DogStatsd | str | None = None,
    service: str | None = None,
    content: ContentMode = "none",
    deny_keys: Collection[str] = DENY_KEYS,
    max_bytes: int = 4096,
) -> ExporterHooks:
    """Create hooks that emit spans ``stroma.run`` and ``stroma.node`` by pipeline and node, and metrics.

    A node's span is active while its function runs, so that what integrations trace in it is under it. Only a final
    failure makes a span an error.

    Args:
        tracer: ddtrace's own if none is given; it goes by the ``DD_*`` variables.
        statsd: a client, or "host:port" of an agent, for metrics under ``stroma.``; None sends none.
        service: of the spans; the tracer's if none is given.
        content: see :class:`stroma.telemetry.content.Content`; with "redacted" states are tags.
        deny_keys: names of fields whose values are never sent.
        max_bytes: of one state or message.

    Raises ImportError with the line that installs the extra, ValueError for an address that is none.
    """
    content_rules = Content.make(content, deny_keys, max_bytes)
    if tracer is None:
        try:
            from ddtrace.trace import tracer
        except ImportError as error:
            raise missing("ddtrace", "datadog_hooks", "datadog") from error
        assert tracer is not None
    own = isinstance(statsd, str)
    return _Datadog(
        tracer, _client(statsd) if isinstance(statsd, str) else statsd, service, content_rules, own_client=own
    ).hooks()


def _client(address: str) -> DogStatsd:
    try:
        from datadog.dogstatsd.base import DogStatsd
    except ImportError as error:
        raise missing("datadog", "datadog_hooks(statsd=...)", "datadog") from error
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal():
        raise ValueError(f'statsd must be "host:port", such as "localhost:8125", got {address!r}')
    # Buffered, and sent by a thread of its own: each packet looks its host up until that has an address.
    return DogStatsd(
        host=host.strip("[]"),
        port=int(port),
        disable_telemetry=True,
        disable_buffering=False,
        disable_background_sender=False,
        sender_queue_size=_MOST_PACKETS,
    )


class _DatadogRun:
    """The span of a run, and when it began."""

    __slots__ = ("before", "here", "restored", "since", "span")

    def __init__(self, span: Span) -> None:
        self.span = span
        self.restored = 0
        #: What undoes that the run is current, and what was active before.
        self.here: Token[Any] | None = None
        self.before: Span | Context | None = None
        self.since = perf_counter()


class _DatadogNode:
    """The span of a node, and what its end needs."""

    __slots__ = ("active", "before", "cost", "ended", "span", "tokens")

    def __init__(self, span: Span) -> None:
        self.span = span
        #: Whether the span was made active, and what was before.
        self.active = False
        self.before: Span | Context | None = None
        self.ended: Ended | None = None
        self.tokens = 0
        self.cost = 0.0


#: Packets of metrics that wait to be sent, 1.4 kB each.
_MOST_PACKETS: Final = 1000


class _Datadog(Observer):
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
        self._labels = MetricLabels()
        self._tracer, self._statsd, self._service, self._content = tracer, statsd, service, content
        self._own_client = own_client
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
        parent = _outer(run)
        span = self._tracer.start_span(
            "stroma.run",
            child_of=parent or self._tracer.current_trace_context(),
            service=self._service,
            resource=run.pipeline,
            span_type="worker",
        )
        of_run = _DatadogRun(span)
        span.set_tag("stroma.run.id", run.run_id)
        span.set_tag("stroma.pipeline", run.pipeline)
        span.set_tag("stroma.input", self._content.state(run, state))
        began = run.first_trace(self.system)
        first = None if began is None else _remote(began)
        if first is not None:
            span.link_span(first, {"stroma.link": "resumed from"})
        run.keep_trace(self.system, _traceparent(span))
        if run.elsewhere:  # No span can end where it has not begun: this one is what the others stand under.
            span.finish()
            return
        run.notes[self] = of_run
        of_run.here = self.enter(of_run)
        of_run.before = self._tracer.context_provider.active()
        self._tracer.context_provider.activate(span)

    def run_ended(self, run: ReliabilityContext, result: ExecutionResult) -> None:
        of_run: _DatadogRun | None = run.notes.pop(self, None)
        if is_returned(run):
            self._count("runs.returned", 1, [*self._of_run(run), f"status:{result.status.value}"])
            return
        if of_run is None and run.elsewhere:
            of_run = self._ending(run, result)
        if of_run is None:
            return
        span = of_run.span
        failed = Ended.finally_(result)
        span.set_tag("stroma.status", result.status.value)
        span.set_metric("stroma.tokens", result.total_tokens)
        span.set_metric("stroma.cost_usd", result.total_cost_usd)
        if of_run.restored:
            span.set_metric("stroma.nodes.restored", of_run.restored)
        if failed is not None:
            self._mark(span, run, failed)
        span.finish()
        if of_run.here is not None and self.here() is of_run:
            # A coroutine that is closed from elsewhere has left its context behind.
            self._tracer.context_provider.activate(of_run.before)
            self.leave(of_run.here)
        pipeline = self._of_run(run)
        status = [*pipeline, f"status:{result.status.value}"]
        self._count("runs", 1, status)
        self._distribution("run.duration", perf_counter() - of_run.since, status)
        dimension = exceeded(result)
        if dimension is not None:
            self._count("budget.exceeded", 1, [*pipeline, f"dimension:{self._labels.dimension(dimension)}"])

    def hook_raised(self, run: ReliabilityContext | None, hook: str) -> None:
        if run is not None:
            self._count("hook.errors", 1, [*self._of_run(run), f"hook:{hook}"])

    def skipped(self, node: NodeExecution) -> None:
        if is_returned(node.ctx):
            return
        self._count("nodes.restored", 1, self._of_node(node))
        of_run: _DatadogRun | None = node.ctx.notes.get(self)
        if of_run is not None:
            of_run.restored += 1

    def budget_warning(self, run: ReliabilityContext, dimension: str, used: float, limit: float) -> None:
        tags = [*self._of_run(run), f"dimension:{self._labels.dimension(dimension)}"]
        self._count("budget.warnings", 1, tags)

    def waiting(self, node: NodeExecution, reason: str, seconds: float) -> None:
        waits_since(node, self)
        self._count("node.waits", 1, self._of_node(node))

    def circuit_changed(self, run: ReliabilityContext, key: str, state: str) -> None:
        tags = [*self._of_run(run), f"circuit:{self._labels.circuit(key)}", f"state:{state}"]
        self._count("circuit.changes", 1, tags)

    def _ending(self, run: ReliabilityContext, result: ExecutionResult) -> _DatadogRun:
        """Return the record of a run that started in another process."""
        record = _DatadogRun(
            self._tracer.start_span(
                "stroma.run_end",
                child_of=_outer(run),
                service=self._service,
                resource=run.pipeline,
                span_type="worker",
            )
        )
        record.since -= seconds_elsewhere(result)
        record.span.set_tag("stroma.run.id", run.run_id)
        record.span.set_tag("stroma.pipeline", run.pipeline)
        return record

    # ------------------------------------------------------------------ nodes

    def attempt_started(self, node: NodeExecution, state: dict[str, Any]) -> None:
        if self not in node.notes:
            before = self._tracer.context_provider.active()
            of_node = self._begin(node, activate=True)
            of_node.active, of_node.before = True, before
            if node.ctx.elsewhere and node.kind == "group":
                # What is inside stands under this span, wherever it runs; as with the run, the end has one of its own.
                node.ctx.keep_trace(self.system, _traceparent(of_node.span))
            of_node.span.set_tag("stroma.input", self._content.state(node.ctx, state))
        waited = waited_seconds(node, self)
        if waited:
            node.notes[self].span.set_metric("stroma.node.wait_s", waited)

    def _begin(self, node: NodeExecution, *, activate: bool) -> _DatadogNode:
        around = self.around(node)
        above = self._tracer.current_trace_context()
        if around is not None and not (
            node.is_called and above is not None and above.trace_id == around.span.trace_id
        ):
            above = around.span  # Not the current span: see Observer.around().
        if node.ctx.elsewhere and node.ctx.traceparent is not None:
            above = _outer(node.ctx)
        span = self._tracer.start_span(
            "stroma.node_end"
            if node.ctx.elsewhere and node.kind == "group" and not activate
            else "stroma.node",
            child_of=above,
            service=self._service,
            resource=node.node_id,
            activate=activate,
        )
        for name, value in (("run.id", node.run_id), ("pipeline", node.pipeline), ("node.id", node.node_id)):
            span.set_tag(f"stroma.{name}", value)
        span.set_tag("stroma.node.kind", node.kind)
        if node.branch:
            span.set_tag("stroma.node.branch", node.branch)
        if node.redelivered:
            span.set_tag("stroma.redelivered", "true")
        node.notes[self] = record = _DatadogNode(span)
        return record

    def attempt_ended(self, node: NodeExecution, ended: Ended) -> None:
        usage, seconds = node.usage, (node.duration_ms or 0.0) / 1000
        of_node = node.notes.get(self)
        if of_node is None:  # Input that broke its contract, or an end that is reported again after a crash.
            of_node = self._begin(node, activate=False)
            if node.started_ns is not None:
                of_node.span.start_ns = node.started_ns
        of_node.ended = ended
        of_node.tokens += usage.tokens
        of_node.cost += usage.cost_usd
        if ended.output is not None:
            of_node.span.set_tag("stroma.output", self._content.state(node.ctx, ended.output))
        tags = self._of_node(node)
        outcome = [*tags, f"outcome:{ended.outcome}", f"failure_class:{ended.class_name}"]
        self._count("node.executions", 1, outcome)
        self._distribution("node.duration", seconds, tags)
        if usage.tokens:
            tags.append(f"model:{self._labels.model(usage.model)}")
            self._count("tokens", usage.input_tokens, [*tags, "direction:input"])
            self._count("tokens", usage.output_tokens, [*tags, "direction:output"])
            self._count("cost_usd", usage.cost_usd, tags)

    def retrying(
        self, node: NodeExecution, attempt: int, delay_seconds: float, failure_class: FailureClass
    ) -> None:
        self._count("node.retries", 1, [*self._of_node(node), f"failure_class:{failure_class.value}"])
        of_node: _DatadogNode | None = node.notes.get(self)
        if of_node is not None:
            of_node.ended = CUT_SHORT

    def limit_cooled_down(self, run: ReliabilityContext, limit: str, seconds: float) -> None:
        self._count("limit.cooldowns", 1, [*self._of_run(run), f"limit:{self._labels.limit(limit)}"])

    def node_ended(self, node: NodeExecution) -> None:
        of_node: _DatadogNode | None = node.notes.pop(self, None)
        if of_node is None:
            return
        span, ended = of_node.span, of_node.ended
        span.set_metric("stroma.attempts", node.attempt)
        span.set_metric("stroma.tokens", of_node.tokens)
        span.set_metric("stroma.cost_usd", of_node.cost)
        if ended is not None:
            span.set_tag("stroma.outcome", ended.outcome)
            if ended.error is not None:
                if may_be_retried(node):
                    self._name_error(span, node.ctx, ended)
                else:
                    self._mark(span, node.ctx, ended)
        if node.redelivered and node.started_ns is not None:
            span.finish((node.started_ns + (node.duration_ms or 0.0) * 1e6) / 1e9)
        else:
            span.finish()
        if of_node.active and current_node() is node:
            # By itself the tracer makes the run's span active, or nothing, and not what was so for the caller.
            self._tracer.context_provider.activate(of_node.before)

    # ------------------------------------------------------------------ small things

    def _mark(self, span: Span, run: ReliabilityContext, ended: Ended) -> None:
        """Make a span an error. Not set_exc_info(): messages and stacks may hold what nodes were given."""
        span.error = 1
        self._name_error(span, run, ended)

    def _name_error(self, span: Span, run: ReliabilityContext, ended: Ended) -> None:
        assert ended.error is not None
        span.set_tag("error.type", type_name(ended.error))
        span.set_tag("stroma.failure_class", ended.class_name)
        if ended.reason is not None:
            span.set_tag("stroma.reason", ended.reason)
        message = self._content.message(run, ended.error)
        if message is not None:
            span.set_tag("error.message", message)

    def _of_run(self, run: ReliabilityContext) -> list[str]:
        return [f"pipeline:{self._labels.pipeline(run.pipeline)}"]

    def _of_node(self, node: NodeExecution) -> list[str]:
        pipeline, node_id = self._labels.place(node.pipeline, node.node_id)
        return [f"pipeline:{pipeline}", f"node_id:{node_id}"]

    def _count(self, name: str, value: float, tags: list[str]) -> None:
        if self._statsd is not None:
            self._statsd.increment(f"stroma.{name}", value, tags=tags)

    def _distribution(self, name: str, value: float, tags: list[str]) -> None:
        if self._statsd is not None:
            self._statsd.distribution(f"stroma.{name}", value, tags=tags)

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
        writer = getattr(getattr(self._tracer, "_span_aggregator", None), "writer", None)
        tries = "_send_payload_with_backoff"  # Of the writer that tries again, else the other one's.
        send = tries if hasattr(writer, tries) else "_send_payload"
        self._losses.watch(writer, send, "traces", _sent)
        self._losses.watch(writer, "_metrics_dist", "traces", _dropped)
        if self._own_client:
            self._losses.watch(self._statsd, "_xmit_packet", "packets of metrics", _transmitted)
            self._losses.watch(self._statsd, "_account_dropped_queue_full", "packets of metrics", _overflows)

    def close(self) -> None:
        if self._own_client and self._statsd is not None:
            self._statsd.close_socket()


def _sent(counter: LossCounter, send: Callable[..., Any]) -> Callable[..., Any]:
    """Return a sender of payloads that counts those that the agent refuses."""

    def counted(payload: Any, count: int, *arguments: Any, **options: Any) -> Any:
        try:
            response = send(payload, count, *arguments, **options)
        except Exception as error:
            counter.add(count, type(error).__name__)
            raise
        status = getattr(response, "status", 200)
        if isinstance(status, int) and status >= 400:
            counter.add(count, f"status {status}")
        return response

    return counted


def _dropped(counter: LossCounter, distribution: Callable[..., Any]) -> Callable[..., Any]:
    """Return a recorder of the writer's own measures that counts traces which do not fit into its buffer."""

    def counted(name: str, count: int = 1, *arguments: Any, **options: Any) -> Any:
        if name in ("buffer.dropped.traces", "encoder.dropped.traces"):
            counter.add(count, name)
        return distribution(name, count, *arguments, **options)

    return counted


def _transmitted(counter: LossCounter, transmit: Callable[..., Any]) -> Callable[..., Any]:
    """Return a sender of packets that counts those it cannot send."""

    def counted(*arguments: Any, **options: Any) -> Any:
        sent = transmit(*arguments, **options)
        if sent is False:
            counter.add(1, "the agent cannot be reached")
        return sent

    return counted


def _overflows(counter: LossCounter, drop: Callable[..., Any]) -> Callable[..., Any]:
    def counted(*arguments: Any, **options: Any) -> Any:
        counter.add(1, "the queue is full")
        return drop(*arguments, **options)

    return counted


def _traceparent(span: Span) -> str:
    return f"00-{span.trace_id:032x}-{span.span_id:016x}-01"


def _outer(run: ReliabilityContext) -> Context | None:
    traceparent = run.outer_trace(_Datadog.system)
    return None if traceparent is None else _remote(traceparent)


def _remote(traceparent: str) -> Context | None:
    from ddtrace.propagation.http import HTTPPropagator

    parent_context = HTTPPropagator.extract({"traceparent": traceparent})  # type: ignore[no-untyped-call]
    return parent_context if parent_context.trace_id else None
