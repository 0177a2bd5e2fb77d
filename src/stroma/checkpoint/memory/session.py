"""The session of a run in the memory of this process."""

from __future__ import annotations

import weakref
from asyncio import Future
from collections.abc import Callable, Mapping, Sequence
from typing import cast

from pydantic import BaseModel

from stroma.checkpoint.decisions import (
    COMPLETE,
    ENDED,
    UNFINISHED,
    decide,
    expired_error,
    is_answered,
    is_old_news,
    merge_wake,
)
from stroma.checkpoint.entries import (
    OF_FLOW,
    Committed,
    Finished,
    PriorUsage,
    RunRequest,
    SentMessage,
    StepCall,
    Waiting,
    is_effect_note,
)
from stroma.checkpoint.errors import Fenced
from stroma.checkpoint.events import EventBatch, EventPlace
from stroma.checkpoint.identity import is_called
from stroma.checkpoint.memory.runs import (
    Key,
    MemoryRun,
    SavedState,
    as_state,
    no_session,
    position_of,
    row_of,
)
from stroma.checkpoint.queue import QUEUED
from stroma.checkpoint.sessions import NullSession
from stroma.contracts.schema import Schema
from stroma.contracts.snapshots import PickledSnapshot
from stroma.contracts.tagged_json import NotSerialisable
from stroma.failures.errors import PAUSED
from stroma.trace.events import AttemptRow, contract_of

__all__ = ["MemorySession"]

_NOTHING_RESTORED: Mapping[tuple[int, str], Committed] = {}
_NO_PRIOR_USAGE = PriorUsage()
_GIVEN_BACK = ("status", "error", "wake_ms", "control", "blocked")


