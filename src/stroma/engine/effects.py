"""Effects: nodes with effects outside; a call is repeated only after a statement that it did not happen.

A note of the session (:class:`Intent`) is stored before each call. It stays when the output is committed: a
committed node is restored, and its intent is not read again. An open intent without a commit is a call with
an unknown outcome: its process died, or its attempt ended without an outcome.

Before an effect is called, earlier calls are settled: the one at the same place, with any input, and the one
with the same input that code in this process has cut off, or whose outcome the body of a flow has not
received. Inputs are compared by their digests; a call that a flow's body has given up by that of its replay.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from copy import copy
from inspect import iscoroutinefunction
from time import perf_counter_ns
from typing import Any, Final, Literal, NamedTuple, TypeAlias, final
from uuid import uuid4

from pydantic import BaseModel

from stroma._utils.access import error_text
from stroma._utils.text import one_line
from stroma.checkpoint import Committed, CorruptCheckpoint, Fenced, PipelineChanged
from stroma.checkpoint.decoding import RecordName, decode_json, decode_number
from stroma.checkpoint.entries import (
    NOT_DONE,
    OF_FLOW,
    WITHDRAWN,
    Intent,
    Statement,
    UnknownCall,
    Waiting,
    effect_note,
    is_effect_note,
)
from stroma.checkpoint.flow_notes import LAST_MS
from stroma.checkpoint.identity import is_called, with_outer, without_attempts
from stroma.checkpoint.sessions import SimpleSession
from stroma.contracts.codec import describe_error
from stroma.contracts.contract import NodeContract, NotDone, Unknown
from stroma.contracts.copying import Snapshot
from stroma.contracts.node import Node, contract_of_node
from stroma.contracts.schema import Schema, has_secrets, schema_of
from stroma.engine.commit import store_notes
from stroma.engine.config import limits_ms
from stroma.engine.context import ReliabilityContext
from stroma.engine.execution import RunningNode, decode_answer
from stroma.engine.restore import read_output
from stroma.engine.tasks import CONTINUES, begin_flight, call_in_thread, end_flight, passes_through
from stroma.failures.errors import Suspend
from stroma.trace.events import Outcome

#: Reason of a suspension.
REASON: Final = "effect"


class Done(NamedTuple):
    """Statement that the call happened. ``output``: as a node may return it."""

    output: Any


Stated: TypeAlias = Done | NotDone | Unknown


class UnknownEnd(NamedTuple):
    """A call whose attempt has ended in this process, with an unknown outcome."""

    node_id: str
    digest: str
    key: str
    snapshot: Snapshot | None


#: Position and branch of the note about a call.
NotePlace: TypeAlias = tuple[int, str]


class Flight:
    """A call of an effect that is being made, from its intent to the end of its attempt.

    Attributes:
        place: of the attempt.
        is_sent: the function may have been called.
        ended: the attempt has its end.
    """

    def __init__(self, place: NotePlace) -> None:
        self.place, self.is_sent = place, False
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._task: asyncio.Task[Any] | None = None

    def send(self) -> None:
        """Have a task that is given up cancelled only after this call."""
        self.is_sent, self._task = True, begin_flight()

    def end(self) -> None:
        end_flight(self._task)
        with suppress(RuntimeError):  # The loop was closed under it.
            self.ended.set_result(None)


class EffectCalls:
    """The calls of effects in one run, as this process knows them.

    Attributes:
        intents: the last calls, by the keys of their notes.
        unknown_ends: calls that ended with an unknown outcome, by the place of their notes.
        flights: calls that are made now, by the place of their notes.
        of_bodies: by the position of a flow and the branch, the calls that its body awaits (False), and those
            whose output it has received (True).
        places: by position, the places of the notes by node and digest.
        taken_over: by the place of a note, the place of the call that takes its effect.
    """

    def __init__(self) -> None:
        self.intents: dict[str, Intent] = {}
        self.unknown_ends: dict[NotePlace, UnknownEnd] = {}
        self.flights: dict[NotePlace, Flight] = {}
        self.of_bodies: dict[int, dict[str, bool]] = {}
        self.places: dict[int, dict[tuple[str, str], dict[NotePlace, None]]] = {}
        self.taken_over: dict[NotePlace, NotePlace] = {}


def effect_calls(ctx: ReliabilityContext) -> EffectCalls:
    """Return the calls of effects in a run."""
    calls: EffectCalls | None = ctx.journal.effects
    if calls is None:
        calls = ctx.journal.effects = EffectCalls()
    return calls


class UnknownOutcome(Suspend):
    """Suspends a run, because the outcome of a call of an effect is unknown."""

    def __init__(self, unknown: UnknownCall, place: NotePlace, schema: type[BaseModel]) -> None:
        super().__init__(REASON, schema=schema)
        self.unknown = unknown
        self.place = place


@final
class Effect:
    """The calls of an effect with one input at one place of a run.

    If code has cut a call off, or calls the effect again before the outcome is stated, the next call with the
    same input settles the first one: it has the same place and key.

    Attributes:
        key: its idempotency key.
        is_refused: the call was not made, since another process may own the run.
        is_stated: the output was stated, and not returned by the function.
        error: the exception of a call whose outcome is unknown, for the gates that the attempt has passed.
        earlier: see :meth:`learn`, if it was called before the attempt began.
    """

    def __init__(self, run: RunningNode, contract: NodeContract[Any, Any], snapshot: Snapshot) -> None:
        assert run.schemas is not None
        self._run, self._contract, self._schemas = run, contract, run.schemas
        self._snapshot: Snapshot | None = snapshot
        self._digest = _digest(run.ctx, run.schemas[0], snapshot)
        self.is_stated = self.is_refused = False
        self._flight: Flight | None = None
        #: Who made the last statement; None if the output was found in the journal.
        self._source: Literal["reconcile", "person"] | None = None
        self.earlier: UnknownOutcome | Stated | None = None
        self.error: BaseException | None = None
        #: The place of the first input, and those of inputs other than this one.
        self._first, self._others = (run.position, without_attempts(run.branch)), list[NotePlace]()
        self._place, self._intent = self._first, _read(run, self._first)
        if self._intent is not None:
            self._find_others(self._intent)
        self.key = run.key_of(self._place[1])
        known = effect_calls(run.ctx)
        if known.unknown_ends:
            self._continue(known.unknown_ends)
        if run.position in known.of_bodies and not self.is_open:
            self._take_over()

    def _find_others(self, first: Intent) -> None:
        """Find the calls with other inputs at this place, and the last one with this input."""
        position, branch = self._first
        places = {digest: (position, f"{branch}@{n}") for n, digest in enumerate(first.others, 2)}
        if _differ(first.digest, self._digest):
            self._place = places.pop(self._digest, (position, f"{branch}@{len(places) + 2}"))
            self._intent = _read(self._run, self._place)
            self._others.append(self._first)
        self._others += places.values()

    def _continue(self, ends: dict[NotePlace, UnknownEnd]) -> None:
        """Take the place of a call with the same input whose end in this process is unknown."""
        mine = self._run.node_id, self._digest
        if ends.pop(self._place, None) is None and self._intent is None and _is_call(self._run):
            place = next((at for at, one in ends.items() if (one.node_id, one.digest) == mine), None)
            if place is not None:
                self._first = self._place = place
                self.key, self._intent = ends.pop(place).key, _read(self._run, place)

    def _take_over(self) -> None:
        """Take the place of a call with the same input whose outcome the flow's body has not received."""
        run, known, own = self._run, effect_calls(self._run.ctx), self._first
        places = _places_of_calls(run.ctx, run.position, run.node_id, self._digest)
        calls = known.of_bodies[run.position]
        for place in list(places):
            one = _read(run, place)
            if one is None or not one.is_open:
                del places[place]
                continue
            holder = known.taken_over.get(place, _holder_of(one))
            is_received = None if holder == own else _is_received(calls, one, holder)
            if is_received:
                del places[place]  # No further call looks at it: there may be many with one input.
            elif is_received is None:
                known.taken_over[place] = own
                known.unknown_ends.pop(place, None)
                self._first = self._place = place
                self._intent, self.key = one, one.key
                return

    @property
    def is_open(self) -> bool:
        """True if the outcome of the last call is unknown."""
        return self._intent is not None and self._intent.is_open

    def question(self, place: NotePlace | None = None) -> Waiting | None:
        """Return the question about the last call at a place (None: that of this input), or None."""
        at = place or self._place
        intent, waiting = _read(self._run, at), self._run.ctx.session.waiting.get(at)
        if intent is None or waiting is None or waiting.effect is None:
            return None
        return waiting if waiting.call_number == intent.number else None

    @property
    def has_question(self) -> bool:
        """True if a question about the last call, or a call with another input, was asked."""
        return any(map(self.question, (self._place, *self._others)))

    async def begin(self) -> tuple[Exception | None, asyncio.CancelledError | None]:
        """Store that a call begins. Return why the store refuses it, and a cancellation meanwhile."""
        run, before = self._run, self._intent
        numbers = [one.number for place in (self._place, *self._others) if (one := _read(run, place))]
        call, others = max(numbers, default=0) + 1, () if before is None else before.others
        self._note(
            Intent(
                run.node_id,
                call,
                True,
                run.position,
                run.branch,
                self._digest,
                others=others,
                key=self.key,
                started_ms=(perf_counter_ns() + run.ctx.journal.epoch_ns) // 1_000_000,
                epoch=run.ctx.session.epoch,
                statement=None if before is None else before.statement,
                event=0 if run.ctx.journal.number_event is None else run.ctx.journal.noticed,
            )
        )
        first = None if self._place == self._first else _read(run, self._first)
        if first is not None and self._digest not in first.others:
            # Later attempts look for this input with the first one at the place.
            write_intent(run.ctx, self._first, first._replace(others=(*first.others, self._digest)))
        run.ctx.session.mark_effect(run.node_id)
        self._take_off()
        problem, cancelled = await store_notes(run)
        if problem is None and not cancelled:
            self.note_begun()
        else:
            self.close()
        return problem, cancelled

    def note_begun(self) -> None:
        """Record that a call is in flight; at a place also a call of an earlier owner of the run."""
        (self._flight or self._take_off()).send()

    def _take_off(self) -> Flight:
        run = self._run
        flight = self._flight = Flight((run.position, without_attempts(run.branch)))
        effect_calls(run.ctx).flights[self._place] = flight
        return flight

    def call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Call the function. Raises Fenced instead if another process may own the run by now."""
        run = self._run
        if not run.ctx.session.holds_lease():
            self.is_refused = True
            raise Fenced(
                f"the lease of run {run.run_id!r} ended before effect {run.node_id!r} was called, and it "
                "is not called: this "
                "process stood still, or did not reach the store; see who owns the run, or resume it"
            )
        return function(*arguments)

    def end_attempt(self, outcome: Outcome | None) -> None:
        """Record that the attempt's call is no longer in flight, if there is one.

        ``outcome``: None without an end.
        """
        flight, self._flight = self._flight, None
        if flight is not None:
            effect_calls(self._run.ctx).flights.pop(self._place, None)
            flight.end()
        if self.is_open and outcome in (None, "cancelled", "suspended"):
            end = UnknownEnd(self._run.node_id, self._digest, self.key, self._snapshot)
            effect_calls(self._run.ctx).unknown_ends[self._place] = end

    def close(self, *, is_stated: bool = False) -> None:
        """Note that the last call did not happen; it is stored with the attempt."""
        assert self._intent is not None
        statement = self._state(False) if is_stated else self._intent.statement
        self._note(self._intent._replace(is_open=False, statement=statement))

    def note_output(self) -> None:
        """Note that the present attempt has the output of the last call; it is stored with that."""
        assert self._intent is not None
        statement = self._state(True) if self.is_stated else self._intent.statement
        self._note(
            self._intent._replace(
                position=self._run.position, branch=self._run.branch, has_output=True, statement=statement
            )
        )

    def note_refused(self, problem: Exception) -> None:
        """Note that the store has refused the output of the last call, for good."""
        assert self._intent is not None
        self._run.ctx.run_logger.error(
            "effect %r with key %s returned, and the store refused its output: %s; if a person is asked "
            "about this call, it happened",
            self._run.node_id,
            self.key,
            one_line(str(problem)),
        )
        self._note(self._intent._replace(has_output=False))

    def _state(self, happened: bool) -> Statement | None:
        """Return the statement about the last call, with who made it; the journal makes none."""
        assert self._intent is not None
        if self._source is None:
            return self._intent.statement
        return self._intent.state(happened, self._source)

    def _note(self, intent: Intent) -> None:
        self._intent = intent
        write_intent(self._run.ctx, self._place, intent)

    # ------------------------------------------------------------------ how a call ended

    async def learn(self, cancelling: int, *, is_sent: bool = False) -> UnknownOutcome | Stated | None:
        """Return a question about an earlier call with an unknown outcome, or the last call's statement.

        None if no call is open. A call that is being made is awaited first. ``is_sent``: the last call is at
        its place, which has its outcome. Raises StoreError.
        """
        while (flight := effect_calls(self._run.ctx).flights.get(self._place)) is not None:
            await asyncio.wait([flight.ended])
            effect_calls(self._run.ctx).unknown_ends.pop(self._place, None)
            self._intent = _read(self._run, self._place)
        question = await self._settle_others(cancelling)
        if question is not None or not self.is_open or is_sent:
            return question
        stated = await self._state_earlier(cancelling)
        return self.unknown(stated.reason) if isinstance(stated, Unknown) else stated

    async def _settle_others(self, cancelling: int) -> UnknownOutcome | None:
        """Find out how calls with other inputs at this place ended.

        Return the question about an unknown outcome.
        """
        for place in self._others:
            intent, end = _read(self._run, place), effect_calls(self._run.ctx).unknown_ends.get(place)
            if intent is not None and intent.is_unknown:
                other = copy(self)
                other._place, other._intent = place, intent
                other.key = self._run.key_of(place[1]) if end is None else end.key
                other._snapshot = None if end is None else end.snapshot
                stated = await other._state_earlier(cancelling)
                if isinstance(stated, Unknown):
                    return other.unknown(f"{stated.reason}; its input was another one")
        return None

    async def _state_earlier(self, cancelling: int) -> Stated:
        """Return how an earlier call ended, as its commit, a person or ``reconcile`` states."""
        run, intent = self._run, self._intent
        assert intent is not None
        committed = await self._find_commit((intent.position, intent.branch))
        schema = self._schemas[1]
        if committed is not None and committed.node_id == run.node_id and not committed.is_failed_item:
            try:
                return Done(read_output(schema, committed, self._contract.upcast))
            except ValueError as error:
                why, cause = describe_error(error)
                raise CorruptCheckpoint(
                    f"the output of effect {run.node_id!r} of run {run.run_id!r} cannot be read back: "
                    f"{why}; restore its schema, or start a new run"
                ) from cause
        question = self.question()
        why = "the process ended, or the attempt was cancelled, during the call"
        if question is not None and question.effect is not None:
            why = question.effect.cause
            if question.is_answered:
                return self._stated_by_person(question)
        stated = await self.reconcile(why, cancelling)
        if question is not None and isinstance(stated, NotDone):
            # A person may have stated by now that it happened. From here on, nobody can.
            pending = run.ctx.session.ask(question._replace(payload=WITHDRAWN))
            question = pending if isinstance(pending, Waiting) else await pending
            if question.is_answered:
                return self._stated_by_person(question)
        return stated

    def _stated_by_person(self, question: Waiting) -> Stated:
        self._source = "person"
        if question.payload == NOT_DONE:
            return NotDone()
        return Done(decode_answer(self._schemas[1], question))

    async def _find_commit(self, place: NotePlace) -> Committed | None:
        """Return the output that another attempt committed for the last call. Raises StoreError."""
        session, (position, branch) = self._run.ctx.session, place
        if isinstance(session, SimpleSession):
            return None  # It has no journal to look into.
        pending = session.committed(position, [branch])
        return (pending if isinstance(pending, Mapping) else await pending).get(branch)

    async def reconcile(self, why: str, cancelling: int) -> Stated:
        """Call the node's ``reconcile``. Returns Unknown with ``why`` if there is none, or if it raises."""
        run, reconcile, self._source = self._run, self._contract.reconcile, "reconcile"
        if reconcile is None or self._snapshot is None:
            return Unknown(why)
        state = self._schemas[0].restore(self._snapshot)
        timeout_ms, _ = limits_ms(run.ctx.step_timeouts.get(run.node_id))
        try:
            async with asyncio.timeout(None if timeout_ms is None else timeout_ms / 1000):
                if iscoroutinefunction(reconcile):
                    stated = await reconcile(state, self.key)
                else:
                    logger, key = run.ctx.run_logger, self.key
                    stated = await call_in_thread(
                        reconcile,
                        (state, key),
                        lambda: logger.warning(CONTINUES, f"reconcile of {run.node_id}"),
                    )
        except BaseException as error:
            if passes_through(error, cancelling, in_group=False):
                raise
            return Unknown(f"{why}; reconcile raised {error_text(error)}")
        if stated is NotDone or isinstance(stated, NotDone):
            return stated if isinstance(stated, NotDone) else NotDone()
        if stated is Unknown or isinstance(stated, Unknown):
            detail = stated.reason if isinstance(stated, Unknown) else ""
            if isinstance(stated, Unknown) and stated.retry_seconds is not None:
                run.ctx.journal.wake_by(int(min(LAST_MS, 1000 * (time.time() + stated.retry_seconds))))
            return Unknown(f"{why}; {detail}" if detail else why)
        return Done(stated)

    def unknown(self, cause: str) -> UnknownOutcome:
        """Return the suspension until a person has stated how the last call ended."""
        assert self._intent is not None
        call = UnknownCall(self.key, self._intent.number, cause)
        return UnknownOutcome(call, self._place, self._schemas[1].model)


