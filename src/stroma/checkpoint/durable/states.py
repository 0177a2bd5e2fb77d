"""The simple protocol of journal stores: the last state of each node of a run, with async or sync calls."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from pydantic import BaseModel

from stroma.checkpoint.durable.annotations import annotate
from stroma.checkpoint.durable.conversion import open_output
from stroma.checkpoint.durable.operations import Transaction
from stroma.checkpoint.durable.rows import Annotation, Rows, StepRow
from stroma.checkpoint.durable.run_store import RunStore
from stroma.checkpoint.durable.store import DurableStore
from stroma.checkpoint.errors import CorruptCheckpoint, StoreError
from stroma.checkpoint.manager import coerce, resolve_schema
from stroma.checkpoint.payloads import PayloadPlace, UnencodedState
from stroma.contracts.codec import describe_error
from stroma.contracts.contract import check_id
from stroma.contracts.schema import schema_of

T = TypeVar("T")


class States(RunStore):
    """The states of a store. In memory, no call suspends."""

    async def _save_state(self, run_id: str, node_id: str, state: BaseModel) -> None:
        check_id(run_id, "run id")
        check_id(node_id, "node id")
        schema = schema_of(type(state))
        place = PayloadPlace(run_id, 0, "output", Annotation.SAVED, node_id)
        step = await self._step(schema, self._encode(schema, state), place)
        await self._submit(
            Transaction(
                run_id,
                lambda rows: annotate(rows, rows.key_of(run_id), Annotation.SAVED, node_id, node_id, step),
            )
        )

    async def _load_state(
        self, run_id: str, node_id: str, wanted: type[BaseModel] | None
    ) -> BaseModel | None:
        """Return the newest output or state of a node. ``wanted``: its class; None: that of its reference."""
        if wanted is not None and not (isinstance(wanted, type) and issubclass(wanted, BaseModel)):
            raise TypeError("schema must be a BaseModel type")
        check_id(run_id, "run id")
        check_id(node_id, "node id")

        def query(rows: Rows) -> tuple[int, StepRow] | None:
            newest = rows.newest_output(run_id, node_id)
            if newest is not None and newest.position == Annotation.SAVED:
                return 0, newest
            run = None if newest is None else rows.find(run_id)
            return None if run is None or newest is None else (run.execution, newest)

        newest = await self._read_async(query, None) if self.exists() else None
        if newest is None:
            return None
        execution, row = newest
        where = f"the checkpoint of node {node_id!r} in run {run_id!r}"
        state, data = row.step.output, b""
        if not isinstance(state, UnencodedState):
            data = await asyncio.to_thread(open_output, self._payloads, run_id, execution, row)
            wanted = wanted or _class_of(row.step.schema_ref, where)
        elif wanted is None:
            return state.schema.restore(state.snapshot)
        try:
            if isinstance(state, UnencodedState):
                return coerce(state.schema.restore(state.snapshot), wanted)
            return schema_of(wanted).decode(data)
        except Exception as error:
            why, cause = describe_error(error)
            raise CorruptCheckpoint(
                f"{where} is not a {wanted.__name__}: {why}; restore the schema, or run the node again"
            ) from cause

    async def _delete(self, run_id: str) -> None:
        check_id(run_id, "run id")
        await self._submit(Transaction(run_id, lambda rows: rows.delete(run_id)))


def _class_of(schema_ref: str, where: str) -> type[BaseModel]:
    """Return the class of a state. Raises StoreError if it is not in an imported module."""
    try:
        return resolve_schema(schema_ref)
    except (LookupError, TypeError) as error:
        raise StoreError(
            f"{where} is a {schema_ref}: {error}; or read it with load_typed(run_id, node_id, schema)"
        ) from error


class AsyncCalls(States):
    """A store whose ``save``, ``load`` and ``delete`` are async."""

    async def save(self, run_id: str, node_id: str, state: BaseModel) -> None:
        """Store a state as the last one of a node. Raises NotSerialisable, ValueError, StoreError."""
        await self._save_state(run_id, node_id, state)

    async def save_typed(self, run_id: str, node_id: str, state: BaseModel, schema: type[BaseModel]) -> None:
        """Save as an instance of ``schema``; raises TypeError("schema must be a BaseModel type")."""
        await self._save_state(run_id, node_id, coerce(state, schema))

    async def load(self, run_id: str, node_id: str) -> BaseModel | None:
        """Return the newest output or saved state of a node, or None.

        Its class must be in an imported module, otherwise StoreError. Use :meth:`load_typed` to avoid this
        restriction. Raises CorruptCheckpoint for a damaged state.
        """
        return await self._load_state(run_id, node_id, None)

    async def load_typed(self, run_id: str, node_id: str, schema: type[BaseModel]) -> BaseModel | None:
        """Return the newest output or saved state of a node as an instance of ``schema``, or None.

        Raises CorruptCheckpoint if it is damaged or not one, TypeError("schema must be a BaseModel type").
        """
        return await self._load_state(run_id, node_id, schema)

    async def delete(self, run_id: str) -> None:
        """Delete all executions and states of a run. A session that has it open is fenced off."""
        await self._delete(run_id)


class SyncCalls(States):
    """A store whose ``save``, ``load`` and ``delete`` are sync; see :class:`AsyncCalls`."""

    def _wait(self, call: Coroutine[Any, Any, T]) -> T:
        """Return the result of a call that does not suspend."""
        try:
            call.send(None)
        except StopIteration as done:
            result: T = done.value
            return result
        raise AssertionError("the call has suspended")

    def save(self, run_id: str, node_id: str, state: BaseModel) -> None:
        """Store a state as the last one of a node. Raises NotSerialisable, ValueError, StoreError."""
        self._wait(self._save_state(run_id, node_id, state))

    def save_typed(self, run_id: str, node_id: str, state: BaseModel, schema: type[BaseModel]) -> None:
        """Save as an instance of ``schema``; raises TypeError("schema must be a BaseModel type")."""
        self._wait(self._save_state(run_id, node_id, coerce(state, schema)))

    def load(self, run_id: str, node_id: str) -> BaseModel | None:
        """Return the newest output or saved state of a node, or None; see :meth:`AsyncCalls.load`."""
        return self._wait(self._load_state(run_id, node_id, None))

    def load_typed(self, run_id: str, node_id: str, schema: type[BaseModel]) -> BaseModel | None:
        """Load as an instance of ``schema``, or None. Raises CorruptCheckpoint if the state is not one."""
        return self._wait(self._load_state(run_id, node_id, schema))

    def delete(self, run_id: str) -> None:
        """Delete all executions and states of a run. A session that has it open is fenced off."""
        self._wait(self._delete(run_id))


class AsyncStates(DurableStore, AsyncCalls):
    """A durable store whose ``save``, ``load`` and ``delete`` are async."""