class MemorySession(NullSession):
    """The session of one execution, which writes into the run itself; see Session."""

    __slots__ = (
        "_before",
        "_calls",
        "_completion",
        "_on_suspension",
        "_other_rows",
        "_read_messages",
        "_run",
        "_run_id",
        "_states",
        "attribution",
        "continued",
        "control",
        "epoch",
        "execution",
        "finished",
        "notes",
        "on_control",
        "places",
        "prior",
        "restored",
        "traceparent",
        "version",
        "waiting",
    )

    def __init__(self, run: MemoryRun, request: RunRequest, on_suspension: Callable[[str], None]) -> None:
        self._on_suspension = on_suspension
        initial = request.schema.snapshot(request.initial_state)
        last = run.last_execution()
        action = "begin" if last is None else decide(request, last, run.input == initial, run.prior_work)
        self.continued, self.finished, self.on_control = action == "continue", None, None
        is_first = run.status == QUEUED
        #: The run as it was, for give_back(). A new one is never given back.
        is_new = last is None and not is_first
        self._before = {} if is_new else {name: getattr(run, name) for name in _GIVEN_BACK}
        if action != "begin":
            self._continue(run, request)
        if action == "continue":
            held = _held_as(run, request)
            if held is not None:  # It was acknowledged, and the owner stopped before it noticed.
                run.status, run.error = held
                run.wake_ms, action, self.continued = None, "return", False
                run.epoch += 1
        self.continued = self.continued and not is_first
        if self.continued or run.status == "CANCELLED":
            run.control = run.control._replace(cancel=False, pause=False)
        #: Status and error of a completed run, and the number of its attempts: end() restores them if none
        #: was added.
        self._completion: tuple[str, str | None, int] | None = None
        if action == "continue" and run.status in COMPLETE and request.discard_from is None:
            self._completion = run.status, run.error, _count_attempts(run)
        if action == "return":
            self.finished = Finished(run.status, run.error)
        elif action == "begin":
            if run.execution or run.states:
                run.discard_execution()
            run.execution += 1
            run.input, run.pipeline, run.schema = initial, request.pipeline, request.schema
            run.version = request.version
            run.start_execution()
            self.restored, self.prior = _NOTHING_RESTORED, _NO_PRIOR_USAGE
        if action != "return":
            if is_first:
                run.version = run.version or request.version
            run.status, run.error, run.wake_ms, run.claim, run.blocked = "RUNNING", None, None, None, None
            if request.tags:
                run.tags = tuple(dict.fromkeys((*run.tags, *request.tags)))
            run.epoch += 1
            run.last_session = weakref.ref(self)
            run.session = run.last_session if request.ends else no_session
        self.execution, self.epoch, self.version = run.execution, run.epoch, run.version
        self._read_messages: int | None = None
        self._run, self._states, self._other_rows = run, run.states, run.other_rows
        self._run_id = request.run_id
        self.control = run.control
        if self.continued and request.any_input:  # What is still to be answered is asked again.
            for place, waiting in list(run.waiting.items()):
                if waiting.payload is None and waiting.effect is None:
                    del run.waiting[place]
        self._calls, self.waiting, self.traceparent = run.calls, dict(run.waiting), run.traceparent
        self.places, self.notes, self.attribution = run.places, run.notes, run.attribution

    def _continue(self, run: MemoryRun, request: RunRequest) -> None:
        commits = {
            position_of(key): Committed(
                state.node_id,
                state.snapshot,
                state.contract,
                _with_input(run.calls.get(key), state, position_of(key)[1]),
                state.schema,
            )
            for key, state in reversed(list(run.newest_states()))
            if not isinstance(key, str)
            and not (request.lazily_loaded and request.is_lazily_loaded(*position_of(key)))
        }
        request = request.resolve_discard(commits)
        first = request.discard_from
        restored = request.accept_commits(commits)
        if first is not None:
            for key in [k for k in run.states if not isinstance(k, str) and position_of(k)[0] >= first]:
                row = row_of(run.states.pop(key))
                if row is not None:  # The output is discarded; its cost still counts.
                    run.other_rows.append(row)
            run.waiting = {at: waiting for at, waiting in run.waiting.items() if at[0] < first}
            run.notes = {
                key: data
                for key, data in run.notes.items()
                if int(key.partition(":")[0]) < first or is_effect_note(key)
            }
        self.restored = restored
        self.prior = PriorUsage(*run.usage())

    def record(
        self, row: AttemptRow, schema: Schema | None, output: BaseModel | None, call: StepCall | None = None
    ) -> None:
        if self._run.epoch != self.epoch:
            raise _fenced(self._run_id)
        if schema is None or output is None:
            self._other_rows.append(row)
            return
        branch = row.branch
        key = (row.position, branch) if branch else row.position
        if call is not None:
            self._calls[key] = call
        elif self._calls:
            self._calls.pop(key, None)
        kind, schemas = type(row.output), row.schemas
        if (
            (kind is tuple or kind is PickledSnapshot or kind is bytes)
            and schemas is not None
            and schemas[1] is schema
        ):
            entry: AttemptRow | SavedState = row
        else:  # The snapshot in the row is for display only.
            entry = SavedState(row.node_id, schema, schema.snapshot(output), contract_of(row, schema), row)
        before = self._states.setdefault(key, entry)
        if before is not entry:
            self._replace(key, before, entry)

    def _replace(self, key: Key, before: AttemptRow | SavedState, entry: AttemptRow | SavedState) -> None:
        """Replace a committed output; the attempt that it came from stays in the history."""
        del self._states[key]
        self._states[key] = entry
        row = row_of(before)
        if row is not None:
            self._other_rows.append(row)

    def committed(self, position: int, branches: Sequence[str]) -> dict[str, Committed]:
        commits: dict[str, Committed] = {}
        for branch in branches:
            key: Key = (position, branch) if branch else position
            entry = self._states.get(key)
            if entry is not None:
                state = as_state(entry)
                commits[branch] = Committed(
                    state.node_id, state.snapshot, state.contract, self._calls.get(key), state.schema
                )
        return commits

    def record_failure_site(
        self, position: int, branch: str, attempt: int, started_ns: int, write: Callable[[], bytes]
    ) -> None:
        """See Session. The frames are encoded when they are read."""
        if self._run.epoch == self.epoch:
            self._run.failure_sites[position, branch] = (attempt, started_ns, write)

    def record_rejected(self, position: int, branch: str, started_ns: int, data: bytes) -> None:
        if self._run.epoch == self.epoch:
            from stroma.trace.rejected import RecentOutputs  # Few runs have one.

            if self._run.rejected is None:
                self._run.rejected = RecentOutputs()
            self._run.rejected.add(position, branch, started_ns, data)

    def note_call(self, position: int, identity: str) -> None:
        if self._run.epoch == self.epoch:
            self._run.places[identity] = position

    def note_traceparent(self, traceparent: str) -> Future[None] | None:
        if self._run.epoch == self.epoch:
            self._run.traceparent = traceparent
        return None

    def note_attribution(self, ids: Mapping[str, str]) -> None:
        if self._run.epoch == self.epoch:
            self._run.attribution = {**self._run.attribution, **ids}

    def suspend(self, row: AttemptRow, waiting: Waiting) -> None:
        self.record(row, None, None)
        self.ask(waiting)

    def append_events(self, last: int, lines: bytes) -> None:
        run, batch = self._run, EventBatch(EventPlace(self.epoch, last), lines)
        if run.execution == self.execution and (not run.events or run.events[-1].last < batch.last):
            run.events.append(batch)

    def note(self, key: str, data: bytes | None) -> None:
        if self._run.epoch != self.epoch:
            return
        if data is None:
            self._run.notes.pop(key, None)
        else:
            self._run.notes[key] = data

    def mark_effect(self, node_id: str) -> None:
        if self._run.epoch == self.epoch and node_id not in self._run.effects:
            self._run.effects |= {node_id}

    def flush(self) -> None:
        if self._run.epoch != self.epoch:
            raise _fenced(self._run_id)

    def ask(self, waiting: Waiting) -> Waiting:
        if self._run.epoch != self.epoch:
            raise _fenced(self._run_id)
        at = waiting.position, waiting.branch
        stored = self._run.waiting.get(at)
        if stored is not None and is_answered(stored, waiting):
            return stored
        self._run.waiting[at] = waiting
        cast("dict[tuple[int, str], Waiting]", self.waiting)[at] = waiting
        return waiting

    def answers(self) -> Mapping[tuple[int, str], Waiting]:
        self.waiting = dict(self._run.waiting)
        return self.waiting

    def messages(self, after: int) -> list[SentMessage]:
        self._read_messages = self._run.last_message
        return [one for one in self._run.messages.values() if one.number > after]

    def end(self, status: str, error: str | None, wake_ms: int | None = None) -> None:
        if self.finished is None:
            if self._run.epoch != self.epoch:
                raise _fenced(self._run_id)
            status = str(status)
            before = self._completion
            if before is not None and status in COMPLETE and before[2] == _count_attempts(self._run):
                status, error = before[:2]  # A resume without anything to do leaves the run unchanged.
            self._run.status, self._run.error = status, error
            earlier, read = self._run.wake_ms, self._read_messages
            if earlier is not None and is_old_news(
                earlier, error, lambda: read in (None, self._run.last_message)
            ):
                earlier = None
            self._run.wake_ms = merge_wake(earlier, status, wake_ms)
            self._run.blocked = None
            self.abandon()
            if status == "SUSPENDED":
                self._on_suspension(self._run_id)

    def give_back(self) -> None:
        run, before = self._run, self._before
        if run.epoch != self.epoch:
            raise _fenced(self._run_id)
        if before["status"] == "RUNNING":  # Its owner was gone.
            before = {**before, "status": "INTERRUPTED", "wake_ms": 0}
        woken = run.wake_ms  # An answer has come meanwhile.
        for name, value in before.items():
            setattr(run, name, value)
        if woken is not None and run.status in UNFINISHED:
            run.wake_ms = woken
        self.abandon()

    def abandon(self) -> None:
        if self._run.epoch == self.epoch:
            self._run.session = self._run.last_session = no_session


