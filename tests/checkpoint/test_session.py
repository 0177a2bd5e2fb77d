"""Sessions of a durable store: what they know of a run, whom they refuse, and what a codec hides."""

from __future__ import annotations

import asyncio
import gc
import sqlite3
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from tests.store_suite.journal import State, begin, commit, finish, restored, row, settled

from stroma import SQLiteStore
from stroma.checkpoint import CorruptCheckpoint, Fenced, PipelineChanged, StepCall
from stroma.checkpoint.durable.annotations import annotate
from stroma.checkpoint.durable.operations import Transaction
from stroma.checkpoint.durable.owner import Owner
from stroma.checkpoint.durable.rows import Annotation, Step
from stroma.checkpoint.entries import Finished, Tried
from stroma.checkpoint.sqlite.file import FORKS
from stroma.contracts.schema import schema_of
from stroma.failures import FailureClass
from stroma.trace.events import Failed

SCHEMA = schema_of(State)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "runs.db"


@pytest.fixture
async def store(path: Path) -> AsyncIterator[SQLiteStore]:
    async with SQLiteStore(path) as store:
        yield store


def change(path: Path, statement: str, *values: Any) -> None:
    db = sqlite3.connect(path)
    with db:
        db.execute(statement, values)
    db.close()


def kill(path: Path, session: Any) -> None:
    """Leave a run as another process does that is killed."""
    owner = Owner.read(session.fence.owner)
    change(path, "UPDATE runs SET lease_owner = ?", str(owner._replace(pid=owner.pid + 1)))
    session.abandon()


async def test_a_run_whose_process_died_too_often(store: SQLiteStore, path: Path) -> None:
    """Its next session ends it as poison, and so does each one after that until one is forced."""
    error = (
        "poison: the process died 2 times under this run; see what kills it, then resume it with "
        "force_resume=True, or stroma resume --force"
    )
    request: dict[str, Any] = {"if_exists": "resume", "max_recoveries": 2, "if_running": "take_over"}
    for _ in range(2):
        session = await begin(store, **request)
        assert session.finished is None
        kill(path, session)
    poisoned = await begin(store, **request)
    assert poisoned.finished == Finished("FAILED", error)
    await finish(poisoned, "FAILED", error)
    assert (await begin(store, **request)).finished == Finished("FAILED", error)
    assert (await begin(store, **request, force=True)).finished is None


async def test_deaths_before_an_orderly_end_do_not_count(store: SQLiteStore, path: Path) -> None:
    """A run that a process has ended in order is not poison, however often others died under it before."""
    request: dict[str, Any] = {"if_exists": "resume", "max_recoveries": 3, "if_running": "take_over"}
    for _ in range(2):
        kill(path, await begin(store, **request))
    await finish(await begin(store, **request), "INTERRUPTED")
    assert (await begin(store, **request | {"max_recoveries": 2})).finished is None


async def test_what_a_process_that_died_had_tried(store: SQLiteStore, path: Path) -> None:
    """After a death a session knows how often each uncommitted node had failed, and how it failed last."""
    session = await begin(store)
    again = FailureClass.RECOVERABLE
    repaired = Failed(again, "one", "contract", "KeyError")
    for place in (
        row(0, failure=again, message="early"),
        row(1, failure=again)._replace(failure=repaired),
        row(1, attempt=2, failure=FailureClass.AMBIGUOUS, message="two"),
        row(2, "child", branch="0", failure=again, message="child"),
        row(2, "group", failure=again, message="group"),
        row(2, "child", branch="1", failure=again, message="again"),
        row(3, "inner", branch="1.0", failure=again, message="inner"),
        row(3, "other", branch="10", failure=again, message="other"),
        row(3, "group", branch="1", failure=again, message="group"),
    ):
        await settled(session.record(place, None, None))
    await commit(session, 0, State(), attempt=2)
    kill(path, session)
    tried = (await begin(store, if_exists="resume", if_running="take_over")).tried
    assert {at: one[:5] for at, one in tried.items()} == {
        (1, ""): (2, 1, "node", "AMBIGUOUS", "two"),
        (2, ""): (1, 0, "group", "RECOVERABLE", "group"),
        (2, "1"): (1, 0, "child", "RECOVERABLE", "again"),
        (3, "10"): (1, 0, "other", "RECOVERABLE", "other"),
        (3, "1"): (1, 0, "group", "RECOVERABLE", "group"),
    }
    assert isinstance(tried[1, ""], Tried)


@pytest.mark.parametrize(
    ("branch", "target"),
    [("", r"that node \(resume_from='node'\)"), ("1", r"the outermost group around it \(resume_from='g'\)")],
)
async def test_a_damaged_commit_is_named(store: SQLiteStore, path: Path, branch: str, target: str) -> None:
    """A resume, and a session that reads it, names the node, its place and the target of the next resume."""
    session = await begin(store)
    attempt = row(1, branch=branch)._replace(group="g" if branch else None)
    await settled(session.record(attempt, SCHEMA, State(n=1)))
    change(path, "UPDATE steps SET output = x'00' WHERE position >= 0")
    text = f"node 'node' at position 1 of run 'run' is damaged; resume from {target} to recompute it"
    with pytest.raises(CorruptCheckpoint, match=text):
        await session.committed(1, [branch])
    session.abandon()
    with pytest.raises(CorruptCheckpoint, match=text):
        await begin(store, if_exists="resume")


