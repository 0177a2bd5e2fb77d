"""Stores that live and die with the process."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import cast

from pydantic import BaseModel

from stroma.checkpoint.journal import (
    Committed,
    CorruptCheckpoint,
    PipelineChanged,
    PriorUsage,
    RunRequest,
    StepCall,
)
from stroma.contracts import check_id
from stroma.schemas import Schema, Snapshot, schema_of
from stroma.trace import BRANCH, DURATION, NODE, OUTPUT, POSITION, USAGE, Row, contract_of

__all__ = ["AsyncInMemoryStore", "InMemoryStore"]

_Key = int | str | tuple[int, str]
_Kept = tuple[str, Schema, Snapshot, str]  # of a node id: with what it is filed under


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
    status: str = "RUNNING"

    def entries(self) -> Iterator[tuple[_Key, _Kept]]:
        """What is kept, the newest first."""
        for key, entry in reversed(self.kept.items()):
            if len(entry) == 4:
                yield key, entry
            else:
                schema = self.schemas[entry[NODE]]
                yield key, (entry[NODE], schema, cast("Snapshot", entry[OUTPUT]), contract_of(entry, schema))


_NOTHING_RESTORED: Mapping[tuple[int, str], Committed] = {}
_NOTHING_SPENT = PriorUsage()


class _MemorySession:
    __slots__ = (
        "_calls",
        "_kept",
        "_run",
        "_schemas",
        "_spent",
        "continued",
        "execution",
        "prior",
        "restored",
    )

    restored: Mapping[tuple[int, str], Committed]

    def __init__(self, run: _Run, request: RunRequest) -> None:
        given = request.schema.snapshot(request.initial_state)
        self.continued = request.resume and run.execution > 0
        if self.continued:
            self._continue(run, request, given)
        else:
            run.execution += 1
            # What was saved by hand belongs to no execution.
            run.kept = {k: v for k, v in run.kept.items() if isinstance(k, str)} if run.kept else {}
            run.spent, run.calls, run.input = [], {}, given
            self.restored, self.prior = _NOTHING_RESTORED, _NOTHING_SPENT
        run.status = "RUNNING"
        self.execution = run.execution
        self._run, self._kept, self._spent, self._schemas = run, run.kept, run.spent, run.schemas
        self._calls = run.calls

    def _continue(self, run: _Run, request: RunRequest, given: Snapshot) -> None:
        first = request.discard_from
        restored = request.accepted(
            {
                _position(key): Committed(node_id, snapshot, contract, run.calls.get(key))
                for key, (node_id, _, snapshot, contract) in reversed(list(run.entries()))
                if not isinstance(key, str)
            }
        )
        if first is None and run.input != given:
            raise PipelineChanged(
                f"run {request.run_id!r} was started with another input; give it the same one, or another run id"
            )
        if first is not None:
            for key in [k for k in run.kept if not isinstance(k, str) and _position(k)[0] >= first]:
                entry = run.kept.pop(key)
                if len(entry) != 4:  # Discarded, but paid for.
                    run.spent.append(entry)
        self.restored = restored
        rows = [*run.spent, *(entry for entry in run.kept.values() if len(entry) != 4)]
        used = [usage for row in rows if (usage := row[USAGE]) is not None]
        self.prior = PriorUsage(
            sum(usage.tokens for usage in used),
            math.fsum(usage.cost_usd for usage in used),
            sum(row[DURATION] for row in rows if not row[BRANCH]) / 1e6,
        )

    def record(
        self, row: Row, schema: Schema | None, output: BaseModel | None, call: StepCall | None = None
    ) -> None:
        if schema is None or output is None:
            self._spent.append(row)
            return
        branch = row[BRANCH]
        key = (row[POSITION], branch) if branch else row[POSITION]
        if call is not None:
            self._calls[key] = call
        kind = type(row[OUTPUT])
        if (kind is tuple or kind is bytes) and self._schemas.setdefault(row[NODE], schema) is schema:
            self._kept[key] = row
        else:  # The row's picture is for people, or its node id stands for another schema already.
            self._kept[key] = (row[NODE], schema, schema.snapshot(output), contract_of(row, schema))
            self._spent.append(row)

    def end(self, status: str, error: str | None) -> None:
        self._run.status = status


def _position(key: _Key) -> tuple[int, str]:
    return cast("tuple[int, str]", key if isinstance(key, tuple) else (key, ""))


class _Memory:
    """What the sync and the async store share. All calls are atomic: nothing here awaits."""

    def __init__(self) -> None:
        self._runs: dict[str, _Run] = {}

    def open_run(self, request: RunRequest) -> _MemorySession:
        run = self._runs.get(request.run_id)
        if run is None:
            run = self._runs[request.run_id] = _Run()
        return _MemorySession(run, request)

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
        self._runs.pop(run_id, None)


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
        raise CorruptCheckpoint(
            f"the checkpoint of node {node_id!r} in run {run_id!r} is not a {schema.__name__}: {error}; "
            "restore the schema, or run the node again"
        ) from error


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
