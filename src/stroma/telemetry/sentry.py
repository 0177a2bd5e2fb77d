"""Sentry: one issue per final failure, at the span of the node that failed; spans for runs and nodes."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import ExitStack
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from stroma.engine.context import ReliabilityContext
from stroma.engine.execution import NodeExecution, current_node
from stroma.failures.classes import FailureClass
from stroma.failures.errors import RemoteFailure
from stroma.telemetry.content import DENY_KEYS, Content, ContentMode, type_name
from stroma.telemetry.observer import CUT_SHORT, WRITING, Ended, ExporterHooks, Observer, is_returned, missing
from stroma.trace.result import ExecutionResult, RunStatus

if TYPE_CHECKING:
    from sentry_sdk import Scope
    from sentry_sdk.client import BaseClient
    from sentry_sdk.tracing import NoOpSpan, Span, Transaction

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
    the exception; an event points at the span of the failed node. Each run has an isolation scope and each node a
    scope of its own, so that what one tags is not found in its neighbours.

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


class _RunScope:
    """State of a run until its end."""

    __slots__ = ("captured", "failed", "outer", "scopes", "span")

    def __init__(self, outer: _RunScope | None) -> None:
        #: The run around this one, and what was captured of the runs inside of it, by identity.
        self.outer = outer
        self.captured: dict[int, BaseException] = {}
        #: The isolation scope that the run has entered.
        self.scopes = ExitStack()
        self.span: Span | Transaction | NoOpSpan | None = None
        #: Attempts that failed, by the identity of their exceptions; the innermost node of each.
        self.failed: dict[int, _Failed] = {}


@dataclass(frozen=True, slots=True)
class _Failed:
    """A failed attempt that may turn out to be final."""

    node_id: str
    ended: Ended
    scope: Scope


class _Node:
    """The span and scope of a node, and what its end needs."""

    __slots__ = ("ended", "entered", "scope", "span")

    def __init__(self, span: Span | NoOpSpan, scope: Scope) -> None:
        self.span, self.scope = span, scope
        self.entered: ExitStack | None = None
        self.ended: Ended | None = None


#: The run whose scopes are entered in this context: a coroutine closed from elsewhere has left its context behind.
_HERE: ContextVar[_RunScope | None] = ContextVar("stroma_sentry_run", default=None)


class _Sentry(Observer):
    name = "Sentry"

    def __init__(self, client: BaseClient | None, content: Content) -> None:
        super().__init__()
        import sentry_sdk
        import sentry_sdk.scope
        import sentry_sdk.utils

        self._sdk, self._client, self._content = sentry_sdk, client, content

    # ------------------------------------------------------------------ runs

    @property
    def destination(self) -> object:
        return self._client or self._sdk.get_client()

    def is_connected(self) -> bool:
        return self._client is not None or bool(self._sdk.get_client().is_active())

    def run_started(self, run: ReliabilityContext, state: dict[str, Any]) -> None:
        if is_returned(run):
            return
        sdk = self._sdk
        run.notes[self] = of_run = _RunScope(_HERE.get())
        outer = sdk.get_current_span()
        # Where log_hooks stand before these they write about the end of the run when its own scope is left already.
        around = sdk.get_isolation_scope()
        if _not_of_log_hooks not in getattr(around, "_event_processors", ()):
            around.add_event_processor(_not_of_log_hooks)
        isolation = self._isolate(of_run, of_run.scopes)
        scope = sdk.get_current_scope()
        if self._client is not None:
            scope.set_client(self._client)
        _name_run(isolation, run)
        about: dict[str, Any] = {"op": "stroma.run", "name": run.pipeline}
        if run.traceparent is not None:
            span: Any = self._continued(run.traceparent, about)
        elif outer is not None:
            span = outer.start_child(**about)
        else:
            span = sdk.start_transaction(**about)
        of_run.span = scope.span = span
        span.set_data("stroma.run.id", run.run_id)
        if run.first_traceparent is not None:
            span.set_data("stroma.resumed_from", run.first_traceparent)
        if run.kept_traceparent is None and getattr(span, "sampled", False):
            run.kept_traceparent = f"00-{span.trace_id}-{span.span_id}-01"
        span.set_data("stroma.input", self._content.state(run, state))
        if run.elsewhere:  # No span can end where it has not begun: this one is what the others stand under.
            del run.notes[self]
            span.finish()
            of_run.scopes.close()

    def run_ended(self, run: ReliabilityContext, result: ExecutionResult) -> None:
        of_run: _RunScope | None = run.notes.pop(self, None)
        if of_run is None and run.elsewhere:
            of_run = self._ending(run)
        if of_run is None:
            return
        try:
            failed = Ended.finally_(result)
            if failed is not None and result.failure is not None:
                # A budget that refuses a node stops the run without an attempt that failed.
                refused = _Failed(_innermost(result), failed, self._sdk.get_current_scope())
                self._capture(run, of_run, of_run.failed.get(_identity(failed.error), refused))
            span = of_run.span
            if span is not None:
                span.set_data("stroma.status", result.status.value)
                span.set_data("stroma.tokens", result.total_tokens)
                span.set_data("stroma.cost_usd", result.total_cost_usd)
                span.set_status(_STATUS.get(result.status, "ok"))
                span.finish()
        finally:
            if _HERE.get() is of_run:
                of_run.scopes.close()

    def _ending(self, run: ReliabilityContext) -> _RunScope:
        """Return the record of a run that started in another process."""
        record = _RunScope(_HERE.get())
        isolation = self._isolate(record, record.scopes)
        scope = self._sdk.get_current_scope()
        if self._client is not None:
            scope.set_client(self._client)
        _name_run(isolation, run)
        record.span = scope.span = self._continued(
            run.traceparent, {"op": "stroma.run_end", "name": run.pipeline}
        )
        return record

    def _continued(self, traceparent: str | None, about: dict[str, Any]) -> Any:
        """Start a transaction under a span of another process, or in a new trace."""
        if traceparent is None:
            return self._sdk.start_transaction(**about)
        _, trace_id, span_id, flags, *_ = traceparent.split("-")
        header = f"{trace_id}-{span_id}-{int(flags, 16) & 1}"
        return self._sdk.start_transaction(self._sdk.continue_trace({"sentry-trace": header}, **about))

    def _isolate(self, of_run: _RunScope, scopes: ExitStack) -> Scope:
        """Until ``scopes`` are closed, breadcrumbs and tags are those of this run alone."""
        isolation = scopes.enter_context(self._sdk.isolation_scope())
        token = _HERE.set(of_run)
        scopes.callback(lambda: _HERE.reset(token))
        isolation.add_event_processor(self._sound)
        return isolation

    def _of_run(self, node: NodeExecution) -> _RunScope:
        """Return the state of a node's run, or of the step in plain code that it is or is inside."""
        of_run: _RunScope | None = node.ctx.notes.get(self)
        if of_run is not None:
            return of_run
        while node.parent is not None:
            node = node.parent
        if (self, "step") not in node.notes:
            node.notes[self, "step"] = _RunScope(_HERE.get())
        of_step: _RunScope = node.notes[self, "step"]
        return of_step

    def budget_warning(self, run: ReliabilityContext, dimension: str, used: float, limit: float) -> None:
        self._breadcrumb(f"80 % of the budget's {dimension} are used", {"used": used, "limit": limit})

    def skipped(self, node: NodeExecution) -> None:
        if is_returned(node.ctx):  # There is no scope of a run to write it to.
            return
        self._breadcrumb(f"node {node.node_id} was restored from the journal", {}, level="info")

    # ------------------------------------------------------------------ nodes

    def attempt_started(self, node: NodeExecution, state: dict[str, Any]) -> None:
        if self in node.notes:
            return
        entered = ExitStack()
        if self._alone(node):
            isolation = self._isolate(self._of_run(node), entered)
            if node.ctx.elsewhere:
                _name_run(isolation, node.ctx)
        else:
            entered.enter_context(self._sdk.new_scope())
        scope = self._sdk.get_current_scope()
        of_node = self._begin(node, scope)
        of_node.entered = entered
        scope.span = of_node.span
        of_node.span.set_data("stroma.input", self._content.state(node.ctx, state))
        span = of_node.span
        if node.ctx.elsewhere and node.kind == "group" and getattr(span, "sampled", False):
            # What is inside stands under this span, wherever it runs; as with the run, the end has one of its own.
            node.ctx.kept_traceparent = f"00-{span.trace_id}-{span.span_id}-01"

    def _alone(self, node: NodeExecution) -> bool:
        """Return True for a step in plain code, which is reported like a run."""
        return node.parent is None and self not in node.ctx.notes

    def _begin(self, node: NodeExecution, scope: Scope, *, ended: bool = False) -> _Node:
        if self._client is not None:
            scope.set_client(self._client)
        scope.set_tag("stroma.node", node.node_id)
        around = self.around(node)
        above = scope.span if around is None else around.span
        about: dict[str, Any] = {"op": "stroma.node", "name": node.node_id}
        span: Any
        if node.ctx.elsewhere:
            if node.kind == "group" and ended:
                about["op"] = "stroma.node_end"
            with self._sdk.scope.use_scope(scope):  # A transaction goes by the client of the current one.
                span = self._continued(node.ctx.traceparent, about)
        else:
            span = self._sdk.start_span(**about) if above is None else above.start_child(**about)
        span.set_data("stroma.node.id", node.node_id)
        span.set_data("stroma.node.kind", node.kind)
        if node.redelivered:
            span.set_data("stroma.redelivered", True)
        node.notes[self] = record = _Node(span, scope)
        return record

    def attempt_ended(self, node: NodeExecution, ended: Ended) -> None:
        of_node: _Node | None = node.notes.get(self)
        if of_node is None:  # Input that broke its contract, or an end that is reported again after a crash.
            of_node = self._begin(node, self._sdk.get_current_scope().fork(), ended=True)
            of_node.scope.span = of_node.span
        of_node.ended = ended
        if ended.output is not None:
            of_node.span.set_data("stroma.output", self._content.state(node.ctx, ended.output))
        if ended.error is not None:
            # A group fails with the exception of its child: it is the child that failed.
            failed = _Failed(node.node_id, ended, of_node.scope)
            self._of_run(node).failed.setdefault(_identity(ended.error), failed)

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
            # It was not final. Another exception may get the same identity later on.
            self._of_run(node).failed.pop(_identity(error), None)
            of_node.ended = CUT_SHORT
        self._breadcrumb(f"node {node.node_id} failed and is tried again", about)

    def node_ended(self, node: NodeExecution) -> None:
        of_node: _Node | None = node.notes.pop(self, None)
        if of_node is None:
            return
        ended = of_node.ended
        if (
            ended is not None
            and ended.error is not None
            and self._alone(node)
            and not node.redelivered
            and not node.ctx.elsewhere
        ):
            # Nobody will say how the run ended: a failure is final here, unless it was to be tried again.
            of_step = self._of_run(node)
            final = of_step.failed.get(_identity(ended.error))
            if final is not None:
                self._capture(node.ctx, of_step, final)
        outcome = "cancelled" if ended is None else ended.outcome
        of_node.span.set_data("stroma.attempts", node.attempt)
        of_node.span.set_data("stroma.outcome", outcome)
        of_node.span.set_status({"failure": "internal_error", "cancelled": "cancelled"}.get(outcome, "ok"))
        with self._sdk.scope.use_scope(of_node.scope):
            of_node.span.finish(of_node.scope)
        if of_node.entered is not None and current_node() is node:
            of_node.entered.close()

    # ------------------------------------------------------------------ events

    def _capture(self, run: ReliabilityContext, of_run: _RunScope, failed: _Failed) -> None:
        ended, scope = failed.ended, failed.scope
        error = ended.error
        assert error is not None
        if of_run.outer is not None:
            of_run.outer.captured[_identity(error)] = error
        if _identity(error) in of_run.captured:
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
                value["value"] = " ".join(filter(None, (ended.class_name, ended.reason)))
            elif value.get("value"):
                value["value"] = self._content.message(run, failure_text)
        if isinstance(error, RemoteFailure):
            for value in event.get("exception", {}).get("values", ())[-1:]:
                module, _, value["type"] = error.full_name.rpartition(".")
                value["module"] = module or "builtins"
        for frame in _frames(event):
            if str(frame.get("module")).startswith("stroma."):
                frame["in_app"] = False  # The engine called the node; it is the node that failed.
        event["fingerprint"] = ["stroma", run.pipeline, failed.node_id, ended.class_name, type_name(error)]
        event["level"] = "error"
        event["transaction"] = run.pipeline
        tags = {
            "stroma.pipeline": run.pipeline,
            "stroma.node": failed.node_id,
            "stroma.failure_class": ended.class_name,
        }
        event["tags"] = {**tags, **({} if ended.reason is None else {"stroma.reason": ended.reason})}
        with self._sdk.scope.use_scope(scope):
            scope.capture_event(event, hint)

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
        client = self._client or self._sdk.get_client()
        client.flush(timeout=timeout_seconds)
        return True


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


def _identity(error: BaseException | None) -> int:
    """Return one identity for an exception and for its redacted copy that hooks receive."""
    return id(getattr(error, "_stroma_identity", error))


_STATUS = {
    RunStatus.FAILED: "internal_error",
    RunStatus.PARTIAL: "unavailable",
    RunStatus.CANCELLED: "cancelled",
    RunStatus.INTERRUPTED: "aborted",
}
