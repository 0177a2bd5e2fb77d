"""Parts of the context of a run."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable
from typing import TYPE_CHECKING, Any, Final, TypeVar, final

from pydantic import BaseModel

from stroma.checkpoint import Session, Waiting
from stroma.checkpoint.identity import StepCalls
from stroma.contracts.copying import PickledSnapshot, Snapshot
from stroma.contracts.schema import Schema, schema_of
from stroma.cost.budget import ExecutionBudget, limits
from stroma.failures.errors import WAITING_FOR_ANSWER, WAITING_FOR_STATEMENT
from stroma.failures.failure import Failure
from stroma.trace.result import HookFailure, Question, RunStatus

if TYPE_CHECKING:
    from stroma.cost.budget import Dimension
    from stroma.cost.tracker import CostTracker

_WARN_AT: Final = 0.8


@final
class Account:
    """The limits and the findings of one run.

    Attributes:
        limits: the limits of the budget, by dimension.
        unpriced: models without a known price.
        hook_failures: exceptions of hooks; the hooks of the run add to this list. None: no hook can fail.
        suspended: reasons for which nodes of the run are suspended.
        questions: open questions.
        failed_items: items of maps that failed while the others continued.
        notes: storage of hooks; None until one asks for it.
    """

    __slots__ = (
        "_warned",
        "failed_items",
        "hook_failures",
        "limits",
        "notes",
        "questions",
        "suspended",
        "unpriced",
    )

    def __init__(self, budget: ExecutionBudget) -> None:
        self.limits: tuple[tuple[Dimension, float], ...] = limits(budget)
        self.unpriced: tuple[str, ...] = ()
        self.hook_failures: list[HookFailure] | None = None
        self.suspended: tuple[str, ...] = ()
        self.questions: tuple[Question, ...] = ()
        self.failed_items = 0
        self.notes: dict[Any, Any] | None = None
        #: Warnings that were logged: dimensions of the budget, and what is wrong with a node.
        self._warned: set[str | tuple[str, str]] | None = None

    def note_suspended(self, reason: str) -> None:
        """Add a reason of the whole run to the result."""
        if reason not in self.suspended:
            self.suspended += (reason,)

    def note_question(self, waiting: Waiting) -> None:
        """Add an open question to the result."""
        if all(one.id != waiting.id for one in self.questions):
            self.suspended += (waiting.reason,)
            self.questions += (waiting.question,)

    def note_open_questions(self, all_waiting: Iterable[Waiting]) -> None:
        """Add the questions without an answer, also those that did not stop the run, to the result."""
        reasons = self.suspended
        for waiting in all_waiting:
            if waiting.payload is None:
                self.note_question(waiting)
        self.suspended = reasons or self.suspended

    def describe_suspension(self) -> str | None:
        """Return what a suspended run waits for, as its record has it; None for nothing.

        The text of a question follows what the run waits for, so that it is not taken for another reason.
        """
        others, texts = list(self.suspended), dict[str, None]()
        for one in self.questions:
            if one.reason in others:
                others.remove(one.reason)
                is_effect = one.kind == "effect"
                texts[WAITING_FOR_STATEMENT if is_effect else f"{WAITING_FOR_ANSWER}{one.reason}"] = None
        return "; ".join([*texts, *others]) or None

    def forget_question(self, waiting: Waiting) -> None:
        """Remove a question that was closed from the result."""
        if any(one.id == waiting.id for one in self.questions):
            self.questions = tuple([one for one in self.questions if one.id != waiting.id])
            at = self.suspended.index(waiting.reason)
            self.suspended = self.suspended[:at] + self.suspended[at + 1 :]

    def note_hook_failure(self, failure: HookFailure) -> None:
        """Add the exception of a hook to the result."""
        if self.hook_failures is None:
            self.hook_failures = []
        self.hook_failures.append(failure)

    def is_first_warning(self, about: str | tuple[str, str]) -> bool:
        """Return True for the first warning of this kind."""
        if self._warned is None:
            self._warned = set()
        is_first = about not in self._warned
        self._warned.add(about)
        return is_first

    def replace_limits(self, budget: ExecutionBudget) -> None:
        """Apply another budget, with separate warnings at 80 % of its limits."""
        self.limits = limits(budget)
        if self._warned is not None:
            self._warned.difference_update(dimension for dimension, _ in self.limits)

    def due_warnings(self, spent: CostTracker) -> list[tuple[str, float, float]]:
        """Return (dimension, used, limit) of each limit just used to 80 %; each once in a process."""
        return [
            (dimension, used, limit)
            for dimension, limit in self.limits
            if 0 < (used := spent.used(dimension)) >= round(_WARN_AT * limit, 9)
            and self.is_first_warning(dimension)
        ]


T = TypeVar("T")


@final
class Stopping:
    """Requests to a run in progress: stop, pause, cancel.

    Attributes:
        is_asked: no further node is to begin.
        is_cancelled: cancelled from elsewhere: nothing is retried.
        holds: no further attempt is to begin: the run is paused, or is being cancelled. Set in any thread.
        is_paused: the run is paused.
        interrupt: ends the run once a shutdown has asked that nothing new is begun; None before.
        waits: called in the event loop of the run when it is paused: they end waits.
    """

    __slots__ = ("holds", "interrupt", "is_asked", "is_cancelled", "is_paused", "waits")

    def __init__(self) -> None:
        self.is_asked = self.is_cancelled = self.holds = self.is_paused = False
        self.interrupt: Callable[[], None] | None = None
        self.waits: dict[Callable[[], None], None] = {}  # In order.

    def end_waits(self) -> None:
        """End the waits before the next attempts. Called in the event loop of the run, once it is held."""
        for end in list(self.waits):
            end()


async def wait_unless_held(stopping: Stopping, work: Callable[[], Awaitable[T]]) -> T | None:
    """Await work that precedes an attempt; a pause cancels the work, and the result is None."""
    if stopping.holds:
        return None
    if asyncio.current_task() is None:
        return await work()
    loop, scope = asyncio.get_running_loop(), asyncio.timeout(None)

    def end() -> None:
        if not scope.expired():
            scope.reschedule(loop.time())

    stopping.waits[end] = None
    try:
        async with scope:
            return await work()
    except TimeoutError:
        if not scope.expired():
            raise
        return None
    finally:
        del stopping.waits[end]


@final
class Handover:
    """The last output that was committed at the top level.

    The values of a large state are passed on without a copy, which would take twice the time. From then on
    its snapshot replaces it.

    Attributes:
        is_active: outputs go from node to node, and not to plain code between them.
        model: the output itself.
        snapshot: of a large output; None for any other.
        is_moved: a node has values of the model in its input, and may change them.
        done: outputs of a group's children in an earlier attempt of it, for the next one.
    """

    __slots__ = ("done", "is_active", "is_moved", "model", "snapshot")

    def __init__(self) -> None:
        self.is_active = False
        self.done: dict[tuple[int, str], BaseModel] = {}
        self.is_moved = False
        self.model: BaseModel | None = None
        self.snapshot: PickledSnapshot | bytes | None = None

    def offer(self, model: BaseModel, snapshot: Snapshot | None = None) -> None:
        """Take over an output that was committed, with its snapshot."""
        self.model = model
        self.is_moved = False
        self.snapshot = None
        if isinstance(snapshot, (PickledSnapshot, bytes)) and self.is_active:
            self.snapshot = snapshot

    def take(self, value: BaseModel, schema: Schema) -> tuple[BaseModel, Snapshot]:
        """Return the input of a node after a large output, and its snapshot. Raises what validators raise."""
        assert self.snapshot is not None
        value = self.own(value)
        state = schema.take_over(value) if value is self.model else None
        if state is None:
            return schema.prepare_input(value)
        self.is_moved = True
        schema.mark_shared(state)
        return state, self.snapshot if state is value else schema.snapshot(state)

    def own(self, state: BaseModel) -> BaseModel:
        """Return a state with values that no node can change."""
        if not self.is_moved or state is not self.model:
            return state
        assert self.snapshot is not None
        schema = schema_of(type(state))
        return schema.mark_exclusive(schema.restore(self.snapshot))

    def state(self) -> BaseModel | None:
        """Return the last output, with values that no node can change; None before the first."""
        if self.model is None or self.is_moved:
            return self.model and self.own(self.model)
        self.snapshot = None  # The caller may change the model.
        return self.model


@final
class PlainSteps:
    """The steps of plain code in one run.

    Attributes:
        calls: the steps that were called, by their identity.
        has_end: the code says when its run ends, with ``async with ctx``.
        at_exit: ends the run there; None before it is opened.
        status: outcome of the last step.
        failure: failure of the last step.
        fenced: the failure of a step because another process owns the run, or has ended it; no other step is
            called.
    """

    __slots__ = (
        "_next_position",
        "_opening",
        "_positions",
        "at_exit",
        "calls",
        "failure",
        "fenced",
        "has_end",
        "status",
    )

    def __init__(self) -> None:
        self.calls: StepCalls | None = None
        self.has_end = False
        self.at_exit: Callable[..., Awaitable[None]] | None = None
        self.status: RunStatus | None = None
        self.failure: Failure | None = None
        self.fenced: Failure | None = None
        #: Ends when the first step has announced the run.
        self._opening: asyncio.Future[None] | None = None
        self._next_position = 0
        #: Positions at which the journal has an entry.
        self._positions: set[int] | None = None

    @property
    def has_begun(self) -> bool:
        """True once the first step has begun to announce the run."""
        return self._opening is not None

    async def begin(self, announce: Callable[[], Awaitable[None]]) -> None:
        """Announce the run, once, at its first step; steps that begin at the same time wait for that."""
        if self._opening is None:
            self._opening = asyncio.get_running_loop().create_future()
            try:
                await announce()
            finally:
                self._opening.set_result(None)
        elif not self._opening.done():
            await asyncio.shield(self._opening)

    def position_of(self, identity: str, session: Session) -> int:
        """Return the position of a step: the one it has in the journal, else the next without an entry."""
        position = session.places.get(identity)
        if position is None:
            if self._positions is None:
                self._positions = {at for at, _ in (*session.restored, *session.waiting)}
                self._positions.update(session.places.values())
            while self._next_position in self._positions:
                self._next_position += 1
            position = self._next_position
            self._next_position += 1
        session.note_call(position, identity)
        return position
