"""Stores that live and die with the process."""

from __future__ import annotations

import math
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import cast

from pydantic import BaseModel

from stroma.checkpoint.cells import MemoryCells
from stroma.checkpoint.journal import (
    AttemptRecord,
    CheckpointNotFound,
    Committed,
    CorruptCheckpoint,
    Fenced,
    Finished,
    Held,
    PriorUsage,
    RunExists,
    RunRecord,
    RunRequest,
    StepCall,
    Waiting,
    decide,
    items_in,
    no_map,
    waits_no_longer,
)
from stroma.contracts import check_id
from stroma.schemas import NotSerialisable, Packed, Schema, Snapshot, schema_of, told_of
from stroma.trace import (
    ATTEMPT,
    BRANCH,
    DURATION,
    FAILURE,
    NO_USAGE,
    NODE,
    OUTCOME,
    OUTPUT,
    POSITION,
    STARTED,
    USAGE,
    Row,
    contract_of,
)

__all__ = ["AsyncInMemoryStore", "InMemoryStore"]

_Key = int | str | tuple[int, str]
_Kept = tuple[str, Schema, Snapshot, str]  # of a node id: with what it is filed under


def _nobody() -> None:
    """The session of a run that nobody is at work on."""
    return


@dataclass(slots=True)
class _Run:
    """One run. ``kept`` holds what was committed by position or by (position, branch), and what the simple calls saved
    by node id; the newest last. Most entries are the very row of the trace: ``schemas`` says how to read its output.
    ``spent`` holds the rows of all other attempts, ``calls`` which calls of plain code the commits were."""

    execution: int = 0
    input: Snapshot | None = None
    kept: dict[_Key, Row | _Kept] = field(default_factory=dict)
    schemas: dict[str, Schema] = field(default_factory=dict)
    spent: list[Row] = field(default_factory=list)
    calls: dict[_Key, StepCall] = field(default_factory=dict)
    waiting: dict[tuple[int, str], Waiting] = field(default_factory=dict)
    traceparent: str | None = None
    parent: str | None = None
    pipeline: str = ""
    tags: tuple[str, ...] = ()
    schema: Schema | None = None
    started_ms: int = 0
    status: str = "RUNNING"
    error: str | None = None
    #: Raised by each session that opens the run; only the last one may write.
    epoch: int = 0
    #: That session, while somebody has it.
    session: Callable[[], _MemorySession | None] = _nobody

    def forget(self) -> None:
        """What the execution before has left. What was saved by hand belongs to none."""
        self.kept = {k: v for k, v in self.kept.items() if isinstance(k, str)}
        self.spent, self.calls, self.waiting = [], {}, {}
        self.traceparent, self.tags = None, ()

    def held(self) -> Held | None:
        """What is known of the last execution."""
        if self.execution == 0:
            return None
        running = self.session() is not None
        return Held(
            self.execution, self.status, "another task of this process" if running else None, math.inf
        )

    def attempts(self) -> list[Row]:
        """The rows of the last execution, by position and time."""
        rows = [*self.spent, *(entry for entry in self.kept.values() if len(entry) != 4)]
        # One that was sent again is one attempt.
        one = {(row[POSITION], row[STARTED], row[BRANCH], row[ATTEMPT]): row for row in rows}
        return [one[key] for key in sorted(one)]

    def used(self) -> tuple[int, float, float]:
        """Tokens, USD and milliseconds of the last execution."""
        rows = self.attempts()
        usages = [usage for row in rows if (usage := row[USAGE]) is not None]
        return (
            sum(usage.tokens for usage in usages),
            math.fsum(usage.cost_usd for usage in usages),
            sum(row[DURATION] for row in rows if not row[BRANCH]) / 1e6,
        )

    def entries(self) -> Iterator[tuple[_Key, _Kept]]:
        """What is kept, the newest first."""
        for key, entry in reversed(self.kept.items()):
            yield key, self.entry(entry)

    def entry(self, entry: Row | _Kept) -> _Kept:
        """One of what is kept."""
        if len(entry) == 4:
            return entry
        schema = self.schemas[entry[NODE]]
        return entry[NODE], schema, cast("Snapshot", entry[OUTPUT]), contract_of(entry, schema)


_NOTHING_RESTORED: Mapping[tuple[int, str], Committed] = {}
_NOTHING_SPENT = PriorUsage()


