"""Sessions that record nothing, or only the last state of each node."""

from __future__ import annotations

import inspect
from asyncio import Future
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, Final

from pydantic import BaseModel

from stroma.checkpoint.entries import (
    NO_CONTROL,
    Committed,
    Finished,
    PriorUsage,
    RunControl,
    SentMessage,
    StepCall,
    Tried,
    Waiting,
)
from stroma.checkpoint.errors import StoreError
from stroma.checkpoint.protocols import Charge
from stroma.contracts.schema import Schema
from stroma.trace.events import AttemptRow

__all__ = ["NULL_SESSION", "NullSession", "SimpleSession"]


class NullSession:
    """A session that records nothing, see :class:`stroma.checkpoint.protocols.Session`.

    Base class of the sessions that override what their store can do.
    """

    address: str = ""
    stores_inputs: bool = False
    epoch: int = 0
    charges: dict[tuple[int, str], Charge] = {}  # noqa: RUF012  # Nothing is put there without an address.
    tried: Mapping[tuple[int, str], Tried] = {}
    execution: int = 1
    continued: bool = False
    finished: Finished | None = None
    restored: Mapping[tuple[int, str], Committed] = {}
    places: Mapping[str, int] = {}
    prior: PriorUsage = PriorUsage()
    waiting: Mapping[tuple[int, str], Waiting] = {}
    notes: Mapping[str, bytes] = {}
    traceparent: str | None = None
    lost_start_ms: int | None = None
    attribution: Mapping[str, str] = {}  # Nothing is put there.
    undelivered: Sequence[AttemptRow] = ()
    control: RunControl = NO_CONTROL
    version: str = ""
    on_control: Callable[[RunControl], None] | None = None

    def record(
        self, row: AttemptRow, schema: Schema | None, output: BaseModel | None, call: StepCall | None = None
    ) -> Awaitable[None] | None:
        return None

    def with_references(self, row: AttemptRow) -> AttemptRow:
        return row

    def committed(
        self, position: int, branches: Sequence[str]
    ) -> Mapping[str, Committed] | Awaitable[Mapping[str, Committed]]:
        return {}

    def suspend(self, row: AttemptRow, waiting: Waiting) -> Awaitable[None] | None:
        return None

    def holds_lease(self) -> bool:
        return True

    def delivered(self, row: AttemptRow) -> None:
        return None

    def note_call(self, position: int, identity: str) -> None:
        return None

    def record_failure_site(
        self, position: int, branch: str, attempt: int, started_ns: int, write: Callable[[], bytes]
    ) -> None:
        return None

    def record_rejected(self, position: int, branch: str, started_ns: int, data: bytes) -> None:
        return None

    def note_traceparent(self, traceparent: str) -> Future[None] | None:
        return None

    def note_attribution(self, ids: Mapping[str, str]) -> None:
        return None

    def append_events(self, last: int, lines: bytes) -> Awaitable[None] | None:
        raise StoreError(
            "this store has no journal, so it stores no events; use a journal store such as SQLiteStore"
        )

    def note(self, key: str, data: bytes | None) -> None:
        return None

    def mark_effect(self, node_id: str) -> None:
        return None

    def flush(self) -> Awaitable[None] | None:
        return None

    def ask(self, waiting: Waiting) -> Waiting | Awaitable[Waiting]:
        raise StoreError(
            f"this store has no journal, so a flow cannot wait for a {waiting.node_id}; use a journal store such as SQLiteStore"
        )

    def answers(self) -> Mapping[tuple[int, str], Waiting] | Awaitable[Mapping[tuple[int, str], Waiting]]:
        return self.waiting

    def messages(self, after: int) -> list[SentMessage] | Awaitable[list[SentMessage]]:
        raise StoreError(
            "this store has no journal, so a flow cannot receive messages; use a journal store such as SQLiteStore"
        )

    def end(self, status: str, error: str | None, wake_ms: int | None = None) -> Awaitable[None] | None:
        return None

    def give_back(self) -> Awaitable[None] | None:
        return None

    def abandon(self) -> None:
        return None


NULL_SESSION: Final = NullSession()


class SimpleSession(NullSession):
    """A run in a store that has only the last state of each node."""

    def __init__(self, store: Any, run_id: str, version: str) -> None:
        self._store = store
        self._run_id = run_id
        self.version = version

    def record(
        self, row: AttemptRow, schema: Schema | None, output: BaseModel | None, call: StepCall | None = None
    ) -> Awaitable[None] | None:
        if output is None or schema is None:
            return None
        # A clone: the store may keep the object, and the next node may change it.
        pending = self._store.save(self._run_id, row.node_id, schema.clone(output))
        return pending if inspect.isawaitable(pending) else None

    def committed(self, position: int, branches: Sequence[str]) -> Mapping[str, Committed]:
        raise StoreError(
            f"{type(self._store).__name__} has no journal, so the items of a map cannot be read back; use a journal store "
            "such as SQLiteStore, or pass a field of the state as into="
        )

    def suspend(self, row: AttemptRow, waiting: Waiting) -> None:
        raise StoreError(
            f"{type(self._store).__name__} has no journal, so run {self._run_id!r} cannot wait for an approval; "
            "use a journal store such as SQLiteStore"
        )
