"""Stores that live and die with the process."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence

from pydantic import BaseModel

from stroma.checkpoint.cells import MemoryCells
from stroma.checkpoint.errors import CheckpointNotFound, CorruptCheckpoint, Fenced, RunExists
from stroma.checkpoint.memory.reader import MemoryReading
from stroma.checkpoint.memory.runs import Kept, Key, MemoryRun, nobody, position_of, row_of
from stroma.checkpoint.protocols import (
    COMPLETE,
    ENDED,
    Charge,
    Committed,
    Finished,
    PriorUsage,
    RunRequest,
    StepCall,
    Tried,
    Waiting,
    decide,
    is_answered_meanwhile,
    waits_no_longer,
)
from stroma.contracts.contract import check_id
from stroma.contracts.schema import Schema, describe_error, schema_of
from stroma.contracts.snapshots import PickledSnapshot
from stroma.trace.events import AttemptRow, contract_of

__all__ = ["AsyncInMemoryStore", "InMemoryStore"]

_NOTHING_RESTORED: Mapping[tuple[int, str], Committed] = {}
_NOTHING_SPENT = PriorUsage()


class _MemorySession:
    __slots__ = (
        "__weakref__",
        "_calls",
        "_epoch",
        "_kept",
        "_run",
        "_spent",
        "_was",
        "continued",
        "execution",
        "finished",
        "on_cancel",
        "places",
        "prior",
        "restored",
        "traceparent",
        "waiting",
    )

    restored: Mapping[tuple[int, str], Committed]
    places: dict[str, int]
    on_cancel: Callable[[], None] | None
    undelivered: Sequence[AttemptRow] = ()  # A process that lives tells its hooks.
    reads_rows = True  # And never an output whose picture is in its row.
    address = ""
    epoch = 0
    charges: dict[tuple[int, str], Charge] = {}  # noqa: RUF012  # Nothing is put there.
    tried: Mapping[tuple[int, str], Tried] = {}

    def __init__(self, run: MemoryRun, request: RunRequest) -> None:
        given = request.schema.snapshot(request.initial_state)
        held = run.held()
        way = "begin" if held is None else decide(request, held, run.input == given)
        self.continued, self.finished, self.on_cancel = way == "continue", None, None
        if way != "begin":
            self._continue(run, request)
        if way == "continue" and run.cancelled and run.status not in ENDED:
            # Acknowledged, and its owner stopped before it knew.
            run.status, run.error, way, self.continued = "CANCELLED", None, "return", False
            run.epoch += 1
        run.cancelled = False
        #: How the run had completed, and how many attempts it had then.
        self._was: tuple[str, str | None, int] | None = None
        if way == "continue" and run.status in COMPLETE and request.discard_from is None:
            self._was = run.status, run.error, _recorded(run)
        if way == "return":
            self.finished = Finished(run.status, run.error)
        elif way == "begin":
            if run.execution or run.kept:
                run.forget()
            run.execution += 1
            run.input, run.pipeline, run.schema = given, request.pipeline, request.schema
            run.begins()
            self.restored, self.prior = _NOTHING_RESTORED, _NOTHING_SPENT
        if way != "return":
            run.status, run.error = "RUNNING", None
            if request.tags:
                run.tags = tuple(dict.fromkeys((*run.tags, *request.tags)))
            run.epoch += 1
            run.session = weakref.ref(self) if request.ends else nobody
        self.execution, self._epoch = run.execution, run.epoch
        self._run, self._kept, self._spent = run, run.kept, run.spent
        self._calls, self.waiting, self.traceparent = run.calls, dict(run.waiting), run.traceparent
        self.places = run.places

    def _continue(self, run: MemoryRun, request: RunRequest) -> None:
        commits = {
            position_of(key): Committed(node_id, snapshot, contract, run.calls.get(key), schema)
            for key, (node_id, schema, snapshot, contract, _) in reversed(list(run.entries()))
            if not isinstance(key, str) and not (request.apart and request.is_apart(*position_of(key)))
        }
        request = request.going_on(commits)
        first = request.discard_from
        restored = request.accepted(commits)
        if first is not None:
            for key in [k for k in run.kept if not isinstance(k, str) and position_of(k)[0] >= first]:
                row = row_of(run.kept.pop(key))
                if row is not None:  # Discarded, but paid for.
                    run.spent.append(row)
            run.waiting = {at: waiting for at, waiting in run.waiting.items() if at[0] < first}
        self.restored = restored
        self.prior = PriorUsage(*run.used())

    def record(
        self, row: AttemptRow, schema: Schema | None, output: BaseModel | None, call: StepCall | None = None
    ) -> None:
        if self._run.epoch != self._epoch:
            raise _fenced()
        if schema is None or output is None:
            self._spent.append(row)
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
            entry: AttemptRow | Kept = row
        else:  # The row's picture is for people.
            entry = (row.node_id, schema, schema.snapshot(output), contract_of(row, schema), row)
        before = self._kept.setdefault(key, entry)
        if before is not entry:
            self._replace(key, before, entry)

    def _replace(self, key: Key, before: AttemptRow | Kept, entry: AttemptRow | Kept) -> None:
        """A place is committed again: what stood there is history, and paid for."""
        del self._kept[key]
        self._kept[key] = entry
        row = row_of(before)
        if row is not None:
            self._spent.append(row)

    def committed(self, position: int, branches: Sequence[str]) -> dict[str, Committed]:
        found: dict[str, Committed] = {}
        for branch in branches:
            key = (position, branch)
            entry = self._kept.get(key)
            if entry is not None:
                node_id, schema, snapshot, contract, _ = self._run.entry(entry)
                found[branch] = Committed(node_id, snapshot, contract, self._calls.get(key), schema)
        return found

    def delivered(self, row: AttemptRow) -> None:
        return None

    def note_trouble(
        self, position: int, branch: str, attempt: int, started_ns: int, write: Callable[[], bytes]
    ) -> None:
        """Keep where an attempt failed, in place of what failed there before; it is written down when it is asked for."""
        if self._run.epoch == self._epoch:
            self._run.troubles[position, branch] = (attempt, started_ns, write)

    def note_call(self, position: int, identity: str) -> None:
        if self._run.epoch == self._epoch:
            self.places[identity] = position

    def note_traceparent(self, traceparent: str) -> None:
        if self._run.epoch == self._epoch:
            self._run.traceparent = traceparent

    def suspend(self, row: AttemptRow, waiting: Waiting) -> None:
        self.record(row, None, None)
        at = waiting.position, waiting.branch
        if not is_answered_meanwhile(self._run.waiting.get(at), self.waiting.get(at), waiting):
            self._run.waiting[at] = waiting

    def end(self, status: str, error: str | None) -> None:
        if self.finished is None:
            if self._run.epoch != self._epoch:
                raise _fenced()
            status = str(status)
            if self._was is not None and status in COMPLETE and self._was[2] == _recorded(self._run):
                status, error = self._was[:2]  # A resume that had nothing to do leaves the run as it was.
            self._run.status, self._run.error = status, error
            self.abandon()

    def abandon(self) -> None:
        if self._run.epoch == self._epoch:
            self._run.session = nobody


def _recorded(run: MemoryRun) -> int:
    return len(run.kept) + len(run.spent)


def _fenced() -> Fenced:
    return Fenced(
        "the run was taken over or deleted meanwhile; nothing more of this execution is kept, see what the other one "
        "makes of it"
    )


class _Memory(MemoryReading, MemoryCells):
    """What the sync and the async store share. All calls are atomic: nothing here awaits."""

    def __init__(self) -> None:
        super().__init__()
        self._runs: dict[str, MemoryRun] = {}

    def open_run(self, request: RunRequest) -> _MemorySession:
        run = self._runs.get(request.run_id)
        if run is None:
            run = self._runs[request.run_id] = MemoryRun()
        return _MemorySession(run, request)

    # ---- as of every journal store

    async def cancel(self, run_id: str) -> bool:
        """Ask whoever is at work on a run to end it; a run that nobody holds is CANCELLED at once.

        False if it had ended already. Raises CheckpointNotFound.
        """
        run = self._known(run_id)
        session = run.session()
        if session is not None:
            run.cancelled = True
            if session.on_cancel is not None:
                session.on_cancel()
        elif run.status in ENDED:
            return False
        else:
            run.status = "CANCELLED"
        return True

    async def signal(self, run_id: str, waiting: Waiting) -> None:
        """Keep the answer that a node waits for; ``waiting`` with its payload.

        Raises CheckpointNotFound, StoreError if the node has an answer or waits no longer.
        """
        run, at = self._known(run_id), (waiting.position, waiting.branch)
        asked = run.waiting.get(at)
        if asked is None or asked.node_id != waiting.node_id or asked.payload not in (None, waiting.payload):
            raise waits_no_longer(run_id, waiting)
        run.waiting[at] = waiting

    async def fork(
        self,
        run_id: str,
        new_run_id: str,
        before: int,
        *,
        edited: tuple[Schema, BaseModel] | None = None,
        state: tuple[Schema, BaseModel] | None = None,
    ) -> None:
        """Make a new run of what a run committed before a position: ``edited`` in place of the last of that,
        ``state`` in place of its input. Raises CheckpointNotFound, RunExists."""
        source, run = self._known(run_id), MemoryRun()
        if before and before - 1 not in source.kept:
            raise CheckpointNotFound(
                f"run {run_id!r} has no output at position {before - 1}, before which it is forked; fork at an earlier node"
            )
        taken = self._runs.get(check_id(new_run_id, "run id"))
        if taken is not None and taken.execution:
            raise RunExists(f"run {new_run_id!r} exists already; give the fork another id")
        for key, (node_id, schema, snapshot, contract, _) in reversed(list(source.entries())):
            if not isinstance(key, str) and position_of(key)[0] < before:
                if edited is not None and key == before - 1:
                    schema, snapshot = edited[0], edited[0].snapshot(edited[1])
                run.kept[key] = (node_id, schema, snapshot, contract, None)
        run.places = {identity: at for identity, at in source.places.items() if at < before}
        run.execution, run.parent, run.status = 1, run_id, "INTERRUPTED"
        run.pipeline, run.schema, run.input = source.pipeline, source.schema, source.input
        run.begins()
        if state is not None:
            run.schema, run.input = state[0], state[0].snapshot(state[1])
        self._runs[new_run_id] = run

    # ---- the simple protocol

    def _save(self, run_id: str, node_id: str, state: BaseModel) -> None:
        run = self._runs.setdefault(check_id(run_id, "run id"), MemoryRun())
        schema = schema_of(type(state))
        run.kept.pop(check_id(node_id, "node id"), None)
        run.kept[node_id] = (node_id, schema, schema.snapshot(state), schema.fingerprint, None)

    def _load(self, run_id: str, node_id: str) -> BaseModel | None:
        run = self._runs.get(run_id)
        if run is not None:
            for _, (node, schema, snapshot, *_) in run.entries():
                if node == node_id:
                    return schema.restore(snapshot)
        return None

    def _save_typed(self, run_id: str, node_id: str, state: BaseModel, schema: type[BaseModel]) -> None:
        self._save(run_id, node_id, coerce(state, schema))

    def _load_typed(self, run_id: str, node_id: str, schema: type[BaseModel]) -> BaseModel | None:
        state = self._load(run_id, node_id)
        return None if state is None else as_schema(state, schema, run_id, node_id)

    def _delete(self, run_id: str) -> None:
        run = self._runs.pop(run_id, None)
        if run is not None:
            run.epoch += 1  # Whoever is at work on it is fenced off.


def coerce(state: BaseModel, schema: type[BaseModel]) -> BaseModel:
    """The state as an instance of a schema. Raises TypeError for what is no schema, ValidationError if it cannot be."""
    if not (isinstance(schema, type) and issubclass(schema, BaseModel)):
        raise TypeError("schema must be a BaseModel type")
    return schema_of(schema).convert(state)


def as_schema(state: BaseModel, schema: type[BaseModel], run_id: str, node_id: str) -> BaseModel:
    """A loaded state as an instance of a schema; raises CorruptCheckpoint if it is not one."""
    try:
        return coerce(state, schema)
    except TypeError:
        raise
    except Exception as error:
        why, cause = describe_error(error)
        raise CorruptCheckpoint(
            f"the checkpoint of node {node_id!r} in run {run_id!r} is not a {schema.__name__}: {why}; "
            "restore the schema, or run the node again"
        ) from cause


class InMemoryStore(_Memory):
    """Keeps everything in this process; sync. What is not serialisable is kept as a copy."""

    def save(self, run_id: str, node_id: str, state: BaseModel) -> None:
        self._save(run_id, node_id, state)

    def load(self, run_id: str, node_id: str) -> BaseModel | None:
        return self._load(run_id, node_id)

    def save_typed(self, run_id: str, node_id: str, state: BaseModel, schema: type[BaseModel]) -> None:
        """Save as an instance of ``schema``; raises TypeError("schema must be a BaseModel type")."""
        self._save_typed(run_id, node_id, state, schema)

    def load_typed(self, run_id: str, node_id: str, schema: type[BaseModel]) -> BaseModel | None:
        """Load as an instance of ``schema``; raises CorruptCheckpoint if the state is not one."""
        return self._load_typed(run_id, node_id, schema)

    def delete(self, run_id: str) -> None:
        self._delete(run_id)


class AsyncInMemoryStore(_Memory):
    """The same with async calls; the default of ``StromaRunner.quick``."""

    async def save(self, run_id: str, node_id: str, state: BaseModel) -> None:
        self._save(run_id, node_id, state)

    async def load(self, run_id: str, node_id: str) -> BaseModel | None:
        return self._load(run_id, node_id)

    async def save_typed(self, run_id: str, node_id: str, state: BaseModel, schema: type[BaseModel]) -> None:
        """Save as an instance of ``schema``; raises TypeError("schema must be a BaseModel type")."""
        self._save_typed(run_id, node_id, state, schema)

    async def load_typed(self, run_id: str, node_id: str, schema: type[BaseModel]) -> BaseModel | None:
        """Load as an instance of ``schema``; raises CorruptCheckpoint if the state is not one."""
        return self._load_typed(run_id, node_id, schema)

    async def delete(self, run_id: str) -> None:
        self._delete(run_id)
