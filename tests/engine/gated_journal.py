"""A journal in memory whose commits wait until a test releases them."""

import asyncio
from collections.abc import Awaitable

from pydantic import BaseModel

from stroma import AsyncInMemoryStore
from stroma.checkpoint import RunRequest, Session, StepCall
from stroma.contracts.schema import Schema
from stroma.trace.events import AttemptRow


class GatedJournal:
    """A journal store whose commits wait for ``gate``, or fail with ``error`` if there is one."""

    def __init__(self, error: Exception | None = None) -> None:
        self.inner = AsyncInMemoryStore()
        self.save, self.load, self.delete = self.inner.save, self.inner.load, self.inner.delete
        self.error = error
        self.late: list[Exception] = []  # with which the next commits are refused once the gate is open
        self.tries = 0
        self.waiting = asyncio.Event()
        self.gate = asyncio.Event()

    def open_run(self, request: RunRequest) -> Session:
        store, session = self, self.inner.open_run(request)

        class Held(Session):
            execution, continued = session.execution, session.continued
            finished, abandon = session.finished, session.abandon
            restored, prior = session.restored, session.prior
            address, epoch, charges = session.address, session.epoch, session.charges
            places, tried, note_call = session.places, session.tried, session.note_call

            def record(
                self,
                row: AttemptRow,
                schema: Schema | None,
                output: BaseModel | None,
                call: StepCall | None = None,
            ) -> Awaitable[None] | None:
                if output is None:
                    return session.record(row, schema, output, call)
                return self.commit(row, schema, output)

            async def commit(self, row: AttemptRow, schema: Schema | None, output: BaseModel) -> None:
                store.tries += 1
                store.waiting.set()
                if store.error is not None:
                    raise store.error
                await store.gate.wait()
                if store.late:
                    raise store.late.pop()
                session.record(row, schema, output, None)

            def end(
                self, status: str, error: str | None, wake_ms: int | None = None, cause: str | None = None
            ) -> Awaitable[None] | None:
                return session.end(status, error, wake_ms, cause)

        return Held()
