"""Rows of a SQLite store: fences, leases, deletion, annotations, changed bytes and exact costs."""

import asyncio
import os
import sqlite3
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tests.kit import Num, node, quick

from stroma import CorruptCheckpoint, SQLiteStore
from stroma.checkpoint import Fenced, RunRequest
from stroma.checkpoint.durable.integrity import checksum, input_step
from stroma.checkpoint.durable.owner import Owner, boot_id, new_owner
from stroma.checkpoint.durable.rows import Annotation, Opening, RunEnd, Step
from stroma.checkpoint.payloads import BLOB
from stroma.checkpoint.queue import ClaimRequest, RunLimits
from stroma.checkpoint.records import AttemptRecord
from stroma.checkpoint.sqlite import connection as _sqlite_rows
from stroma.checkpoint.sqlite.connection import SqliteRows
from stroma.checkpoint.sqlite.file import DatabaseFile, connect
from stroma.contracts.schema import schema_of
from stroma.cost import KNOWN_MODELS
from stroma.trace.events import AttemptRow

INPUT, OTHER = b'{"n":1}', b'{"n":2}'
OURS = str(new_owner(None))
THEIRS = str(new_owner(None)._replace(boot="another start of the machine"))


class Clock:
    """``now``: ms since the epoch; ``lease``: ms by the clock that leases go by."""

    now = 1000
    lease = 500_000


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(_sqlite_rows, "_now_ms", lambda: clock.now)
    monkeypatch.setattr(_sqlite_rows, "_clock_ms", lambda: clock.lease)
    monkeypatch.setattr(_sqlite_rows, "_BOOT", Owner.read(OURS).boot)
    return clock


@pytest.fixture
def rows(tmp_path: Path, clock: Clock) -> Iterator[SqliteRows]:
    db = DatabaseFile(str(tmp_path / "runs.db"), "normal", connect, 15.0).open()
    yield SqliteRows(db)
    db.close()


def opening(run_id: str = "r", **facts: Any) -> Opening:
    inputs: dict[str, Any] = {
        "pipeline": "p",
        "owner": OURS,
        "lease_seconds": 30.0,
        "input": input_step("c", INPUT),
        "tags": (),
    }
    return Opening(run_id, **{**inputs, **facts})


def attempt(
    position: int = 0, started: int = 10, branch: str = "", number: int = 1, **facts: Any
) -> AttemptRecord:
    inputs: dict[str, Any] = {
        "node_id": f"node {position}",
        "duration_ns": 7,
        "outcome": "success",
        "failure_class": None,
        "message": None,
        "reason": None,
        "tokens": 5,
        "output_tokens": 3,
        "cost_pico": 11,
        "model": "m",
        "function_ns": 7,
    }
    return AttemptRecord(position, started, branch, number, **{**inputs, **facts})


def step(data: bytes = b"{}", number: int | None = None, input_data: bytes | None = None) -> Step:
    return Step("contract", "module:Model", data, checksum(data), number, input_data)


def table(rows: SqliteRows, name: str, order: str = "1, 2, 3") -> list[tuple[Any, ...]]:
    """Return the rows of a table without index keys; a run is without its place in the queue, its mark, its
    parent and its tags."""
    cursor = rows.db.execute(f"SELECT * FROM {name} ORDER BY {order}")
    keys = ("run_key", "branch_key")
    shown = [at for at, (column, *_) in enumerate(cursor.description) if column not in keys]
    found = [tuple(row[at] for at in shown) for row in cursor]
    if name == "runs":
        assert {row[-13:-3] for row in found} <= {(0, None, None, None, None, "", None, None, None, None)}
        return [row[:-13] for row in found]
    return found


@pytest.mark.parametrize(
    "change", [{"run": 2}, {"epoch": 2}, {"epoch": 0}, {"owner": THEIRS}, {"acknowledged": 1}]
)
def test_the_fence(rows: SqliteRows, clock: Clock, change: dict[str, Any]) -> None:
    """Whoever has another run, epoch or owner, or more acknowledged attempts, writes and renews nothing."""
    fence = rows.begin(None, opening())
    before = table(rows, "runs")
    clock.now = clock.lease = 10**9
    other = replace(fence, **change)
    assert not rows.commit(other, attempt(), step())
    assert not rows.finish(other, RunEnd("FAILED", "why"))
    rows.renew([other])
    assert table(rows, "runs") == before
    assert len(table(rows, "steps")) == 1  # The input.


