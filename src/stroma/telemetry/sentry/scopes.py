"""Scopes of runs and nodes until they end, and notes on the exceptions that may end them."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary, WeakSet

from stroma.engine.redaction import notes_of_error
from stroma.telemetry.observer import AttemptEnd

if TYPE_CHECKING:
    from sentry_sdk import Scope
    from sentry_sdk.client import BaseClient

__all__ = ["ErrorNotes", "FailedAttempt", "NodeScope", "RunScope", "notes_of"]


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
