"""Ends of a flow and of its calls: failures and cancellations, which a resume replays or tries again."""

from __future__ import annotations

import asyncio
import weakref
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, Protocol

from stroma._utils.text import one_line
from stroma.checkpoint import PipelineChanged
from stroma.contracts.node import FlowNode, Group, Node
from stroma.engine.context import ReliabilityContext
from stroma.engine.execution import NodeExecution
from stroma.engine.outcome import Halt
from stroma.failures.classes import FailureClass
from stroma.failures.failure import Failure
from stroma.runner.flows.errors import StepFailed
from stroma.runner.flows.journal import FlowJournal
from stroma.runner.flows.order import ResultOrder

__all__ = ["CallEnd", "EndKey", "Endings", "RunningFlow", "carried_by", "end_key_of", "end_of"]


class RunningFlow(Protocol):
    """A flow, as its driver and the ends of its calls see it."""

    node: FlowNode
    position: int
    order: ResultOrder
    is_map: bool
    has_ended: bool
    is_sequential: bool
    execution: NodeExecution

    def missing(self) -> str | None: ...
    def forget_from(self, index: int, given_up: set[str], retried: set[str]) -> None: ...


class EndKey(NamedTuple):
    """Place of a call in the records of a run."""

    position: int
    branch: str
    kind: Literal["failure", "cancelled"]


class CallEnd(NamedTuple):
    """A call that failed, or that the body cancelled.

    Attributes:
        place: number of results of its flow that were handed out before.
        number: counts those that the body met; 0 if it did not.
        activity: of the driver then.
    """

    run: RunningFlow
    identity: str
    place: int
    number: int
    activity: int


class HandledError(NamedTuple):
    """An exception that a body is handling while it makes a call.

    Attributes:
        place: number of results of the flow that were handed out before the first such call.
        activity: of the driver before that call.
    """

    run: RunningFlow
    error: BaseException
    place: int
    activity: int