async def test_a_damaged_input_is_not_used(store: SQLiteStore, path: Path) -> None:
    """Neither a reader nor a resume gets an input that is not what was stored."""
    (await begin(store)).abandon()
    change(path, f"UPDATE steps SET output = x'7b7d' WHERE position = {Annotation.INPUT}")
    with pytest.raises(CorruptCheckpoint, match="the input of run 'run' is damaged"):
        store.input_of("run")
    with pytest.raises(CorruptCheckpoint, match="the input of run 'run' is damaged"):
        await begin(store, if_exists="resume", state=State(n=1))


async def test_a_damaged_output_is_not_forked(store: SQLiteStore, path: Path) -> None:
    """A fork that would copy a damaged output is refused and leaves nothing; one before it is made."""
    session = await begin(store)
    await commit(session, 0, State(n=1))
    await commit(session, 1, State(n=2))
    change(path, "UPDATE steps SET output = x'00' WHERE position = 1")
    with pytest.raises(CorruptCheckpoint, match="position 1 of run 'run' is damaged"):
        await store.fork("run", "fork", 2)
    assert store.get_run("fork") is None
    await store.fork("run", "fork", 1)


@pytest.mark.parametrize("data", [b"[]", b"[null]", b"{}"])
async def test_due_hooks_of_another_shape(store: SQLiteStore, data: bytes) -> None:
    """A record of due hooks with a right checksum and another shape stops the resume by name."""
    session = await begin(store, deliver=True)
    step = Step("", "", data, b"")
    await store._submit(
        Transaction(
            "run", lambda rows: annotate(rows, rows.key_of("run"), Annotation.DUE_HOOKS, "0:1:1:", "n", step)
        )
    )
    session.abandon()
    with pytest.raises(CorruptCheckpoint, match="the due hooks '0:1:1:' of run 'run' is damaged"):
        await begin(store, if_exists="resume", deliver=True)


def test_nested_use_delays_a_fork() -> None:
    """A fork waits for the end of the outermost use of SQLite by another thread."""
    forks = type(FORKS)()

    def fork() -> None:
        forks.before()
        forks.after_in_parent()

    forking = threading.Thread(target=fork)
    with forks.prevent():
        with forks.prevent():
            pass
        forking.start()
        forking.join(0.05)
        assert forking.is_alive()
    forking.join(10)
    assert not forking.is_alive()


async def test_what_nobody_awaits_may_fail(store: SQLiteStore) -> None:
    """An error of an operation that nobody awaits is dropped without a message of the event loop."""
    messages: list[Any] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: messages.append(context))
    stale = await begin(store)
    await begin(store, if_exists="resume", if_running="take_over")
    pending = stale.note_attribution({"trace": "00-a-b-01"})
    stale.delivered(row())
    await asyncio.wait([pending])
    assert isinstance(pending.exception(), Fenced)
    del pending
    gc.collect()
    assert messages == []


async def test_a_failure_site_is_of_its_attempt(store: SQLiteStore) -> None:
    """The site of an attempt that is not stored is dropped, and that of another one stays."""
    session = await begin(store)
    failed = row(1, branch="0", failure=FailureClass.AMBIGUOUS)
    for started_ns in (failed.started_ns, failed.started_ns + 1):
        session.record_failure_site(1, "0", 1, started_ns, lambda: b"[[], []]")
        attempt = failed if started_ns == failed.started_ns else row(1, branch="0")
        await settled(session.record(attempt, None, None))
    site = store.failure_site_of("run", 1, "0")
    assert site.started_ns == failed.started_ns


class Counting:
    """A codec that gives other bytes each time; ``opened``: how often it has decoded."""

    def __init__(self) -> None:
        self.sealed = self.opened = 0

    def encode(self, data: bytes) -> bytes:
        self.sealed += 1
        return b"%d|" % self.sealed + data[::-1]

    def decode(self, data: bytes) -> bytes:
        self.opened += 1
        return data.partition(b"|")[2][::-1]


async def test_a_codec_that_gives_other_bytes_each_time(path: Path) -> None:
    """An equal input is the same input; a resume decrypts an output when its node is reached."""
    codec = Counting()
    async with SQLiteStore(path, codec=codec) as store:
        session = await begin(store, state=State(n=0))
        for n, call in enumerate((StepCall(2, b"given"), StepCall(3, None), None)):
            await settled(session.record(row(n), SCHEMA, State(n=n), call))
        session.abandon()
        with pytest.raises(PipelineChanged):
            await begin(store, state=State(n=1), if_exists="resume")
        codec.opened = 0
        again = await begin(store, state=State(n=0), if_exists="resume")
        assert codec.opened == 2  # The input, and what the first step was given.
        steps = [one.step for one in again.restored.values()]
        assert steps == [StepCall(2, b"given"), StepCall(3, None), None]
        assert restored(again) == {(n, ""): State(n=n) for n in range(3)}
        assert codec.opened == 5
    async with SQLiteStore(path) as plain:
        with pytest.raises(CorruptCheckpoint, match="written through a codec; open the store with codec="):
            plain.output_of("run", 0)
