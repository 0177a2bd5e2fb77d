"""OpenTelemetry: a span for each run and node, and metrics. Needs ``opentelemetry-api`` alone."""

from __future__ import annotations

from collections.abc import Callable, Collection
from contextvars import Token
from time import perf_counter, time_ns
from typing import TYPE_CHECKING, Any, Final, Literal

from stroma.contracts.schema import schema_of
from stroma.engine.context import ReliabilityContext
from stroma.engine.execution import NodeExecution, current_node
from stroma.engine.unread import UnreadState
from stroma.failures.classes import FailureClass
from stroma.telemetry import conventions
from stroma.telemetry.content import DENY_KEYS, Content, ContentMode, type_name
from stroma.telemetry.conventions import ABOUT, SCHEMA_URL, SCOPE, Semconv, Vocabulary, about_run, content_of
from stroma.telemetry.inference import InferenceMode, InferenceSpans
from stroma.telemetry.labels import MetricLabels
from stroma.telemetry.losses import LossCounter, Losses
from stroma.telemetry.observer import (
    CUT_SHORT,
    NODE_BUCKETS,
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
    from opentelemetry.context import Context
    from opentelemetry.metrics import Meter, MeterProvider
    from opentelemetry.trace import Span, Tracer, TracerProvider

__all__ = ["otel_hooks"]

# The histogram of runs and what it calls the pipeline: of release 0.1.0 of the conventions, and before it.
_RUN_NAMES: Final = (
    ("gen_ai.invoke_agent.duration", "gen_ai.agent.name"),
    ("gen_ai.invoke_workflow.duration", "gen_ai.workflow.name"),
)
# In seconds. The first as the conventions advise; https://opentelemetry.io/docs/specs/semconv/gen-ai/
_RUN_BUCKETS: Final = (1, 5, 10, 30, 60, 120, 300, 600, 1800, 3600, 7200)


def otel_hooks(
    *,
    tracer: Tracer | TracerProvider | None = None,
    meter: Meter | MeterProvider | None = None,
    attempts: Literal["events", "spans"] = "events",
    content: ContentMode = "none",
    deny_keys: Collection[str] = DENY_KEYS,
    max_bytes: int = 8192,
    vocabulary: Vocabulary = "openinference",
    inference: InferenceMode = "auto",
    semconv: Semconv | None = None,
    baggage: bool = False,
) -> ExporterHooks:
    """Create hooks that emit spans and metrics.

    ``invoke_workflow {pipeline}`` is the span of a run, a child of the span that is current where the run is started
    (or of ``run(traceparent=)``); ``stroma.node {node_id}`` is that of a node with all its attempts, under the run or
    the group around it. It is current while the node's function runs, in its threads and tasks too. A resumed run
    links to the span of the first one. Only a failure that is final makes a span an error: an attempt that is tried
    again, a cancelled and a waiting node do not. On other machines only the end of the run tells what was final.

    Args:
        tracer: what to make spans with, or the provider to take it from, which flush() needs; else the global provider.
        meter: the same for metrics.
        attempts: "events" notes attempts on the node's span, "spans" gives each a span of its own under it.
        content: see :class:`stroma.telemetry.content.Content`; with "redacted" states are attributes.
        deny_keys: names of fields whose values are never sent.
        max_bytes: of one state or message.
        vocabulary: "openinference" also gives spans the kinds that Phoenix, Langfuse and others show, and content under the
            names that these read; "none" leaves both out.
        inference: a span with model, tokens and cost for each attempt that used tokens: "auto" makes it where no span
            inside the attempt reports tokens itself, as those of an instrumented client do; that is seen with a provider
            of the SDK, to which an AttributionProcessor is added. Else, and for "never", there is none.
        semconv: "latest" or "both", see :data:`stroma.telemetry.conventions.Semconv`. None: "both" if
            OTEL_SEMCONV_STABILITY_OPT_IN has ``gen_ai/dup``, else "latest".
        baggage: pass the ids of run, session and user on to the services that nodes call.

    Raises ImportError with the line that installs the extra, ValueError for an unknown choice.
    """
    try:
        import opentelemetry.trace  # noqa: F401
    except ImportError as error:
        raise missing("opentelemetry-api", "otel_hooks", "otel") from error
    if attempts not in ("events", "spans"):
        raise ValueError(f'attempts must be "events" or "spans", got {attempts!r}')
    if vocabulary not in ("openinference", "none"):
        raise ValueError(f'vocabulary must be "openinference" or "none", got {vocabulary!r}')
    return _OpenTelemetry(
        tracer,
        meter,
        own_spans=attempts == "spans",
        content=Content.make(content, deny_keys, max_bytes),
        vocabulary=vocabulary,
        inference=InferenceSpans(inference, vocabulary),
        earlier_names=conventions.wants_earlier_names(semconv),
        baggage=baggage,
    ).hooks()


class _RunSpan:
    """The span of a run, and when it began."""

    __slots__ = ("events", "here", "restored", "since", "span", "token")

    def __init__(self) -> None:
        self.since = perf_counter()
        self.span: Span | None = None
        self.events = _Events()
        self.restored = 0
        #: What undoes that the run, and its span, are current.
        self.here: Token[Any] | None = None
        self.token: Token[Context] | None = None


class _Events:
    """The number of events of a span: its SDK keeps 128, and drops the oldest ones without a word."""

    __slots__ = ("dropped", "sent")

    def __init__(self) -> None:
        self.sent = self.dropped = 0

    def add(self, span: Span, name: str, about: dict[str, Any], most: int = 100) -> None:
        """Add an event to the span unless it has ``most``; the others are counted."""
        if self.sent < most:
            self.sent += 1
            span.add_event(name, about)
        else:
            self.dropped += 1

    def note(self, span: Span) -> None:
        """Set the attribute that says how many are missing, if any are."""
        if self.dropped:
            span.set_attribute("stroma.events.dropped", self.dropped)


class _NodeSpan:
    """The span of a node, and what its end needs."""

    __slots__ = (
        "attempt",
        "attempt_end_ns",
        "attempt_token",
        "cost",
        "ended",
        "events",
        "output",
        "span",
        "token",
        "tokens",
    )

    def __init__(self, span: Span) -> None:
        self.span = span
        self.events = _Events()
        self.output: dict[str, str] = {}
        self.token: Token[Context] | None = None
        #: The span of an attempt, until it is known if another one follows; and when the attempt ended.
        self.attempt: Span | None = None
        self.attempt_end_ns: int | None = None
        self.attempt_token: Token[Context] | None = None
        self.ended: Ended | None = None
        self.tokens = 0
        self.cost = 0.0


#: Events of restored nodes on the span of a run; as many again are left for others.
_MOST_RESTORED: Final = 50


class _OpenTelemetry(Observer):
    name = "OpenTelemetry"
    system = "otel"

    def __init__(
        self,
        tracer: Tracer | TracerProvider | None,
        meter: Meter | MeterProvider | None,
        *,
        own_spans: bool,
        content: Content,
        vocabulary: Vocabulary,
        inference: InferenceSpans,
        earlier_names: bool,
        baggage: bool,
    ) -> None:
        super().__init__()
        self._labels = MetricLabels()
        self._attributes: dict[tuple[str, ...], dict[str, str]] = {}
        from opentelemetry import context, metrics, trace
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self._context, self._trace, self._w3c = context, trace, TraceContextTextMapPropagator()
        self._providers: list[Callable[[], Any]] = [
            # The global one may be set later than these hooks are made.
            trace.get_tracer_provider if tracer is None else lambda: tracer,
            metrics.get_meter_provider if meter is None else lambda: meter,
        ]
        traces: Any = trace.get_tracer_provider() if tracer is None else tracer
        measures: Any = metrics.get_meter_provider() if meter is None else meter
        version = conventions.version()
        self._tracer: Tracer = (
            traces
            if isinstance(traces, trace.Tracer)
            else traces.get_tracer(SCOPE, version, schema_url=SCHEMA_URL)
        )
        own_meter: Meter = (
            measures
            if isinstance(measures, metrics.Meter)
            else measures.get_meter(SCOPE, version or "", SCHEMA_URL)
        )
        self._own_spans = own_spans
        self._content = content
        self._vocabulary = vocabulary
        self._inference = inference
        self._baggage = baggage
        self._watched: Any = None
        #: Histograms of runs, with the name of the pipeline's label: the second is that of earlier conventions.
        self._run_seconds = [
            (own_meter.create_histogram(
                name, "s", "Wall time of a run", explicit_bucket_boundaries_advisory=_RUN_BUCKETS
            ), label)
            for name, label in (_RUN_NAMES if earlier_names else _RUN_NAMES[:1])
        ]  # fmt: skip
        self._node_seconds = own_meter.create_histogram(
            "stroma.node.duration", "s", "Wall time of an attempt's function",
            explicit_bucket_boundaries_advisory=NODE_BUCKETS,
        )  # fmt: skip
        self._active = own_meter.create_up_down_counter("stroma.runs.active", "{run}", "Runs in progress")
        self._executions = own_meter.create_counter(
            "stroma.node.executions", "{attempt}", "Attempts that ended"
        )
        self._retries = own_meter.create_counter(
            "stroma.node.retries", "{attempt}", "Attempts that follow a failed one"
        )
        self._tokens = own_meter.create_counter("stroma.tokens", "{token}", "Tokens that nodes reported")
        self._cost = own_meter.create_counter("stroma.cost", "USD", "What they cost")
        self._exceeded = own_meter.create_counter(
            "stroma.budget.exceeded", "{run}", "Runs that a budget stopped"
        )
        self._cooldowns = own_meter.create_counter(
            "stroma.limit.cooldowns", "{cooldown}", "Times that a refused call has closed a limit"
        )
        self._waits = own_meter.create_counter(
            "stroma.node.waits",
            "{wait}",
            "Times that an attempt was queued for a limit, a budget or a circuit",
        )
        self._circuits = own_meter.create_counter(
            "stroma.circuit.changes", "{change}", "Circuits that became open, half open or closed"
        )
        self._restored = own_meter.create_counter(
            "stroma.nodes.restored", "{node}", "Outputs that were restored from the journal"
        )
        self._warnings = own_meter.create_counter(
            "stroma.budget.warnings", "{run}", "Runs that used 80 % of a limit of their budget"
        )
        self._returned = own_meter.create_counter(
            "stroma.runs.returned", "{run}", "Calls that got the result of a run that they did not run"
        )
        self._losses = Losses(self.name)
        self._watch_losses()
        self._hook_errors = own_meter.create_counter(
            "stroma.hook.errors", "{error}", "Exceptions that hooks raised"
        )

    # ------------------------------------------------------------------ runs

    @property
    def destination(self) -> object:
        return tuple(provider() for provider in self._providers)

    def is_connected(self) -> bool:
        return not isinstance(self._providers[0](), self._trace.ProxyTracerProvider)

    def run_started(self, run: ReliabilityContext, state: dict[str, Any]) -> None:
        if is_returned(run):
            return
        of_run = _RunSpan()
        run.notes[ABOUT] = about_run(run)
        self._watch_spans_of_others()
        if not run.elsewhere:  # It may end in another process: what went up here would never come down.
            self._active.add(1, self._of_run(run))
        parent = self._outer(run)
        links = []
        began = run.first_trace(self.system)
        if began is not None:
            first = self._trace.get_current_span(self._remote(began)).get_span_context()
            if first.is_valid:
                links.append(self._trace.Link(first, {"stroma.link": "resumed from"}))
        of_run.span = span = self._tracer.start_span(
            f"invoke_workflow {run.pipeline}",
            context=parent,
            links=links,
            attributes={
                "gen_ai.operation.name": "invoke_workflow",
                **{label: run.pipeline for _, label in self._run_seconds},
                "stroma.run.execution": run.execution,
                **about_run(run),
                **self._kind_of(None),
            },
        )
        self._keep_trace(run, span)
        if span.is_recording():
            span.set_attributes(self._shown("input", run, state))
        if run.elsewhere:  # No span can end where it has not begun: this one is what the others stand under.
            span.end()
            return
        run.notes[self] = of_run
        of_run.here = self.enter(of_run)
        of_run.token = self._attach(span, run)

    def run_ended(self, run: ReliabilityContext, result: ExecutionResult) -> None:
        of_run = run.notes.pop(self, None)
        if is_returned(run):
            self._returned.add(1, self._of_run(run, "stroma.status", result.status.value))
            return
        if of_run is None and run.elsewhere:
            of_run = self._ending(run, result)
        if of_run is None:
            return
        span = of_run.span
        if not run.elsewhere:
            self._active.add(-1, self._of_run(run))
        failed = Ended.finally_(result)
        kind = None if failed is None or failed.error is None else type_name(failed.error)
        outcome = {"stroma.status": result.status.value}
        if kind is not None:
            outcome["error.type"] = kind
        seconds = perf_counter() - of_run.since
        pipeline = self._labels.pipeline(run.pipeline)
        for histogram, label in self._run_seconds:
            histogram.record(seconds, {label: pipeline, **outcome})
        dimension = exceeded(result)
        if dimension is not None:
            dimension = self._labels.dimension(dimension)
            self._exceeded.add(1, self._of_run(run, "stroma.budget.dimension", dimension))
        if span is None:
            return
        span.set_attribute("stroma.status", result.status.value)
        span.set_attribute("stroma.tokens", result.total_tokens)
        span.set_attribute("stroma.cost_usd", result.total_cost_usd)
        if of_run.restored:
            span.set_attribute("stroma.nodes.restored", of_run.restored)
        of_run.events.note(span)
        state = run.last_state
        if state is not None and span.is_recording():
            unread = UnreadState(schema_of(type(state)), state, run.redactor)
            span.set_attributes(self._shown("output", run, unread))
        if failed is not None:
            self._mark(span, run, failed)
        if of_run.here is not None and self.here() is of_run:
            # A coroutine that is closed from elsewhere has left its context behind.
            self._detach(of_run.token)
            self.leave(of_run.here)
        span.end()

    def hook_raised(self, run: ReliabilityContext | None, hook: str) -> None:
        if run is not None:
            self._hook_errors.add(1, self._of_run(run, "stroma.hook", hook))

    def _ending(self, run: ReliabilityContext, result: ExecutionResult) -> _RunSpan:
        """Return the record of a run that started in another process."""
        record = _RunSpan()
        record.since -= seconds_elsewhere(result)
        record.span = self._tracer.start_span(
            f"stroma.run_end {run.pipeline}",
            context=self._outer(run),
            attributes={**about_run(run), **self._kind_of(None)},
        )
        return record

    def skipped(self, node: NodeExecution) -> None:
        if is_returned(node.ctx):
            return
        self._restored.add(1, self._of_node(node))
        of_run: _RunSpan | None = node.ctx.notes.get(self)
        if of_run is not None and of_run.span is not None:
            of_run.restored += 1
            about = {"stroma.node.id": node.node_id, **_place(node)}
            of_run.events.add(of_run.span, "stroma.node.skipped", about, _MOST_RESTORED)

    def budget_warning(self, run: ReliabilityContext, dimension: str, used: float, limit: float) -> None:
        label = self._labels.dimension(dimension)
        self._warnings.add(1, self._of_run(run, "stroma.budget.dimension", label))
        of_run = run.notes.get(self)
        if of_run is not None and of_run.span is not None:
            about = {
                "stroma.budget.dimension": dimension,
                "stroma.budget.used": used,
                "stroma.budget.limit": limit,
            }
            of_run.events.add(of_run.span, "stroma.budget.warning", about)

    def limit_cooled_down(self, run: ReliabilityContext, limit: str, seconds: float) -> None:
        self._cooldowns.add(1, self._of_run(run, "stroma.limit", self._labels.limit(limit)))
        of_run = run.notes.get(self)
        if of_run is not None and of_run.span is not None:
            about = {"stroma.limit": limit, "stroma.limit.cooldown_s": seconds}
            of_run.events.add(of_run.span, "stroma.limit.cooldown", about)

    def circuit_changed(self, run: ReliabilityContext, key: str, state: str) -> None:
        circuit = self._labels.circuit(key)
        self._circuits.add(1, self._of_run(run, "stroma.circuit", circuit, "stroma.circuit.state", state))
        of_run = run.notes.get(self)
        if of_run is not None and of_run.span is not None:
            about = {"stroma.circuit": key, "stroma.circuit.state": state}
            of_run.events.add(of_run.span, "stroma.circuit.change", about)

    def waiting(self, node: NodeExecution, reason: str, seconds: float) -> None:
        waits_since(node, self)
        self._waits.add(1, self._of_node(node))
        # The span of a node begins with its first attempt: before that the wait is seen around it.
        around = node.notes.get(self) or self.around(node)
        if around is not None and around.span is not None:
            about = {"stroma.node.id": node.node_id, "stroma.wait.reason": reason, **_place(node)}
            around.events.add(around.span, "stroma.node.wait", about)

    # ------------------------------------------------------------------ nodes

    def attempt_started(self, node: NodeExecution, state: dict[str, Any]) -> None:
        of_node = node.notes.get(self)
        if of_node is None:
            of_node = self._begin(node)
            if node.ctx.elsewhere and node.kind == "group":
                # What is inside stands under this span, wherever it runs; as with the run, the end has one of its own.
                self._keep_trace(node.ctx, of_node.span)
            of_node.token = self._attach(of_node.span, node.ctx)
            if of_node.span.is_recording():
                of_node.span.set_attributes(self._shown("input", node.ctx, state))
        waited = waited_seconds(node, self)
        if waited:
            of_node.span.set_attribute("stroma.node.wait_s", waited)
        if self._own_spans:
            self._detach(of_node.attempt_token)  # of the attempt before
            of_node.attempt = self._tracer.start_span(
                f"stroma.attempt {node.node_id}",
                context=self._trace.set_span_in_context(of_node.span),
                attributes={
                    "stroma.node.id": node.node_id,
                    "stroma.node.attempt": node.attempt,
                    **about_run(node.ctx),
                    **self._kind_of(None),
                },
            )
            of_node.attempt_token = self._attach(of_node.attempt, node.ctx)

    def _begin(self, node: NodeExecution, start_ns: int | None = None) -> _NodeSpan:
        around = self.around(node)
        above = None if around is None else around.span
        if above is not None and node.is_called:
            above = self._current_below(above)
        parent = None if above is None else self._trace.set_span_in_context(above)
        what, ctx = "node", node.ctx
        if ctx.elsewhere:
            what = "node_end" if node.kind == "group" and start_ns is not None else what
            parent = self._outer(ctx)
        span = self._tracer.start_span(
            f"stroma.{what} {node.node_id}",
            context=parent,
            start_time=start_ns,
            attributes={
                "stroma.node.id": node.node_id,
                "stroma.node.kind": node.kind,
                **about_run(ctx),
                **self._kind_of(node.role),
                **_place(node),
                **({"stroma.redelivered": True} if node.redelivered else {}),
            },
        )
        node.notes[self] = record = _NodeSpan(span)
        return record

    def _current_below(self, above: Span) -> Span:
        """Return the current span, such as the framework's own around a step; ``above`` where that is of another trace."""
        current = self._trace.get_current_span()
        about = current.get_span_context()
        same = about.is_valid and about.trace_id == above.get_span_context().trace_id
        return current if same else above

    def attempt_ended(self, node: NodeExecution, ended: Ended) -> None:
        usage = node.usage
        seconds = (node.duration_ms or 0.0) / 1000
        outcome = "stroma.outcome", ended.outcome, "stroma.failure_class", ended.class_name
        self._executions.add(1, self._of_node(node, *outcome))
        self._node_seconds.record(seconds, self._of_node(node))
        if usage.tokens:
            model = "stroma.model", self._labels.model(usage.model)
            self._tokens.add(usage.input_tokens, self._of_node(node, *model, "stroma.direction", "input"))
            self._tokens.add(usage.output_tokens, self._of_node(node, *model, "stroma.direction", "output"))
            self._cost.add(usage.cost_usd, self._of_node(node, *model))
        of_node = node.notes.get(self)
        if of_node is None:  # Input that broke its contract, or an end that is reported again after a crash.
            of_node = self._begin(node, node.started_ns)
        of_node.ended = ended
        of_node.tokens += usage.tokens
        of_node.cost += usage.cost_usd
        span = of_node.span
        if span.is_recording():
            about_attempt: dict[str, Any] = {
                "stroma.node.attempt": node.attempt, "stroma.outcome": ended.outcome,
                "stroma.duration_s": seconds, "stroma.tokens": usage.tokens,
            }  # fmt: skip
            if usage.cached_input_tokens or usage.cache_write_tokens:
                about_attempt["stroma.cached_input_tokens"] = usage.cached_input_tokens
                about_attempt["stroma.cache_write_tokens"] = usage.cache_write_tokens
            if ended.error is not None:
                about_attempt |= {
                    "stroma.failure_class": ended.class_name,
                    "error.type": type_name(ended.error),
                }
                if ended.reason is not None:
                    about_attempt["stroma.reason"] = ended.reason
                if of_node.attempt is None:
                    of_node.events.add(span, "exception", self._exception(node, ended.error))
                else:
                    of_node.attempt.add_event("exception", self._exception(node, ended.error))
            if of_node.attempt is None:
                of_node.events.add(span, "stroma.attempt", about_attempt)
            else:
                of_node.attempt.set_attributes(about_attempt)
            if ended.output is not None:
                of_node.output = self._shown("output", node.ctx, ended.output)
            if self._inference.are_due(node):
                self._bill(node, ended, self._trace.set_span_in_context(of_node.attempt or span))
        # Whether it is an error is known once a retry follows, or none; and on other machines it is decided elsewhere.
        of_node.attempt_end_ns = time_ns()

    def retrying(
        self, node: NodeExecution, attempt: int, delay_seconds: float, failure_class: FailureClass
    ) -> None:
        self._retries.add(1, self._of_node(node, "stroma.failure_class", failure_class.value))
        of_node = node.notes.get(self)
        if of_node is not None:
            of_node.ended = CUT_SHORT
            self._end_attempt(of_node)
            about = {"stroma.node.attempt": attempt, "stroma.retry.delay_s": delay_seconds}
            about_retry = {**about, "stroma.failure_class": failure_class.value}
            of_node.events.add(of_node.span, "stroma.retry", about_retry)

    def _end_attempt(self, of_node: _NodeSpan) -> None:
        # Detached later: the hook may be called where the coroutine is closed.
        if of_node.attempt is not None:
            of_node.attempt.end(of_node.attempt_end_ns)
            of_node.attempt = of_node.attempt_end_ns = None

    def node_ended(self, node: NodeExecution) -> None:
        of_node = node.notes.pop(self, None)
        if of_node is None:
            return
        span, ended = of_node.span, of_node.ended
        if current_node() is node:  # A coroutine that is closed from elsewhere has left its context behind.
            self._detach(of_node.attempt_token)
            self._detach(of_node.token)
        if of_node.attempt is not None:
            if ended is not None and not may_be_retried(node):
                self._mark(of_node.attempt, node.ctx, ended)
            self._end_attempt(of_node)
        if span.is_recording():
            of_node.events.note(span)
            about: dict[str, Any] = {
                "stroma.node.attempts": node.attempt,
                "stroma.tokens": of_node.tokens,
                "stroma.cost_usd": of_node.cost,
            }
            about |= of_node.output
            if ended is not None:
                about["stroma.outcome"] = ended.outcome
            span.set_attributes(about)
        if ended is not None:
            if not may_be_retried(node):
                self._mark(span, node.ctx, ended)
            elif ended.error is not None:
                span.set_attribute("error.type", type_name(ended.error))
                span.set_attribute("stroma.failure_class", ended.class_name)
        if node.redelivered and node.started_ns is not None:
            span.end(node.started_ns + int((node.duration_ms or 0.0) * 1e6))
        else:
            span.end()

    # ------------------------------------------------------------------ small things

    def _of_run(self, run: ReliabilityContext, *more: str) -> dict[str, str]:
        """Return the attributes of a metric of runs: the pipeline and ``more``, name after name with its value."""
        return self._metric_attributes("stroma.pipeline", self._labels.pipeline(run.pipeline), *more)

    def _of_node(self, node: NodeExecution, *more: str) -> dict[str, str]:
        """Return the attributes of a metric of nodes, likewise."""
        pipeline, node_id = self._labels.place(node.pipeline, node.node_id)
        return self._metric_attributes("stroma.pipeline", pipeline, "stroma.node.id", node_id, *more)

    def _metric_attributes(self, *pairs: str) -> dict[str, str]:
        # As many as there are series, which the labels bound.
        attributes = self._attributes.get(pairs)
        if attributes is None:
            attributes = self._attributes[pairs] = dict(zip(pairs[::2], pairs[1::2], strict=True))
        return attributes

    def _keep_trace(self, run: ReliabilityContext, span: Span) -> None:
        """Record a span as the one that other processes link to, or put theirs under."""
        if span.get_span_context().is_valid:
            carrier: dict[str, str] = {}
            self._w3c.inject(carrier, self._trace.set_span_in_context(span))
            run.keep_trace(self.system, carrier["traceparent"])

    def _outer(self, run: ReliabilityContext) -> Context | None:
        traceparent = run.outer_trace(self.system)
        return None if traceparent is None else self._remote(traceparent)

    def _remote(self, traceparent: str) -> Context:
        return self._w3c.extract({"traceparent": traceparent})

    def _attach(self, span: Span, run: ReliabilityContext) -> Token[Context]:
        context = self._trace.set_span_in_context(span)
        if self._baggage:
            from opentelemetry.baggage import set_baggage

            about = about_run(run)
            for name in ("stroma.run.id", "session.id", "user.id"):
                if name in about:
                    context = set_baggage(name, about[name], context)
        return self._context.attach(context)

    def _kind_of(self, role: str | None) -> dict[str, str]:
        if self._vocabulary == "none":
            return {}
        return {"openinference.span.kind": "CHAIN" if role is None else role.upper()}

    def _shown(
        self, direction: Literal["input", "output"], run: ReliabilityContext, state: dict[str, Any]
    ) -> dict[str, str]:
        """Return the attributes that show a state: as backends read it where it is content, else under our name."""
        text = self._content.state(run, state)
        if self._content.mode == "redacted" and self._vocabulary == "openinference":
            return content_of(direction, text)
        return {f"stroma.{direction}": text}

    def _bill(self, node: NodeExecution, ended: Ended, around: Context) -> None:
        span, end_ns = self._inference.start(self._tracer, node, around)
        # No error: the call was answered, or another attempt may follow.
        span.set_attribute("stroma.outcome", ended.outcome)
        if ended.error is not None:
            span.set_attribute("stroma.failure_class", ended.class_name)
        span.end(end_ns)

    def _watch_spans_of_others(self) -> None:
        """See to it that the spans of others are attributed, and their usage seen, if they are the SDK's."""
        provider: Any = self._providers[0]()
        if provider is self._watched or not hasattr(provider, "add_span_processor"):
            return
        from stroma.telemetry.attribution import watch

        watch(provider)
        self._watched = provider
        self._inference.can_see = True

    def _detach(self, token: Token[Context] | None) -> None:
        if token is not None:
            self._context.detach(token)

    def _exception(self, node: NodeExecution, error: BaseException) -> dict[str, Any]:
        about = {"exception.type": type_name(error)}
        message = self._content.message(node.ctx, error)
        if message is not None:
            about["exception.message"] = message
        return about

    def _mark(self, span: Span, run: ReliabilityContext, ended: Ended) -> None:
        """Make a span an error, if the end was one."""
        if ended.error is None:
            return
        description = self._content.message(run, ended.error)
        if description is None:
            description = " ".join(filter(None, (ended.class_name, ended.reason)))
        span.set_attribute("error.type", type_name(ended.error))
        span.set_attribute("stroma.failure_class", ended.class_name)
        span.set_status(self._trace.Status(self._trace.StatusCode.ERROR, description))

    def flush(self, timeout_seconds: float) -> bool:
        self._watch_losses()
        # One after the other: each gets the remaining time.
        end, sent = perf_counter() + timeout_seconds, True
        for provider in self._providers:
            # The SDK's providers have it; those of the API alone, and tracers, do not.
            flush = getattr(provider(), "force_flush", None)
            if flush is not None:
                sent = flush(max(1, int((end - perf_counter()) * 1000))) is not False and sent
        return self._losses.take() == 0 and sent

    def _watch_losses(self) -> None:
        """Count what processors and readers of the SDK drop; those that were added since the last time, too."""
        for provider in self._providers:
            one = provider()
            spans = getattr(getattr(one, "_active_span_processor", None), "_span_processors", ())
            for processor in spans:
                self._losses.watch(getattr(processor, "span_exporter", None), "export", "spans", _results)
                batch = getattr(processor, "_batch_processor", None)
                self._losses.watch(getattr(batch, "_metrics", None), "drop_items", "spans", _overflows)
            for reader in getattr(one, "_metric_readers", ()):
                self._losses.watch(getattr(reader, "_exporter", None), "export", "metrics", _results)


def _results(counter: LossCounter, export: Callable[..., Any]) -> Callable[..., Any]:
    """Return an export() that counts what it fails to send."""

    def counted(batch: Any, *arguments: Any, **options: Any) -> Any:
        size = len(batch) if isinstance(batch, (list, tuple)) else 1
        try:
            result = export(batch, *arguments, **options)
        except Exception as error:
            counter.add(size, type(error).__name__)
            raise
        if getattr(result, "name", "") == "FAILURE":
            counter.add(size, "the exporter failed")
        return result

    return counted


def _overflows(counter: LossCounter, drop: Callable[..., Any]) -> Callable[..., Any]:
    """Return a drop_items() that counts what found the queue full."""

    def counted(count: int, *arguments: Any, **options: Any) -> Any:
        counter.add(count, "the queue is full")
        return drop(count, *arguments, **options)

    return counted


def _place(node: NodeExecution) -> dict[str, Any]:
    return {"stroma.node.position": node.position} | (
        {"stroma.node.branch": node.branch} if node.branch else {}
    )
