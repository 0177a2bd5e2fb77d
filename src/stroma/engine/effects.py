"""Effects: nodes that change the world, of which no call is repeated unless somebody states that it did not happen.

A note of the session (:class:`Intent`) is stored before each call. It stays when the output is committed: a committed node is
restored, and its intent is not read again. An intent that is open and has no commit is a call of which nobody knows if it
happened: of a process that died, or of an attempt that ended without saying so.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import Awaitable, Callable, Mapping
from inspect import iscoroutinefunction
from typing import Any, Final, NamedTuple, TypeAlias, final

from pydantic import BaseModel

from stroma._utils.text import typed
from stroma.checkpoint import Committed, CorruptCheckpoint, Fenced, schema_ref
from stroma.checkpoint.decoding import RecordName, decode_json
from stroma.checkpoint.entries import NOT_DONE, UnknownCall, Waiting, effect_note
from stroma.checkpoint.identity import is_called, without_attempts
from stroma.checkpoint.sessions import SimpleSession
from stroma.contracts.contract import NodeContract
from stroma.contracts.effects import NotDone, Unknown
from stroma.contracts.node import Plan, output_class
from stroma.contracts.schema import Schema, Snapshot, describe_error
from stroma.contracts.tagged_json import NotSerialisable
from stroma.engine.commit import settle
from stroma.engine.execution import NodeExecution
from stroma.engine.in_flight import begin_flight, end_flight
from stroma.engine.restore import read_output
from stroma.engine.tasks import CONTINUES, as_store_error, call_in_thread, passes_through
from stroma.failures.errors import Suspend
from stroma.failures.failure import kind_of, message_of

__all__ = ["REASON", "Effect", "Stated", "UnknownOutcome"]

#: Reason of a suspension.
REASON: Final = "effect"


class Done(NamedTuple):
    """Statement that the call happened. ``output``: as a node may return it."""

    output: Any


Stated: TypeAlias = Done | NotDone | Unknown


class Intent(NamedTuple):
    """The last call of an effect at one place.

    Attributes:
        node_id: the node; a pipeline may have another one at this place by now.
        number: 1-based number of the call.
        is_open: nobody has stated how it ended. The commit of its output does not change this.
        branch: of the attempt that made it.
        digest: of its input, where a retried node may make the call with another one; otherwise "".
    """

    node_id: str
    number: int
    is_open: bool
    branch: str
    digest: str


class UnknownOutcome(Suspend):
    """Suspends a run, since nobody knows if a call of an effect happened."""

    def __init__(self, unknown: UnknownCall, schema: type[BaseModel]) -> None:
        super().__init__(REASON, schema=schema)
        self.unknown = unknown

    def waiting(self, run: NodeExecution) -> Waiting:
        """Return the question to a person."""
        assert self.schema is not None
        ref = "" if self.schema is output_class(None) else schema_ref(self.schema)
        return Waiting(run.position, run.branch, run.node_id, REASON, ref, None, self.unknown)


@final
class Effect:
    """The calls of an effect at one place of a run.

    Attributes:
        branch: of its note and its idempotency key: that of the execution, without the numbers of attempts around it.
        is_under_way: the present attempt has begun a call, whose end is not known.
        is_refused: the call was not made, since another process may own the run.
        is_stated: the output was stated, and not returned by the function.
    """

    __slots__ = (
        "_contract", "_digest", "_flight", "_intent", "_key", "_run", "_schemas", "branch", "is_refused", "is_stated",
        "is_under_way",
    )  # fmt: skip

    def __init__(
        self, run: NodeExecution, contract: NodeContract[Any, Any], plan: Plan, snapshot: Snapshot
    ) -> None:
        assert plan[0] is not None
        self._run, self._contract, self._schemas = run, contract, (plan[0], plan[1])
        self._digest = _digest(plan[0], snapshot) if is_called(run.branch) else ""
        self.branch, self._intent = self._find(run)
        self._key = effect_note(run.position, self.branch)
        self.is_under_way = self.is_stated = self.is_refused = False
        self._flight: asyncio.Task[Any] | None = None

    def _find(self, run: NodeExecution) -> tuple[str, Intent | None]:
        """Return the branch that the effect is known by, and its last call.

        Another attempt of a node around it calls it again, in another branch: that is the same effect if the input is.
        """
        first = without_attempts(run.branch)
        intent = _read(run, first)
        if first == run.branch or (intent is not None and intent.digest == self._digest):
            return first, intent
        return run.branch, _read(run, run.branch)

    @property
    def is_open(self) -> bool:
        """True if nobody knows how the last call ended."""
        return self._intent is not None and self._intent.is_open

    async def begin(self) -> tuple[Exception | None, asyncio.CancelledError | None]:
        """Store that a call begins. Return why the store refuses it, and True if the task was cancelled meanwhile."""
        run, before = self._run, self._intent
        call = 1 if before is None else before.number + 1
        self._note(Intent(run.node_id, call, True, run.branch, self._digest))
        run.ctx.session.mark_effect(run.node_id)
        problem, cancelled = await settle(run.ctx, run, self._flush(), self._flush)
        if problem is None and not cancelled:
            self.is_under_way = True
            self._flight = begin_flight()
        else:
            self.close()
        return problem, cancelled

    def call(self, function: Callable[..., Any], state: BaseModel, context: Any) -> Any:
        """Call the function. Raises Fenced instead if another process may own the run: this one stood still since its intent."""
        run = self._run
        if not run.ctx.session.holds_lease():
            self.is_refused = True
            raise Fenced(
                f"the lease of run {run.run_id!r} ended before effect {run.node_id!r} was called, and it is not called: this "
                "process stood still, or did not reach the store; see who owns the run, or resume it"
            )
        return function(state, context)

    def end_attempt(self) -> None:
        """End the flight of the call that the attempt has made, if it has made one."""
        flight, self._flight = self._flight, None
        end_flight(flight)

    def close(self) -> None:
        """Note that the last call did not happen; it is stored with the attempt."""
        self.is_under_way = False
        assert self._intent is not None
        self._note(self._intent._replace(is_open=False))

    def _flush(self) -> Awaitable[None] | Exception | None:
        try:
            return self._run.ctx.session.flush()
        except BaseException as error:
            return as_store_error(error)

    def _note(self, intent: Intent) -> None:
        ctx = self._run.ctx
        self._intent = ctx.effects[self._key] = intent
        ctx.session.note(self._key, json.dumps(intent).encode())

    # ------------------------------------------------------------------ how a call ended

    async def state_earlier(self, state: BaseModel, cancelling: int) -> Stated:
        """Return how a call of an earlier attempt or process ended: by its commit, a person, or ``reconcile``."""
        run, intent = self._run, self._intent
        assert intent is not None
        session, place = run.ctx.session, (run.position, intent.branch)
        committed = await self._find_commit(intent.branch)
        schema = self._schemas[1]
        if committed is not None and committed.node_id == run.node_id and not committed.is_failed_item:
            try:
                return Done(read_output(schema, committed, self._contract.upcast))
            except ValueError as error:
                why, cause = describe_error(error)
                raise CorruptCheckpoint(
                    f"the output of effect {run.node_id!r} of run {run.run_id!r} cannot be read back: {why}; restore its schema, or start a new run"
                ) from cause
        question = session.waiting.get(place)
        why = "the process ended, or the attempt was cancelled, during the call"
        if question is not None and question.call_number == intent.number and question.effect is not None:
            why = question.effect.cause
            if question.payload == NOT_DONE:
                return NotDone()
            if question.payload is not None:
                try:
                    return Done(schema.decode(question.payload))
                except ValueError as error:
                    return Unknown(f"invalid answer: {describe_error(error)[0]}")
        return await self.reconcile(state, why, cancelling)

    async def _find_commit(self, branch: str) -> Committed | None:
        """Return the committed output of the last call, of another attempt of the code around it. Raises StoreError."""
        session = self._run.ctx.session
        if isinstance(session, SimpleSession):
            return None  # It has no journal to look into.
        pending = session.committed(self._run.position, [branch])
        return (pending if isinstance(pending, Mapping) else await pending).get(branch)

    async def reconcile(self, state: BaseModel, why: str, cancelling: int) -> Stated:
        """Call the node's ``reconcile``. Returns Unknown, with ``why``, without one; with what it raised if it raises."""
        run, reconcile = self._run, self._contract.reconcile
        if reconcile is None:
            return Unknown(why)
        timeout_ms = run.ctx.step_timeouts.get(run.node_id)
        try:
            async with asyncio.timeout(None if timeout_ms is None else timeout_ms / 1000):
                if iscoroutinefunction(reconcile):
                    stated = await reconcile(state, run.idempotency_key)
                else:
                    logger, key = run.ctx.run_logger, run.idempotency_key
                    stated = await call_in_thread(
                        reconcile,
                        (state, key),
                        lambda: logger.warning(CONTINUES, f"reconcile of {run.node_id}"),
                    )
        except BaseException as error:
            if passes_through(error, cancelling, in_group=False):
                raise
            return Unknown(f"{why}; reconcile raised {typed(kind_of(error), message_of(error))}")
        if stated is NotDone or isinstance(stated, NotDone):
            return stated if isinstance(stated, NotDone) else NotDone()
        if stated is Unknown or isinstance(stated, Unknown):
            detail = stated.reason if isinstance(stated, Unknown) else ""
            return Unknown(f"{why}; {detail}" if detail else why)
        return Done(stated)

    def unknown(self, cause: str) -> UnknownOutcome:
        """Return the suspension until a person has stated how the last call ended."""
        assert self._intent is not None
        self.is_under_way = False
        call = UnknownCall(self._run.idempotency_key, self._intent.number, cause)
        return UnknownOutcome(call, self._schemas[1].model)


def _read(run: NodeExecution, branch: str) -> Intent | None:
    """Return the last call that is noted at a branch; None without one, or if it is another node's."""
    key = effect_note(run.position, branch)
    intent = run.ctx.effects.get(key)
    if intent is None:
        data = run.ctx.session.notes.get(key)
        name = RecordName(run.run_id, "note", key)
        intent = None if data is None else decode_json(data, Intent, name)
    return intent if intent is not None and intent.node_id == run.node_id else None


def _digest(schema: Schema, snapshot: Snapshot) -> str:
    try:
        data = schema.encode(schema.restore(snapshot))
    except NotSerialisable:
        return ""
    return hashlib.sha256(data).hexdigest()[:32]
