"""Datadog: spans through ddtrace, metrics through DogStatsD."""

from __future__ import annotations

from collections.abc import Collection
from time import perf_counter
from typing import TYPE_CHECKING, Any

from stroma.engine.context import ReliabilityContext
from stroma.engine.execution import NodeExecution, current_node
from stroma.failures.classes import FailureClass
from stroma.telemetry.content import DENY_KEYS, Content, ContentMode, type_name
from stroma.telemetry.observer import (
    CUT_SHORT,
    Ended,
    ExporterHooks,
    ModelLabels,
    Observer,
    exceeded,
    is_returned,
    missing,
    seconds_elsewhere,
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
    return DogStatsd(host=host.strip("[]"), port=int(port), disable_telemetry=True)


class _DatadogRun:
    """The span of a run, and when it began."""

    __slots__ = ("since", "span")

    def __init__(self, span: Span) -> None:
        self.span = span
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


class _Datadog(Observer):
    name = "Datadog"

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
        self._model_label = ModelLabels()
        self._tracer, self._statsd, self._service, self._content = tracer, statsd, service, content
        self._own_client = own_client

    # ------------------------------------------------------------------ runs

    @property
    def destination(self) -> object:
        statsd: Any = self._statsd
        address = getattr(statsd, "host", statsd), getattr(statsd, "port", None)
        return self._tracer, *(address if isinstance(address[0], str) else (statsd, None))

    def run_started(self, run: ReliabilityContext, state: dict[str, Any]) -> None:
        if is_returned(run):
            return
        parent = None if run.traceparent is None else _remote(run.traceparent)
        span = self._tracer.start_span(
            "stroma.run",
            child_of=parent or self._tracer.current_trace_context(),
            service=self._service,
            resource=run.pipeline,
            span_type="worker",
        )
        run.notes[self] = _DatadogRun(span)
        span.set_tag("stroma.run.id", run.run_id)
        span.set_tag("stroma.pipeline", run.pipeline)
        span.set_tag("stroma.input", self._content.state(run, state))
        if run.first_traceparent is not None:
            first = _remote(run.first_traceparent)
            if first is not None:
                span.link_span(first, {"stroma.link": "resumed from"})
        if run.kept_traceparent is None:
            run.kept_traceparent = _traceparent(span)
        if run.elsewhere:  # No span can end where it has not begun: this one is what the others stand under.
            del run.notes[self]
            span.finish()

    def run_ended(self, run: ReliabilityContext, result: ExecutionResult) -> None:
        of_run: _DatadogRun | None = run.notes.pop(self, None)
        if of_run is None and run.elsewhere:
            of_run = self._ending(run, result)
        if of_run is None:
            return
        span = of_run.span
        failed = Ended.finally_(result)
        span.set_tag("stroma.status", result.status.value)
        span.set_metric("stroma.tokens", result.total_tokens)
        span.set_metric("stroma.cost_usd", result.total_cost_usd)
        if failed is not None:
            self._mark(span, run, failed)
        span.finish()
        pipeline = f"pipeline:{run.pipeline}"
        status = [pipeline, f"status:{result.status.value}"]
        self._count("runs", 1, status)
        self._distribution("run.duration", perf_counter() - of_run.since, status)
        for error in result.hook_errors:
            self._count("hook.errors", 1, [pipeline, f"hook:{error.hook}"])
        dimension = exceeded(result)
        if dimension is not None:
            self._count("budget.exceeded", 1, [pipeline, f"dimension:{dimension}"])

    def _ending(self, run: ReliabilityContext, result: ExecutionResult) -> _DatadogRun:
        """Return the record of a run that started in another process."""
        record = _DatadogRun(
            self._tracer.start_span(
                "stroma.run_end",
                child_of=None if run.traceparent is None else _remote(run.traceparent),
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
                node.ctx.kept_traceparent = _traceparent(of_node.span)
            of_node.span.set_tag("stroma.input", self._content.state(node.ctx, state))

    def _begin(self, node: NodeExecution, *, activate: bool) -> _DatadogNode:
        around = self.around(node)
        above = self._tracer.current_trace_context() if around is None else around.span
        if node.ctx.elsewhere and node.ctx.traceparent is not None:
            above = _remote(node.ctx.traceparent)
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
        tags = [f"pipeline:{node.pipeline}", f"node_id:{node.node_id}"]
        outcome = [*tags, f"outcome:{ended.outcome}", f"failure_class:{ended.class_name}"]
        self._count("node.executions", 1, outcome)
        self._distribution("node.duration", seconds, tags)
        if usage.tokens:
            tags.append(f"model:{self._model_label(usage.model)}")
            self._count("tokens", usage.input_tokens, [*tags, "direction:input"])
            self._count("tokens", usage.output_tokens, [*tags, "direction:output"])
            self._count("cost_usd", usage.cost_usd, tags)

    def retrying(
        self, node: NodeExecution, attempt: int, delay_seconds: float, failure_class: FailureClass
    ) -> None:
        tags = [
            f"pipeline:{node.pipeline}",
            f"node_id:{node.node_id}",
            f"failure_class:{failure_class.value}",
        ]
        self._count("node.retries", 1, tags)
        of_node: _DatadogNode | None = node.notes.get(self)
        if of_node is not None:
            of_node.ended = CUT_SHORT

    def limit_cooled_down(self, run: ReliabilityContext, limit: str, seconds: float) -> None:
        self._count("limit.cooldowns", 1, [f"pipeline:{run.pipeline}", f"limit:{limit}"])

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
        assert ended.error is not None
        span.error = 1
        span.set_tag("error.type", type_name(ended.error))
        span.set_tag("stroma.failure_class", ended.class_name)
        if ended.reason is not None:
            span.set_tag("stroma.reason", ended.reason)
        message = self._content.message(run, ended.error)
        if message is not None:
            span.set_tag("error.message", message)

    def _count(self, name: str, value: float, tags: list[str]) -> None:
        if self._statsd is not None:
            self._statsd.increment(f"stroma.{name}", value, tags=tags)

    def _distribution(self, name: str, value: float, tags: list[str]) -> None:
        if self._statsd is not None:
            self._statsd.distribution(f"stroma.{name}", value, tags=tags)

    def flush(self, timeout_seconds: float) -> bool:
        self._tracer.flush()  # type: ignore[no-untyped-call]
        if self._statsd is not None:
            self._statsd.flush()
        return True

    def close(self) -> None:
        if self._own_client and self._statsd is not None:
            self._statsd.close_socket()


def _traceparent(span: Span) -> str:
    return f"00-{span.trace_id:032x}-{span.span_id:016x}-01"


def _remote(traceparent: str) -> Context | None:
    from ddtrace.propagation.http import HTTPPropagator

    parent_context = HTTPPropagator.extract({"traceparent": traceparent})  # type: ignore[no-untyped-call]
    return parent_context if parent_context.trace_id else None
