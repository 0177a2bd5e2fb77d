"""What a store must be able to do, and what the engine tells it.

Two protocols. The simple one (``save``, ``load``, ``delete``) keeps the last state of each node. A *journal* store
also knows runs: which positions are committed, what every attempt used, who is at work; it gives resume, history and
the command line.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple, Protocol, runtime_checkable

from pydantic import BaseModel

from stroma.schemas import Schema, Snapshot
from stroma.trace import Row

__all__ = [
    "AsyncCheckpointStore",
    "AttemptRecord",
    "CheckpointKey",
    "CheckpointNotFound",
    "CheckpointStore",
    "Committed",
    "CorruptCheckpoint",
    "Fenced",
    "JournalStore",
    "PipelineChanged",
    "PriorUsage",
    "RunBusy",
    "RunRecord",
    "RunRequest",
    "Session",
    "StepCall",
    "StoreError",
]


class StoreError(Exception):
    """A store could not do what was asked. Base of the errors of stores.

    ``transient``: whether trying the same again may help.

    Where: out of ``run()`` if the run cannot begin; ``result.failure`` of a PARTIAL run if a commit could not be kept.
    Cause: the file, disk or server of the store, or a store that keeps no journal where one is needed.
    Mend: do what the message says, then run with ``resume=True``; nothing committed is lost.
    """

    transient: bool = True


class CheckpointNotFound(StoreError, LookupError):
    """There is no checkpoint where one is needed to go on.

    Where: out of ``run(resume_from=...)``; reading a run from a store.
    Cause: the node before the resume point never committed in that run, or the run id is not in this store.
    Mend: resume from an earlier node, check the run id and the store, or run from the beginning.
    """


class CorruptCheckpoint(StoreError, TypeError):
    """What a store gave back is not a state of the schema it is read with.

    Where: out of ``run()`` on resume; reading a state from a store.
    Cause: a damaged store, data that something else wrote, or a schema that has changed since.
    Mend: ``resume_from=`` the node that is named makes its output anew; else restore the store or the schema.
    """


class PipelineChanged(StoreError):
    """A run cannot be resumed: the pipeline, or its input, is not what the run was recorded with.

    Where: out of ``run()`` on resume, before anything is called.
    Cause: nodes were added, removed, renamed or reordered before the resume point, an output schema has changed, or the
        input is another one.
    Mend: restore what the message names, resume before the change (``resume_from=``), or begin a new run.
    """


class RunBusy(StoreError):
    """Another process is at work on the run.

    Where: out of ``run()``, from stores that give a run one owner.
    Cause: the same run id was picked up twice.
    Mend: wait for the other process to end, or use another run id.
    """


class Fenced(StoreError):
    """Somebody else has taken the run over; this process may not write to it any more.

    Where: ``result.failure`` of a PARTIAL run.
    Cause: the same run id was opened again while this run was going on, or the run was deleted.
    Mend: look at what the other process makes of the run; give each run an id of its own.
    """

    transient = False


@runtime_checkable
class CheckpointStore(Protocol):
    """Keeps the last state of each node of each run."""

    def save(self, run_id: str, node_id: str, state: BaseModel) -> None: ...
    def load(self, run_id: str, node_id: str) -> BaseModel | None: ...
    def delete(self, run_id: str) -> None: ...


@runtime_checkable
class AsyncCheckpointStore(Protocol):
    """The same, async."""

    async def save(self, run_id: str, node_id: str, state: BaseModel) -> None: ...
    async def load(self, run_id: str, node_id: str) -> BaseModel | None: ...
    async def delete(self, run_id: str) -> None: ...


class CheckpointKey(NamedTuple):
    """What a checkpoint is filed under."""

    run_id: str
    node_id: str


class RunRequest(NamedTuple):
    """What a driver asks a journal for when a run begins.

    Attributes:
        initial_state, schema: the run's input and its Schema; a durable store encodes it.
        resume: continue the last execution, if there is one; otherwise begin a new one.
        discard_from: forget the commits from this position on (of the execution that is continued).
        accept: asked, before anything is changed, about each commit that would be restored; what it raises refuses
            the request.
    """

    run_id: str
    pipeline: str
    initial_state: BaseModel
    schema: Schema
    resume: bool = False
    discard_from: int | None = None
    accept: Callable[[int, str, Committed], None] | None = None

    def accepted(self, commits: Mapping[tuple[int, str], Committed]) -> Mapping[tuple[int, str], Committed]:
        """The commits that stay; raises what ``accept`` raises."""
        first = self.discard_from
        kept = {at: commit for at, commit in commits.items() if first is None or at[0] < first}
        if self.accept is not None:
            for (position, branch), commit in kept.items():
                self.accept(position, branch, commit)
        return kept


class StepCall(NamedTuple):
    """What a resumed run knows a step of plain code by.

    Attributes:
        number: which call of its step id it is, 0-based.
        given: its input in stored form; None if that has none, and so cannot be compared.
    """

    number: int
    given: bytes | None


@dataclass(frozen=True, slots=True)
class Committed:
    """One committed output, as it was kept.

    Attributes:
        contract: see :func:`stroma.trace.contract_of`.
        step: of a step outside of any pipeline; None for the nodes of one.
    """

    node_id: str
    output: Snapshot
    contract: str
    step: StepCall | None = None


@dataclass(frozen=True, slots=True)
class PriorUsage:
    """What earlier processes used on this execution."""

    tokens: int = 0
    cost_usd: float = 0.0
    latency_ms: float = 0.0


class Session(Protocol):
    """One execution of a run, held by this process.

    Attributes:
        execution: 1 for the first execution of the run id, 2 after a restart, and so on.
        continued: whether it goes on with an execution that an earlier call began.
        restored: the committed outputs by (position, branch).
    """

    execution: int
    continued: bool
    restored: Mapping[tuple[int, str], Committed]
    prior: PriorUsage

    def record(
        self, row: Row, schema: Schema | None, output: BaseModel | None, call: StepCall | None = None
    ) -> Awaitable[None] | None:
        """Keep one attempt and, with ``output``, its commit: together or not at all.

        Returns None if it is done, else what to await. The engine never abandons that half-way, not even when the
        run is cancelled: it must come to an end by itself. Raises NotSerialisable at once for an output that cannot
        be kept.
        """

    def end(self, status: str, error: str | None) -> Awaitable[None] | None:
        """The run has stopped with a status (see RunStatus) and, unless it completed, the reason in words."""


@runtime_checkable
class JournalStore(Protocol):
    """A store that keeps runs. Any awaitable result is awaited."""

    def open_run(self, request: RunRequest) -> Session | Awaitable[Session]: ...


@dataclass(frozen=True, slots=True)
class RunRecord:
    """A run as a store lists it.

    Attributes:
        status: "RUNNING" while it runs (or since its process died), else a RunStatus.
        started_ms, updated_ms: milliseconds since the epoch.
        tokens, cost_usd: of all attempts of the last execution.
        nodes: how many positions of it are committed, those inside groups not counted.
    """

    run_id: str
    pipeline: str
    status: str
    execution: int
    started_ms: int
    updated_ms: int
    tokens: int
    cost_usd: float
    nodes: int
    error: str | None


@dataclass(frozen=True, slots=True)
class AttemptRecord:
    """An attempt as a store lists it. ``output`` is in its stored form; None unless it was committed."""

    position: int
    branch: str
    node_id: str
    attempt: int
    started_ms: int
    duration_ms: float
    outcome: str
    failure_class: str | None
    message: str | None
    reason: str | None
    tokens: int
    output_tokens: int
    cost_usd: float
    model: str | None
    output: bytes | None
