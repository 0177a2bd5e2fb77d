"""Questions to a person, of a node or of a step inside of it."""

from __future__ import annotations

from typing import Any, Final, cast

from pydantic import BaseModel

from stroma._utils.access import cause_of, context_of, members_of
from stroma.checkpoint import Session, Waiting, schema_ref
from stroma.checkpoint.entries import UnknownCall
from stroma.contracts.node import output_class
from stroma.contracts.schema import schema_of
from stroma.engine.context import ReliabilityContext
from stroma.engine.effects import UnknownOutcome
from stroma.engine.execution import CURRENT, RunningNode, leave
from stroma.engine.outcome import Halt, Paused, Place
from stroma.failures.classes import FailureClass
from stroma.failures.errors import Suspend
from stroma.failures.failure import Failure, isinstance_by_type

_MAX_CAUSES: Final = 20
_hides_context: Final = cast("Any", BaseException).__suppress_context__.__get__


def find_question(error: BaseException, run: RunningNode) -> Suspend | None:
    """Return the question that an exception is, or was raised from: frameworks wrap exceptions of steps.

    In an exception group all members must be questions; otherwise something else has failed.
    """
    cause: BaseException | None = error
    for _ in range(_MAX_CAUSES if run.children or run.ctx.stopping.is_paused else 1):
        if cause is None:
            break
        if isinstance_by_type(cause, Suspend):
            return cause if cause is error or _is_recorded(cause, run) else None
        if isinstance_by_type(cause, BaseExceptionGroup):
            questions = [find_question(one, run) for one in members_of(cause)]
            return questions[0] if all(questions) else None
        cause = cause_of(cause) or (None if _hides_context(cause) else context_of(cause))
    return None


def asks_itself(error: BaseException, run: RunningNode) -> bool:
    """Return True if an attempt asks the question that ends it, and not an execution inside of it."""
    if isinstance_by_type(error, Suspend):
        return error.asked_at is None and not isinstance_by_type(error, Paused)
    return run.raised_itself(error)


def question_of(raised: Suspend, run: RunningNode, reason: str) -> Waiting | None:
    """Return the question of a node; None if a step inside waits, or the run is paused."""
    if _is_recorded(raised, run):
        return None
    raised.asked_at = run.ctx.run_id, run.position, run.branch
    session = run.ctx.session
    if isinstance_by_type(raised, UnknownOutcome):
        schema = None if raised.schema is output_class(None) else raised.schema
        return make_question(session, Place(*raised.place), run.node_id, reason, schema, raised.unknown)
    before = run.waiting()
    at = Place(run.position, run.branch if before is None else before.branch)
    return make_question(session, at, run.node_id, reason, raised.schema)


def make_question(
    session: Session,
    at: Place,
    node_id: str,
    reason: str,
    schema: type[BaseModel] | None,
    effect: UnknownCall | None = None,
) -> Waiting:
    """Return the question of a call: with the number of the one that is open there, else with a new number.

    A number is used once at a place, also if the run restarts: an answer to an earlier question is refused.
    """
    before, call = session.waiting.get((at.position, at.branch)), 0 if effect is None else effect.number
    number = session.epoch
    if before is not None:
        is_open = before.payload is None and before.call_number == call
        number = before.number if is_open else max(before.number + 1, number)
    ref, shape = ("", "") if schema is None else (schema_ref(schema), schema_of(schema).json_schema)
    return Waiting(at.position, at.branch, node_id, reason, ref, None, effect, number, shape)


def suspend_again(run: RunningNode, waiting: Waiting) -> Halt:
    """Return the end of a node whose question is still open: it is not called again."""
    run.ctx.account.note_question(waiting)
    error = Suspend(waiting.reason)
    error.asked_at = run.ctx.run_id, run.position, run.branch
    failure = Failure(error, FailureClass.RECOVERABLE, run.node_id, run.attempt, waiting.reason)
    return Halt(failure, suspended=True)


async def announce(ctx: ReliabilityContext, waiting: Waiting) -> None:
    """Call the hooks for a question of a flow, which has no attempt. Raises HookNotAsync."""
    if ctx.fire.on_node_suspended is None:
        return
    run = RunningNode(ctx, waiting.node_id, "node", waiting.position, waiting.branch)
    run.question = waiting.question
    token = CURRENT.set(run)
    try:
        node_id = waiting.node_id
        await ctx.fire.fire("on_node_suspended", node_id, ctx.run_id, node_id, waiting.reason)
    finally:
        run.close()
        leave(token)


def _is_recorded(raised: Suspend, run: RunningNode) -> bool:
    if raised.asked_at is None:
        return isinstance_by_type(raised, Paused)
    run_id, position, branch = raised.asked_at
    around = f"{run.branch}." if run.branch else ""
    is_inside = branch != run.branch and branch.startswith(around)
    return is_inside and (run_id, position) == (run.ctx.run_id, run.position)
