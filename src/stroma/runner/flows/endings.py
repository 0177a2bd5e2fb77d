"""Ends of a flow and of its calls: failures and cancellations, which a resume replays or tries again."""

from __future__ import annotations

from typing import Literal, NamedTuple, Protocol

from stroma._utils.text import one_line
from stroma.checkpoint import PipelineChanged
from stroma.contracts.node import FlowNode, Group, Node
from stroma.engine.context import ReliabilityContext
from stroma.engine.outcome import Halt
from stroma.failures.classes import FailureClass
from stroma.failures.failure import Failure, NodeContext, diagnose
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

    def missing(self) -> str | None: ...
    def forget_from(self, index: int, identities: set[str]) -> None: ...


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
        inside: failures inside a flow or map which are the cause of its own.
    """

    run: RunningFlow
    identity: str
    place: int
    number: int
    activity: int
    inside: tuple[EndKey, ...] = ()


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
        return Halt(diagnose(error, NodeContext(node_id, 1, self._ctx.run_id), self._ctx.classifiers))

    def halt_of(self, error: BaseException, node_id: str) -> Halt:
        """Return the end of a flow whose body raised."""
        failed = [one for one in leaves_of(error) if isinstance(one, StepFailed)]
        if failed:
            first = min(failed, key=lambda one: one.place[3] if one.place is not None else 0)
            return Halt(first.failure)
        while isinstance(error, BaseExceptionGroup):
            error = error.exceptions[0]
        halt = self.halt(error, node_id)
        halt = halt._replace(failure=self._ctx.redactor.mask_failure(halt.failure, ()))
        self._ctx.run_logger.warning(
            "flow %r raised %s: %s", node_id, type(error).__name__, one_line(halt.failure.message)
        )
        return halt

    def forget_what_ended(self, error: BaseException, activity: int) -> None:
        """Delete the records of the failures that ended the flow, and of what they cancelled: a resume tries those again."""
        ended = self.ended
        keys = [key for one in carried_by(error) if (key := end_key_of(one)) is not None]
        # Failures that the body has not met cannot have been caught: those of siblings, and of other items of a map.
        maps = {ended[key].run for key in keys if key in ended and ended[key].run.is_map}
        keys += [
            key for key, end in ended.items() if key.kind == "failure" and (not end.number or end.run in maps)
        ]
        forgotten: set[EndKey] = set()
        while keys:
            key = keys.pop()
            if key not in forgotten:
                forgotten.add(key)
                keys += ended[key].inside if key in ended else ()
        failed = [ended[key] for key in forgotten if key in ended and ended[key].number]
        for key, end in ended.items():
            if key.kind == "cancelled" and (
                end.activity == activity  # The body made no call after it.
                or any(one.number < end.number and one.activity == end.activity for one in failed)
            ):
                forgotten.add(key)
        first: dict[RunningFlow, int] = {}
        for key in forgotten:
            self._journal.forget(key.kind, key.position, key.branch)
            known = ended.get(key)
            if known is not None and known.number and failed:
                first[known.run] = min(known.place, first.get(known.run, known.place))
        identities = {ended[key].identity for key in forgotten if key in ended}
        for run, index in first.items():
            run.forget_from(index, identities)


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
