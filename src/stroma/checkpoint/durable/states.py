"""The simple protocol of durable stores: the last state of each node of a run."""

from __future__ import annotations

import asyncio

from pydantic import BaseModel

from stroma.checkpoint.durable.annotations import annotate
from stroma.checkpoint.durable.conversion import open_output
from stroma.checkpoint.durable.operations import Transaction
from stroma.checkpoint.durable.rows import Annotation, Rows, Step, StepRow
from stroma.checkpoint.durable.store import DurableStore
from stroma.checkpoint.errors import CorruptCheckpoint, StoreError
from stroma.checkpoint.manager import coerce, resolve_schema
from stroma.checkpoint.payloads import PayloadPlace
from stroma.contracts.codec import describe_error
from stroma.contracts.contract import check_id
from stroma.contracts.schema import Schema, schema_of


class AsyncStates(DurableStore):
    """A durable store whose ``save``, ``load`` and ``delete`` are async."""

    async def save(self, run_id: str, node_id: str, state: BaseModel) -> None:
        """Store a state as the last one of a node. Raises NotSerialisable, ValueError, StoreError."""
        check_id(run_id, "run id")
        check_id(node_id, "node id")
        schema = schema_of(type(state))
        place = PayloadPlace(run_id, 0, "output", Annotation.SAVED, node_id)
        step = await self._step(schema, self._encode(schema, state), place)
        await self._submit(
            Transaction(run_id, lambda rows: annotate(rows, run_id, Annotation.SAVED, node_id, node_id, step))
        )

    async def save_typed(self, run_id: str, node_id: str, state: BaseModel, schema: type[BaseModel]) -> None:
        """Save as an instance of ``schema``; raises TypeError("schema must be a BaseModel type")."""
        await self.save(run_id, node_id, coerce(state, schema))

    async def load(self, run_id: str, node_id: str) -> BaseModel | None:
        """Return the newest output or saved state of a node, or None.

        Its class must be in an imported module, otherwise StoreError. Use :meth:`load_typed` to avoid this
        restriction. Raises CorruptCheckpoint for a damaged state.
        """
        step = await self._newest(run_id, node_id)
        if step is None:
            return None
        where = f"the checkpoint of node {node_id!r} in run {run_id!r}"
        try:
            model = resolve_schema(step.schema_ref)
        except (LookupError, TypeError) as error:
            raise StoreError(
                f"{where} is a {step.schema_ref}: {error}; or read it with load_typed(run_id, node_id, "
                "schema)"
            ) from error
        return _decode(schema_of(model), step.output, where)

    async def load_typed(self, run_id: str, node_id: str, schema: type[BaseModel]) -> BaseModel | None:
        """Return the newest output or saved state of a node as an instance of ``schema``, or None.

        Raises CorruptCheckpoint if it is damaged or not one, TypeError("schema must be a BaseModel type").
        """
        if not (isinstance(schema, type) and issubclass(schema, BaseModel)):
            raise TypeError("schema must be a BaseModel type")
        step = await self._newest(run_id, node_id)
        if step is None:
            return None
        return _decode(
            schema_of(schema), step.output, f"the checkpoint of node {node_id!r} in run {run_id!r}"
        )

    async def delete(self, run_id: str) -> None:
        """Delete all executions and states of a run. A session that has it open is fenced off."""
        check_id(run_id, "run id")
        await self._submit(Transaction(run_id, lambda rows: rows.delete(run_id)))

    async def _newest(self, run_id: str, node_id: str) -> Step | None:
        check_id(run_id, "run id")
        check_id(node_id, "node id")

        if not self.exists():
            return None

        def query(rows: Rows) -> tuple[int, StepRow] | None:
            newest = rows.newest_output(run_id, node_id)
            if newest is not None and newest.position == Annotation.SAVED:
                return 0, newest
            run = None if newest is None else rows.find(run_id)
            return None if run is None or newest is None else (run.execution, newest)

        newest = await asyncio.to_thread(self.read, query, None)
        if newest is None:
            return None
        execution, row = newest
        output = await asyncio.to_thread(open_output, self._payloads, run_id, execution, row)
        return row.step._replace(output=output)


def _decode(schema: Schema, data: bytes, where: str) -> BaseModel:
    try:
        return schema.decode(data)
    except Exception as error:
        why, cause = describe_error(error)
        raise CorruptCheckpoint(
            f"{where} is not a {schema.model.__name__}: {why}; restore the schema, or run the node again"
        ) from cause
