"""Ends of flows: what a body raised, and from which event on a resume does otherwise."""

from __future__ import annotations

from stroma._utils.text import one_line
from stroma.checkpoint import PipelineChanged
from stroma.contracts.node import Group, Node
from stroma.engine.context import ReliabilityContext
from stroma.engine.outcome import Halt
from stroma.failures.classes import FailureClass
from stroma.failures.failure import Failure
from stroma.runner.flows.errors import StepFailed

__all__ = ["Endings", "end_of"]


class Endings:
    """Ends of the flows of a run."""

    def __init__(self, ctx: ReliabilityContext) -> None:
        self._ctx = ctx
        #: Exceptions that the body was handling while it made a call, and the number of the last event before
        #: the first one.
        self._handled: list[tuple[BaseException, int]] = []

    def changed(self, message: str, node_id: str) -> Halt:
        """Return the end of a flow whose body does not do what it did before."""
        ctx = self._ctx
        error = PipelineChanged(
            f"run {ctx.run_id!r} cannot be resumed: {message}. A flow may depend only on its input, its steps, and flow.now(), "
            "flow.random() and flow.uuid(); restore the code that recorded this, or start a new run"
        )
        return Halt(Failure(error, FailureClass.TERMINAL, node_id, 1, str(error), "changed"))

    def stuck(self, node_id: str) -> Halt:
        """Return the end of a flow whose body waits for nothing that can come."""
        return self.mistake(
            f"the body of flow {node_id!r} waits, and no step, timer or question of it is open; check its events, locks and queues",
            node_id,
        )

    def mistake(self, message: str, node_id: str) -> Halt:
        """Return the end of a flow by a mistake in its body."""
        return Halt(Failure(RuntimeError(message), FailureClass.TERMINAL, node_id, 1, message, "bug"))

    def halt(self, error: BaseException, node_id: str) -> Halt:
        """Return the end of a flow by an exception."""
        return Halt(self._ctx.diagnose(error, node_id, 1))

    def halt_of(self, error: BaseException, node_id: str) -> Halt:
        """Return the end of a flow whose body raised."""
        failed = [one for one in leaves_of(error) if isinstance(one, StepFailed)]
        if failed:
            first = min(failed, key=lambda one: one.event)
            return Halt(first.failure)
        while isinstance(error, BaseExceptionGroup):
            error = error.exceptions[0]
        self._ctx.redactor.note_run()
        halt = self.halt(error, node_id)
        self._ctx.run_logger.warning(
            "flow %r raised %s: %s", node_id, type(error).__name__, one_line(halt.failure.message)
        )
        return halt

    def note_handled(self, error: BaseException, number: int) -> None:
        """Note that a call is made while an exception is handled: in an ``except`` or a ``finally``."""
        if all(error is not known for known, _ in self._handled):
            self._handled.append((error, number))

    def first_to_retry(self, error: BaseException) -> int | None:
        """Return the number of the first event that a resume must not repeat; None if it repeats all.

        That is the first failure that the exception carries, or the first event after it was raised.
        """
        carried = carried_by(error)
        numbers = [one.event for one in carried if isinstance(one, StepFailed) and one.event]
        numbers += [number + 1 for known, number in self._handled if any(known is one for one in carried)]
        self._handled.clear()  # Their tracebacks reference the frames of the body.
        return min(numbers, default=None)


def end_of(error: BaseException, node: Node | Group) -> Halt | BaseException:
    """Return the end of a flow by an exception that its body must not meet."""
    if isinstance(error, PipelineChanged):
        return Halt(Failure(error, FailureClass.TERMINAL, node.node_id, 1, str(error), "changed"))
    return error


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
