"""A durable store of one run or two, for tests of its sessions: each operation is done at once, and its rows
can be looked at."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from stroma.checkpoint import RunRequest, StepCall
from stroma.checkpoint.durable.annotations import annotate, record_due_hooks, record_waiting
from stroma.checkpoint.durable.integrity import checksum, seal
from stroma.checkpoint.durable.operations import Transaction
from stroma.checkpoint.durable.owner import new_owner
from stroma.checkpoint.durable.rows import Annotation, Fence, Opening, RunRow, Step, StepRow
from stroma.checkpoint.durable.session import DurableSession
from stroma.checkpoint.entries import Committed, Waiting
from stroma.checkpoint.manager import schema_ref
from stroma.checkpoint.payloads import PayloadPlace, Payloads
from stroma.checkpoint.records import AttemptRecord
from stroma.checkpoint.sqlite import rows as _sqlite_rows
from stroma.checkpoint.sqlite.file import DatabaseFile, connect
from stroma.checkpoint.sqlite.rows import SqliteRows
from stroma.contracts.schema import schema_of
from stroma.failures import FailureClass
from stroma.trace import AttemptUsage
from stroma.trace.events import AttemptRow, Failed


class State(BaseModel):
    n: int = 0


SCHEMA = schema_of(State)
REF = schema_ref(State)
TABLES = ("runs", "inputs", "tags", "attempts", "steps")
EMPTY = Step("", "", b"", b"")


def sealed_row(position: int, branch: str, node_id: str, step: Step = EMPTY) -> StepRow:
    """Return a row with its checksum."""
    return StepRow(position, branch, node_id, seal(position, branch, node_id, step))


def stored(n: int) -> bytes:
    return b'{"n":%d}' % n


class Counting:
    """A codec that gives other bytes each time; ``opened``: how often it was asked for the way back."""

    def __init__(self) -> None:
        self.sealed = self.opened = 0

    def encode(self, data: bytes) -> bytes:
        self.sealed += 1
        return b"%d|" % self.sealed + data[::-1]

    def decode(self, data: bytes) -> bytes:
        self.opened += 1
        return data.partition(b"|")[2][::-1]


class LockedRows(SqliteRows):
    """Rows that see to it that nobody changes an execution that another one could change at the same time."""

    def __init__(self, db: Any) -> None:
        super().__init__(db)
        self.locked: set[str] = set()

    def find(self, run_id: str, *, lock: bool = False) -> RunRow | None:
        if lock:
            self.locked.add(run_id)
        return super().find(run_id, lock=lock)

    def begin(self, existing: RunRow | None, opening: Opening) -> Fence:
        assert opening.run_id in self.locked
        return super().begin(existing, opening)

    def take_over(self, existing: RunRow, opening: Opening) -> Fence:
        assert existing.run_id in self.locked
        return super().take_over(existing, opening)


class Store:
    """A store that does each operation at once, in a transaction; ``fails``: makes what it raises in place of
    that."""

    def __init__(self, path: Path) -> None:
        self.db = DatabaseFile(str(path), "normal", connect, 15.0).open()
        self.rows = LockedRows(self.db)
        self.fails: Callable[[], BaseException] | None = None
        self.operations = 0

    def submit(self, operation: Any, /) -> asyncio.Future[Any]:
        assert not isinstance(operation, Transaction) or operation.run_id  # Some stores keep each run apart.
        done = asyncio.get_running_loop().create_future()
        self.operations += 1
        try:
            if self.fails is not None:
                raise self.fails()
            done.set_result(self.do(operation))
        except asyncio.CancelledError:
            done.cancel()
        except Exception as error:
            done.set_exception(error)
        return done

    def do(self, operation: Callable[[LockedRows], Any]) -> Any:
        self.db.execute("BEGIN")
        self.rows.locked.clear()
        try:
            value = operation(self.rows)
        except BaseException:
            self.db.execute("ROLLBACK")
            raise
        self.db.execute("COMMIT")
        return value

    def open(
        self,
        run_id: str = "r",
        n: int = 0,
        *,
        payloads: Payloads | None = None,
        **request: Any,
    ) -> DurableSession:
        payloads = payloads or Payloads()
        request.setdefault("if_running", "take_over")  # Not every system says that a process has died.
        question = RunRequest(run_id, "pipeline", State(n=n), SCHEMA, **request)
        session = DurableSession(run_id, self.submit, payloads)
        sealed = payloads.seal_now(stored(n), PayloadPlace(run_id, 1, "input"))
        opening = Opening(
            run_id,
            "pipeline",
            str(new_owner(session)),
            question.lease_seconds,
            SCHEMA.fingerprint,
            sealed,
            checksum(sealed),
            question.discard_from,
            question.tags,
        )
        result: DurableSession = self.do(lambda rows: session.open(question, opening, stored(n), rows))
        return result

    def table(self, name: str) -> list[tuple[Any, ...]]:
        return self.db.execute(f"SELECT * FROM {name} ORDER BY 1, 2, 3").fetchall()

    def tables(self) -> dict[str, list[tuple[Any, ...]]]:
        return {name: self.table(name) for name in TABLES}

    def annotations(self) -> list[tuple[int, str, str]]:
        return [
            (one.position, one.branch, one.node_id)
            for place in range(-10, 0)
            for one in self.rows.annotations(1, place)
        ]

    def keep_beside(self, run_id: str = "r") -> None:
        """Something of each kind; two nodes wait, one of them has its answer."""
        for position in (Annotation.SAVED, Annotation.PARENT, Annotation.TRACE, Annotation.FAILURE_SITE):
            annotate(self.rows, run_id, position, "", f"at {position}")
        annotate(self.rows, run_id, Annotation.REQUEST, "cancel", "at -3")
        record_due_hooks(self.rows, run_id, attempt(1, 50))
        record_due_hooks(self.rows, run_id, attempt(0, 20))
        for waiting in (Waiting(0, "", "first", "why", "m:Q"), Waiting(2, "0", "second", "what", "", b"7")):
            record_waiting(self.rows, run_id, 1, waiting, Payloads())


def store_fixture() -> Any:
    """Return a fixture ``store``: a new store whose clock stands still."""

    @pytest.fixture
    def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
        monkeypatch.setattr(_sqlite_rows, "_now_ms", lambda: 1000)
        instance = Store(tmp_path / "runs.db")
        yield instance
        instance.db.close()

    return store


def row(
    position: int = 0,
    started: int = 10,
    branch: str = "",
    number: int = 1,
    *,
    node: str = "node",
    failed: Any = None,
    usage: AttemptUsage | None = AttemptUsage(5, 3, 0.25, "m"),  # noqa: B008
    group: str | None = None,
) -> AttemptRow:
    outcome: Any = "success" if failed is None else "failure"
    return AttemptRow(
        node, number, started, 7, (), None, outcome, failed, usage, position, branch, group, None, None, 7
    )


def attempt(
    position: int = 0, started: int = 10, branch: str = "", number: int = 1, **facts: Any
) -> AttemptRecord:
    """What is kept of row()."""
    inputs: dict[str, Any] = {
        "node_id": "node",
        "duration_ns": 7,
        "outcome": "success",
        "failure_class": None,
        "message": None,
        "reason": None,
        "tokens": 5,
        "output_tokens": 3,
        "cost_pico": 250_000_000_000,
        "model": "m",
        "function_ns": 7,
    }
    return AttemptRecord(position, started, branch, number, **{**inputs, **facts})


def committed(
    n: int, node: str = "node", call: StepCall | None = None, contract: str | None = None
) -> Committed:
    return Committed(node, stored(n), SCHEMA.fingerprint if contract is None else contract, call)


def lose(session: DurableSession) -> None:
    """Its process has died."""
    session.abandon()


async def begin_run(store: Store, **request: Any) -> DurableSession:
    """A run with commits at 0, 1 (a group with two children) and 2, whose process has died."""
    session = store.open(**request)
    await session.record(row(0), SCHEMA, State(n=10), StepCall(4, b"given"))
    await session.record(row(1, 20, "0", group="group"), SCHEMA, State(n=11))
    await session.record(row(1, 21, "1", group="group"), SCHEMA, State(n=12))
    await session.record(row(1, 19), SCHEMA, State(n=13))
    await session.record(
        row(2, 30, failed=Failed(FailureClass.AMBIGUOUS, "no", "why", "OSError")), None, None
    )
    await session.record(row(2, 31, number=2), SCHEMA, State(n=14))
    lose(session)
    return session


GROUPED = f"{SCHEMA.fingerprint}:group"
COMMITS = {
    (0, ""): committed(10, call=StepCall(4, b"given")),
    (1, "0"): committed(11, contract=GROUPED),
    (1, "1"): committed(12, contract=GROUPED),
    (1, ""): committed(13),
    (2, ""): committed(14),
}
