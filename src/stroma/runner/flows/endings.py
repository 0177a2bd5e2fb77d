"""Ends of flows: the exceptions of a body, and from which event on a resume calls again."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any
from urllib.parse import unquote

from stroma._utils.text import one_line
from stroma.checkpoint import PipelineChanged
from stroma.contracts.node import Group, Node
from stroma.engine.context import ReliabilityContext
from stroma.engine.outcome import Halt
from stroma.failures.classes import FailureClass
from stroma.failures.failure import Failure


class StepFailed(Exception):
    """A step of a flow stopped for good, after its last attempt.

    Attributes:
        failure: class, reason, message and node id of the last failure: the same live and on replay. Its
            exception, which is the ``__cause__`` too, is the original one only in the process in which the
            step failed.
        path: the flows around the step, from the outermost inwards, then the step: ``("triage", "lookup")``.

    Where: out of ``flow.step``, ``flow.map`` and ``flow.run``, in the body of a flow.
    Cause: the step failed, and its retry policy grants no further attempt.
    Fix: catch it to continue without the step; uncaught, it ends the run, and a resume tries the step again.
    """

    def __init__(self, failure: Failure, path: tuple[str, ...] = ()) -> None:
        super().__init__(f"step {failure.node_id!r} failed: {failure}")
        self.failure = failure
        self.path = path
        #: Number of the event that it is in its flow; 0 for the failure of a flow inside.
        self.event = 0

    def __reduce__(self) -> Any:
        return StepFailed, (self.failure, self.path)


class FlowClosed(asyncio.CancelledError):
    """A flow was used while it is suspended or stopped, by a body that continues after its cancellation.

    No ``except Exception`` catches it: the body must end.
    """


def describe(branch: str) -> str:
    """Return a call as people read it: ``step 'judge' (call 2) of step 'triage' (call 1)``."""
    return " of ".join(map(_describe_call, reversed(branch.split("."))))


def _describe_call(identity: str) -> str:
    name, mark, number = identity.partition("@")[0].rpartition("#")
    if not mark:
        return f"the item at index {number}"
    if name in ("", "!", "?", "*"):
        return f"the call with key={unquote(number)!r}"
    if name == "!wait":
        return f"flow.wait_for (call {int(number) + 1})"
    if name == "?receive":
        return f"flow.receive (call {int(number) + 1})"
    kind = "map over" if name.startswith("*") else "step"
    return f"{kind} {unquote(name.lstrip('*'))!r} (call {int(number) + 1})"


class Endings:
    """Ends of the flows of a run."""

    def __init__(self, ctx: ReliabilityContext) -> None:
        self._ctx = ctx
        #: Exceptions handled by the body when it made a call, and the last event before the first call.
        self._handled: list[tuple[BaseException, int]] = []

    def changed(self, message: str, node_id: str, inputs: tuple[bytes, bytes] | None = None) -> Halt:
        """Return the end of a flow whose body does not do what it did before."""
        ctx = self._ctx
        error = PipelineChanged(
            f"run {ctx.run_id!r} cannot be resumed: {message}. A flow may depend only on its input, its "
            "steps, and flow.now(), flow.random() and flow.uuid(); restore the code that recorded this, "
            "branch by flow.version, or start a new run"
        )
        error.inputs = inputs
        return Halt(Failure(error, FailureClass.TERMINAL, node_id, 1, str(error), "changed"))

    def mistake(self, message: str, node_id: str) -> Halt:
        """Return the end of a flow by a mistake in its body."""
        return Halt(Failure(RuntimeError(message), FailureClass.TERMINAL, node_id, 1, message, "bug"))

    def halt(self, error: BaseException, node_id: str) -> Halt:
        """Return the end of a flow by an exception, of a group by its first one."""
        while isinstance(error, BaseExceptionGroup):
            error = error.exceptions[0]
        self._ctx.redactor.note_run()
        failure = self._ctx.diagnose(error, node_id, 1)
        message = self._ctx.redactor.redact_message(failure.message, of_flow=True)
        return Halt(replace(failure, message=message))

    def halt_of(self, error: BaseException, node_id: str) -> Halt:
        """Return the end of a flow whose body raised, and log it."""
        failed = [one for one in leaves_of(error) if isinstance(one, StepFailed)]
        if failed:
            return Halt(min(failed, key=lambda one: one.event).failure)
        halt = self.halt(error, node_id)
        self._ctx.run_logger.warning("flow %r raised %s", node_id, one_line(str(halt.failure)))
        return halt

    def note_handled(self, error: BaseException, number: int) -> None:
        """Note that a call is made while an exception is handled: in an ``except`` or a ``finally``."""
        if all(error is not known for known, _ in self._handled):
            self._handled.append((error, number))

    def first_to_retry(self, error: BaseException) -> int | None:
        """Return the number of the first event that a resume must not repeat; None if it repeats all.

        That is the first failure that ended the flow, or the first event after an exception that did.
        """
        reasons = _reasons_of(error)
        numbers = [one.event for one in reasons if isinstance(one, StepFailed) and one.event]
        numbers += [number + 1 for known, number in self._handled if any(known is one for one in reasons)]
        self._handled.clear()  # Their tracebacks reference the frames of the body.
        return min(numbers, default=None)


def end_of(error: BaseException, node: Node | Group) -> Halt | BaseException:
    """Return the end of a flow by an exception that its body must not meet."""
    if isinstance(error, PipelineChanged):
        return Halt(Failure(error, FailureClass.TERMINAL, node.node_id, 1, str(error), "changed"))
    return error


def leaves_of(error: BaseException) -> list[BaseException]:
    """Return the exceptions in a group and in the groups inside it, or the exception itself."""
    if isinstance(error, BaseExceptionGroup):
        return [leaf for one in error.exceptions for leaf in leaves_of(one)]
    return [error]


def _reasons_of(error: BaseException) -> list[BaseException]:
    """Return the exceptions that ended a flow: one with its members, causes and contexts.

    A failed step in the context of another one is not among them: the body has answered it, as with a
    fallback whose step failed.
    """
    errors: list[BaseException] = []
    seen: set[int] = set()
    stack: list[tuple[BaseException | None, bool]] = [(error, False)]
    while stack:
        one, is_context = stack.pop()
        if one is None or id(one) in seen:
            continue
        seen.add(id(one))
        is_step = isinstance(one, StepFailed)
        if not (is_step and is_context):
            errors.append(one)
        stack += [(one.__context__, is_step or is_context), (one.__cause__, is_context)]
        if isinstance(one, BaseExceptionGroup):
            stack += [(inner, is_context) for inner in one.exceptions]
    return errors
