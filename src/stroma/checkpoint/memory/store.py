"""Stores in the memory of this process."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from pydantic import BaseModel

from stroma._utils.logs import get_logger
from stroma.checkpoint.cells import MemoryCells, memory_lock
from stroma.checkpoint.durable.owner import memory_owner
from stroma.checkpoint.durable.rows import Annotation, Opening, Rows, Step
from stroma.checkpoint.durable.run_store import RunStore
from stroma.checkpoint.entries import RunRequest
from stroma.checkpoint.errors import CorruptCheckpoint
from stroma.checkpoint.manager import coerce, schema_ref
from stroma.checkpoint.memory.rows import MemoryRows, MemoryRun
from stroma.checkpoint.memory.session import DoneNow, MemorySession
from stroma.checkpoint.payloads import Payloads, UnencodedState
from stroma.contracts.contract import check_id
from stroma.contracts.schema import Schema, describe_error, schema_of

__all__ = ["AsyncInMemoryStore", "InMemoryStore"]

T = TypeVar("T")
logger = get_logger()


class _MemoryStore(MemoryCells, RunStore):
    """Base class of the sync and the async store. All calls are atomic, also those of several threads."""

    #: Nobody has asked for this store: guards delete what ended long ago, so that memory does not grow.
    is_default = False
    _has_warned = False
    _payloads = Payloads()

    def __init__(self) -> None:
        super().__init__()
        self._runs: dict[str, MemoryRun] = {}
        self._rows = MemoryRows(self._runs, self._cells)

    def _display_name(self) -> str:
        return "this process"

    def read(self, query: Callable[[Rows], T], nothing: T) -> T:
        return query(self._rows)

    def _submit(self, operation: Callable[[Rows], Any]) -> DoneNow:
        with memory_lock():
            return DoneNow(operation(self._rows))

    def _notify_owner(self, run_id: str) -> None:
        run = self._runs.get(run_id)
        session = None if run is None or run.session is None else run.session()
        if session is not None:
            with memory_lock():
                session.read_requests(self._rows)

    def open_run(self, request: RunRequest) -> MemorySession:
        """Begin an execution of a run, or continue its last one; see DurableStore."""
        data = self._encode(request.schema, request.initial_state)
        opening = Opening(
            run_id=request.run_id,
            pipeline=request.pipeline,
            owner=memory_owner(ends=request.ends),
            lease_seconds=request.lease_seconds,
            contract=request.schema.fingerprint,
            input=data,
            sha256=data,
            discard_from=request.discard_from,
            tags=request.tags,
            version=request.version,
        )
        session = MemorySession(request.run_id, self._rows, self._payloads, self.warn_of_loss)
        with memory_lock():
            return session.open(request, opening, data, self._rows)

    def _encode(self, schema: Schema, state: BaseModel) -> UnencodedState:
        return UnencodedState(schema, schema.snapshot(state))

    def warn_of_loss(self, run_id: str) -> None:
        """Warn of the first suspended run."""
        if not self._has_warned:
            self._has_warned = True
            logger.warning(
                "run %r is suspended in memory, and is lost when this process ends; pass a durable store, as "
                'in store="sqlite:///runs.db"',
                run_id,
                extra={"run_id": run_id},
            )

    # ---- simple protocol

    def _save(self, run_id: str, node_id: str, state: BaseModel) -> None:
        check_id(run_id, "run id")
        schema = schema_of(type(state))
        step = Step(schema.fingerprint, schema_ref(schema.model), self._encode(schema, state), b"")
        with memory_lock():
            self._rows.annotate(run_id, Annotation.SAVED, check_id(node_id, "node id"), node_id, step)

    def _load(self, run_id: str, node_id: str) -> BaseModel | None:
        newest = self._rows.newest_output(run_id, node_id)
        if newest is None:
            return None
        state: UnencodedState = newest.step.output
        return state.schema.restore(state.snapshot)

    def _load_typed(self, run_id: str, node_id: str, schema: type[BaseModel]) -> BaseModel | None:
        state = self._load(run_id, node_id)
        return None if state is None else as_schema(state, schema, run_id, node_id)

    def delete_now(self, run_id: str) -> None:
        """Delete a run at once; nothing happens if there is none."""
        with memory_lock():
            self._rows.delete(run_id)


def as_schema(state: BaseModel, schema: type[BaseModel], run_id: str, node_id: str) -> BaseModel:
    """Return a loaded state as an instance of a schema. Raises CorruptCheckpoint if it is not one."""
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


class InMemoryStore(_MemoryStore):
    """Store in the memory of this process, with sync calls. States are stored as copies."""

    def save(self, run_id: str, node_id: str, state: BaseModel) -> None:
        self._save(run_id, node_id, state)

    def load(self, run_id: str, node_id: str) -> BaseModel | None:
        return self._load(run_id, node_id)

    def save_typed(self, run_id: str, node_id: str, state: BaseModel, schema: type[BaseModel]) -> None:
        """Save as an instance of ``schema``; raises TypeError("schema must be a BaseModel type")."""
        self._save(run_id, node_id, coerce(state, schema))

    def load_typed(self, run_id: str, node_id: str, schema: type[BaseModel]) -> BaseModel | None:
        """Load as an instance of ``schema``; raises CorruptCheckpoint if the state is not one."""
        return self._load_typed(run_id, node_id, schema)

    def delete(self, run_id: str) -> None:
        self.delete_now(run_id)


class AsyncInMemoryStore(_MemoryStore):
    """Store in the memory of this process, with async calls. The default of ``StromaRunner.quick``."""

    async def save(self, run_id: str, node_id: str, state: BaseModel) -> None:
        self._save(run_id, node_id, state)

    async def load(self, run_id: str, node_id: str) -> BaseModel | None:
        return self._load(run_id, node_id)

    async def save_typed(self, run_id: str, node_id: str, state: BaseModel, schema: type[BaseModel]) -> None:
        """Save as an instance of ``schema``; raises TypeError("schema must be a BaseModel type")."""
        self._save(run_id, node_id, coerce(state, schema))

    async def load_typed(self, run_id: str, node_id: str, schema: type[BaseModel]) -> BaseModel | None:
        """Load as an instance of ``schema``; raises CorruptCheckpoint if the state is not one."""
        return self._load_typed(run_id, node_id, schema)

    async def delete(self, run_id: str) -> None:
        self.delete_now(run_id)