class _MemorySession:
    __slots__ = (
        "__weakref__",
        "_calls",
        "_epoch",
        "_kept",
        "_run",
        "_schemas",
        "_spent",
        "continued",
        "execution",
        "finished",
        "on_cancel",
        "prior",
        "restored",
        "traceparent",
        "waiting",
    )

    restored: Mapping[tuple[int, str], Committed]
    on_cancel: Callable[[], None] | None
    undelivered: Sequence[Row] = ()  # A process that lives tells its hooks.
    reads_rows = True  # And never an output whose picture is in its row.

    def __init__(self, run: _Run, request: RunRequest) -> None:
        given = request.schema.snapshot(request.initial_state)
        held = run.held()
        way = "begin" if held is None else decide(request, held, run.input == given)
        self.continued, self.finished, self.on_cancel = way == "continue", None, None
        if way != "begin":
            self._continue(run, request)
        if way == "return":
            self.finished = Finished(run.status, run.error)
        elif way == "begin":
            if run.execution or run.kept:
                run.forget()
            run.execution += 1
            run.input, run.pipeline, run.schema = given, request.pipeline, request.schema
            run.started_ms = _now_ms()
            self.restored, self.prior = _NOTHING_RESTORED, _NOTHING_SPENT
        if way != "return":
            run.status, run.error = "RUNNING", None
            if request.tags:
                run.tags = tuple(dict.fromkeys((*run.tags, *request.tags)))
            run.epoch += 1
            run.session = weakref.ref(self) if request.ends else _nobody
        self.execution, self._epoch = run.execution, run.epoch
        self._run, self._kept, self._spent, self._schemas = run, run.kept, run.spent, run.schemas
        self._calls, self.waiting, self.traceparent = run.calls, run.waiting, run.traceparent

    def _continue(self, run: _Run, request: RunRequest) -> None:
        commits = {
            _position(key): Committed(node_id, snapshot, contract, run.calls.get(key), schema)
            for key, (node_id, schema, snapshot, contract) in reversed(list(run.entries()))
            if not isinstance(key, str) and not (request.apart and request.is_apart(*_position(key)))
        }
        request = request.going_on(commits)
        first = request.discard_from
        restored = request.accepted(commits)
        if first is not None:
            for key in [k for k in run.kept if not isinstance(k, str) and _position(k)[0] >= first]:
                entry = run.kept.pop(key)
                if len(entry) != 4:  # Discarded, but paid for.
                    run.spent.append(entry)
            run.waiting = {at: waiting for at, waiting in run.waiting.items() if at[0] < first}
        self.restored = restored
        self.prior = PriorUsage(*run.used())

    def record(
        self, row: Row, schema: Schema | None, output: BaseModel | None, call: StepCall | None = None
    ) -> None:
        if self._run.epoch != self._epoch:
            raise _fenced()
        if schema is None or output is None:
            self._spent.append(row)
            return
        branch = row[BRANCH]
        key = (row[POSITION], branch) if branch else row[POSITION]
        if call is not None:
            self._calls[key] = call
        elif self._calls:
            self._calls.pop(key, None)
        kind = type(row[OUTPUT])
        if (kind is tuple or kind is Packed or kind is bytes) and self._schemas.setdefault(
            row[NODE], schema
        ) is schema:
            self._kept[key] = row
        else:  # The row's picture is for people, or its node id stands for another schema already.
            self._kept[key] = (row[NODE], schema, schema.snapshot(output), contract_of(row, schema))
            self._spent.append(row)

    def committed(self, position: int, branches: Sequence[str]) -> dict[str, Committed]:
        found: dict[str, Committed] = {}
        for branch in branches:
            key = (position, branch)
            entry = self._kept.get(key)
            if entry is not None:
                node_id, schema, snapshot, contract = self._run.entry(entry)
                found[branch] = Committed(node_id, snapshot, contract, self._calls.get(key), schema)
        return found

    def delivered(self, row: Row) -> None:
        return None

    def note_traceparent(self, traceparent: str) -> None:
        if self._run.epoch == self._epoch:
            self._run.traceparent = traceparent

    def suspend(self, row: Row, waiting: Waiting) -> None:
        self.record(row, None, None)
        self._run.waiting[waiting.position, waiting.branch] = waiting

    def end(self, status: str, error: str | None) -> None:
        if self.finished is None:
            if self._run.epoch != self._epoch:
                raise _fenced()
            self._run.status, self._run.error = str(status), error
            self.abandon()

    def abandon(self) -> None:
        if self._run.epoch == self._epoch:
            self._run.session = _nobody


