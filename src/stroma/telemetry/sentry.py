"""Sentry: one issue per final failure, at the span of the node that failed; spans for runs and nodes."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final
from weakref import WeakKeyDictionary, WeakSet

from stroma.engine.context import ReliabilityContext
from stroma.engine.execution import NodeExecution, current_node
from stroma.engine.redaction import notes_of_error
from stroma.failures.classes import FailureClass
from stroma.failures.errors import RemoteFailure
from stroma.telemetry.content import DENY_KEYS, Content, ContentMode, type_name
from stroma.telemetry.losses import LossCounter, Losses
from stroma.telemetry.observer import (
    CUT_SHORT,
    WRITING,
    Ended,
    ExporterHooks,
    Observer,
    is_returned,
    may_be_retried,
    missing,
    waited_seconds,
    waits_since,
)
from stroma.trace.result import ExecutionResult, RunStatus

if TYPE_CHECKING:
    from sentry_sdk import Scope
    from sentry_sdk.client import BaseClient

__all__ = ["sentry_hooks"]


def sentry_hooks(
    *,
    client: BaseClient | None = None,
    content: ContentMode = "none",
    deny_keys: Collection[str] = DENY_KEYS,
    max_bytes: int = 4096,
) -> ExporterHooks:
    """Create hooks that capture the failure that ended a run, once, and emit a span for each run and node.

    An attempt that is tried again is a breadcrumb. Issues are grouped by pipeline, node, failure class and type of
    the exception; an event points at the span of the failed node. Each run and each node has an isolation scope of its
    own, so that what one tags is not found in its neighbours. Spans are transactions, or with the SDK's
    ``trace_lifecycle="stream"`` streamed.

    Args:
        client: where to send to; the one of ``sentry_sdk.init()`` if none is given.
        content: see :class:`stroma.telemetry.content.Content`. In "none" events carry no messages; in no mode do they
            carry variables of stack frames.
        deny_keys: names of fields whose values are never sent.
        max_bytes: of one state or message.

    Raises ImportError with the line that installs the extra.
    """
    try:
        import sentry_sdk  # noqa: F401
    except ImportError as error:
        raise missing("sentry-sdk", "sentry_hooks", "sentry") from error
    return _Sentry(client, Content.make(content, deny_keys, max_bytes)).hooks()


class _ErrorNotes:
    """Notes on an exception, on the exception itself: it is gone with it, and redacted copies share it."""

    __slots__ = ("captured_by", "captured_in", "failed")

    def __init__(self) -> None:
        #: The failed attempt that it ended, by run; the innermost node of each.
        self.failed: WeakKeyDictionary[_RunScope, _Failed] = WeakKeyDictionary()
        #: The runs inside of which it was captured, and the clients that have sent it.
        self.captured_in: WeakSet[_RunScope] = WeakSet()
        self.captured_by: WeakSet[BaseClient] = WeakSet()

    def __reduce__(self) -> tuple[Any, ...]:
        return _ErrorNotes, ()  # A copy of the exception, in another process say, is another one.


def _notes_of(error: BaseException) -> _ErrorNotes:
    notes: _ErrorNotes = notes_of_error(error).setdefault("sentry", _ErrorNotes())
    return notes


class _RunScope:
    """State of a run, or of a step in plain code, until its end."""

    __slots__ = ("__weakref__", "isolation", "outer", "restored", "scopes", "span")

    def __init__(self, outer: _RunScope | None) -> None:
        #: The run around this one.
        self.outer = outer
        #: The isolation scope that the run has entered.
        self.scopes = ExitStack()
        self.isolation: Scope | None = None
        self.span: Any = None
        self.restored = 0


@dataclass(frozen=True, slots=True)
class _Failed:
    """A failed attempt that may turn out to be final; without its exception, which refers to this."""

    node_id: str
    class_name: str
    reason: str | None
    scope: Scope
    isolation: Scope | None = None
    span: Any = None


class _Node:
    """The span and scope of a node, and what its end needs."""

    __slots__ = ("ended", "entered", "isolation", "of_run", "scope", "span")

    def __init__(self, span: Any, scope: Scope, of_run: _RunScope) -> None:
        self.span, self.scope, self.of_run = span, scope, of_run
        self.isolation: Scope | None = None
        self.entered: ExitStack | None = None
        self.ended: Ended | None = None


class _Transactions:
    """Spans of transactions, as the SDK has them by default."""

    is_streamed = False

    def __init__(self, sdk: Any) -> None:
        self._sdk = sdk

    def current(self, scope: Any) -> Any:
        return scope.span

    def start(
        self, scope: Any, name: str, op: str, above: Any, traceparent: str | None, *, is_root: bool
    ) -> Any:
        about = {"op": op, "name": name}
        with self._sdk.scope.use_scope(scope):  # A transaction goes by the client of the current one.
            if traceparent is not None:
                header = {"sentry-trace": _sentry_trace(traceparent)}
                span = self._sdk.start_transaction(self._sdk.continue_trace(header, **about))
            elif above is not None:
                span = above.start_child(**about)
            else:
                span = self._sdk.start_transaction(**about) if is_root else self._sdk.start_span(**about)
        scope.span = span
        return span

    def put(self, span: Any, name: str, value: Any) -> None:
        span.set_data(name, value)

    def end(self, span: Any, status: str, scope: Any) -> None:
        span.set_status(status)
        with self._sdk.scope.use_scope(scope):
            span.finish(scope)


class _Streams:
    """Spans that are sent one by one (``trace_lifecycle="stream"``): transactions do nothing there."""

    is_streamed = True

    def __init__(self, sdk: Any) -> None:

        self._sdk = sdk

    def current(self, scope: Any) -> Any:
        return scope.streamed_span

    def start(
        self, scope: Any, name: str, op: str, above: Any, traceparent: str | None, *, is_root: bool
    ) -> Any:
        with self._sdk.scope.use_scope(scope):
            scope.streamed_span = above if traceparent is None else None
            if traceparent is not None:
                scope.generate_propagation_context({"sentry-trace": _sentry_trace(traceparent)})
            elif above is None and is_root:
                scope.set_new_propagation_context()
            return self._sdk.traces.start_span(name=name, attributes={"sentry.op": op})

    def put(self, span: Any, name: str, value: Any) -> None:
        span.set_attribute(name, value)

    def end(self, span: Any, status: str, scope: Any) -> None:
        span.status = "ok" if status in ("ok", "cancelled", "aborted") else "error"
        span.set_attribute("sentry.status.message", status)
        with self._sdk.scope.use_scope(scope):
            span.end()


def _sentry_trace(traceparent: str) -> str:
    _, trace_id, span_id, flags, *_ = traceparent.split("-")
    return f"{trace_id}-{span_id}-{int(flags, 16) & 1}"


class _Sentry(Observer):
    name = "Sentry"
    system = "sentry"

    def __init__(self, client: BaseClient | None, content: Content) -> None:
        super().__init__()
        import sentry_sdk
        import sentry_sdk.integrations.logging
        import sentry_sdk.scope
        import sentry_sdk.tracing_utils
        import sentry_sdk.utils

        self._sdk: Any = sentry_sdk
        self._client, self._content = client, content
        self._transactions = _Transactions(sentry_sdk)
        self._streams: _Streams | None = None
        self._losses = Losses(self.name)
        self._watch_losses()
        scopes: Any = sentry_sdk.scope
        if _not_again not in scopes.global_event_processors:
            scopes.add_global_event_processor(_not_again)
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
            self._streams = _Streams(self._sdk)
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
        sdk, spans = self._sdk, self._spans
        run.notes[self] = of_run = _RunScope(self._run_here())
        outer = self._span_around()
        # Where log_hooks stand before these they write about the end of the run when its own scope is left already.
        around = sdk.get_isolation_scope()
        if _not_of_log_hooks not in getattr(around, "_event_processors", ()):
            around.add_event_processor(_not_of_log_hooks)
        isolation = self._isolate(of_run, of_run, of_run.scopes)
        scope = sdk.get_current_scope()
        _name_run(isolation, run)
        of_run.span = span = spans.start(
            scope, run.pipeline, "gen_ai.invoke_agent", outer, run.outer_trace(self.system), is_root=True
        )
        spans.put(span, "gen_ai.operation.name", "invoke_agent")
        spans.put(span, "gen_ai.agent.name", run.pipeline)
        spans.put(span, "stroma.run.id", run.run_id)
        began = run.first_trace(self.system)
        if began is not None:
            spans.put(span, "stroma.resumed_from", began)
        if getattr(span, "sampled", False):
            run.keep_trace(self.system, f"00-{span.trace_id}-{span.span_id}-01")
            spans.put(span, "stroma.input", self._content.state(run, state))
        if run.elsewhere:  # No span can end where it has not begun: this one is what the others stand under.
            del run.notes[self]
            spans.end(span, "ok", scope)
            of_run.scopes.close()

    def _run_here(self) -> _RunScope | None:
        here = self.here()
        return here.of_run if isinstance(here, _Node) else here

    def run_ended(self, run: ReliabilityContext, result: ExecutionResult) -> None:
        of_run: _RunScope | None = run.notes.pop(self, None)
        if of_run is None and run.elsewhere:
            of_run = self._ending(run)
        if of_run is None:
            return
        try:
            failed = Ended.finally_(result)
            if failed is not None and failed.error is not None and result.failure is not None:
                final = _notes_of(failed.error).failed.get(of_run)
                if final is None:
                    # A budget that refuses a node stops the run without an attempt that failed.
                    scope = self._sdk.get_current_scope()
                    final = _Failed(_innermost(result), failed.class_name, failed.reason, scope)
                self._capture(run, of_run, failed.error, final)
            span, spans = of_run.span, self._spans
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

    def _scope_of(self, of_run: _RunScope) -> Any:
        """Return the current scope; where another client's or another context's is, a scope of the run's own client."""
        scope = self._sdk.get_current_scope()
        if self._client is not None and scope.get_client() is not self._client:
            scope = scope.fork()
            scope.set_client(self._client)
        return scope

    def _ending(self, run: ReliabilityContext) -> _RunScope:
        """Return the record of a run that started in another process."""
        record = _RunScope(self._run_here())
        isolation = self._isolate(record, record, record.scopes)
        scope = self._sdk.get_current_scope()
        _name_run(isolation, run)
        traceparent = run.outer_trace(self.system)
        record.span = self._spans.start(
            scope, run.pipeline, "stroma.run_end", None, traceparent, is_root=True
        )
        return record

    def _isolate(self, of_run: _RunScope, record: _RunScope | _Node, scopes: ExitStack) -> Scope:
        """Until ``scopes`` are closed, what is tagged is seen by this run, or node, alone."""
        isolation: Scope = scopes.enter_context(self._sdk.isolation_scope())
        token = self.enter(record)
        scopes.callback(lambda: self.leave(token))
        if of_run.isolation is None:
            of_run.isolation = isolation
            isolation.add_event_processor(self._sound)
        else:
            # Breadcrumbs are those of the run: what failed later has those of earlier nodes.
            isolation._breadcrumbs = of_run.isolation._breadcrumbs
        if self._client is not None:
            self._sdk.get_current_scope().set_client(self._client)
        return isolation

    def _of_run(self, node: NodeExecution) -> _RunScope:
        """Return the state of a node's run, or of the step in plain code that it is or is inside."""
        of_run: _RunScope | None = node.ctx.notes.get(self)
        if of_run is not None:
            return of_run
        while node.parent is not None:
            node = node.parent
        if (self, "step") not in node.notes:
            node.notes[self, "step"] = _RunScope(self._run_here())
        of_step: _RunScope = node.notes[self, "step"]
        return of_step

    def budget_warning(self, run: ReliabilityContext, dimension: str, used: float, limit: float) -> None:
        self._breadcrumb(f"80 % of the budget's {dimension} are used", {"used": used, "limit": limit})

    def limit_cooled_down(self, run: ReliabilityContext, limit: str, seconds: float) -> None:
        self._breadcrumb(f"limit {limit} is closed, since its provider asked to wait", {"seconds": seconds})

    def circuit_changed(self, run: ReliabilityContext, key: str, state: str) -> None:
        self._breadcrumb(f"the circuit of {key} is {state}", {})

    def waiting(self, node: NodeExecution, reason: str, seconds: float) -> None:
        waits_since(node, self)
        self._breadcrumb(f"node {node.node_id} waits: {reason}", {}, level="info")

    def skipped(self, node: NodeExecution) -> None:
        if is_returned(node.ctx):  # There is no scope of a run to write it to.
            return
        of_run: _RunScope | None = node.ctx.notes.get(self)
        if of_run is not None:
            of_run.restored += 1
        self._breadcrumb(f"node {node.node_id} was restored from the journal", {}, level="info")

    # ------------------------------------------------------------------ nodes

    def attempt_started(self, node: NodeExecution, state: dict[str, Any]) -> None:
        of_node: _Node | None = node.notes.get(self)
        if of_node is None:
            of_node = self._enter_node(node)
            span = of_node.span
            if getattr(span, "sampled", False):
                self._spans.put(span, "stroma.input", self._content.state(node.ctx, state))
                if node.ctx.elsewhere and node.kind == "group":
                    # What is inside stands under this span, wherever it runs; as with the run, the end has one of its own.
                    node.ctx.keep_trace(self.system, f"00-{span.trace_id}-{span.span_id}-01")
        waited = waited_seconds(node, self)
        if waited:
            self._spans.put(of_node.span, "stroma.node.wait_s", waited)

    def _enter_node(self, node: NodeExecution) -> _Node:
        above, entered, of_run = self._span_around(), ExitStack(), self._of_run(node)
        of_node = _Node(None, self._sdk.get_current_scope(), of_run)
        isolation = self._isolate(of_run, of_node, entered)
        if node.ctx.elsewhere:
            _name_run(isolation, node.ctx)
        of_node.scope, of_node.entered = self._sdk.get_current_scope(), entered
        of_node.isolation = isolation
        self._begin(node, of_node, above)
        return of_node

    def _alone(self, node: NodeExecution) -> bool:
        """Return True for a step in plain code, which is reported like a run."""
        return node.parent is None and self not in node.ctx.notes

    def _begin(self, node: NodeExecution, of_node: _Node, above: Any, *, ended: bool = False) -> None:
        scope, spans = of_node.scope, self._spans
        if self._client is not None:
            scope.set_client(self._client)
        scope.set_tag("stroma.node", node.node_id)
        around = self.around(node)
        if around is not None and not (
            node.is_called and getattr(above, "trace_id", above) == getattr(around.span, "trace_id", None)
        ):
            above = around.span  # Not the current span: see Observer.around().
        op, traceparent = "gen_ai.execute_tool", None
        if node.ctx.elsewhere:
            traceparent, above = node.ctx.outer_trace(self.system), None
            if node.kind == "group" and ended:
                op = "stroma.node_end"
        span = spans.start(scope, node.node_id, op, above, traceparent, is_root=node.ctx.elsewhere)
        if op == "gen_ai.execute_tool":
            spans.put(span, "gen_ai.operation.name", "execute_tool")
            spans.put(span, "gen_ai.tool.name", node.node_id)
        spans.put(span, "stroma.node.id", node.node_id)
        spans.put(span, "stroma.node.kind", node.kind)
        if node.redelivered:
            spans.put(span, "stroma.redelivered", True)
        of_node.span = span
        node.notes[self] = of_node

    def attempt_ended(self, node: NodeExecution, ended: Ended) -> None:
        of_node: _Node | None = node.notes.get(self)
        if of_node is None:  # Input that broke its contract, or an end that is reported again after a crash.
            of_node = _Node(None, self._sdk.get_current_scope().fork(), self._of_run(node))
            self._begin(node, of_node, self._span_around(), ended=True)
        of_node.ended = ended
        if ended.output is not None and getattr(of_node.span, "sampled", False):
            self._spans.put(of_node.span, "stroma.output", self._content.state(node.ctx, ended.output))
        if ended.error is not None:
            # A group fails with the exception of its child: it is the child that failed.
            failed = _Failed(
                node.node_id,
                ended.class_name,
                ended.reason,
                of_node.scope,
                of_node.isolation,
                of_node.span,
            )
            _notes_of(ended.error).failed.setdefault(of_node.of_run, failed)

    def retrying(
        self, node: NodeExecution, attempt: int, delay_seconds: float, failure_class: FailureClass
    ) -> None:
        of_node: _Node | None = node.notes.get(self)
        error = None if of_node is None or of_node.ended is None else of_node.ended.error
        about: dict[str, Any] = {
            "attempt": attempt - 1,
            "failure_class": failure_class.value,
            "delay_s": delay_seconds,
        }
        if error is not None and of_node is not None:
            about["type"] = type_name(error)
            message = self._content.message(node.ctx, error)
            if message is not None:
                about["message"] = message
            # It was not final.
            _notes_of(error).failed.pop(of_node.of_run, None)
            of_node.ended = CUT_SHORT
        self._breadcrumb(f"node {node.node_id} failed and is tried again", about)

    def node_ended(self, node: NodeExecution) -> None:
        of_node: _Node | None = node.notes.pop(self, None)
        if of_node is None:
            return
        ended, spans = of_node.ended, self._spans
        if (
            ended is not None
            and ended.error is not None
            and self._alone(node)
            and not node.redelivered
            and not node.ctx.elsewhere
        ):
            # Nobody will say how the run ended: a failure is final here, unless it was to be tried again.
            of_step = of_node.of_run
            final = _notes_of(ended.error).failed.get(of_step)
            if final is not None:
                self._capture(node.ctx, of_step, ended.error, final)
        outcome = "cancelled" if ended is None else ended.outcome
        spans.put(of_node.span, "stroma.attempts", node.attempt)
        spans.put(of_node.span, "stroma.outcome", outcome)
        # Not "cancelled": the SDK streams spans of gen_ai operations, where every status but "ok" is an error.
        is_error = outcome == "failure" and not may_be_retried(node)
        spans.end(of_node.span, "internal_error" if is_error else "ok", of_node.scope)
        if of_node.entered is not None and current_node() is node:
            of_node.entered.close()

    # ------------------------------------------------------------------ events

    def _capture(
        self, run: ReliabilityContext, of_run: _RunScope, error: BaseException, failed: _Failed
    ) -> None:
        scope, notes = failed.scope, _notes_of(error)
        if of_run.outer is not None:
            notes.captured_in.add(of_run.outer)
        if of_run in notes.captured_in:
            return  # A nested run ended with it already.
        client = self._client or scope.get_client()
        event, hint = self._sdk.utils.event_from_exception(
            error,
            # Variables of frames hold what nodes were given.
            client_options={**client.options, "include_local_variables": False},
            mechanism={"type": "stroma", "handled": True},
        )
        for value in event.get("exception", {}).get("values", ()):
            failure_text = str(value.get("value") or "")
            if self._content.mode == "none":
                value["value"] = " ".join(filter(None, (failed.class_name, failed.reason)))
            elif value.get("value"):
                value["value"] = self._content.message(run, failure_text)
        if isinstance(error, RemoteFailure):
            for value in event.get("exception", {}).get("values", ())[-1:]:
                module, _, value["type"] = error.full_name.rpartition(".")
                value["module"] = module or "builtins"
        for frame in _frames(event):
            if str(frame.get("module")).startswith("stroma."):
                frame["in_app"] = False  # The engine called the node; it is the node that failed.
        event["fingerprint"] = ["stroma", run.pipeline, failed.node_id, failed.class_name, type_name(error)]
        event["level"] = "error"
        event["transaction"] = run.pipeline
        tags = {
            "stroma.pipeline": run.pipeline,
            "stroma.node": failed.node_id,
            "stroma.failure_class": failed.class_name,
        }
        event["tags"] = {**tags, **({} if failed.reason is None else {"stroma.reason": failed.reason})}
        if self._spans.is_streamed and failed.span is not None:
            scope.streamed_span = failed.span  # It has ended; the event is about it all the same.
        # A nested run, or a retry of the run, may have sent the same exception: that was another failure.
        notes.captured_by.discard(client)
        scopes = self._sdk.scope
        with ExitStack() as entered:
            if failed.isolation is not None:  # With what the node has tagged.
                entered.enter_context(scopes.use_isolation_scope(failed.isolation))
            entered.enter_context(scopes.use_scope(scope))
            scope.capture_event(event, hint)
        notes.captured_by.add(client)

    def _breadcrumb(self, message: str, data: dict[str, Any], level: str = "warning") -> None:
        self._sdk.add_breadcrumb(
            category="stroma.run", type="default", level=level, message=message, data=data
        )

    @staticmethod
    def _sound(event: Any, _hint: Any) -> Any:
        """Redact an event from inside a run."""
        crumbs = event.get("breadcrumbs")
        if isinstance(crumbs, dict):
            # The engine's own log lines tell what the exceptions said, secrets and all, and are no news beside ours.
            crumbs["values"] = [c for c in crumbs.get("values", ()) if c.get("category") != "stroma"]
        if str(event.get("logger")) == "stroma":  # A hook that raised had the state among its arguments.
            for frame in _frames(event):
                frame.pop("vars", None)
        return event

    def flush(self, timeout_seconds: float) -> bool:
        self._watch_losses()
        client = self._the_client()
        client.flush(timeout=timeout_seconds)
        # What the SDK could not send in time is still in its queue.
        queue = getattr(getattr(getattr(client, "transport", None), "_worker", None), "_queue", None)
        return self._losses.take() == 0 and not getattr(queue, "unfinished_tasks", 0)

    def _watch_losses(self) -> None:
        """Count what the client's transport drops."""
        transport = getattr(self._the_client(), "transport", None)
        self._losses.watch(transport, "record_lost_event", "items", _lost)