def _is_call(run: RunningNode) -> bool:
    """Return True if plain code calls the node, and may call it again elsewhere."""
    step = run.step
    if step is not None and step.number <= OF_FLOW:
        return False
    is_of_plain_code = not run.branch and step is not None and step.identity is not None
    return is_of_plain_code or is_called(run.branch.rpartition(".")[2])


def _read(run: RunningNode, place: NotePlace) -> Intent | None:
    """Return the last call recorded at a place; None without one, or if it belongs to another node.

    Raises PipelineChanged if the outcome of the other node's call is unknown.
    """
    intent = _recorded(run.ctx, place)
    if intent is None or intent.node_id == run.node_id:
        return intent
    if intent.is_unknown and not run.ctx.config.allow_changes:
        raise PipelineChanged(
            f"run {run.run_id!r} cannot be resumed: {intent.described}, and the code calls {run.node_id!r} "
            "in its place; restore the node, or start a new run"
        )
    return None


def _recorded(ctx: ReliabilityContext, place: NotePlace) -> Intent | None:
    key = effect_note(*place)
    intent = effect_calls(ctx).intents.get(key)
    if intent is None and (data := ctx.session.notes.get(key)) is not None:
        intent = decode_json(data, Intent, RecordName(ctx.run_id, "note", key))
    return intent