def _fenced() -> Fenced:
    return Fenced(
        "the run was taken over or deleted meanwhile; nothing more of this execution is kept, see what the other one "
        "makes of it"
    )


def _now_ms() -> int:
    return time.time_ns() // 1_000_000


def _position(key: _Key) -> tuple[int, str]:
    return cast("tuple[int, str]", key if isinstance(key, tuple) else (key, ""))


class _Memory(MemoryCells):
    """What the sync and the async store share. All calls are atomic: nothing here awaits."""

    def __init__(self) -> None:
        super().__init__()
        self._runs: dict[str, _Run] = {}

    def open_run(self, request: RunRequest) -> _MemorySession:
        run = self._runs.get(request.run_id)
        if run is None:
            run = self._runs[request.run_id] = _Run()
        return _MemorySession(run, request)

    # ---- as of every journal store

    async def cancel(self, run_id: str) -> bool:
        """Ask whoever is at work on a run to end it; a run that nobody holds is CANCELLED at once.

        False if it had ended already. Raises CheckpointNotFound.
        """
        run = self._known(run_id)
        session = run.session()
        if session is not None:
            if session.on_cancel is not None:
                session.on_cancel()
        elif run.status in ("COMPLETED", "RESUMED", "FAILED", "CANCELLED"):
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
        source, run = self._known(run_id), _Run()
        if before and before - 1 not in source.kept:
            raise CheckpointNotFound(
                f"run {run_id!r} has no output at position {before - 1}, before which it is forked; fork at an earlier node"
            )
        taken = self._runs.get(check_id(new_run_id, "run id"))
        if taken is not None and taken.execution:
            raise RunExists(f"run {new_run_id!r} exists already; give the fork another id")
        for key, (node_id, schema, snapshot, contract) in reversed(list(source.entries())):
            if not isinstance(key, str) and _position(key)[0] < before:
                if edited is not None and key == before - 1:
                    schema, snapshot = edited[0], edited[0].snapshot(edited[1])
                run.kept[key] = (node_id, schema, snapshot, contract)
        run.execution, run.parent, run.status = 1, run_id, "INTERRUPTED"
        run.pipeline, run.schema, run.input, run.started_ms = (
            source.pipeline,
            source.schema,
            source.input,
            _now_ms(),
        )
        if state is not None:
            run.schema, run.input = state[0], state[0].snapshot(state[1])
        self._runs[new_run_id] = run

    def waiting(self, run_id: str) -> list[Waiting]:
        """What nodes of the last execution of a run wait for, or waited for. [] if unknown."""
        run = self._runs.get(check_id(run_id, "run id"))
        return [] if run is None else list(run.waiting.values())

    def _known(self, run_id: str) -> _Run:
        run = self._runs.get(check_id(run_id, "run id"))
        if run is None or not run.execution:
            raise CheckpointNotFound(f"there is no run {run_id!r} in this process; check the id")
        return run

    def list_runs(
        self, *, limit: int = 50, pipeline: str | None = None, status: str | None = None
    ) -> list[RunRecord]:
        """The last execution of each run, the one begun last first."""
        found = [
            self._record(run_id, run)
            for run_id, run in reversed(list(self._runs.items()))
            if run.execution and pipeline in (None, run.pipeline) and status in (None, run.status)
        ]
        return sorted(found, key=lambda run: -run.started_ms)[:limit]

    def get_run(self, run_id: str) -> RunRecord | None:
        """The last execution of a run, or None. Raises ValueError for an illegal id."""
        run = self._runs.get(check_id(run_id, "run id"))
        return None if run is None or not run.execution else self._record(run_id, run)

    def find_run(self, prefix_or_last: str, *, limit: int = 20) -> list[str]:
        """The ids that begin with a text, newest first, or the newest id for "last". A whole id stands alone."""
        runs = self.list_runs(limit=len(self._runs))
        if prefix_or_last == "last":
            return [run.run_id for run in runs[:1]]
        prefix = check_id(prefix_or_last, "run id")
        found = [run.run_id for run in runs if run.run_id.startswith(prefix)]
        return [prefix] if prefix in found else found[:limit]

    def attempts(self, run_id: str, *, execution: int | None = None) -> list[AttemptRecord]:
        """Every attempt of the last execution, by position and time; earlier ones are not kept. [] if unknown."""
        run = self._runs.get(check_id(run_id, "run id"))
        if run is None or execution not in (None, run.execution):
            return []
        return [_attempt(row, run) for row in run.attempts()]

    def input_of(self, run_id: str) -> bytes:
        """The initial state of a run in its stored form. Raises CheckpointNotFound, NotSerialisable."""
        run = self._known(run_id)
        assert run.schema is not None
        assert run.input is not None
        return run.schema.encode(run.schema.restore(run.input))

    def map_items(self, run_id: str, node_id: str, first: int, count: int) -> list[tuple[int, Committed]]:
        """What a map committed of its items, from one on, of the last execution of a run; [] behind the last one.

        Raises CheckpointNotFound if there is no such map that is done.
        """
        run = self._known(run_id)
        for key, kept in run.entries():
            call = run.calls.get(key)
            if kept[0] == node_id and call is not None and call.given is not None:
                position, branch = _position(key)
                prefix = f"{branch}." if branch else ""
                found: list[tuple[int, Committed]] = []
                for index in range(first, min(items_in(call.given), first + count)):
                    entry = run.kept.get((position, f"{prefix}{index}"))
                    if entry is not None:
                        node, schema, snapshot, contract = run.entry(entry)
                        found.append((index, Committed(node, snapshot, contract, None, schema)))
                return found
        raise no_map(run_id, node_id)

    def _record(self, run_id: str, run: _Run) -> RunRecord:
        tokens, cost, _ = run.used()
        rows = run.attempts()
        updated = max([run.started_ms, *((row[STARTED] + row[DURATION]) // 1_000_000 for row in rows)])
        nodes = sum(isinstance(key, int) for key in run.kept)
        held = run.held()
        return RunRecord(
            run_id, run.pipeline, run.status, run.execution, run.started_ms, updated, tokens, cost, nodes, run.error,
            held and held.holder, run.parent, sum(row[DURATION] for row in rows if not row[BRANCH]) / 1e6,
            tuple(sorted(run.tags)),
        )  # fmt: skip

    # ---- the simple protocol

    def _save(self, run_id: str, node_id: str, state: BaseModel) -> None:
        run = self._runs.setdefault(check_id(run_id, "run id"), _Run())
        schema = schema_of(type(state))
        run.kept.pop(check_id(node_id, "node id"), None)
        run.kept[node_id] = (node_id, schema, schema.snapshot(state), schema.fingerprint)

    def _load(self, run_id: str, node_id: str) -> BaseModel | None:
        run = self._runs.get(run_id)
        if run is not None:
            for _, (node, schema, snapshot, _) in run.entries():
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


def _attempt(row: Row, run: _Run) -> AttemptRecord:
    usage = row[USAGE] or NO_USAGE
    failure, message, reason = row[FAILURE] or (None, None, None)
    branch = row[BRANCH]
    entry = run.kept.get((row[POSITION], branch) if branch else row[POSITION])
    output = None
    if row[OUTPUT] is not None and entry is not None and (entry is row or len(entry) == 4):
        if len(entry) == 4:
            _, schema, snapshot, _ = entry
        else:
            schema, snapshot = run.schemas[row[NODE]], cast("Snapshot", entry[OUTPUT])
        try:
            output = schema.encode(schema.restore(snapshot))
        except NotSerialisable:
            pass  # It has no stored form.
    return AttemptRecord(
        row[POSITION], branch, row[NODE], row[ATTEMPT], row[STARTED] // 1_000_000, row[DURATION] / 1e6, row[OUTCOME],
        failure and failure.value, message, reason, usage.tokens, usage.output_tokens, usage.cost_usd, usage.model,
        output, output_bytes=None if output is None else len(output), started_ns=row[STARTED],
    )  # fmt: skip


def coerce(state: BaseModel, schema: type[BaseModel]) -> BaseModel:
    """The state as an instance of a schema. Raises TypeError for what is no schema, ValidationError if it cannot be."""
    if not (isinstance(schema, type) and issubclass(schema, BaseModel)):
        raise TypeError("schema must be a BaseModel type")
    return schema_of(schema).cross(state)


def as_schema(state: BaseModel, schema: type[BaseModel], run_id: str, node_id: str) -> BaseModel:
    """A loaded state as an instance of a schema; raises CorruptCheckpoint if it is not one."""
    try:
        return coerce(state, schema)
    except TypeError:
        raise
    except Exception as error:
        why, cause = told_of(error)
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
