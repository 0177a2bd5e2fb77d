"""The exporter to Sentry."""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, Final

import sentry_sdk
import sentry_sdk.integrations.dedupe
import sentry_sdk.integrations.logging
import sentry_sdk.scope
import sentry_sdk.tracing_utils

from stroma._utils.access import type_name
from stroma.engine.context import ReliabilityContext
from stroma.engine.execution import CURRENT, RunningNode
from stroma.failures.classes import FailureClass
from stroma.telemetry.content import Content
from stroma.telemetry.conventions import attribution_of, note_run, operation_of
from stroma.telemetry.observer import (
    CUT_SHORT,
    AttemptEnd,
    FlowPart,
    Observer,
    is_returned,
    place_key,
    redelivered_end_ns,
    span_id_at,
    waited_seconds,
    waits_since,
)
from stroma.telemetry.sentry.events import (
    FailedAttempt,
    NodeScope,
    RunScope,
    drop_captured,
    drop_log_lines,
    drop_raised,
    event_of,
    notes_of,
    redact_event,
)
from stroma.telemetry.sentry.spans import SpanStream, Transactions
from stroma.trace.result import ExecutionResult, RunStatus

if TYPE_CHECKING:
    from sentry_sdk import Scope
    from sentry_sdk.client import BaseClient

_STATUS: Final = {
    RunStatus.FAILED: "internal_error",
    RunStatus.PARTIAL: "unavailable",
    RunStatus.CANCELLED: "cancelled",
    RunStatus.INTERRUPTED: "aborted",
}
#: Keys in the notes of a run, or of a node: its isolation scope, and the exporter that adds its breadcrumbs.
_ISOLATION: Final = "sentry isolation"
_BREADCRUMBS: Final = "sentry breadcrumbs"


