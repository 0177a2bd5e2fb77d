"""The connection that a SQLite store writes with: what is kept of operations, and what each one is told."""

from __future__ import annotations

import os
import sqlite3
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from stroma.checkpoint import StoreError
from stroma.checkpoint.durable.integrity import checksum, input_step
from stroma.checkpoint.durable.operations import Commit
from stroma.checkpoint.durable.rows import Fence, Opening, Step
from stroma.checkpoint.durable.worker import Job
from stroma.checkpoint.records import AttemptRecord
from stroma.checkpoint.sqlite import file as sqlite_file
from stroma.checkpoint.sqlite.connection import SqliteConnection, SqliteRows
from stroma.checkpoint.sqlite.file import DatabaseFile

OWNER = "host|boot|1|2|3|token"


def error_of(code: int, text: str = "said") -> sqlite3.OperationalError:
    error = sqlite3.OperationalError(text)
    error.sqlite_errorcode = code
    return error


class Disk(sqlite3.Connection):
    """A connection that keeps what it was told, and fails where it was said to."""

    statements: list[str]
    fails: dict[str, list[Exception]]

    def execute(self, sql: str, *values: Any) -> sqlite3.Cursor:
        word = sql.split()[0] if not sql.startswith("ROLLBACK TO") else "ROLLBACK TO"
        if word in ("BEGIN", "COMMIT", "ROLLBACK", "ROLLBACK TO", "SAVEPOINT", "RELEASE"):
            self.statements.append(sql)
            if self.fails.get(word):
                raise self.fails[word].pop(0)
        return super().execute(sql, *values)