def _held_as(run: MemoryRun, request: RunRequest) -> tuple[str, str | None] | None:
    """Return the status and the error of a run that must not be continued; None if it may be."""
    if run.control.cancel and run.status not in ENDED:
        return "CANCELLED", None
    if run.control.pause and request.is_automatic and run.status in ("RUNNING", *UNFINISHED):
        return "SUSPENDED", PAUSED
    if run.has_expired:
        return "FAILED", expired_error(request.run_id)
    return None


def _with_input(call: StepCall | None, state: SavedState, branch: str) -> StepCall | None:
    """Return a call with its input in stored form, which is made here of the attempt: most are never asked for it."""
    row = state.row
    if call is None and is_called(branch.rpartition(".")[2]):
        call = StepCall(OF_FLOW, None)  # What other code calls is recorded with its call.
    if (
        call is None
        or call.number > OF_FLOW
        or call.input_key is not None
        or row is None
        or row.schemas is None
    ):
        return call
    try:
        return call._replace(input_key=row.schemas[0].encode(row.schemas[0].restore(row.input)))
    except NotSerialisable:
        return call


def _count_attempts(run: MemoryRun) -> int:
    return len(run.states) + len(run.other_rows)


def _fenced(run_id: str) -> Fenced:
    return Fenced(
        f"run {run_id!r} was taken over or deleted; this execution records nothing more, see the result of the other one"
    )
