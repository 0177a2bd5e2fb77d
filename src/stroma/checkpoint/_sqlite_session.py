"""One execution of a run in a SQLite file: how it begins, what it keeps, and the fence around it."""

from __future__ import annotations

import hashlib
import sqlite3
import time
from collections.abc import Awaitable, Callable, Mapping
from functools import partial
from typing import Any, Final, Protocol

from pydantic import BaseModel

from stroma.checkpoint.journal import (
    Committed,
    CorruptCheckpoint,
    Fenced,
    PipelineChanged,
    PriorUsage,
    RunRequest,
    StepCall,
)
from stroma.checkpoint.manager import schema_ref
from stroma.schemas import Schema
from stroma.trace import (
    ATTEMPT,
    BRANCH,
    DURATION,
    FAILURE,
    NO_USAGE,
    NODE,
    OUTCOME,
    POSITION,
    STARTED,
    USAGE,
    Row,
    contract_of,
)

__all__ = ["PICO", "SAVED", "SqliteSession", "intact", "save", "verify"]

PICO: Final = 10**12  # Costs are kept in whole pico-dollars: sums are exact in any order.
SAVED: Final = -1  # the position of what save() keeps

_FIND_RUN: Final = """SELECT run, execution, lease_epoch, tokens, cost_pico, latency_ns FROM runs
    WHERE run_id = ?"""
_NEW_RUN: Final = """INSERT INTO runs (run_id, pipeline, execution, status, started_ms, updated_ms, tokens, cost_pico,
    latency_ns, lease_epoch) VALUES (?, '', 0, 'RUNNING', ?, ?, 0, 0, 0, 0)"""
_RESTART: Final = """UPDATE runs SET execution = ?, pipeline = ?, started_ms = ?, tokens = 0, cost_pico = 0,
    latency_ns = 0 WHERE run = ?"""
_NEW_INPUT: Final = "INSERT INTO inputs (run, execution, contract, input, sha256) VALUES (?, ?, ?, ?, ?)"
_INPUT: Final = "SELECT contract, sha256 FROM inputs WHERE run = ? AND execution = ?"
_CLAIM: Final = """UPDATE runs SET status = 'RUNNING', error = NULL, updated_ms = ?, lease_owner = ?,
    lease_epoch = lease_epoch + 1 WHERE run = ?"""
_DISCARD: Final = "DELETE FROM steps WHERE run = ? AND execution = ? AND position >= ?"
_RESTORED: Final = """SELECT position, branch, node_id, contract, output, sha256, call, given FROM steps
    WHERE run = ? AND execution = ? AND position >= 0"""
_ATTEMPT: Final = """INSERT INTO attempts (run, execution, epoch, position, started_ns, branch, attempt, node_id,
    duration_ns, outcome, failure_class, message, reason, tokens, output_tokens, cost_pico, model)
    VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT DO NOTHING"""
_STEP: Final = """INSERT OR REPLACE INTO steps (run, execution, position, branch, node_id, epoch, attempt, started_ns,
    contract, schema_ref, output, sha256, call, given) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)"""
# The fence: rows change only while this session is the last one that opened the run.
_FENCE: Final = "WHERE run = ? AND lease_epoch = ? AND lease_owner = ?"
_COUNT: Final = f"""UPDATE runs SET updated_ms = ?, tokens = tokens + ?, cost_pico = cost_pico + ?,
    latency_ns = latency_ns + ? {_FENCE}"""
_END: Final = f"UPDATE runs SET status = ?, error = ?, updated_ms = ? {_FENCE}"


class _Submit(Protocol):
    """Has an operation done in a transaction; what it returns ends after the COMMIT."""

    def __call__(self, operation: Callable[[sqlite3.Connection], None], /) -> Awaitable[None]: ...


def _find_run(db: sqlite3.Connection, run_id: str) -> Any:
    """The row of a run; made, with no execution yet, if there is none."""
    found = db.execute(_FIND_RUN, (run_id,)).fetchone()
    if found is None:
        now = _now_ms()
        db.execute(_NEW_RUN, (run_id, now, now))
        found = db.execute(_FIND_RUN, (run_id,)).fetchone()
    return found


def save(db: sqlite3.Connection, run_id: str, node_id: str, contract: str, ref: str, data: bytes) -> None:
    """Keep a state as the last one of a node, outside of any session."""
    run, execution, *_ = _find_run(db, run_id)
    sha = hashlib.sha256(data).digest()
    db.execute(
        _STEP, (run, execution, SAVED, node_id, node_id, 0, 0, 0, contract, ref, data, sha, None, None)
    )