def write_intent(ctx: ReliabilityContext, place: NotePlace, intent: Intent) -> None:
    """Note the last call at a place; it is stored with the next record."""
    key = effect_note(*place)
    effect_calls(ctx).intents[key] = intent
    ctx.session.note(key, json.dumps(intent).encode())
    places = effect_calls(ctx).places.get(place[0])
    if places is not None:
        places.setdefault((intent.node_id, intent.digest), {})[place] = None


def note_input(ctx: ReliabilityContext, place: NotePlace, node: Node, state: BaseModel) -> None:
    """Note the input of a call in a flow as it is compared now: its class may have changed since the call."""
    contract = contract_of_node(node, ctx.registry)
    assert contract is not None  # An effect has one.
    schema = schema_of(contract.input_schema)
    with suppress(Exception):  # The input breaks the contract.
        digest = _digest(ctx, schema, schema.snapshot(schema.convert(state)))
        intent = _recorded(ctx, place)
        if intent is not None and not _differ(intent.digest, digest):
            _places_of_calls(ctx, place[0], node.node_id, digest)[place] = None


def _places_of_calls(
    ctx: ReliabilityContext, position: int, node_id: str, digest: str
) -> dict[NotePlace, None]:
    """Return the places of the calls of a node with an input in the flow at a position, in their order."""
    by_place = effect_calls(ctx).places
    if position not in by_place:
        by_call = by_place[position] = {}
        calls = intents(ctx, position).items()
        for place, one in sorted(calls, key=lambda item: item[1].started_ms):
            by_call.setdefault((one.node_id, one.digest), {})[place] = None
    return by_place[position].setdefault((node_id, digest), {})


