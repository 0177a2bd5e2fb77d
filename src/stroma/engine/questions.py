"""Questions to a person: what a node waits for, and what a step inside of it has asked."""

from __future__ import annotations

from typing import Final

from stroma.checkpoint import Waiting, schema_ref
from stroma.engine.effects import UnknownOutcome
from stroma.engine.execution import NodeExecution
from stroma.engine.holds import Paused
from stroma.failures.errors import Suspend
from stroma.failures.failure import isinstance_by_type

__all__ = ["find_question", "question_of"]

_MAX_CAUSES: Final = 20
#: Attributes as the base class has them: those of another class may raise anything.
_cause, _context, _hides_context, _members = (
    vars(kind)[name].__get__
    for kind, name in (
        (BaseException, "__cause__"),
        (BaseException, "__context__"),
        (BaseException, "__suppress_context__"),
        (BaseExceptionGroup, "exceptions"),
    )
)


def find_question(error: BaseException, run: NodeExecution) -> Suspend | None:
    """Return the question that an exception of a node is, or is raised from: frameworks wrap those of the steps inside.

    In an exception group all members have to be questions: otherwise something else has failed.
    """
    cause: BaseException | None = error
    for _ in range(_MAX_CAUSES if run.children or run.ctx.paused else 1):
        if cause is None:
            break
        if isinstance_by_type(cause, Suspend):
            return cause if cause is error or _is_recorded(cause, run) else None
        if isinstance_by_type(cause, BaseExceptionGroup):
            questions = [find_question(one, run) for one in _members(cause)]
            return questions[0] if all(questions) else None
        cause = _cause(cause) or (None if _hides_context(cause) else _context(cause))
    return None


def question_of(raised: Suspend, run: NodeExecution, reason: str) -> Waiting | None:
    """Return what a node waits for, from now on; None if a step inside of it waits already, or the run is paused."""
    if _is_recorded(raised, run):
        return None
    raised.asked_at = run.ctx.run_id, run.position, run.branch
    if isinstance_by_type(raised, UnknownOutcome):
        return raised.waiting(run)
    before = run.question()
    ref = "" if raised.schema is None else schema_ref(raised.schema)
    return Waiting(run.position, run.branch if before is None else before.branch, run.node_id, reason, ref)


def _is_recorded(raised: Suspend, run: NodeExecution) -> bool:
    if raised.asked_at is None:
        return isinstance_by_type(raised, Paused)
    run_id, position, branch = raised.asked_at
    around = f"{run.branch}." if run.branch else ""
    is_inside = branch != run.branch and branch.startswith(around)
    return is_inside and (run_id, position) == (run.ctx.run_id, run.position)