class Endings:
    """Ends of the flows of a run.

    Attributes:
        ended: failures and cancellations of calls, which a resume may have to try again.
        count: number of those so far that a body met.
    """

    def __init__(self, ctx: ReliabilityContext, journal: FlowJournal) -> None:
        self._ctx = ctx
        self._journal = journal
        self.ended: dict[EndKey, CallEnd] = {}
        self.count = 0
        #: By the scope of the calls. Cleared by the first call that is made outside.
        self.handlers: dict[object, list[HandledError]] = {}
        #: The task in which a call was cancelled, until the next call.
        self._thrown_into: weakref.ref[asyncio.Task[Any]] | None = None

    def changed(self, message: str, node_id: str) -> Halt:
        """Return the end of a flow whose body does not do what it did before."""
        ctx = self._ctx
        error = PipelineChanged(
            f"run {ctx.run_id!r} cannot be resumed: {message}. A flow may depend only on its input, its steps, and flow.now(), "
            "flow.random() and flow.uuid(); restore the code that recorded this, or start a new run"
        )
        return Halt(Failure(error, FailureClass.TERMINAL, node_id, 1, str(error), "changed"))

    def halt(self, error: BaseException, node_id: str) -> Halt:
        """Return the end of a flow by an exception."""
        return Halt(self._ctx.diagnose(error, node_id, 1))

    def halt_of(self, error: BaseException, node_id: str) -> Halt:
        """Return the end of a flow whose body raised."""
        failed = [one for one in leaves_of(error) if isinstance(one, StepFailed)]
        if failed:
            first = min(failed, key=lambda one: one.place[3] if one.place is not None else 0)
            return Halt(first.failure)
        while isinstance(error, BaseExceptionGroup):
            error = error.exceptions[0]
        self._ctx.redactor.note_run()
        halt = self.halt(error, node_id)
        self._ctx.run_logger.warning(
            "flow %r raised %s: %s", node_id, type(error).__name__, one_line(halt.failure.message)
        )
        return halt

    def note_thrown(self, task: asyncio.Task[Any] | None) -> None:
        """Note that a call was cancelled in a task, which continues with an exception."""
        self._thrown_into = None if task is None else weakref.ref(task)

    def note_handler(
        self, run: RunningFlow, scope: object, error: BaseException | None, activity: int
    ) -> None:
        """Note that a call is made while an exception is handled: in an ``except`` or a ``finally``.

        Should that exception end the flow, the body raised it before this call.
        """
        if error is None:
            # Python does not show what a coroutine around handles to one that an exception was thrown into.
            thrown_into, self._thrown_into = self._thrown_into, None
            if thrown_into is None or asyncio.current_task() is not thrown_into():
                self.handlers.pop(scope, None)
            return
        handlers = self.handlers.get(scope, [])
        if handlers and handlers[-1].error is error:
            return
        around = carried_by(error)  # The handlers that have not ended yet.
        handlers = [one for one in handlers if any(one.error is other for other in around)]
        self.handlers[scope] = [*handlers, HandledError(run, error, len(run.order.delivered), activity)]

    def forget_what_ended(self, position: int, prefix: str, error: BaseException, activity: int) -> None:
        """Delete the records of the failures that ended a flow, and of what they cancelled: a resume tries those again.

        ``prefix``: of the branches of its calls. ``activity``: of the driver by now.
        """
        carried = carried_by(error)
        ended = {
            key: end for key, end in self.ended.items()
            if key.position == position and key.branch.startswith(prefix)
        }  # fmt: skip
        forgotten = {key for one in carried if (key := end_key_of(one)) is not None and key in ended}
        causes = [end for key in forgotten if (end := ended[key]).number]
        handled = [
            one for handlers in self.handlers.values() for one in handlers
            if any(one.error is other for other in carried)
        ]  # fmt: skip
        first: dict[RunningFlow, int] = {}
        places = [(one.run, one.place) for one in causes] + [(one.run, one.place) for one in handled]
        for run, place in places:
            first[run] = min(place, first.get(run, place))
        # A failure in a handler is of a clean-up, which need not come again.
        retried = [
            end for end in causes
            if end.place == first[end.run]
            and not any(one.run is end.run and one.place <= end.place for one in handled)
        ]  # fmt: skip
        for key, end in ended.items():
            if key.kind == "cancelled" and _was_caused(end, causes, handled, activity):
                forgotten.add(key)
                first[end.run] = min(end.place, first.get(end.run, end.place))
        moments = {end.activity for end in causes}
        for key, end in ended.items():
            # The body has not met it, or has met it together with one of these or later: it decided nothing by it.
            if key.kind == "failure" and (
                not end.number
                or end.run.is_map
                or end.activity in moments
                or end.place >= first.get(end.run, end.place + 1)
            ):
                forgotten.add(key)
        for key in forgotten:
            self._journal.forget(key.kind, key.position, key.branch)
        for run, index in first.items():
            given_up = {
                end.identity
                for key in forgotten
                if key.kind == "cancelled" and (end := ended[key]).run is run
            }
            run.forget_from(index, given_up, {end.identity for end in retried if end.run is run})
        for key in ended:  # What is inside a flow that failed is made again, or not at all.
            del self.ended[key]


def _was_caused(
    end: CallEnd, causes: Sequence[CallEnd], handled: Sequence[HandledError], activity: int
) -> bool:
    """Return True if the body cancelled a call after what ended the flow, or with it."""
    if any(one.number < end.number for one in causes):
        return True
    if any(one.activity <= end.activity for one in handled):
        return True
    return not causes and end.activity == activity  # The body made no call after it.


def end_of(error: BaseException, node: Node | Group) -> Halt | BaseException:
    """Return the end of a flow by an exception that its body must not meet."""
    if isinstance(error, PipelineChanged):
        return Halt(Failure(error, FailureClass.TERMINAL, node.node_id, 1, str(error), "changed"))
    return error


def end_key_of(error: BaseException) -> EndKey | None:
    """Return where a failure is recorded; None if it is none of a step."""
    if not isinstance(error, StepFailed) or error.place is None:
        return None
    position, flow, identity, _ = error.place
    return EndKey(position, f"{flow}.{identity}" if flow else identity, "failure")


def leaves_of(error: BaseException) -> list[BaseException]:
    if isinstance(error, BaseExceptionGroup):
        return [leaf for one in error.exceptions for leaf in leaves_of(one)]
    return [error]


def carried_by(error: BaseException) -> list[BaseException]:
    """Return an exception with all that it carries: members, causes and contexts."""
    errors: list[BaseException] = []
    seen: set[int] = set()
    stack: list[BaseException | None] = [error]
    while stack:
        one = stack.pop()
        if one is None or id(one) in seen:
            continue
        seen.add(id(one))
        errors.append(one)
        stack += [one.__cause__, one.__context__]
        if isinstance(one, BaseExceptionGroup):
            stack += one.exceptions
    return errors