def _is_received(calls: Mapping[str, bool], intent: Intent, holder: NotePlace) -> bool | None:
    """Return True if the body of a flow has received what a call came to, False if it awaits that.

    None: neither, and the outcome is for the next call with the same input. ``calls``: of the body, see
    EffectCalls. ``holder``: the place that has the call.
    """
    known = [calls[branch] for branch in with_outer(holder[1]) if branch in calls]
    if False in known:
        return False
    return True if known and not intent.is_unknown else None


def flight_inside(ctx: ReliabilityContext, position: int, branch: str) -> Flight | None:
    """Return a call of an effect in flight at a branch or inside it."""
    flights = effect_calls(ctx).flights.values()
    return next((one for one in flights if one.is_sent and _is_inside(one.place, (position, branch))), None)


def settle_left_calls(ctx: ReliabilityContext, position: int) -> list[tuple[NotePlace, Intent]]:
    """Note what persons stated of calls in a flow whose outcome is unknown; return the others."""
    unknown = list[tuple[NotePlace, Intent]]()
    for place, one in intents(ctx, position).items():
        if one.is_unknown:
            waiting = ctx.session.waiting.get(place)
            if waiting is None or waiting.call_number != one.number or not waiting.is_answered:
                unknown.append((place, one))
                continue
            happened = waiting.payload != NOT_DONE
            stated = one._replace(
                is_open=happened, has_output=happened, statement=one.state(happened, "person")
            )
            write_intent(ctx, place, stated)
    return unknown


