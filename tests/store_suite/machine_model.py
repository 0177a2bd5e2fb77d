"""Model of a journal store for the stateful tests: runs, executions and attempts as plain objects."""

from dataclasses import dataclass, field
from typing import Any, Final, Literal, NamedTuple

from tests.store_suite.journal import State

from stroma.checkpoint import AttemptRecord, PipelineChanged, RunBusy, RunExists, StoreError
from stroma.checkpoint.decisions import UNFINISHED
from stroma.checkpoint.records import PICO
from stroma.contracts.schema import schema_of
from stroma.trace.events import AttemptRow

SCHEMA: Final = schema_of(State)


class RecordedUsage(NamedTuple):
    """Usage of one attempt."""

    tokens: int
    cost_usd: float
    duration_ms: int


@dataclass(frozen=True)
class ModelPlace:
    """Place of an attempt in its run."""

    position: int
    branch: str = ""
    node_id: str = "a"


@dataclass(frozen=True)
class OpenArguments:
    """Arguments of one open_run() call."""

    run_id: str
    input: State
    if_exists: Any = "resume"
    if_running: Any = "error"
    pipeline: str = "p"
    #: The session takes the run: it renews a lease, and its end is recorded.
    ends: bool = True
    #: accept() rejects every commit.
    refuses: bool = False
    #: Resume without the commits from this position on.
    first_position: int | None = None


@dataclass
class ModelAttempt:
    """One attempt as the model expects it."""

    row: AttemptRow
    process: int  # number of the session that wrote it, 1-based
    output: State | None
    #: Order among all writes: later ones are newer.
    order: int
    is_discarded: bool = False


@dataclass
class ModelExecution:
    """One execution of a run as the model expects it."""

    pipeline: str
    input: State
    start_order: int
    status: str = "RUNNING"
    error: str | None = None
    attempts: list[ModelAttempt] = field(default_factory=list)
    #: Status, error and number of attempts at its completion, before it was opened again.
    completion: tuple[str, str | None, int] | None = None

    def commits(self) -> dict[tuple[int, str], ModelAttempt]:
        """Return the committed attempts by position and branch."""
        return {
            (entry.row.position, entry.row.branch): entry
            for entry in self.attempts
            if entry.output is not None and not entry.is_discarded
        }

    def usage(self) -> tuple[int, float, float]:
        """Return tokens, USD and ms. The time of children is part of the group."""
        usages = [usage for entry in self.attempts if (usage := entry.row.usage) is not None]
        top = (entry.row.function_ns for entry in self.attempts if not entry.row.branch)
        return sum(u.tokens for u in usages), sum(u.cost_usd for u in usages), sum(top) / 1e6

    def reopen(self, *, keeps_completion: bool) -> None:
        """Set the execution to running again. ``keeps_completion``: its end stays if nothing more is done."""
        self.completion = None
        if keeps_completion and self.status in ("COMPLETED", "RESUMED"):
            self.completion = self.status, self.error, len(self.attempts)
        self.status, self.error = "RUNNING", None

    def end(self, status: str, error: str | None) -> None:
        """Record an end; a completed execution that did nothing since keeps its first one."""
        before = self.completion
        if before and status in ("COMPLETED", "RESUMED") and before[2] == len(self.attempts):
            status, error = before[:2]
        self.status, self.error = status, error


@dataclass(eq=False)
class SessionHandle:
    """A session with its expected state."""

    run_id: str
    session: Any
    process: int
    #: It blocks other owners; it may still write.
    is_owner: bool
    can_write: bool = True
    #: Its store object was closed.
    is_closed: bool = False
    writes: list[tuple[AttemptRow, State | None]] = field(default_factory=list)

    def release(self) -> None:
        """Record that the session ended."""
        self.is_owner = self.can_write = False


@dataclass
class ModelRun:
    """One run as the model expects it."""

    executions: list[ModelExecution] = field(default_factory=list)
    saved: dict[str, tuple[int, State]] = field(default_factory=dict)
    open_count: int = 0
    #: The session that may write; None before the first and after a deletion.
    owner: SessionHandle | None = None

    @property
    def last(self) -> ModelExecution:
        return self.executions[-1]

    @property
    def has_owner(self) -> bool:
        return self.owner is not None and self.owner.is_owner

    def has_input(self, state: State) -> bool:
        """Return True if the run exists with this input."""
        return bool(self.executions) and self.last.input == state

    def remaining(self, opening: OpenArguments) -> dict[tuple[int, str], ModelAttempt]:
        """Return the commits that a resume keeps."""
        commits = self.last.commits() if self.executions else {}
        first = opening.first_position
        return {at: entry for at, entry in commits.items() if first is None or at[0] < first}

    def expected_opening(
        self, opening: OpenArguments
    ) -> Literal["begin", "resume", "return"] | type[StoreError]:
        """Return the action that open_run() must take, or the error that it must raise."""
        if self.has_owner and opening.if_running != "take_over":
            return RunBusy
        if self.executions and opening.if_exists == "error":
            return RunExists
        if not self.executions or opening.if_exists == "restart":
            return "begin"
        if opening.if_exists == "new":
            return RunExists if self.last.status in ("RUNNING", *UNFINISHED) else "begin"
        if (opening.first_position is None and not self.has_input(opening.input)) or (
            opening.refuses and self.remaining(opening)
        ):
            return PipelineChanged
        is_finished = opening.if_exists == "return" and self.last.status in ("COMPLETED", "RESUMED")
        is_finished |= opening.if_exists == "attach" and self.last.status != "RUNNING"
        return "return" if is_finished else "resume"


def record_of(entry: ModelAttempt) -> AttemptRecord:
    """Return the expected record of an attempt, without a discarded output."""
    attempt, output = entry.row, entry.output
    failure, message, reason, error_type = attempt.failure or (None, None, None, None)
    usage = attempt.usage
    return AttemptRecord(
        position=attempt.position,
        branch=attempt.branch,
        node_id=attempt.node_id,
        attempt=attempt.attempt,
        started_ns=attempt.started_ns,
        duration_ns=attempt.duration_ns,
        outcome=attempt.outcome,
        failure_class=None if failure is None else failure.value,
        message=message,
        reason=reason,
        tokens=usage.tokens,
        output_tokens=usage.output_tokens,
        cost_pico=round(usage.cost_usd * PICO),
        model=usage.model,
        output=None if output is None or entry.is_discarded else SCHEMA.encode(output),
        error_type=error_type,
    )