class Bench:
    """A connection at work on a file. ``said``: begins and ends of transactions; ``waiting``: the rest."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "runs.db"
        self.statements: list[str] = []
        self.fails: dict[str, list[Exception]] = {}
        self.waiting: list[Job] = []
        self.query_count = 0
        self.opened: list[Disk] = []
        self.file = DatabaseFile(str(self.path), "normal", self._connect, 0.0)
        self.connection = SqliteConnection(self.file)

    def _connect(self, uri: str) -> sqlite3.Connection:
        db: Any = sqlite3.connect(uri, uri=True, timeout=0, isolation_level=None, factory=Disk)
        db.statements, db.fails = [], {}
        self.opened.append(db)
        return db

    def apply(self, *operations: Callable[[SqliteRows], Any]) -> tuple[list[Job], Any]:
        """The jobs, as they are when the connection is done with them; and what it says of the disk."""
        if self.opened:
            self.opened[-1].statements, self.opened[-1].fails = self.statements, self.fails
        batch = [Job(operation, None) for operation in operations]

        def more() -> bool:
            self.query_count += 1
            come, self.waiting = self.waiting, []
            batch.extend(come)
            return bool(come)

        self.statements.clear()
        poisoned = self.connection.apply(batch, more)
        return batch, poisoned

    def ready(self) -> None:
        """Let it open its file, so that the next transaction is like all that follow."""
        self.apply(lambda _: None)
        self.statements.clear()
        self.query_count = 0

    def cells(self) -> list[str]:
        """What others find in the file."""
        db = sqlite3.connect(self.path)
        findings = [name for (name,) in db.execute("SELECT name FROM cells ORDER BY 1").fetchall()]
        db.close()
        return findings


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    instance = Bench(tmp_path)
    yield instance
    instance.connection.close()
    for db in instance.opened:
        db.close()


def put(name: str) -> Callable[[SqliteRows], str]:
    def operation(rows: SqliteRows) -> str:
        rows.write_cell(name, b"")
        return f"put {name}"

    return operation


def failing(error: Exception, name: str = "failing") -> Callable[[SqliteRows], None]:
    def operation(rows: SqliteRows) -> None:
        rows.write_cell(name, b"")
        raise error

    return operation


def undoing(rows: SqliteRows) -> None:
    """What makes SQLite roll back everything by itself."""
    rows.db.execute("INSERT OR ROLLBACK INTO cells VALUES ('x', 'x', x'00'), ('x', 'x', x'01')")


def outcomes_of(jobs: list[Job]) -> list[Any]:
    return [job.value if job.error is None else job.error for job in jobs]


def in_transaction(bench: Bench) -> list[str]:
    """The statements of transactions, without those of savepoints."""
    return [one for one in bench.statements if not one.endswith(" one")]


def test_operations_go_in_one_transaction(bench: Bench) -> None:
    """Those that come meanwhile, too; each is told what it gave, once all of it is on the disk."""
    bench.ready()
    bench.waiting = [Job(put("c"), None), Job(put("b"), None)]
    jobs, poisoned = bench.apply(put("a"))
    assert outcomes_of(jobs) == ["put a", "put c", "put b"]
    assert poisoned is None
    assert in_transaction(bench) == ["BEGIN IMMEDIATE", "COMMIT"]
    assert bench.cells() == ["a", "b", "c"]
    assert bench.query_count == 2
    assert not bench.opened[-1].in_transaction


def test_a_file_that_was_replaced_is_opened_anew(bench: Bench) -> None:
    """What goes in afterwards is in the new one; nothing holds the old one any more."""
    bench.apply(put("a"))
    old = bench.opened[0]
    for file in list(bench.path.parent.iterdir()):
        file.unlink()
    jobs, _ = bench.apply(put("b"))
    assert outcomes_of(jobs) == ["put b"]
    assert bench.cells() == ["b"]
    assert bench.connection.handle() is bench.opened[1]
    with pytest.raises(sqlite3.ProgrammingError, match="closed"):
        old.execute("SELECT 1")
    bench.apply(put("c"))
    assert len(bench.opened) == 2


def test_the_connection_is_closed(bench: Bench) -> None:
    """Once or more often, with or without a word of SQLite; another operation opens the file anew."""
    bench.connection.close()
    bench.apply(put("a"))
    bench.connection.close()
    assert bench.connection.handle() is None
    with pytest.raises(sqlite3.ProgrammingError, match="closed"):
        bench.opened[0].execute("SELECT 1")
    bench.connection.close()
    bench.apply(put("b"))
    assert bench.cells() == ["a", "b"]

    class Refuses:
        def execute(self, statement: str) -> None:
            raise error_of(sqlite3.SQLITE_BUSY)

        def close(self) -> None:
            raise error_of(sqlite3.SQLITE_BUSY)

    bench.connection._db = Refuses()
    bench.connection.close()
    assert bench.connection.handle() is None


def test_an_operation_that_fails_harms_no_other_one(bench: Bench) -> None:
    """It alone is undone, and told why, in words that name the store; trying it again helps no one."""
    bench.ready()
    wrong, refused = ValueError("why"), StoreError("no")
    jobs, poisoned = bench.apply(put("a"), failing(wrong, "w"), put("b"), failing(refused, "r"), put("c"))
    error = jobs[1].error
    assert outcomes_of(jobs) == ["put a", error, "put b", refused, "put c"]
    assert type(error) is StoreError
    assert str(error) == f"{bench.path} cannot store the data: ValueError: why"
    assert error.__cause__ is wrong
    assert not error.transient
    assert poisoned is None
    assert bench.cells() == ["a", "b", "c"]
    entry, undone = ["SAVEPOINT one", "RELEASE one"], ["SAVEPOINT one", "ROLLBACK TO one", "RELEASE one"]
    assert bench.statements == ["BEGIN IMMEDIATE", *entry, *undone, *entry, *undone, *entry, "COMMIT"]


def test_what_comes_after_one_that_failed_is_done(bench: Bench) -> None:
    """Nothing that has come meanwhile is done twice, and nothing is left out."""
    bench.ready()
    times: list[str] = []

    def counted(rows: SqliteRows) -> str:
        times.append("done")
        rows.write_cell(str(len(times)), b"")
        return "counted"

    bench.waiting = [Job(counted, None), Job(failing(ValueError("why")), None)]
    jobs, _ = bench.apply(put("a"))
    assert outcomes_of(jobs)[:2] == ["put a", "counted"]
    assert jobs[2].error is not None
    assert bench.cells() == ["1", "a"]


def test_an_error_that_undoes_everything(bench: Bench) -> None:
    """Then all fail, each with an exception of its own, and the next transaction goes well."""
    bench.ready()
    jobs, poisoned = bench.apply(put("a"), undoing, put("b"))
    assert [str(job.error) for job in jobs] == [f"{bench.path}: UNIQUE constraint failed: cells.cell_key"] * 3
    assert len({id(job.error) for job in jobs}) == 3
    assert all(isinstance(job.error.__cause__, sqlite3.IntegrityError) for job in jobs if job.error)
    assert poisoned is None
    assert bench.cells() == []
    jobs, _ = bench.apply(put("c"))
    assert outcomes_of(jobs) == ["put c"]
    assert bench.cells() == ["c"]


@pytest.mark.parametrize(
    ("word", "code", "why"),
    [
        ("COMMIT", sqlite3.SQLITE_FULL, "the disk is full: {} cannot grow; free some space, then resume"),
        (
            "COMMIT",
            sqlite3.SQLITE_IOERR_WRITE,
            "the disk refused a write to {}: it is full, over a quota or a size limit, or failing; free some "
            "space or replace the disk, then resume",
        ),
        (
            "BEGIN",
            sqlite3.SQLITE_BUSY,
            "database is locked: another process has held {} for 0 s; end that process (a stopped one keeps "
            "its lock), then resume",
        ),
    ],
)
def test_a_transaction_that_fails(bench: Bench, word: str, code: int, why: str) -> None:
    """All that wait are told, also those that came meanwhile; nothing is kept, and the next one goes well."""
    bench.ready()
    bench.fails[word] = [error_of(code)]
    bench.waiting = [Job(put("b"), None)]
    jobs, poisoned = bench.apply(put("a"))
    assert [str(job.error) for job in jobs] == [why.format(bench.path)] * 2
    assert len({id(job.error) for job in jobs}) == 2
    assert all(isinstance(job.error.__cause__, sqlite3.OperationalError) for job in jobs if job.error)
    assert poisoned is None
    assert bench.statements[-1] == ("ROLLBACK" if word == "COMMIT" else "BEGIN IMMEDIATE")
    assert bench.cells() == []
    jobs, _ = bench.apply(put("c"))
    assert outcomes_of(jobs) == ["put c"]
    assert len(bench.opened) == 1


def test_a_file_that_cannot_be_opened(bench: Bench, tmp_path: Path) -> None:
    """All that wait are told at once, each with an exception of its own; once it can be, all goes well."""
    bench.path = tmp_path / "none" / "runs.db"
    bench.connection = SqliteConnection(DatabaseFile(str(bench.path), "normal", bench._connect, 0.0))
    bench.waiting = [Job(put("b"), None)]
    jobs, poisoned = bench.apply(put("a"))
    errors = [str(job.error) for job in jobs]
    (text,) = set(errors)
    assert text.startswith(f"cannot open {bench.path} to write (")
    assert len({id(job.error) for job in jobs}) == 2
    assert all(isinstance(job.error, StoreError) and not job.error.transient for job in jobs)
    assert poisoned is None
    bench.path.parent.mkdir()
    jobs, _ = bench.apply(put("c"))
    assert outcomes_of(jobs) == ["put c"]


def test_a_rollback_that_fails(bench: Bench) -> None:
    """The file is opened anew then."""
    bench.ready()
    bench.fails["COMMIT"] = [error_of(sqlite3.SQLITE_FULL)]
    bench.fails["ROLLBACK"] = [error_of(sqlite3.SQLITE_FULL)]
    jobs, poisoned = bench.apply(put("a"))
    assert jobs[0].error is not None
    assert poisoned is None
    assert bench.connection.handle() is None
    jobs, _ = bench.apply(put("c"))
    assert outcomes_of(jobs) == ["put c"]
    assert len(bench.opened) == 2
    assert bench.cells() == ["c"]


@pytest.mark.parametrize(
    ("where", "text"),
    [
        ("COMMIT", ["BEGIN IMMEDIATE", "COMMIT"]),
        ("BEGIN", ["BEGIN IMMEDIATE"]),
        ("SAVEPOINT", ["BEGIN IMMEDIATE"]),
        ("an operation", ["BEGIN IMMEDIATE"]),
    ],
)
def test_a_disk_that_fails_is_not_written_to_any_more(bench: Bench, where: str, text: list[str]) -> None:
    """A disk fault is raised by all that was under way and comes later; the connection is left alone."""
    bench.ready()
    fault = error_of(sqlite3.SQLITE_IOERR_FSYNC)
    operations = [put("a"), put("b")]
    if where == "an operation":
        operations.append(failing(fault))
    else:
        bench.fails[where] = [fault]
    bench.waiting = [Job(put("c"), None)]
    jobs, poisoned = bench.apply(*operations)
    why = (
        f"the disk of {bench.path} failed (said): acknowledged commits are stored, no more are written; "
        "check the disk, then resume in a new process"
    )
    assert len(jobs) == len(operations) + 1
    assert [str(job.error) for job in jobs] == [why] * len(jobs)
    assert len({id(job.error) for job in jobs}) == len(jobs)
    assert poisoned is not None
    again = [poisoned(), poisoned()]
    assert [str(error) for error in again] == [why] * 2
    assert again[0] is not again[1]
    assert not again[0].transient
    assert in_transaction(bench) == text
    bench.connection.close()
    assert bench.cells() == []


def attempt(number: int) -> AttemptRecord:
    return AttemptRecord(number, number, "", 1, "n", 1, "success", tokens=1, output_tokens=1, cost_pico=1)


STEP = Step("c", "m:M", b"{}", checksum(b"{}"))


@pytest.fixture
def fence(bench: Bench) -> Fence:
    opening = Opening("r", "p", OWNER, 30.0, input_step("c", b"{}"))
    jobs, _ = bench.apply(lambda rows: rows.begin(None, opening))
    fence: Fence = jobs[0].value
    return fence


def positions(bench: Bench) -> list[int]:
    db = sqlite3.connect(bench.path)
    rows = db.execute("SELECT position FROM steps WHERE position >= 0 ORDER BY id").fetchall()
    findings = [at for (at,) in rows]
    db.close()
    return findings


def test_commits_share_a_transaction(bench: Bench, fence: Fence) -> None:
    """Commits and what waits between them keep their order, in one transaction."""
    commits = [Commit("r", fence, attempt(number), STEP) for number in range(7)]
    seen: list[list[int]] = []

    def look(rows: SqliteRows) -> int:
        seen.append(sorted(one.position for one in rows.steps(fence.run, 1)))
        return len(seen)

    bench.waiting = [Job(one, None) for one in (commits[4], look, commits[5], commits[6])]
    jobs, poisoned = bench.apply(commits[0], commits[1], commits[2], look, commits[3], look)
    assert outcomes_of(jobs) == [None, None, None, 1, None, 2, None, 3, None, None]
    assert poisoned is None
    assert seen == [[0, 1, 2], [0, 1, 2, 3], [0, 1, 2, 3, 4]]
    assert positions(bench) == list(range(7))
    assert in_transaction(bench) == ["BEGIN IMMEDIATE", "COMMIT"]


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="a system that forks")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_child_makes_files_though_its_parent_was_at_it(tmp_path: Path) -> None:
    """A thread of the parent that makes a file at the moment of a fork keeps no child from making its own."""
    is_held, is_over = threading.Event(), threading.Event()

    def hold() -> None:
        with sqlite_file._creating:
            is_held.set()
            is_over.wait()

    thread = threading.Thread(target=hold)
    thread.start()
    is_held.wait()
    child = os.fork()
    if child == 0:
        os._exit(0 if sqlite_file._creating.acquire(blocking=False) else 1)
    is_free = sqlite_file._creating.acquire(blocking=False)
    is_over.set()
    thread.join()
    assert not is_free
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    DatabaseFile(str(tmp_path / "runs.db"), "full", sqlite_file.connect, 15.0).open().close()