def test_the_end_gives_up_the_lease(rows: SqliteRows) -> None:
    """A run that has ended has no lease, also after a late renewal."""
    fence = rows.begin(None, opening())
    assert rows.finish(fence, RunEnd("PARTIAL", "why"))
    rows.renew([fence])
    result = rows.find("r")
    assert (result.left_seconds, result.holder) == (-1.0, None)


def test_leases_are_renewed_each_for_its_time(rows: SqliteRows, clock: Clock) -> None:
    """That is no sign of life of the run itself: when it was last written to stays."""
    fences = [
        rows.begin(None, opening("r")),
        rows.begin(None, opening("s", lease_seconds=5.0)),
        rows.begin(None, opening("t")),
    ]
    clock.now, clock.lease = 2000, 600_000
    rows.renew(fences[:2])
    ages = [(one[7], one[13]) for one in table(rows, "runs")]
    assert ages == [(1000, 630_000), (1000, 605_000), (1000, 530_000)]


@pytest.mark.parametrize(
    ("until", "left"), [(500_001, 0.001), (500_000, 0.0), (499_999, -0.001), (498_000, -2.0)]
)
def test_what_is_left_of_a_lease(rows: SqliteRows, until: int, left: float) -> None:
    """To its last millisecond it has a holder, and not any longer."""
    owner = str(Owner.read(OURS)._replace(pid=os.getpid() + 1, space=0))
    fence = rows.begin(None, opening(owner=owner))
    rows.db.execute("UPDATE runs SET lease_until_ms = ?", (until,))
    result = rows.find("r")
    assert result.left_seconds == left
    assert (result.holder is None) == (left < 0)
    assert fence.owner == owner


def test_a_lease_of_another_start_of_the_machine_has_expired(rows: SqliteRows) -> None:
    rows.begin(None, opening(owner=THEIRS))
    found = rows.find("r")
    assert (found.left_seconds, found.holder) == (-1.0, None)
    request = ClaimRequest("token", 1.0, 10, 0, {"p": RunLimits()})
    assert [one.run_id for one in rows.candidates("p", request)] == ["r"]
    assert rows.live_runs("p") == {}