def intents(ctx: ReliabilityContext, position: int | None = None) -> dict[NotePlace, Intent]:
    """Return the last calls of effects, at a position or in the whole run, by the places of their notes."""
    known = effect_calls(ctx).intents
    calls: dict[NotePlace, Intent] = {}
    for name in {**ctx.session.notes, **known}:
        at, _, branch = name.split(":", 2) if is_effect_note(name) else ("", "", "")
        if at and (position is None or at == str(position)):
            where = RecordName(ctx.run_id, "note", name)
            one = known.get(name) or decode_json(ctx.session.notes.get(name, b""), Intent, where)
            calls[decode_number(at, where), branch] = one
    return calls


def _holder_of(intent: Intent) -> NotePlace:
    """Return the place of the attempt that made a call, or has its output."""
    return intent.position, without_attempts(intent.branch)


def _is_inside(place: NotePlace, group: NotePlace) -> bool:
    return place[0] == group[0] and (place[1] == group[1] or place[1].startswith(f"{group[1]}."))


def is_unknown(ctx: ReliabilityContext, position: int, branch: str) -> bool:
    """Return True if the outcome of the effect that was called at a branch is unknown."""
    return any(
        one.is_unknown and effect_calls(ctx).taken_over.get(place, _holder_of(one)) == (position, branch)
        for place, one in intents(ctx, position).items()
    )


def _digest(ctx: ReliabilityContext, schema: Schema, snapshot: Snapshot) -> str:
    """Return a digest of an input: of its schema and of its stored form.

    Two digests before "-" differ if the inputs cannot be compared.
    """
    data = schema.input_key(schema.restore(snapshot), is_sealed=ctx.session.stores_secrets)
    if data is None:
        return f"{uuid4().hex}-"
    process = data.split()[1].decode() if has_secrets(data) else ""
    return f"{schema.fingerprint}{process}-{hashlib.sha256(data).hexdigest()[:32]}"


def _differ(digest: str, other: str) -> bool:
    """Return True if two inputs differ. At one place, inputs that cannot be compared count as equal."""
    (fingerprint, _, content), (other_fingerprint, _, other_content) = (
        digest.rpartition("-"),
        other.rpartition("-"),
    )
    return fingerprint == other_fingerprint and content != other_content
