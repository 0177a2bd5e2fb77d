"""The exporter to OpenTelemetry."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from time import perf_counter, time_ns
from typing import TYPE_CHECKING, Any, Final, Literal

from opentelemetry import metrics, trace
from opentelemetry.context import Context

from stroma._utils.access import type_name
from stroma.checkpoint.queue import QueueReading
from stroma.contracts.schema import schema_of
from stroma.engine.context import ReliabilityContext
from stroma.engine.execution import CURRENT, RunningNode
from stroma.engine.redaction import UnreadState
from stroma.failures.classes import FailureClass
from stroma.telemetry.content import Content, is_text
from stroma.telemetry.conventions import Vocabulary, about_run, content_of, note_run, operation_of
from stroma.telemetry.inference import InferenceSpans
from stroma.telemetry.messages import messages_of_call
from stroma.telemetry.metrics import METRICS, NODE_BUCKETS, QUEUE_GAUGES, RUN_SECONDS, Metric, MetricsObserver
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
from stroma.telemetry.opentelemetry.spans import (
    NodeSpan,
    RunSpan,
    attach,
    context_of,
    current_below,
    detach,
    is_span_of,
    meter_of,
    place_of,
    traceparent_of,
    tracer_of,
    tracer_of_span,
)
from stroma.trace.result import ExecutionResult

if TYPE_CHECKING:
    from opentelemetry.metrics import Meter, MeterProvider
    from opentelemetry.trace import Span, Tracer, TracerProvider

#: In seconds, as the conventions advise; https://opentelemetry.io/docs/specs/semconv/gen-ai/
_RUN_BUCKETS: Final = (1, 5, 10, 30, 60, 120, 300, 600, 1800, 3600, 7200)
#: Names of labels that are not "stroma." and the label.
_LABELS: Final = {
    "node_id": "stroma.node.id",
    "agent": "gen_ai.agent.name",
    "dimension": "stroma.budget.dimension",
    "state": "stroma.circuit.state",
}
#: Events of restored nodes on the span of a run; as many again are left for others.
_MOST_RESTORED: Final = 50


class OpenTelemetry(MetricsObserver):
    """The hooks of :func:`stroma.telemetry.otel_hooks`."""

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
        baggage: bool,
    ) -> None:
        super().__init__()
        self._providers: list[Callable[[], Any]] = [
            # The global one may be set later than these hooks are made.
            trace.get_tracer_provider if tracer is None else lambda: tracer,
            metrics.get_meter_provider if meter is None else lambda: meter,
        ]
        self._tracer = tracer_of(self._providers[0]())
        self._own_spans = own_spans
        self._content = content
        self._vocabulary = vocabulary
        self._inference = inference
        self._baggage = baggage
        self._watched: Any = None
        self._meter = meter_of(self._providers[1]())
        self._make_instruments()

    # ------------------------------------------------------------------ runs

    @property
    def destination(self) -> object:
        return tuple(provider() for provider in self._providers)

    def is_connected(self) -> bool:
        return not isinstance(self._providers[0](), trace.ProxyTracerProvider)

    def run_started(self, run: ReliabilityContext, state: dict[str, Any]) -> None:
        super().run_started(run, state)
        if is_returned(run):
            return
        of_run = RunSpan()
        note_run(run)
        self._watch_spans_of_others()
        of_run.span = span = self._start_root(run)
        self._keep_trace(run, span)
        if span.is_recording():
            span.set_attributes(self._shown("input", run, state))
        run.notes[self] = of_run
        of_run.here = self.enter(of_run)
        of_run.token = attach(span, run, baggage=self._baggage)

    def _start_root(self, run: ReliabilityContext) -> Span:
        """Start the span of a run: that of a dead process under its ids and start, else a new one."""
        context, tracer, start_ns = self._outer(run), self._tracer, None
        links = []
        before, lost = run.first_trace(self.system), self.lost_root(run)
        if before is not None:
            earlier = trace.get_current_span(context_of(before)).get_span_context()
            its_tracer = None if lost is None else tracer_of_span(tracer, earlier)
            if its_tracer is not None and lost is not None:
                tracer, start_ns = its_tracer, lost[1]
                outer = trace.get_current_span(context).get_span_context()
                if outer.trace_id != earlier.trace_id:
                    context = Context()
            elif earlier.is_valid:
                links.append(trace.Link(earlier, {"stroma.link": "resumed from"}))
        return tracer.start_span(
            f"invoke_workflow {run.pipeline}",
            context=context,
            links=links,
            start_time=start_ns,
            attributes={
                "gen_ai.operation.name": "invoke_workflow",
                "gen_ai.agent.name": run.pipeline,
                "stroma.run.execution": run.execution,
                **about_run(run),
                **self._kind_of(None),
                # As Phoenix and Langfuse read it.
                **({"tag.tags": run.config.tags} if run.config.tags and self._vocabulary != "none" else {}),
            },
        )

    def run_ended(self, run: ReliabilityContext, result: ExecutionResult) -> None:
        super().run_ended(run, result)
        of_run: RunSpan | None = run.notes.pop(self, None)
        if of_run is None or of_run.span is None:
            return
        span, failed = of_run.span, AttemptEnd.finally_(result)
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
        for part, ended_ns in self.ended_parts(run):
            part.events.note(part.span)
            part.span.end(ended_ns or None)
        if of_run.here is not None and self.here() is of_run:
            # A coroutine that is closed from elsewhere has left its context behind.
            detach(of_run.token)
            self.leave(of_run.here)
        span.end()

    def skipped(self, node: RunningNode) -> None:
        super().skipped(node)
        of_run: RunSpan | None = node.ctx.notes.get(self)
        if of_run is not None and of_run.span is not None:
            of_run.restored += 1
            self.begin_lost_parts(node)
            about = {"stroma.node.id": node.node_id, **place_of(node)}
            of_run.events.add(of_run.span, "stroma.node.skipped", about, _MOST_RESTORED)

    def budget_warning(self, run: ReliabilityContext, dimension: str, used: float, limit: float) -> None:
        super().budget_warning(run, dimension, used, limit)
        about = {
            "stroma.budget.dimension": dimension,
            "stroma.budget.used": used,
            "stroma.budget.limit": limit,
        }
        self._add_event(run, "stroma.budget.warning", about)

    def limit_cooled_down(self, run: ReliabilityContext, limit: str, seconds: float) -> None:
        super().limit_cooled_down(run, limit, seconds)
        about = {"stroma.limit": limit, "stroma.limit.cooldown_s": seconds}
        self._add_event(run, "stroma.limit.cooldown", about)

    def circuit_changed(self, run: ReliabilityContext, key: str, state: str) -> None:
        super().circuit_changed(run, key, state)
        about = {"stroma.circuit": key, "stroma.circuit.state": state}
        self._add_event(run, "stroma.circuit.change", about)

    def _add_event(self, run: ReliabilityContext, name: str, about: dict[str, Any]) -> None:
        of_run: RunSpan | None = run.notes.get(self)
        if of_run is not None and of_run.span is not None:
            of_run.events.add(of_run.span, name, about)

    def waiting(self, node: RunningNode, reason: str, seconds: float) -> None:
        waits_since(node, self)
        super().waiting(node, reason, seconds)
        # The span of a node begins with its first attempt: before that the wait is seen around it.
        around = node.notes.get(self) or self.around(node)
        if around is not None and around.span is not None:
            about = {"stroma.node.id": node.node_id, "stroma.wait.reason": reason, **place_of(node)}
            around.events.add(around.span, "stroma.node.wait", about)

    # ------------------------------------------------------------------ nodes

    def attempt_started(self, node: RunningNode, state: dict[str, Any]) -> None:
        of_node = node.notes.get(self)
        if of_node is None:
            self._inference.note_surroundings(node, trace.get_current_span())
            of_node = self._begin(node)
            of_node.token = attach(of_node.span, node.ctx, baggage=self._baggage)
            if of_node.span.is_recording():
                of_node.span.set_attributes(self._shown("input", node.ctx, state))
        waited = waited_seconds(node, self)
        if waited:
            of_node.span.set_attribute("stroma.node.wait_s", waited)
        if self._own_spans:
            detach(of_node.attempt_token)  # of the attempt before
            of_node.attempt = self._tracer.start_span(
                f"stroma.attempt {node.node_id}",
                context=trace.set_span_in_context(of_node.span),
                attributes={
                    "stroma.node.id": node.node_id,
                    "stroma.node.attempt": node.attempt,
                    **about_run(node.ctx),
                    **self._kind_of(None),
                },
            )
            of_node.attempt_token = attach(of_node.attempt, node.ctx, baggage=self._baggage)

    def _begin(self, node: RunningNode, start_ns: int | None = None) -> NodeSpan:
        around = self.around(node)
        above = None if around is None else around.span
        if above is not None and node.is_called:
            above = current_below(above)
        operation = operation_of(node)
        about = {
            "stroma.node.id": node.node_id,
            "stroma.node.kind": node.kind,
            **operation,
            **about_run(node.ctx),
            **place_of(node),
            **({"stroma.redelivered": True} if node.redelivered else {}),
        }
        if above is not None and is_span_of(above, node.node_id):
            above.set_attributes(about)
            node.notes[self] = record = NodeSpan(above, is_ours=False)
            return record
        tracer = self._tracer_at(node.ctx, place_key(node))
        span = tracer.start_span(
            f"{operation.get('gen_ai.operation.name', 'stroma.node')} {node.node_id}",
            context=None if above is None else trace.set_span_in_context(above),
            start_time=start_ns,
            attributes={**about, **self._kind_of(node.role)},
        )
        node.notes[self] = record = NodeSpan(span)
        return record

    def part_started(
        self, run: ReliabilityContext, part: FlowPart, around: RunSpan | NodeSpan
    ) -> NodeSpan | None:
        if around.span is None:
            return None
        operation = part.operation or {"stroma.node.id": part.name, "stroma.node.kind": "group"}
        return NodeSpan(
            self._tracer_at(run, part.place).start_span(
                f"{operation.get('gen_ai.operation.name', 'stroma.map')} {part.name}",
                context=trace.set_span_in_context(around.span),
                start_time=part.start_ns,
                attributes={
                    "stroma.node.branch": part.branch,
                    **operation,
                    **about_run(run),
                    **self._kind_of("agent" if part.kind == "agent" else None),
                },
            )
        )

    def _tracer_at(self, run: ReliabilityContext, place: str) -> Tracer:
        """Return a tracer whose next span has the id of a place in a run; see :func:`span_id_at`."""
        of_run: RunSpan | None = run.notes.get(self)
        if of_run is None or of_run.span is None:
            return self._tracer
        root = of_run.span.get_span_context()
        span_id = span_id_at(root.trace_id, root.span_id, place)
        about = trace.SpanContext(root.trace_id, span_id, is_remote=False)
        return tracer_of_span(self._tracer, about) or self._tracer

    def attempt_ended(self, node: RunningNode, ended: AttemptEnd) -> None:
        usage = node.usage
        seconds = (node.duration_ms or 0.0) / 1000
        super().attempt_ended(node, ended)
        of_node = node.notes.get(self)
        if of_node is None:  # Input that broke its contract, or an end that is reported again after a crash.
            of_node = self._begin(node, node.started_ns)
        of_node.ended = ended
        of_node.tokens += usage.tokens
        of_node.cost += usage.cost_usd
        span = of_node.span
        if span.is_recording():
            about_attempt: dict[str, Any] = {
                "stroma.node.attempt": node.attempt,
                "stroma.outcome": ended.outcome,
                "stroma.duration_s": seconds,
                "stroma.tokens": usage.tokens,
            }
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
                message = self._content.message(ended.message)
                if message is not None:
                    about_attempt["stroma.message"] = message
            if of_node.attempt is None:
                of_node.events.add(span, "stroma.attempt", about_attempt)
            else:
                of_node.attempt.set_attributes(about_attempt)
            if ended.output is not None:
                of_node.output = self._shown("output", node.ctx, ended.output)
            if self._inference.are_due(node, is_answer=ended.outcome == "success"):
                self._bill(node, ended, trace.set_span_in_context(of_node.attempt or span))
        # Whether it is an error is known once a retry follows, or none; and on other machines it is decided
        # elsewhere.
        of_node.attempt_end_ns = time_ns()

    def retrying(
        self, node: RunningNode, attempt: int, delay_seconds: float, failure_class: FailureClass
    ) -> None:
        super().retrying(node, attempt, delay_seconds, failure_class)
        of_node = node.notes.get(self)
        if of_node is not None:
            of_node.ended = CUT_SHORT
            self._end_attempt(of_node)
            about = {"stroma.node.attempt": attempt, "stroma.retry.delay_s": delay_seconds}
            about_retry = {**about, "stroma.failure_class": failure_class.value}
            of_node.events.add(of_node.span, "stroma.retry", about_retry)

    def _end_attempt(self, of_node: NodeSpan) -> None:
        # Detached later: the hook may be called where the coroutine is closed.
        if of_node.attempt is not None:
            of_node.attempt.end(of_node.attempt_end_ns)
            of_node.attempt = of_node.attempt_end_ns = None

    def node_ended(self, node: RunningNode) -> None:
        of_node = node.notes.pop(self, None)
        if of_node is None:
            return
        span, ended = of_node.span, of_node.ended
        if CURRENT.get() is node:  # A coroutine that is closed from elsewhere has left its context behind.
            detach(of_node.attempt_token)
            detach(of_node.token)
        if of_node.attempt is not None:
            if ended is not None:
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
        if ended is not None and not node.redelivered:
            self._mark(span, node.ctx, ended)
        if of_node.is_ours:
            span.end(redelivered_end_ns(node))

    # ------------------------------------------------------------------ metrics

    def _make_instruments(self) -> None:
        meter = self._meter
        #: What adds to an instrument, by its name; the attributes, of which there are as many as series.
        self._instruments: dict[str, Callable[..., None]] = {}
        self._attributes: dict[tuple[tuple[str, ...], tuple[str, ...]], dict[str, str]] = {}
        #: Figures of the queues that workers of this process serve, by the label of the pipeline.
        self._queues: dict[str, QueueReading] = {}
        self._shows_queues = False
        for metric in METRICS:
            if (name := metric.otel) is None:
                continue
            if metric.kind == "seconds":
                self._instruments[name] = meter.create_histogram(
                    name,
                    metric.unit,
                    metric.text,
                    explicit_bucket_boundaries_advisory=_RUN_BUCKETS
                    if metric is RUN_SECONDS
                    else NODE_BUCKETS,
                ).record
            elif metric.kind == "active":
                self._instruments[name] = meter.create_up_down_counter(name, metric.unit, metric.text).add
            else:
                self._instruments[name] = meter.create_counter(name, metric.unit, metric.text).add

    def send(self, metric: Metric, value: float, *labels: str) -> None:
        if metric.otel is not None:
            self._instruments[metric.otel](value, self._attributes_of(metric.labels, labels))

    def _attributes_of(self, names: tuple[str, ...], values: tuple[str, ...]) -> dict[str, str]:
        attributes = self._attributes.get((names, values))
        if attributes is None:
            shown = [_LABELS.get(name, f"stroma.{name}") for name in names]
            attributes = self._attributes[names, values] = dict(zip(shown, values, strict=True))
        return attributes

    def send_run_duration(self, pipeline: str, result: ExecutionResult, seconds: float) -> None:
        about = {"gen_ai.agent.name": pipeline, "stroma.status": result.status.value}
        failed = AttemptEnd.finally_(result)
        if failed is not None and failed.error is not None:
            about["error.type"] = type_name(failed.error)
        self._instruments[str(RUN_SECONDS.otel)](seconds, about)

    def queue_read(self, pipeline: str, figures: QueueReading | None) -> None:
        label = self._labels.pipeline(pipeline)
        if figures is None:
            self._queues.pop(label, None)
            return
        self._queues[label] = figures
        if not self._shows_queues:  # Where no worker serves, the gauges would only be empty.
            self._shows_queues = True
            for at, metric in enumerate(QUEUE_GAUGES):
                self._meter.create_observable_gauge(
                    str(metric.otel), [partial(self._observe, at)], metric.unit, metric.text
                )

    def _observe(self, at: int, _: metrics.CallbackOptions) -> list[metrics.Observation]:
        return [
            metrics.Observation(figures[at], {"stroma.pipeline": label})
            for label, figures in list(self._queues.items())  # Called in the thread of a reader.
        ]

    # ------------------------------------------------------------------ small things

    def _keep_trace(self, run: ReliabilityContext, span: Span) -> None:
        """Record a span as the one that other processes link to, or put theirs under."""
        traceparent = traceparent_of(span)
        if traceparent is not None:
            run.keep_trace(self.system, traceparent)

    def _outer(self, run: ReliabilityContext) -> Context | None:
        traceparent = run.outer_trace(self.system)
        return None if traceparent is None else context_of(traceparent)

    def _kind_of(self, role: str | None) -> dict[str, str]:
        if self._vocabulary == "none":
            return {}
        return {"openinference.span.kind": "CHAIN" if role is None else role.upper()}

    def _shown(
        self, direction: Literal["input", "output"], run: ReliabilityContext, state: dict[str, Any]
    ) -> dict[str, str]:
        """Return the attributes that show a state: under the backends' names if it is content, else ours."""
        text = self._content.state(run, state)
        if not text:
            return {}
        if self._content.mode == "redacted" and self._vocabulary == "openinference":
            return content_of(direction, text, is_text=is_text(state))
        return {f"stroma.{direction}": text}

    def _bill(self, node: RunningNode, ended: AttemptEnd, around: Context) -> None:
        about: dict[str, Any] = {"stroma.outcome": ended.outcome}
        if ended.error is not None:
            about["stroma.failure_class"] = ended.class_name
        if self._content.mode == "redacted":
            for direction, messages in zip(("input", "output"), messages_of_call(node), strict=True):
                if text := self._content.messages(node.ctx, messages):
                    about[f"gen_ai.{direction}.messages"] = text
        self._inference.emit(self._tracer, node, around, about)

    def _watch_spans_of_others(self) -> None:
        """See to it that the spans of others are attributed, and their usage seen, if they are the SDK's."""
        provider: Any = self._providers[0]()
        if provider is self._watched or not hasattr(provider, "add_span_processor"):
            return
        from stroma.telemetry.attribution import watch

        watch(provider)
        self._watched = provider
        self._inference.can_see = True

    def _mark(self, span: Span, run: ReliabilityContext, ended: AttemptEnd) -> None:
        """Make a span an error if the end was one. Some backends take each "exception" event for an error."""
        if ended.error is None:
            return
        description, kind = self._content.message(ended.message), type_name(ended.error)
        about = {"exception.type": kind} | ({} if description is None else {"exception.message": description})
        span.add_event("exception", about)
        if description is None:
            description = " ".join(filter(None, (ended.class_name, ended.reason)))
        span.set_attribute("error.type", kind)
        span.set_attribute("stroma.failure_class", ended.class_name)
        if ended.reason is not None:
            span.set_attribute("stroma.reason", ended.reason)
        span.set_status(trace.Status(trace.StatusCode.ERROR, description))

    def flush(self, timeout_seconds: float) -> bool:
        # One after the other: each gets the remaining time.
        end, sent = perf_counter() + timeout_seconds, True
        for provider in self._providers:
            # The SDK's providers have it; those of the API alone, and tracers, do not.
            flush = getattr(provider(), "force_flush", None)
            if flush is not None:
                sent = flush(max(1, int((end - perf_counter()) * 1000))) is not False and sent
        return sent