#: Reasons of the SDK for dropping what it was to send; with others nothing was to be sent.
_LOST: Final = frozenset(
    {
        "queue_overflow",
        "buffer_overflow",
        "network_error",
        "ratelimit_backoff",
        "send_error",
        "internal_sdk_error",
    }
)


def _lost(counter: LossCounter, record: Any) -> Any:
    """Return a recorder of lost items that counts them, too."""

    def counted(reason: str, *arguments: Any, **options: Any) -> Any:
        if reason in _LOST:
            counter.add(int(options.get("quantity", 1)), reason)
        return record(reason, *arguments, **options)

    return counted


def _innermost(result: ExecutionResult) -> str:
    """Return the node that failed: a group fails with the exception of its child."""
    assert result.failure is not None
    node_id = result.failure.node_id
    rows = list(result.trace)[-1:]
    while rows and rows[-1].node_id == node_id:
        failure_text = rows[-1].failure_message
        rows = [
            row
            for row in rows[-1].children
            if row.outcome == "failure" and row.failure_message == failure_text
        ]
        node_id = rows[-1].node_id if rows else node_id
    return node_id


def _name_run(isolation: Scope, run: ReliabilityContext) -> None:
    isolation.set_tag("stroma.pipeline", run.pipeline)
    isolation.set_context("stroma", {"run_id": run.run_id, "execution": run.execution})


def _frames(event: Any) -> Iterator[dict[str, Any]]:
    for value in (event.get("exception") or {}).get("values") or ():
        yield from (value.get("stacktrace") or {}).get("frames") or ()


def _not_of_log_hooks(event: Any, _hint: Any) -> Any:
    """None for what Sentry's logging integration makes of a line that says again what is captured here."""
    return None if WRITING.get() else event


def _not_again(event: Any, hint: Any) -> Any:
    """None for what an integration makes of an exception that was captured here with the same client, in any task."""
    error = ((hint or {}).get("exc_info") or (None, None))[1]
    notes = getattr(error, "__dict__", {}).get("_stroma_notes", {}).get("sentry")
    if notes is None:
        return event
    from sentry_sdk import get_client

    return None if get_client() in notes.captured_by else event


_STATUS = {
    RunStatus.FAILED: "internal_error",
    RunStatus.PARTIAL: "unavailable",
    RunStatus.CANCELLED: "cancelled",
    RunStatus.INTERRUPTED: "aborted",
}