class SqliteSession:
    """One execution of a run, held by this process until the run is opened again, here or elsewhere.

    Attributes: see :class:`stroma.checkpoint.journal.Session`.
    """

    __slots__ = ("_fence", "_path", "_run_id", "_submit", "continued", "execution", "prior", "restored")

    def __init__(
        self,
        submit: _Submit,
        path: str,
        request: RunRequest,
        data: bytes,
        contract: str,
        owner: str,
        db: sqlite3.Connection,
    ) -> None:
        """In the writer's thread, as one operation: a request that is refused changes nothing and fences nobody.

        ``data`` is the encoded input, ``contract`` the fingerprint of its schema, ``owner`` "host:process id:random".
        """
        self._submit = submit
        self._path = path
        self._run_id = run_id = request.run_id
        run, self.execution, epoch, tokens, cost, latency = _find_run(db, run_id)
        now = _now_ms()
        self.restored: Mapping[tuple[int, str], Committed] = {}
        self.prior = PriorUsage()
        self.continued = request.resume and self.execution > 0
        sha = hashlib.sha256(data).digest()
        if not self.continued:
            self.execution += 1
            # Earlier executions stay as history; nothing reads their commits any more.
            db.execute(_RESTART, (self.execution, request.pipeline, now, run))
            db.execute(_NEW_INPUT, (run, self.execution, contract, data, sha))
        else:
            if request.discard_from is not None:
                db.execute(_DISCARD, (run, self.execution, max(request.discard_from, 0)))
            elif (kept := db.execute(_INPUT, (run, self.execution)).fetchone()) is None or kept[1] != sha:
                same = kept is None or kept[0] == contract
                changed = "" if same else f" (or {request.schema.model.__name__} has changed)"
                raise PipelineChanged(
                    f"run {run_id!r} was started with another input{changed}; "
                    "give it the same one, or another run id"
                )
            self.prior = PriorUsage(tokens, cost / PICO, latency / 1e6)
            # All at once: a statement that is left half read would hold its snapshot past the transaction.
            rows = db.execute(_RESTORED, (run, self.execution)).fetchall()
            for position, branch, node_id, _, output, output_sha, *_ in rows:
                verify(output, output_sha, run_id, position, node_id, branch)
            # Refused, the operation is rolled back: neither the discarded commits nor the status are lost.
            self.restored = request.accepted(
                {
                    (row[0], row[1]): Committed(
                        row[2], row[4], row[3], None if row[6] is None else StepCall(row[6], row[7])
                    )
                    for row in rows
                }
            )
        db.execute(_CLAIM, (now, owner, run))
        self._fence = (run, epoch + 1, owner)

    def record(
        self, row: Row, schema: Schema | None, output: BaseModel | None, call: StepCall | None = None
    ) -> Awaitable[None]:
        """Keep one attempt and, with ``output``, its commit: together or not at all.

        Raises NotSerialisable at once; awaited: Fenced, or another StoreError. Repeating the call after an error is
        safe: an attempt that was kept all the same is not counted twice.
        """
        if output is None or schema is None:
            return self._submit(partial(self._keep, row, None, None))
        kept = (contract_of(row, schema), schema_ref(schema.model), schema.encode(output))
        return self._submit(partial(self._keep, row, kept, call))

    def _keep(
        self, row: Row, kept: tuple[str, str, bytes] | None, call: StepCall | None, db: sqlite3.Connection
    ) -> None:
        run, epoch, _ = self._fence
        position, branch, attempt, started = row[POSITION], row[BRANCH], row[ATTEMPT], row[STARTED]
        failure, message, reason = row[FAILURE] or (None, None, None)
        usage = row[USAGE] or NO_USAGE
        tokens, cost = usage.tokens, round(usage.cost_usd * PICO)
        what = (run, self.execution, epoch, position, started, branch, attempt, row[NODE])
        how = (
            row[DURATION],
            row[OUTCOME],
            failure and failure.value,
            _text(message),
            _text(reason),
        )
        used = (tokens, usage.output_tokens, cost, _text(usage.model))
        new = db.execute(_ATTEMPT, what + how + used).rowcount
        if not new:
            return  # Kept by an earlier call whose acknowledgement was lost; so were its output and its totals.
        # What a group took is its own wall time; its children's is part of it.
        latency = 0 if branch else row[DURATION]
        self._check(db, db.execute(_COUNT, (_now_ms(), tokens, cost, latency, *self._fence)).rowcount)
        if kept is not None:
            sha = hashlib.sha256(kept[2]).digest()
            step = (run, self.execution, position, branch, row[NODE], epoch, attempt, started)
            db.execute(_STEP, (*step, *kept, sha, *(call or (None, None))))

    def end(self, status: str, error: str | None) -> Awaitable[None]:
        """Note how the run stopped. Awaited: raises Fenced, or another StoreError."""
        return self._submit(partial(self._finish, status, error))

    def _finish(self, status: str, error: str | None, db: sqlite3.Connection) -> None:
        self._check(db, db.execute(_END, (str(status), _text(error), _now_ms(), *self._fence)).rowcount)

    def _check(self, db: sqlite3.Connection, changed: int) -> None:
        if changed == 1:
            return
        found = db.execute("SELECT lease_owner FROM runs WHERE run_id = ?", (self._run_id,)).fetchone()
        if found is None or found[0] is None:
            what = f"run {self._run_id!r} is no longer in {self._path}: it was deleted"
        else:
            host, pid, _ = str(found[0]).rsplit(":", 2)
            what = f"run {self._run_id!r} was opened again meanwhile, by process {pid} on {host}"
        raise Fenced(f"{what}; nothing more of this execution is kept, see what the other one makes of it")


def _now_ms() -> int:
    return time.time_ns() // 1_000_000


def _text(value: str | None) -> str | None:
    """Text that SQLite can keep: an exception's message may hold a lone surrogate."""
    if value is None or value.isascii():
        return value
    return value.encode("utf-8", "backslashreplace").decode()


def verify(data: Any, sha: bytes, run_id: str, position: int, node_id: str, branch: str = "") -> None:
    """Raise CorruptCheckpoint, with the way out, if an output is not what was committed."""
    if intact(data, sha):
        return
    if position == SAVED:
        raise CorruptCheckpoint(
            f"the saved state of node {node_id!r} in run {run_id!r} is damaged; save it again"
        )
    # Children of groups are no targets of a resume.
    target = f"that node (resume_from={node_id!r})" if not branch else "the group around it (resume_from=)"
    raise CorruptCheckpoint(
        f"the output of node {node_id!r} at position {position} of run {run_id!r} is damaged; resume from {target} "
        "to make it anew"
    )


def intact(data: Any, sha: bytes) -> bool:
    """Whether data has its checksum. SQLite promises no type: in a file from elsewhere it may be anything."""
    return isinstance(data, bytes) and hashlib.sha256(data).digest() == sha