@pytest.mark.skipif(
    not boot_id() or not hasattr(time, "CLOCK_BOOTTIME"),
    reason="a system with a clock that runs from its start",
)
def test_leases_go_by_the_clock_of_the_machine_since_its_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody can set that one; where the system has no boot id, they go by the time of day."""
    assert boot_id() == _sqlite_rows._BOOT
    clock = time.CLOCK_BOOTTIME
    low = time.clock_gettime_ns(clock) // 1_000_000
    now = _sqlite_rows._clock_ms()
    assert low <= now <= time.clock_gettime_ns(clock) // 1_000_000
    monkeypatch.setattr(_sqlite_rows, "_BOOT", "")
    _is_time_of_day(_sqlite_rows._clock_ms)
    monkeypatch.undo()
    monkeypatch.setattr(_sqlite_rows, "_CLOCK", None)
    _is_time_of_day(_sqlite_rows._clock_ms)


def test_runs_are_dated_by_the_time_of_day() -> None:
    _is_time_of_day(_sqlite_rows._now_ms)


def _is_time_of_day(now: Any) -> None:
    low = time.time_ns() // 1_000_000
    assert low <= now() <= time.time_ns() // 1_000_000


def test_a_run_is_deleted_from_all_tables(rows: SqliteRows) -> None:
    """Other runs stay whole; its key is never used again."""
    for run_id in ("r", "s"):
        fence = rows.begin(None, opening(run_id, tags=("t",)))
        rows.commit(fence, attempt(), step())
        rows.annotate(fence.run, Annotation.SAVED, "n", "n", step())
    rows.delete("s")
    names = ("runs", "attempts", "steps")
    numbers = [{one[0] if name != "steps" else one[1] for one in table(rows, name)} for name in names]
    assert numbers == [{1}] * 3
    assert len(table(rows, "steps")) == 3
    rows.delete("nobody")
    assert rows.begin(None, opening("s")).run == 3


def test_the_payloads_that_stand_in_blobs(rows: SqliteRows) -> None:
    """Outputs, what steps were given, and inputs: what begins with the mark of a blob, of all runs."""
    one, two, three, four = (BLOB + digit * 32 for digit in (b"1", b"2", b"3", b"4"))
    fence = rows.begin(None, opening(input=input_step("c", one)))
    rows.commit(fence, attempt(0, 1), step(two, 1, three))
    rows.commit(fence, attempt(1, 2), step(b"{}" + two, 1, b"plain"))
    fence = rows.begin(None, opening("s", input=input_step("c", BLOB[:-1])))
    rows.annotate(fence.run, Annotation.SAVED, "n", "n", step(four))
    assert sorted(rows.blobs()) == [one, two, three, four]


def test_the_positions_of_what_stands_beside_a_run_differ() -> None:
    """They are below all positions of nodes and stay so: written files keep their meaning."""
    places = {annotation.name: annotation.value for annotation in Annotation}
    assert places == {
        "SAVED": -1,
        "WAITING": -2,
        "REQUEST": -3,
        "INPUT": -4,
        "DUE_HOOKS": -6,
        "FAILURE_SITE": -7,
        "DEATHS": -8,
        "NOTE": -9,
        "CONTROL": -10,
        "REJECTED": -11,
        "ATTRIBUTION": -12,
        "EFFECT": -13,
        "MESSAGE": -14,
    }


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[SQLiteStore]:
    async with SQLiteStore(tmp_path / "runs.db") as instance:
        yield instance


@pytest.mark.core
async def test_bytes_that_changed_are_never_handed_out(store: SQLiteStore) -> None:
    """An output whose bytes still make sense, but are not those that were committed, is damaged."""

    async def func(state: Num) -> Any:
        return {"n": 1}

    await quick(store=store, run_id="r").run([node("a", func)], Num())
    with closing(sqlite3.connect(store.path)) as db, db:
        other = "CAST(replace(CAST(output AS TEXT), '1', '7') AS BLOB)"
        changed = db.execute(f"UPDATE steps SET output = {other} WHERE position = 0")
        assert changed.rowcount == 1
        assert db.execute("SELECT typeof(output) FROM steps WHERE position = 0").fetchone() == ("blob",)
    with pytest.raises(CorruptCheckpoint, match="node 'a' at position 0 of run 'r' is damaged"):
        await store.load_typed("r", "a", Num)
    with pytest.raises(CorruptCheckpoint, match="node 'a' at position 0 of run 'r' is damaged"):
        await quick(store=store, run_id="r", resume=True).run([node("a", func)], Num())


@pytest.mark.core
async def test_a_refused_operation_leaves_nothing_behind(store: SQLiteStore) -> None:
    """What a stale session wrote beside another run's commits is not there, in its own execution either."""
    request = RunRequest("stale", "pipeline", Num(), schema_of(Num))
    stale = await store.open_run(request)
    await store.open_run(request._replace(if_exists="restart", if_running="take_over"))
    good = await store.open_run(request._replace(run_id="good"))

    def row(position: int) -> AttemptRow:
        return AttemptRow(
            "a", 1, 10**18 + position, 5, (0,), (1,), "success", None, None, position, "", None, None, None, 5
        )

    pending = [(stale if i % 2 else good).record(row(i), schema_of(Num), Num(n=i), None) for i in range(6)]
    errors = await asyncio.gather(*pending, return_exceptions=True)
    assert [type(error) for error in errors] == [type(None), Fenced] * 3
    assert [a.position for a in store.attempts("good")] == [0, 2, 4]
    assert store.attempts("stale", execution=1) == store.attempts("stale") == []


@pytest.mark.core
async def test_the_smallest_costs_are_exact(store: SQLiteStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """A token may cost less than a millionth of a dollar: a run's cost in the store is still the sum."""
    monkeypatch.setitem(KNOWN_MODELS, "a-model-of-ours", (0.15, 0.6))

    async def func(state: Num) -> Any:
        return {"n": state.n + 1}, 1, 1, "a-model-of-ours"

    await quick(store=store, run_id="r").run([node("a", func)] * 10, Num())
    run = store.get_run("r")
    assert run.cost_usd == 0.000_007_5
    assert [attempt.cost_usd for attempt in store.attempts("r")] == [0.000_000_75] * 10
