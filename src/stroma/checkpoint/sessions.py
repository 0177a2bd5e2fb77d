"""The session between the engine and a store, which records nothing, or only the last state of each node."""

from __future__ import annotations

import inspect
from asyncio import Future
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, Final, Protocol

from pydantic import BaseModel

from stroma.checkpoint.cells import Change
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
from stroma.contracts.schema import Schema
from stroma.trace.events import AttemptRow


class Charge(Protocol):
    """Changes of cells that a session makes in the transaction that records an attempt."""

    def changes(self, tokens: int, cost_pico: int, *, committed: bool) -> list[tuple[str, Change[Any]]]:
        """Return (cell, change) of each cell, in the order in which they are to be locked.

        ``committed``: the attempt has an output. The changes are idempotent.
        """
        ...

    def settled(self, answers: list[Any]) -> None:
        """Receive the answers of the changes, in their order, in the event loop after they are stored."""


class Session:
    """One execution of a run, held by this process. Here nothing is recorded: stores override the methods.

    Attributes:
        address: identifies the store among all stores: cells of a store with this address change in the
            transactions of the session's commits. "" without such transactions.
        stores_inputs: it stores the inputs of calls (``StepCall.given``), so that they must be encoded.
        stores_secrets: it encrypts what it stores.
        epoch: incremented by each session that opens the run; 0 if that is not recorded.
        charges: what to settle when the attempt in progress at a (position, branch) is recorded; removed by
            the code that added it. Not read if ``address`` is "".
        execution: 1 for the first execution of the run id, 2 after a restart, and so on.
        continued: the session continues an execution that an earlier call started.
        restored: the committed outputs by (position, branch).
        places: the position of each step of plain code with a recorded attempt, by its identity.
        finished: the end of an execution that is returned unchanged, or that must end before a node is
            called; otherwise None.
        waiting: approvals that its nodes wait for, or waited for, by (position, branch).
        notes: what :meth:`note` stored in this execution before, by key.
        lost_start_ms: start of the execution, in ms since the epoch, if its last process recorded no end;
            else None.
        lost_times: start of the first and end of the last attempt that such a process recorded, in ns since
            the epoch, by (position, branch); {} if it recorded no trace context.
        attribution: ids of what the run belongs to, by "conversation", "user", "session" and "trace": those
            that were noted before, in a fork those of its origin. "session": the first of the runs that were
            forked from each other. "trace": the W3C trace context of the last process that began a trace.
        undelivered: attempts of earlier processes whose end hooks may not have been called, the oldest first;
            without states. Always empty if all attempts are of this process.
        tried: failed attempts without a later commit, by (position, branch), if the previous process died.
        control: the requests that hold when it is opened.
        version: that of the pipeline when the execution began; "" without a version.
        on_control: called, from any thread, with all requests that hold, before a new one is acknowledged.
    """

    address: str = ""
    stores_inputs: bool = False
    stores_secrets: bool = False
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
    lost_start_ms: int | None = None
    lost_times: Mapping[tuple[int, str], tuple[int, int]] = {}
    attribution: Mapping[str, str] = {}  # Nothing is put there.
    undelivered: Sequence[AttemptRow] = ()
    control: RunControl = NO_CONTROL
    version: str = ""
    on_control: Callable[[RunControl], None] | None = None

    @property
    def traceparent(self) -> str | None:
        """The trace context of the process before in this execution; None in the first one."""
        return self.attribution.get("trace")

    def record(
        self, row: AttemptRow, schema: Schema | None, output: BaseModel | None, call: StepCall | None = None
    ) -> Awaitable[None] | None:
        """Store one attempt and, with ``output``, its commit: both or nothing.

        Returns None if it is done, otherwise an awaitable. The engine always awaits it to its end, even if
        the run is cancelled: it must end by itself. Raises NotSerialisable at once for an output without a
        stored form.
        """

    def with_references(self, row: AttemptRow) -> AttemptRow:
        """Return a row for the trace, with references in place of states that the store holds in blobs."""
        return row

    def committed(
        self, position: int, branches: Sequence[str]
    ) -> Mapping[str, Committed] | Awaitable[Mapping[str, Committed]]:
        """Return the commits in some branches of a position, also of this process. Raises StoreError."""
        return {}

    def suspend(self, row: AttemptRow, waiting: Waiting) -> Awaitable[None] | None:
        """Store an attempt that waits for an answer, and its question: both or nothing. Raises StoreError."""

    def holds_lease(self) -> bool:
        """Return False if another process may have taken the run over, from any thread, without a store."""
        return True

    def delivered(self, row: AttemptRow) -> None:
        """Record, without waiting, that end hooks were called. Only called if the request has ``deliver``."""

    def note_call(self, position: int, identity: str) -> None:
        """Store an identity with each attempt that is recorded at a position, or inside it."""

    def record_failure_site(
        self, position: int, branch: str, attempt: int, started_ns: int, write: Callable[[], bytes]
    ) -> None:
        """Store where an attempt failed, with the attempt. ``write``: see :func:`failure_site_writer`."""

    def record_rejected(self, position: int, branch: str, started_ns: int, data: bytes) -> None:
        """Store an output that broke its contract, with the attempt; see :class:`RejectedOutput`."""

    def note_attribution(self, ids: Mapping[str, str]) -> Future[None] | None:
        """Store, without waiting, ids of what this execution belongs to, for processes that resume it.

        Return an awaitable that ends once they are stored, or cannot be; None if there is nothing to wait
        for.
        """

    def append_events(self, last: int, lines: bytes) -> Awaitable[None] | None:
        """Store a batch of events up to a number of the session. Not refused if it is fenced off.

        Raises StoreError, at once or awaited; None: it is done. It is stored before an end that is recorded
        later.
        """
        raise StoreError(
            "this store has no journal, so it stores no events; use a journal store such as SQLiteStore"
        )

    def note(self, key: str, data: bytes | None) -> None:
        """Store data of the driver under a key, "position:..."; None deletes it.

        It is stored with the next recorded attempt, question or end of the run, or by :meth:`flush`.
        Discarding a position discards its notes, except those of effects (:func:`effect_note`).
        """

    def mark_effect(self, node_id: str) -> None:
        """Store with the next note that the run has called an effect of this node, in any execution."""

    def flush(self) -> Awaitable[None] | None:
        """Store the notes now. Awaited: raises Fenced, or another StoreError."""

    def ask(self, waiting: Waiting) -> Waiting | Awaitable[Waiting]:
        """Store a question of no node, or how it ended, together with the notes. Raises StoreError.

        Returns what is stored then: an accepted answer to the same question stays.
        """
        raise StoreError(
            f"this store has no journal, so a flow cannot wait for a {waiting.node_id}; use a journal "
            "store such as SQLiteStore"
        )

    def answers(self) -> Mapping[tuple[int, str], Waiting] | Awaitable[Mapping[tuple[int, str], Waiting]]:
        """Return the present value of ``waiting``. Raises StoreError."""
        return self.waiting

    def messages(self, after: int) -> list[SentMessage] | Awaitable[list[SentMessage]]:
        """Return the messages to the run after a number, in their order. Raises StoreError.

        A run that stops as SUSPENDED is due at once if there is a message that this has not returned, once it
        was called.
        """
        raise StoreError(
            "this store has no journal, so a flow cannot receive messages; use a journal store such as "
            "SQLiteStore"
        )

    def end(
        self, status: str, error: str | None, wake_ms: int | None = None, cause: str | None = None
    ) -> Awaitable[None] | None:
        """Record that the run stopped with a status (see RunStatus) and, unless it completed, an error text.

        ``wake_ms``: when a suspended run is due without an answer, in ms since the epoch. An answer makes it
        due at once, also one that was stored since the run was opened. An interrupted run is due at once.
        ``cause``: the mark of the attempt that stopped it, see AttemptRecord.
        """

    def give_back(self) -> Awaitable[None] | None:
        """Release the run, in place of :meth:`end`: it is as before. Raises StoreError."""

    def abandon(self) -> None:
        """Release the run when nothing can be awaited. Nothing is recorded."""


NULL_SESSION: Final = Session()


class SimpleSession(Session):
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
            f"{type(self._store).__name__} has no journal, so the items of a map cannot be read back; use a "
            "journal store such as SQLiteStore, or pass a field of the state as into="
        )

    def suspend(self, row: AttemptRow, waiting: Waiting) -> None:
        raise StoreError(
            f"{type(self._store).__name__} has no journal, so run {self._run_id!r} cannot wait for an "
            "approval; use a journal store such as SQLiteStore"
        )
