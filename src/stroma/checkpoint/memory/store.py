"""Stores in the memory of this process."""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable, Generator
from typing import Any, NamedTuple, TypeVar

from pydantic import BaseModel

from stroma._utils.forks import process_lock
from stroma._utils.logs import get_logger
from stroma.checkpoint.cells import Change
from stroma.checkpoint.durable.annotations import record_notes
from stroma.checkpoint.durable.conversion import to_attempt
from stroma.checkpoint.durable.operations import fence_error
from stroma.checkpoint.durable.owner import memory_owner
from stroma.checkpoint.durable.rows import Opening, Rows, RunEnd
from stroma.checkpoint.durable.run_store import RunStore, changing
from stroma.checkpoint.durable.session import DurableSession
from stroma.checkpoint.durable.states import AsyncCalls, SyncCalls
from stroma.checkpoint.entries import RunRequest, StepCall, Waiting
from stroma.checkpoint.errors import StoreError
from stroma.checkpoint.memory.rows import MemoryRows, MemoryRun
from stroma.checkpoint.payloads import Payloads, Stored, UnencodedState
from stroma.contracts.schema import Schema
from stroma.trace.events import AttemptRow

# Under which all stores in memory change, for microseconds: their runs may be shared by threads.
_lock = process_lock()


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

    def __init__(
        self, run_id: str, rows: MemoryRows, payloads: Payloads, on_suspension: Callable[[str], None]
    ) -> None:
        self.run_id, self._payloads, self._rows = run_id, payloads, rows
        self._attached, self._pending_notes, self._identities = {}, {}, {}
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

    def _submit(self, operation: Any, then: Callable[[Any], object] | None = None) -> DoneNow:
        with _lock:
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
        with _lock:
            if run.epoch != self.epoch:
                raise fence_error(self._rows, self.fence, self.run_id)
            self.completed = None
            run.log.append(row)
            if output is not None and schema is not None:
                run.commit(row, schema, output, call)
            if self._attached:
                for write in self._attached.pop((row.position, row.branch, row.started_ns), ()):
                    write(self._records(self._rows), to_attempt(row))
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

    def end(
        self, status: str, error: str | None, wake_ms: int | None = None, cause: str | None = None
    ) -> None:
        end = self._to_record(RunEnd(str(status), error, wake_ms, cause=cause))
        if end is not None:
            try:
                with _lock:
                    self._finish(end, self._rows)
            finally:
                self.ended = True
            if end.status == "SUSPENDED":
                self._on_suspension(self.run_id)


T = TypeVar("T")
logger = get_logger()


class _MemoryStore(RunStore):
    """Base class of the sync and the async store. All calls are atomic, also those of several threads."""

    #: It ends with this process.
    address = ""
    #: Nobody has asked for this store: guards delete what ended long ago, so that memory does not grow.
    is_default = False
    _has_warned = False
    _payloads = Payloads()

    def __init__(self) -> None:
        self._runs: dict[str, MemoryRun] = {}
        self._rows = MemoryRows(self._runs)

    @property
    def keeps_secrets(self) -> bool:
        return True  # Nothing leaves this process.

    def _display_name(self) -> str:
        return "this process"

    def read(self, query: Callable[[Rows], T], nothing: T) -> T:
        return query(self._rows)

    async def _read_async(self, query: Callable[[Rows], T], nothing: T) -> T:
        return query(self._rows)

    def _submit(self, operation: Callable[[Rows], Any]) -> DoneNow:
        with _lock:
            return DoneNow(operation(self._rows))

    async def change_cell(self, name: str, change: Change[T]) -> T:
        """See CellStore. Does not suspend."""
        answer: T = self._submit(changing(name, change)).value
        return answer

    def post_cell(self, name: str, change: Change[Any]) -> None:
        """See CellStore."""
        _ = self._submit(changing(name, change))

    def _notify_owner(self, run_id: str) -> None:
        run = self._runs.get(run_id)
        session = None if run is None or run.session is None else run.session()
        if session is not None:
            with _lock:
                session.read_requests(self._rows)

    def open_run(self, request: RunRequest) -> MemorySession:
        """Begin an execution of a run, or continue its last one; see DurableStore."""
        data = self._encode(request.schema, request.initial_state)
        opening = self._opening(request, data, memory_owner(os.getpid(), request.ends))
        session = MemorySession(request.run_id, self._rows, self._payloads, self.warn_of_loss)
        with _lock:
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

    def delete_now(self, run_id: str) -> None:
        """Delete a run at once; nothing happens if there is none."""
        with _lock:
            self._rows.delete(run_id)


class InMemoryStore(_MemoryStore, SyncCalls):
    """Store in the memory of this process, with sync calls. States are stored as copies."""


class AsyncInMemoryStore(_MemoryStore, AsyncCalls):
    """Store in the memory of this process, with async calls. The default of ``StromaRunner.quick``."""
