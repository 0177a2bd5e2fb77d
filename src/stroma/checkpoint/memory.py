"""Stores that live and die with the process."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import cast

from pydantic import BaseModel

from stroma.checkpoint.journal import Committed, CorruptCheckpoint, PipelineChanged, PriorUsage, RunRequest
from stroma.contracts import check_id
from stroma.schemas import Schema, Snapshot, schema_of
from stroma.trace import BRANCH, DURATION, NODE, OUTPUT, POSITION, USAGE, Row

__all__ = ["AsyncInMemoryStore", "InMemoryStore"]

_Key = int | str | tuple[int, str]


@dataclass(slots=True)
class _Run:
    """One run. ``kept`` holds (node id, schema, snapshot) by position, by (position, branch), or, for what the simple
    calls saved, by node id; the newest last."""

    execution: int = 0
    input: Snapshot | None = None
    kept: dict[_Key, tuple[str, Schema, Snapshot]] = field(default_factory=dict)
    spent: list[Row] = field(default_factory=list)
    status: str = "RUNNING"


_NOTHING_RESTORED: Mapping[tuple[int, str], Committed] = {}
_NOTHING_SPENT = PriorUsage()


class _MemorySession:
    __slots__ = ("_kept", "_run", "_spent", "continued", "execution", "prior", "restored")

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
            run.spent, run.input = [], given
            self.restored, self.prior = _NOTHING_RESTORED, _NOTHING_SPENT
        run.status = "RUNNING"
        self.execution = run.execution
        self._run, self._kept, self._spent = run, run.kept, run.spent

    def _continue(self, run: _Run, request: RunRequest, given: Snapshot) -> None:
        first = request.discard_from
        if first is not None:
            run.kept = {k: v for k, v in run.kept.items() if isinstance(k, str) or _position(k)[0] < first}
        elif run.input != given:
            raise PipelineChanged(
                f"run {request.run_id!r} was started with another input; give it the same one, or another run id"
            )
        self.restored = {
            _position(key): Committed(node_id, snapshot, schema.fingerprint)
            for key, (node_id, schema, snapshot) in run.kept.items()
            if not isinstance(key, str)
        }
        used = [usage for row in run.spent if (usage := row[USAGE]) is not None]
        self.prior = PriorUsage(
            sum(usage.tokens for usage in used),
            math.fsum(usage.cost_usd for usage in used),
            sum(row[DURATION] for row in run.spent if not row[BRANCH]) / 1e6,
        )

    def record(self, row: Row, schema: Schema | None, output: BaseModel | None) -> None:
        self._spent.append(row)
        if schema is not None and output is not None:
            branch = row[BRANCH]
            snapshot = row[OUTPUT]
            if type(snapshot) is dict or snapshot is None:  # The row holds the dict of another view.
                snapshot = schema.snapshot(output)
            self._kept[(row[POSITION], branch) if branch else row[POSITION]] = (row[NODE], schema, snapshot)

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
        run.kept[node_id] = (node_id, schema, schema.snapshot(state))

    def _load(self, run_id: str, node_id: str) -> BaseModel | None:
        run = self._runs.get(run_id)
        if run is not None:
            for node, schema, snapshot in reversed(run.kept.values()):
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
            f"the checkpoint of node {node_id!r} in run {run_id!r} is not a {schema.__name__}: {error}"
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
