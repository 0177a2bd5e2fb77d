"""The session of a run in the memory of this process."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Generator
from typing import Any, NamedTuple

from pydantic import BaseModel

from stroma.checkpoint.cells import memory_lock
from stroma.checkpoint.durable.annotations import record_notes, record_rejected
from stroma.checkpoint.durable.conversion import to_attempt
from stroma.checkpoint.durable.operations import fence_error
from stroma.checkpoint.durable.rows import Opening, Rows
from stroma.checkpoint.durable.session import DurableSession
from stroma.checkpoint.entries import RunRequest, StepCall, Waiting
from stroma.checkpoint.errors import StoreError
from stroma.checkpoint.memory.rows import MemoryRows, MemoryRun
from stroma.checkpoint.payloads import Payloads, Stored
from stroma.contracts.schema import Schema
from stroma.trace.events import AttemptRow

__all__ = ["DoneNow", "MemorySession"]


class DoneNow(NamedTuple):
    """The result of an operation that was performed at once. Can be awaited."""

    value: Any

    def __await__(self) -> Generator[None, None, Any]:
        yield from ()
        return self.value


class MemorySession(DurableSession):
    """The session of one execution in memory. An attempt is stored as the row of the trace."""

    stores_inputs = False
    _run: MemoryRun
    _references = None
    _failure_sites: dict[Any, Any] = {}  # noqa: RUF012  # Nothing is put there.

    def __init__(
        self, run_id: str, rows: MemoryRows, payloads: Payloads, on_suspension: Callable[[str], None]
    ) -> None:
        self.run_id, self._payloads, self._rows = run_id, payloads, rows
        self._rejected, self._pending_notes, self.waiting, self._identities = {}, {}, {}, {}
        self._on_suspension = on_suspension

    def open(self, request: RunRequest, opening: Opening, plain_input: Stored, rows: Rows) -> MemorySession:
        super().open(request, opening, plain_input, rows)
        self._run, self._ends = self.fence.run, request.ends
        self._deliver = False  # All attempts are of this process, which calls their hooks itself.
        if self.fence.owner:
            self._run.session = weakref.ref(self)
        return self

    @property
    def owns_run(self) -> bool:
        """True until it ends, if it records its end."""
        return self._ends and not self.ended

    def _submit(
        self,
        operation: Any,
        then: Callable[[Any], object] | None = None,
        in_any_case: Callable[[], object] | None = None,
    ) -> DoneNow:
        with memory_lock():
            value = operation(self._rows)
            if then is not None:
                then(value)
        return DoneNow(value)

    def _post(self, operation: Any) -> None:
        try:
            _ = self._submit(operation)
        except StoreError:
            pass  # It is fenced off.

    def _require_fence(self, rows: Rows) -> None:
        if self._run.epoch != self.epoch:
            raise fence_error(rows, self.fence, self.run_id)

    def record(
        self, row: AttemptRow, schema: Schema | None, output: BaseModel | None, call: StepCall | None = None
    ) -> None:
        run = self._run
        with memory_lock():
            if run.epoch != self.epoch:
                raise fence_error(self._rows, self.fence, self.run_id)
            self.completed = None
            if output is None or schema is None:
                run.log.append(row)
            else:
                run.commit(row, schema, output, call)
            if self._rejected:
                started_ns, data = self._rejected.pop((row.position, row.branch), (0, b""))
                if started_ns == row.started_ns:
                    record_rejected(self._records(self._rows), to_attempt(row), data)
            if self._pending_notes:
                record_notes(self._records(self._rows), self._pending_notes)
                self._pending_notes = {}

    # The engine awaits nothing that is done: no turn of the event loop passes.

    def flush(self) -> None:
        _ = super().flush()

    def suspend(self, row: AttemptRow, waiting: Waiting) -> None:  # type: ignore[override]  # pyright: ignore[reportIncompatibleMethodOverride]
        _ = super().suspend(row, waiting)

    def ask(self, waiting: Waiting) -> Waiting:  # type: ignore[override]  # pyright: ignore[reportIncompatibleMethodOverride]
        done: Any = super().ask(waiting)
        stored: Waiting = done.value
        return stored

    def holds_lease(self) -> bool:
        return True

    def note_call(self, position: int, identity: str) -> None:
        if self._run.epoch == self.epoch:
            self._run.identities[identity] = position

    def record_failure_site(
        self, position: int, branch: str, attempt: int, started_ns: int, write: Callable[[], bytes]
    ) -> None:
        """See Session. The frames are encoded when they are read."""
        if self._run.epoch == self.epoch:
            self._run.failure_sites[position, branch] = (attempt, started_ns, write)

    def abandon(self) -> None:
        self.ended = True

    def delivered(self, row: AttemptRow) -> None:
        return

    def end(self, status: str, error: str | None, wake_ms: int | None = None) -> None:
        end = self._to_record(status, error, wake_ms)
        if end is not None:
            try:
                with memory_lock():
                    self._finish(end, self._rows)
            finally:
                self.abandon()
            if end.status == "SUSPENDED":
                self._on_suspension(self.run_id)