class Sentry(Observer):
    """The hooks of :func:`stroma.telemetry.sentry_hooks`."""

    name = "Sentry"
    system = "sentry"

    def __init__(self, client: BaseClient | None, content: Content) -> None:
        super().__init__()
        self._sdk: Any = sentry_sdk
        self._client, self._content = client, content
        self._transactions = Transactions(sentry_sdk)
        self._streams: SpanStream | None = None
        scopes: Any = sentry_sdk.scope
        if drop_captured not in scopes.global_event_processors:
            scopes.add_global_event_processor(drop_captured)
        # The engine's own lines say what exceptions said: no Sentry logs, as they are no breadcrumbs.
        ignore = getattr(sentry_sdk.integrations.logging, "ignore_logger_for_sentry_logs", None)
        if ignore is not None:
            ignore("stroma")

    # ------------------------------------------------------------------ runs

    @property
    def destination(self) -> object:
        return self._the_client()

    def _the_client(self) -> Any:
        return self._client or self._sdk.get_client()

    @property
    def _here_key(self) -> int:
        # The global client may be another one at the end of a run than at its start.
        return 0 if self._client is None else id(self._client)

    def is_connected(self) -> bool:
        return self._client is not None or bool(self._sdk.get_client().is_active())

    @property
    def _spans(self) -> Any:
        """Return what makes spans in the mode of the client."""
        is_streamed = getattr(self._sdk.tracing_utils, "has_span_streaming_enabled", None)
        if is_streamed is None or not is_streamed(self._the_client().options):
            return self._transactions
        if self._streams is None:
            self._streams = SpanStream(self._sdk)
        return self._streams

    def _span_around(self) -> Any:
        """Return the span that a run, or a step in plain code, is started in; None if there is none."""
        scope = self._sdk.get_current_scope()
        if self._client is None or scope.get_client() is self._client:
            return self._spans.current(scope)
        around = self.here()  # The current scope is that of another client.
        return None if around is None else around.span

    def run_started(self, run: ReliabilityContext, state: dict[str, Any]) -> None:
        if is_returned(run):
            return
        note_run(run)
        sdk, spans = self._sdk, self._spans
        run.notes[self] = of_run = RunScope(self._run_here())
        outer = self._span_around()
        # Where log_hooks stand before these they write about the end of the run when its own scope is left
        # already.
        around = sdk.get_isolation_scope()
        if drop_log_lines not in getattr(around, "_event_processors", ()):
            around.add_event_processor(drop_log_lines)
        isolation = self._isolate(of_run, of_run, of_run.scopes, run.notes)
        scope = sdk.get_current_scope()
        _name_run(isolation, scope, run)
        lost = self.lost_root(run)
        outer_trace = run.outer_trace(self.system)
        if outer_trace is None and lost is not None and outer is not None:
            outer_trace = _traceparent_of(outer)
        of_run.span = span = (
            spans.start(scope, run.pipeline, "gen_ai.invoke_agent", outer, outer_trace, is_root=True)
            if lost is None
            else spans.start_lost(scope, run.pipeline, "gen_ai.invoke_agent", outer_trace, lost)
        )
        spans.put(span, "gen_ai.operation.name", "invoke_agent")
        spans.put(span, "gen_ai.agent.name", run.pipeline)
        spans.put(span, "gen_ai.pipeline.name", run.pipeline)
        spans.put(span, "stroma.run.id", run.run_id)
        self._attribute(span, run)
        began = run.first_trace(self.system)
        if began is not None and lost is None:
            spans.put(span, "stroma.resumed_from", began)
        if getattr(span, "sampled", False):
            run.keep_trace(self.system, _traceparent_of(span))
            self._show(span, "stroma.input", run, state)

    def _run_here(self) -> RunScope | None:
        here = self.here()
        return here.of_run if isinstance(here, NodeScope) else here

    def run_ended(self, run: ReliabilityContext, result: ExecutionResult) -> None:
        of_run: RunScope | None = run.notes.pop(self, None)
        if of_run is None:
            return
        try:
            failed = AttemptEnd.finally_(result)
            if failed is not None and failed.error is not None and result.failure is not None:
                final = notes_of(failed.error).failed.get(of_run)
                if final is None:
                    # A budget that refuses a node stops the run without an attempt that failed.
                    scope = self._sdk.get_current_scope()
                    node_id = result.failure.innermost.node_id
                    final = FailedAttempt(node_id, failed.class_name, failed.reason, failed.message, scope)
                self._capture(run, of_run, failed.error, final)
            span, spans = of_run.span, self._spans
            for part, ended_ns in self.ended_parts(run):
                spans.end(part.span, "ok", part.scope, ended_ns / 1e9 if ended_ns else None)
            if span is not None:
                spans.put(span, "stroma.status", result.status.value)
                spans.put(span, "stroma.tokens", result.total_tokens)
                spans.put(span, "stroma.cost_usd", result.total_cost_usd)
                if of_run.restored:
                    spans.put(span, "stroma.nodes.restored", of_run.restored)
                spans.end(span, _STATUS.get(result.status, "ok"), self._scope_of(of_run))
        finally:
            if self._run_here() is of_run:
                of_run.scopes.close()

    def _scope_of(self, of_run: RunScope) -> Any:
        """Return the current scope, or one of the run's own client if that is of another client."""
        scope = self._sdk.get_current_scope()
        if self._client is not None and scope.get_client() is not self._client:
            scope = scope.fork()
            scope.set_client(self._client)
        return scope

    def _isolate(
        self, of_run: RunScope, record: RunScope | NodeScope, scopes: ExitStack, notes: dict[Any, Any]
    ) -> Scope:
        """Until ``scopes`` are closed, what is tagged is seen by this run, or node, alone.

        ``notes``: those of the run or node. Exporters to several clients share its isolation scope.
        """
        isolation: Scope = self._sdk.get_isolation_scope()
        if notes.get(_ISOLATION) is isolation:
            scopes.enter_context(self._sdk.new_scope())
        else:
            notes[_ISOLATION] = isolation = scopes.enter_context(self._sdk.isolation_scope())
        token = self.enter(record)
        scopes.callback(lambda: self.leave(token))
        if of_run.isolation is None:
            of_run.isolation = isolation
            isolation.add_event_processor(drop_raised)
            isolation.add_event_processor(redact_event)
        else:
            # Breadcrumbs are those of the run: what failed later has those of earlier nodes.
            isolation._breadcrumbs = of_run.isolation._breadcrumbs
        if self._client is not None:
            self._sdk.get_current_scope().set_client(self._client)
        return isolation

    def _of_run(self, node: RunningNode) -> RunScope:
        """Return the state of a node's run, or of the step in plain code that it is or is inside."""
        of_run: RunScope | None = node.ctx.notes.get(self)
        if of_run is not None:
            return of_run
        while node.parent is not None:
            node = node.parent
        if (self, "step") not in node.notes:
            node.notes[self, "step"] = RunScope(self._run_here())
        of_step: RunScope = node.notes[self, "step"]
        return of_step

    def budget_warning(self, run: ReliabilityContext, dimension: str, used: float, limit: float) -> None:
        self._breadcrumb(run, f"80 % of the budget's {dimension} are used", {"used": used, "limit": limit})

    def limit_cooled_down(self, run: ReliabilityContext, limit: str, seconds: float) -> None:
        message = f"limit {limit} is closed, since its provider asked to wait"
        self._breadcrumb(run, message, {"seconds": seconds})

    def circuit_changed(self, run: ReliabilityContext, key: str, state: str) -> None:
        self._breadcrumb(run, f"the circuit of {key} is {state}", {})

    def waiting(self, node: RunningNode, reason: str, seconds: float) -> None:
        waits_since(node, self)
        self._breadcrumb(node.ctx, f"node {node.node_id} waits: {reason}", {}, level="info")

    def skipped(self, node: RunningNode) -> None:
        if is_returned(node.ctx):  # There is no scope of a run to write it to.
            return
        of_run: RunScope | None = node.ctx.notes.get(self)
        if of_run is not None:
            of_run.restored += 1
            if self._spans.is_streamed:
                self.begin_lost_parts(node)
        self._breadcrumb(node.ctx, f"node {node.node_id} was restored from the journal", {}, level="info")

    # ------------------------------------------------------------------ nodes

    def attempt_started(self, node: RunningNode, state: dict[str, Any]) -> None:
        of_node: NodeScope | None = node.notes.get(self)
        if of_node is None:
            of_node = self._enter_node(node)
            span = of_node.span
            self._show(span, "stroma.input", node.ctx, state)
        waited = waited_seconds(node, self)
        if waited:
            self._spans.put(of_node.span, "stroma.node.wait_s", waited)

    def _enter_node(self, node: RunningNode) -> NodeScope:
        above, entered, of_run = self._span_around(), ExitStack(), self._of_run(node)
        of_node = NodeScope(None, self._sdk.get_current_scope(), of_run)
        isolation = self._isolate(of_run, of_node, entered, node.notes)
        of_node.scope, of_node.entered = self._sdk.get_current_scope(), entered
        of_node.isolation = isolation
        self._begin(node, of_node, above)
        return of_node

    def _show(self, span: Any, name: str, run: ReliabilityContext, state: dict[str, Any]) -> None:
        text = self._content.state(run, state) if getattr(span, "sampled", False) else ""
        if text:
            self._spans.put(span, name, text)

    def _attribute(self, span: Any, run: ReliabilityContext) -> None:
        """Set the conversation, user and tags of a run on a span."""
        for name, value in attribution_of(run).items():
            self._spans.put(span, name, list(value) if isinstance(value, tuple) else value)

    def _alone(self, node: RunningNode) -> bool:
        """Return True for a step in plain code, which is reported like a run."""
        return node.parent is None and self not in node.ctx.notes

    def _begin(self, node: RunningNode, of_node: NodeScope, above: Any) -> None:
        scope, spans = of_node.scope, self._spans
        if self._client is not None:
            scope.set_client(self._client)
        scope.set_tag("stroma.node", node.node_id)
        around = self.around(node)
        if around is not None and not (
            node.is_called and getattr(above, "trace_id", above) == getattr(around.span, "trace_id", None)
        ):
            above = around.span  # Not the current span: see Observer.around().
        operation = operation_of(node)
        kind = operation.get("gen_ai.operation.name")
        name = node.node_id if kind is None else f"{kind} {node.node_id}"
        span = spans.start(scope, name, "function" if kind is None else f"gen_ai.{kind}", above, None)
        self._place(node.ctx, span, place_key(node))
        if kind is not None:
            if node.agent is not None:
                spans.put(span, "gen_ai.agent.name", node.agent)
            spans.put(span, "gen_ai.pipeline.name", node.pipeline)
        for attribute, value in operation.items():
            spans.put(span, attribute, value)
        spans.put(span, "stroma.node.id", node.node_id)
        spans.put(span, "stroma.node.kind", node.kind)
        self._attribute(span, node.ctx)
        if node.redelivered:
            spans.put(span, "stroma.redelivered", True)
        of_node.span = span
        node.notes[self] = of_node

    def part_started(
        self, run: ReliabilityContext, part: FlowPart, around: RunScope | NodeScope
    ) -> NodeScope:
        scope = self._sdk.get_current_scope().fork()
        of_run: RunScope = run.notes[self]
        of_part, spans = NodeScope(None, scope, of_run), self._spans
        name, op = (
            (part.name, "function")
            if part.kind == "map"
            else (f"invoke_agent {part.name}", "gen_ai.invoke_agent")
        )
        of_part.span = span = spans.start(scope, name, op, around.span, None)
        self._place(run, span, part.place, part.start_ns)
        if part.kind != "map":
            spans.put(span, "gen_ai.operation.name", "invoke_agent")
            spans.put(span, "gen_ai.agent.name", part.name)
            spans.put(span, "gen_ai.pipeline.name", run.pipeline)
        spans.put(span, "stroma.node.branch", part.branch)
        self._attribute(span, run)
        return of_part

    def _place(self, run: ReliabilityContext, span: Any, place: str, start_ns: int | None = None) -> None:
        """Give a streamed span the id of its place in a run; see :func:`span_id_at`."""
        of_run: RunScope | None = run.notes.get(self)
        root: Any = None if of_run is None else of_run.span
        if self._spans.is_streamed and getattr(root, "sampled", False):
            self._spans.move(span, span_id_at(root.trace_id, root.span_id, place), start_ns)

    def attempt_ended(self, node: RunningNode, ended: AttemptEnd) -> None:
        of_node: NodeScope | None = node.notes.get(self)
        if of_node is None:  # Input that broke its contract, or an end that is reported again after a crash.
            of_node = NodeScope(None, self._sdk.get_current_scope().fork(), self._of_run(node))
            self._begin(node, of_node, self._span_around())
            if node.started_ns is not None:
                self._spans.backdate(of_node.span, node.started_ns)
        of_node.ended = ended
        if ended.output is not None:
            self._show(of_node.span, "stroma.output", node.ctx, ended.output)
        if ended.error is not None:
            # A group fails with the exception of its child: it is the child that failed.
            failed = FailedAttempt(
                node.node_id,
                ended.class_name,
                ended.reason,
                ended.message,
                of_node.scope,
                of_node.isolation,
                of_node.span,
            )
            notes_of(ended.error).failed.setdefault(of_node.of_run, failed)

    def retrying(
        self, node: RunningNode, attempt: int, delay_seconds: float, failure_class: FailureClass
    ) -> None:
        of_node: NodeScope | None = node.notes.get(self)
        ended = None if of_node is None else of_node.ended
        about: dict[str, Any] = {
            "attempt": attempt - 1,
            "failure_class": failure_class.value,
            "delay_s": delay_seconds,
        }
        if of_node is not None and ended is not None and ended.error is not None:
            about["type"] = type_name(ended.error)
            message = self._content.message(ended.message)
            if message is not None:
                about["message"] = message
            # It was not final.
            notes_of(ended.error).failed.pop(of_node.of_run, None)
            of_node.ended = CUT_SHORT
        self._breadcrumb(node.ctx, f"node {node.node_id} failed and is tried again", about)

    def node_ended(self, node: RunningNode) -> None:
        of_node: NodeScope | None = node.notes.pop(self, None)
        if of_node is None:
            return
        ended, spans = of_node.ended, self._spans
        if ended is not None and ended.error is not None and self._alone(node) and not node.redelivered:
            # Nobody will say how the run ended: a failure is final here, unless it was to be tried again.
            of_step = of_node.of_run
            final = notes_of(ended.error).failed.get(of_step)
            if final is not None:
                self._capture(node.ctx, of_step, ended.error, final)
        outcome = "cancelled" if ended is None else ended.outcome
        spans.put(of_node.span, "stroma.attempts", node.attempt)
        spans.put(of_node.span, "stroma.outcome", outcome)
        # Not "cancelled": the SDK streams spans of gen_ai operations, where every status but "ok" is an
        # error.
        is_final = outcome == "failure" and not node.redelivered
        ended_ns = redelivered_end_ns(node)
        ended_s = None if ended_ns is None else ended_ns / 1e9
        spans.end(of_node.span, "internal_error" if is_final else "ok", of_node.scope, ended_s)
        if of_node.entered is not None and CURRENT.get() is node:
            of_node.entered.close()

    # ------------------------------------------------------------------ events

    def _capture(
        self, run: ReliabilityContext, of_run: RunScope, error: BaseException, failed: FailedAttempt
    ) -> None:
        scope, notes = failed.scope, notes_of(error)
        if of_run.outer is not None:
            notes.captured_in.add(of_run.outer)
        if of_run in notes.captured_in:
            return  # A nested run ended with it already.
        client = self._client or scope.get_client()
        event, hint = event_of(error, run, failed, self._content, client.options)
        if self._spans.is_streamed and failed.span is not None:
            scope.streamed_span = failed.span  # It has ended, but the event is about it.
        # A nested run, or a retry of the run, may have sent the same exception: that was another failure.
        notes.captured_by.discard(client)
        scopes = self._sdk.scope
        with ExitStack() as entered:
            if failed.isolation is not None:  # With what the node has tagged.
                entered.enter_context(scopes.use_isolation_scope(failed.isolation))
            entered.enter_context(scopes.use_scope(scope))
            # The SDK drops an exception that it has seen, as one that it has captured in the node.
            self._sdk.integrations.dedupe.DedupeIntegration.reset_last_seen()
            scope.capture_event(event, hint)
        notes.captured_by.add(client)

    def _breadcrumb(
        self, run: ReliabilityContext, message: str, data: dict[str, Any], level: str = "warning"
    ) -> None:
        if run.notes.setdefault(_BREADCRUMBS, self) is self:  # Of several exporters one adds it.
            self._sdk.add_breadcrumb(
                category="stroma.run", type="default", level=level, message=message, data=data
            )

    def flush(self, timeout_seconds: float) -> bool:
        client = self._the_client()
        client.flush(timeout=timeout_seconds)
        # What the SDK could not send in time is still in its queue.
        queue = getattr(getattr(getattr(client, "transport", None), "_worker", None), "_queue", None)
        return not getattr(queue, "unfinished_tasks", 0)


def _traceparent_of(span: Any) -> str:
    return f"00-{span.trace_id}-{span.span_id}-01"


def _name_run(isolation: Scope, scope: Scope, run: ReliabilityContext) -> None:
    """Have all events and calls of models in these scopes say which run they belong to."""
    isolation.set_tag("stroma.pipeline", run.pipeline)
    isolation.set_context("stroma", {"run_id": run.run_id, "execution": run.execution})
    if run.conversation is not None:
        isolation.set_tag("gen_ai.conversation.id", run.conversation)
        # Newer releases put it on the spans that integrations make of calls.
        set_conversation = getattr(scope, "set_conversation_id", None)
        if set_conversation is not None:
            set_conversation(run.conversation)
    if run.user is not None:
        isolation.set_user({"id": run.user})
    if run.config.tags:
        isolation.set_tag("stroma.tags", ",".join(run.config.tags))
