"""Events of failures, the scopes of runs and nodes, and what is removed from the events of others."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final
from weakref import WeakKeyDictionary, WeakSet

from sentry_sdk import get_client
from sentry_sdk.utils import event_from_exception

from stroma._utils.access import type_name
from stroma.engine.context import ReliabilityContext
from stroma.engine.redaction import notes_of_error
from stroma.telemetry.content import Content
from stroma.telemetry.observer import WRITING, AttemptEnd

if TYPE_CHECKING:
    from sentry_sdk import Scope
    from sentry_sdk.client import BaseClient


class ErrorNotes:
    """Notes on an exception, on the exception itself: it is gone with it, and redacted copies share it."""

    __slots__ = ("captured_by", "captured_in", "failed")

    def __init__(self) -> None:
        #: The failed attempt that it ended, by run; the innermost node of each.
        self.failed: WeakKeyDictionary[RunScope, FailedAttempt] = WeakKeyDictionary()
        #: The runs inside of which it was captured, and the clients that have sent it.
        self.captured_in: WeakSet[RunScope] = WeakSet()
        self.captured_by: WeakSet[BaseClient] = WeakSet()

    def __reduce__(self) -> tuple[Any, ...]:
        return ErrorNotes, ()  # A copy of the exception, in another process say, is another one.


def notes_of(error: BaseException) -> ErrorNotes:
    """Return the notes on an exception; new ones for an exception that has none."""
    notes: ErrorNotes = notes_of_error(error).setdefault("sentry", ErrorNotes())
    return notes


class RunScope:
    """State of a run, or of a step in plain code, until its end."""

    __slots__ = ("__weakref__", "isolation", "outer", "restored", "scopes", "span")

    def __init__(self, outer: RunScope | None) -> None:
        #: The run around this one.
        self.outer = outer
        #: The isolation scope that the run has entered.
        self.scopes = ExitStack()
        self.isolation: Scope | None = None
        self.span: Any = None
        self.restored = 0


@dataclass(frozen=True, slots=True)
class FailedAttempt:
    """A failed attempt that may turn out to be final; without its exception, which refers to this."""

    node_id: str
    class_name: str
    reason: str | None
    message: str | None
    scope: Scope
    isolation: Scope | None = None
    span: Any = None


class NodeScope:
    """The span and scope of a node, and what its end needs."""

    __slots__ = ("ended", "entered", "isolation", "of_run", "scope", "span")

    def __init__(self, span: Any, scope: Scope, of_run: RunScope) -> None:
        self.span, self.scope, self.of_run = span, scope, of_run
        self.isolation: Scope | None = None
        self.entered: ExitStack | None = None
        self.ended: AttemptEnd | None = None


def event_of(
    error: BaseException,
    run: ReliabilityContext,
    failed: FailedAttempt,
    content: Content,
    options: Mapping[str, Any],
) -> tuple[Any, dict[str, Any]]:
    """Return the event of a final failure with its hint, by the options of its client."""
    event: Any
    event, hint = event_from_exception(
        error,
        # Variables of frames hold what nodes were given.
        client_options={**options, "include_local_variables": False},
        mechanism={"type": "stroma", "handled": True},
    )
    values = event.get("exception", {}).get("values", ())
    for value in values:
        if content.mode == "none":
            value["value"] = " ".join(filter(None, (failed.class_name, failed.reason)))
        elif value is values[-1]:  # The exception itself, after its causes and members.
            value["value"] = content.message(failed.message)
        elif value.get("value"):
            redactor = run.redactor
            value["value"] = content.message(redactor.redact_foreign(redactor.mask(str(value["value"]))))
    for frame in _frames_of(event):
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
    return event, hint


#: Mechanisms of exceptions that end no call of a node.
_ELSEWHERE: Final = frozenset({"asyncio", "threading", "unraisablehook"})


def drop_raised(event: Any, _hint: Any) -> Any:
    """Return None for an exception that the SDK captures as it leaves a call that a node makes.

    Integrations of clients of models do so, and are on by default. The node may handle the exception or be
    retried, and its final failure is captured.
    """
    for value in (event.get("exception") or {}).get("values") or ():
        mechanism = value.get("mechanism") or {}
        if mechanism.get("handled") is False and mechanism.get("type") not in _ELSEWHERE:
            return None
    return event


def redact_event(event: Any, hint: Any) -> Any:
    """Return an event of a run without the engine's own log lines; None for its line about a failed end."""
    if getattr((hint or {}).get("log_record"), "run_status", None) is not None:
        return None  # The failure is captured with its stack.
    crumbs = event.get("breadcrumbs")
    if isinstance(crumbs, dict):
        # The engine's own log lines tell what the exceptions said, secrets and all, and are no news beside
        # ours.
        crumbs["values"] = [c for c in crumbs.get("values", ()) if c.get("category") != "stroma"]
    if str(event.get("logger")) == "stroma":  # A hook that raised had the state among its arguments.
        for frame in _frames_of(event):
            frame.pop("vars", None)
    return event


def drop_log_lines(event: Any, _hint: Any) -> Any:
    """Return None for an event that Sentry's logging integration makes of a line captured here anyway."""
    return None if WRITING.get() else event


def drop_captured(event: Any, hint: Any) -> Any:
    """Return None for an exception that was captured here with the same client, in any task."""
    error = ((hint or {}).get("exc_info") or (None, None))[1]
    notes = getattr(error, "__dict__", {}).get("_stroma_notes", {}).get("sentry")
    if notes is None:
        return event
    return None if get_client() in notes.captured_by else event


def _frames_of(event: Any) -> Iterator[dict[str, Any]]:
    for value in (event.get("exception") or {}).get("values") or ():
        yield from (value.get("stacktrace") or {}).get("frames") or ()
