"""The rows of a SQLite store: what each operation leaves in the tables, and what each look at them gives,
column by column."""

from __future__ import annotations

import os
import sqlite3
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from stroma.checkpoint.durable.integrity import checksum
from stroma.checkpoint.durable.owner import Owner, boot_id, new_owner
from stroma.checkpoint.durable.rows import (
    Annotation,
    Fence,
    Opening,
    RunEnd,
    RunExtras,
    RunRow,
    Step,
    StepRow,
)
from stroma.checkpoint.payloads import BLOB
from stroma.checkpoint.queue import ClaimRequest, RunLimits
from stroma.checkpoint.records import AttemptRecord, RunQuery, StoreFacts, Tally
from stroma.checkpoint.sql import rows as _sql_rows
from stroma.checkpoint.sql.tables import SCHEMA_VERSION
from stroma.checkpoint.sqlite import rows as _sqlite_rows
from stroma.checkpoint.sqlite.file import DatabaseFile, connect
from stroma.checkpoint.sqlite.rows import SqliteRows

INPUT, OTHER = b'{"n":1}', b'{"n":2}'
OURS = str(new_owner(None, ends=False))
THEIRS = str(new_owner(None, ends=False)._replace(boot="another start of the machine"))


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
        "contract": "c",
        "input": INPUT,
        "sha256": checksum(INPUT),
        "discard_from": None,
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


def failed(
    position: int = 0, started: int = 10, branch: str = "", number: int = 1, **facts: Any
) -> AttemptRecord:
    events = {"outcome": "failure", "failure_class": "semantic", "message": "no", "reason": "why", **facts}
    return attempt(position, started, branch, number, **events)


def step(data: bytes = b"{}", number: int | None = None, input_data: bytes | None = None) -> Step:
    return Step("contract", "module:Model", data, checksum(data), number, input_data)


def table(rows: SqliteRows, name: str, order: str = "1, 2, 3") -> list[tuple[Any, ...]]:
    """Return the rows of a table without index keys; a run is without its place in the queue and its mark,
    which no test here gives it."""
    cursor = rows.db.execute(f"SELECT * FROM {name} ORDER BY {order}")
    keys = ("run_key", "branch_key")
    shown = [at for at, (column, *_) in enumerate(cursor.description) if column not in keys]
    found = [tuple(row[at] for at in shown) for row in cursor]
    if name == "runs":
        assert {row[-10:] for row in found} <= {(0, None, None, None, None, "", None, None, None, None)}
        return [row[:-10] for row in found]
    return found


# ---------------------------------------------------------------------- executions


def test_the_first_execution_of_a_run(rows: SqliteRows) -> None:
    """It writes the run, its input and its tags, is number 1 of epoch 1, and holds a lease for as long as was
    asked."""
    assert rows.find("r") is None
    fence = rows.begin(None, opening(tags=("b", "a", "b")))
    assert fence == Fence(1, 1, 1, OURS, 30.0)
    assert table(rows, "runs") == [
        (1, "r", "p", 1, "RUNNING", None, 1000, 1000, 0, 0, 0, OURS, 1, 530_000, 0, 0, None)
    ]
    assert table(rows, "inputs") == [(1, 1, "c", INPUT, checksum(INPUT))]
    assert table(rows, "tags") == [(1, "a", 1000), (1, "b", 1000)]
    assert rows.find("r") == RunRow(
        1, "r", "p", 1, "RUNNING", None, 1000, 1000, 0, 0, 0, OURS, 1, 30.0, 0, priority=0
    )
    assert rows.find("r", lock=True) == rows.find("r")
    assert rows.input(1, 1) == ("c", INPUT, checksum(INPUT))
    assert rows.input(1, 2) is None
    assert rows.input(2, 1) is None


def test_the_next_execution_of_a_run(rows: SqliteRows, clock: Clock) -> None:
    """It counts from nothing, under its own name, input and tags; the input of the one before stays."""
    first = rows.begin(None, opening(tags=("old",)))
    rows.commit(first, attempt(), step())
    rows.finish(first, RunEnd("FAILED", "why"))
    clock.now, clock.lease = 2000, 900_000
    result = rows.find("r")
    fence = rows.begin(
        result,
        opening(
            pipeline="q",
            owner=THEIRS,
            lease_seconds=1.5,
            contract="d",
            input=OTHER,
            sha256=checksum(OTHER),
            tags=("new",),
        ),
    )
    assert fence == Fence(1, 2, 2, THEIRS, 1.5)
    assert table(rows, "runs") == [
        (1, "r", "q", 2, "RUNNING", None, 2000, 2000, 0, 0, 0, THEIRS, 2, 901_500, 0, 0, None)
    ]
    assert table(rows, "inputs") == [(1, 1, "c", INPUT, checksum(INPUT)), (1, 2, "d", OTHER, checksum(OTHER))]
    assert table(rows, "tags") == [(1, "new", 2000)]
    assert rows.steps(1, 2) == []
    assert [one.position for one in rows.steps(1, 1)] == [0]


def test_tags_go_when_an_execution_without_any_begins(rows: SqliteRows) -> None:
    rows.begin(None, opening(tags=("old",)))
    rows.begin(None, opening("another", tags=("stays",)))
    rows.begin(rows.find("r"), opening())
    assert table(rows, "tags") == [(2, "stays", 1000)]


def test_an_execution_goes_on(rows: SqliteRows, clock: Clock) -> None:
    """Its figures, start, input and commits stay, tags are added; its end is forgotten, and the epoch is
    raised."""
    first = rows.begin(None, opening(tags=("one",)))
    for position in range(4):
        rows.commit(first, attempt(position, 10 + position), step())
    rows.annotate("r", Annotation.WAITING, "3:", "node 3", step())
    rows.finish(first, RunEnd("PARTIAL", "why"))
    clock.now, clock.lease = 2000, 600_000
    result = rows.find("r")
    assert result is not None
    changed = {"pipeline": "q", "owner": THEIRS, "lease_seconds": 2.0, "contract": "d", "input": OTHER}
    fence = rows.take_over(result, opening(tags=("two", "one"), **changed))
    assert fence == Fence(1, 1, 2, THEIRS, 2.0)
    assert table(rows, "runs") == [
        (1, "r", "p", 1, "RUNNING", None, 1000, 2000, 20, 44, 28, THEIRS, 2, 602_000, 4, 4, None)
    ]
    assert table(rows, "inputs") == [(1, 1, "c", INPUT, checksum(INPUT))]
    assert table(rows, "tags") == [(1, "one", 1000), (1, "two", 1000)]
    assert [one.position for one in rows.steps(1, 1)] == [0, 1, 2, 3]
    assert [one.branch for one in rows.annotations(1, Annotation.WAITING)] == ["3:"]


@pytest.mark.parametrize(
    ("discard_from", "left"), [(None, [0, 1, 2]), (3, [0, 1, 2]), (2, [0, 1]), (1, [0]), (0, []), (-7, [])]
)
def test_an_execution_goes_on_without_the_commits_from_a_position_on(
    rows: SqliteRows, discard_from: int | None, left: list[int]
) -> None:
    """Those of other executions, and what is kept beside, stay."""
    old = rows.begin(None, opening())
    rows.commit(old, attempt(9), step())
    fence = rows.begin(rows.find("r"), opening())
    for position in range(3):
        rows.commit(fence, attempt(position, branch="0" if position == 1 else ""), step())
    rows.annotate("r", Annotation.SAVED, "n", "n", step())
    result = rows.find("r")
    assert result is not None
    assert rows.take_over(result, opening(discard_from=discard_from)).execution == 2
    assert [one.position for one in rows.steps(1, 2)] == left
    assert [one.position for one in rows.steps(1, 1)] == [9]
    assert len(rows.annotations(1, Annotation.SAVED)) == 1


# ---------------------------------------------------------------------- commits


def test_a_commit(rows: SqliteRows, clock: Clock) -> None:
    """It writes the attempt, what it used and its output, and renews the lease."""
    fence = rows.begin(None, opening())
    clock.now, clock.lease = 1700, 510_000
    tried = attempt(
        2, 99, "", 4, failure_class="semantic", message="said", reason="why", error_type="KeyError"
    )
    assert rows.commit(fence, tried, step(b"[1]", 8, b"given"))
    assert table(rows, "runs") == [
        (1, "r", "p", 1, "RUNNING", None, 1000, 1700, 5, 11, 7, OURS, 1, 540_000, 1, 1, None)
    ]
    assert table(rows, "attempts") == [
        (
            1,
            1,
            1,
            2,
            99,
            "",
            4,
            "node 2",
            7,
            "success",
            "semantic",
            "said",
            "why",
            5,
            3,
            11,
            "m",
            7,
            None,
            None,
            "KeyError",
        )
    ]
    assert table(rows, "steps") == [
        (
            1,
            1,
            1,
            2,
            "",
            "node 2",
            1,
            4,
            99,
            "contract",
            "module:Model",
            b"[1]",
            checksum(b"[1]"),
            8,
            b"given",
        )
    ]
    assert rows.find("r").nodes == 1


def test_an_attempt_without_an_output(rows: SqliteRows) -> None:
    """It is counted, and nothing is committed; inside a group its time is part of the group's."""
    fence = rows.begin(None, opening())
    assert rows.commit(fence, failed(), None)
    assert rows.commit(fence, attempt(0, 11, "1"), None)
    assert table(rows, "steps") == []
    assert [(one[8], one[9], one[10]) for one in table(rows, "runs")] == [(10, 22, 7)]


def test_an_attempt_is_kept_once(rows: SqliteRows, clock: Clock) -> None:
    """A repeated call is told that all is well, and changes nothing: neither figures nor the output nor the
    lease."""
    fence = rows.begin(None, opening())
    rows.commit(fence, attempt(), step(b"1"))
    before = [table(rows, name) for name in ("runs", "attempts", "steps")]
    clock.now = clock.lease = 10**9
    assert rows.commit(fence, attempt(tokens=500), step(b"2"))
    assert [table(rows, name) for name in ("runs", "attempts", "steps")] == before


@pytest.mark.parametrize("field", ["position", "started_ns", "branch", "attempt"])
def test_what_tells_attempts_apart(rows: SqliteRows, field: str) -> None:
    fence = rows.begin(None, opening())
    rows.commit(fence, attempt(), None)
    rows.commit(fence, replace(attempt(), **{field: "7" if field == "branch" else 7}), None)
    assert len(table(rows, "attempts")) == 2


@pytest.mark.parametrize(
    "change", [{"run": 2}, {"epoch": 2}, {"epoch": 0}, {"owner": THEIRS}, {"acknowledged": 1}]
)
def test_the_fence(rows: SqliteRows, clock: Clock, change: dict[str, Any]) -> None:
    """Whoever has another run, epoch or owner, or more acknowledged attempts than the run counts, writes
    neither figures nor an output, ends nothing and renews nothing."""
    fence = rows.begin(None, opening())
    before = table(rows, "runs")
    clock.now = clock.lease = 10**9
    other = replace(fence, **change)
    assert not rows.commit(other, attempt(), step())
    assert not rows.finish(other, RunEnd("FAILED", "why"))
    rows.renew([other])
    assert table(rows, "runs") == before
    assert table(rows, "steps") == []


def test_a_commit_at_the_same_place_takes_the_place_of_the_one_before(rows: SqliteRows) -> None:
    """It is the newest then: its id is higher than those of all others."""
    fence = rows.begin(None, opening())
    rows.commit(fence, attempt(0, 1), step(b"1"))
    rows.commit(fence, attempt(1, 2), step(b"2"))
    rows.commit(fence, attempt(0, 3), step(b"3"))
    assert [(one[0], one[3], one[11]) for one in table(rows, "steps")] == [(2, 1, b"2"), (3, 0, b"3")]


# ---------------------------------------------------------------------- leases


def test_the_end_gives_up_the_lease(rows: SqliteRows, clock: Clock) -> None:
    fence = rows.begin(None, opening())
    clock.now = 3000
    assert rows.finish(fence, RunEnd("PARTIAL", "why"))
    assert table(rows, "runs") == [
        (1, "r", "p", 1, "PARTIAL", "why", 1000, 3000, 0, 0, 0, OURS, 1, None, 0, 0, None)
    ]
    result = rows.find("r")
    assert result is not None
    assert (result.left_seconds, result.holder) == (-1.0, None)
    rows.renew([fence])
    assert table(rows, "runs")[0][13] is None  # It is not taken up again by somebody who is late.


def test_leases_are_renewed_each_for_its_time(rows: SqliteRows, clock: Clock) -> None:
    """That is no sign of life of the run itself: when it was last written to stays."""
    fences = [
        rows.begin(None, opening("r")),
        rows.begin(None, opening("s", lease_seconds=5.0)),
        rows.begin(None, opening("t")),
    ]
    clock.now, clock.lease = 2000, 600_000
    rows.renew(fences[:2])
    assert [(one[7], one[13]) for one in table(rows, "runs")] == [
        (1000, 630_000),
        (1000, 605_000),
        (1000, 530_000),
    ]


@pytest.mark.parametrize(
    ("until", "left"), [(500_001, 0.001), (500_000, 0.0), (499_999, -0.001), (498_000, -2.0)]
)
def test_what_is_left_of_a_lease(rows: SqliteRows, until: int, left: float) -> None:
    """To its last millisecond it has a holder, and not any longer."""
    owner = str(Owner.read(OURS)._replace(pid=os.getpid() + 1, space=0))
    fence = rows.begin(None, opening(owner=owner))
    rows.db.execute("UPDATE runs SET lease_until_ms = ?", (until,))
    result = rows.find("r")
    assert result is not None
    assert result.left_seconds == left
    assert (result.holder is None) == (left < 0)
    assert fence.owner == owner


def test_a_lease_of_another_start_of_the_machine_has_expired(rows: SqliteRows) -> None:
    rows.begin(None, opening(owner=THEIRS))
    found = rows.find("r")
    assert found is not None
    assert (found.left_seconds, found.holder) == (-1.0, None)
    request = ClaimRequest("token", 1.0, 10, 0, {"p": RunLimits()})
    assert [one.run_id for one in rows.candidates("p", request)] == ["r"]
    assert rows.live_runs("p") == {}


@pytest.mark.skipif(
    not boot_id() or not hasattr(time, "CLOCK_BOOTTIME"),
    reason="a system with a clock that runs from its start",
)
def test_leases_go_by_the_clock_of_the_machine_since_its_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody can set that one; where the system does not say which start it is, they go by the time of
    day."""
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


# ---------------------------------------------------------------------- what is committed


def test_the_commits_of_an_execution(rows: SqliteRows) -> None:
    """All but what is kept beside them; those that are apart are left out, which the output of a group never
    is."""
    fence = rows.begin(None, opening())
    places = [(0, ""), (1, ""), (1, "0"), (1, "1"), (1, "1.0"), (1, "10"), (2, "1"), (2, "")]
    for at, (position, branch) in enumerate(places):
        data = f"{position}:{branch}".encode()
        rows.commit(fence, attempt(position, at, branch), step(data, at, b"g"))
    rows.annotate("r", Annotation.SAVED, "n", "n", step())
    whole = rows.steps(1, 1)
    assert whole[3] == StepRow(1, "1", "node 1", step(b"1:1", 3, b"g"))
    assert sorted((one.position, one.branch) for one in whole) == sorted(places)

    def told(*apart: tuple[int, str]) -> set[tuple[int, str]]:
        return set(places) - {(one.position, one.branch) for one in rows.steps(1, 1, apart)}

    assert told((1, "")) == {(1, "0"), (1, "1"), (1, "1.0"), (1, "10")}
    assert told((1, "1.")) == {(1, "1.0")}
    assert told((1, "1")) == {(1, "1"), (1, "1.0"), (1, "10")}
    assert told((1, "0"), (2, "1")) == {(1, "0"), (2, "1")}
    assert told((3, "")) == set()


def test_some_branches_of_a_position(rows: SqliteRows) -> None:
    """However many are asked for; a build of SQLite that takes 999 values in a statement gives them, too."""
    rows.db.setlimit(sqlite3.SQLITE_LIMIT_VARIABLE_NUMBER, 999)
    fence = rows.begin(None, opening())
    there = [0, 1, 498, 499, 500, 501, 999, 1000, 1001, 1499, 1500]
    for number in there:
        rows.commit(fence, attempt(1, number, str(number)), step(str(number).encode()))
    rows.commit(fence, attempt(2, 1, "0"), step(b"elsewhere"))

    def told(branches: list[int]) -> list[int]:
        result = rows.steps_at(1, 1, 1, [str(number) for number in branches])
        assert all(one == StepRow(1, one.branch, "node 1", step(one.branch.encode())) for one in result)
        return sorted(int(one.branch) for one in result)

    assert told(list(range(1501))) == there
    assert told(list(range(1500))) == there[:-1]
    assert told(list(range(500))) == there[:4]
    assert told(list(range(501))) == there[:5]
    assert told([500]) == [500]
    assert told([]) == []
    assert rows.steps_at(1, 2, 1, ["0"]) == []
    assert rows.steps_at(2, 1, 1, ["0"]) == []


def test_the_commit_at_a_place(rows: SqliteRows) -> None:
    fence = rows.begin(None, opening())
    rows.commit(fence, attempt(1, 10, "0"), step(b"x", 2, b"y"))
    assert rows.step_at(1, 1, 1, "0") == StepRow(1, "0", "node 1", step(b"x", 2, b"y"))
    for place in ((2, 1, 1, "0"), (1, 2, 1, "0"), (1, 1, 0, "0"), (1, 1, 1, "")):
        assert rows.step_at(*place) is None


# ---------------------------------------------------------------------- beside the commits


def test_what_is_kept_beside_a_run(rows: SqliteRows) -> None:
    """It makes the run, without an execution; what is there gives way to it; it is told in the order of its
    branches."""
    rows.annotate("r", Annotation.SAVED, "b", "node", step(b"1"))
    assert table(rows, "runs") == [
        (1, "r", "", 0, "RUNNING", None, 1000, 1000, 0, 0, 0, None, 0, None, 0, 0, None)
    ]
    rows.annotate("r", Annotation.SAVED, "a", "node", step(b"2", 4, b"g"))
    rows.annotate("r", Annotation.SAVED, "b", "other", step(b"3"))
    rows.annotate("r", Annotation.TRACE, "", "trace", step(b"4"))
    rows.annotate("s", Annotation.SAVED, "a", "node", step(b"5"))
    assert table(rows, "steps", "1") == [
        (2, 1, 0, -1, "a", "node", 0, 0, 0, "contract", "module:Model", b"2", checksum(b"2"), 4, b"g"),
        (3, 1, 0, -1, "b", "other", 0, 0, 0, "contract", "module:Model", b"3", checksum(b"3"), None, None),
        (4, 1, 0, -5, "", "trace", 0, 0, 0, "contract", "module:Model", b"4", checksum(b"4"), None, None),
        (5, 2, 0, -1, "a", "node", 0, 0, 0, "contract", "module:Model", b"5", checksum(b"5"), None, None),
    ]
    assert len(table(rows, "runs")) == 2
    a, b = StepRow(-1, "a", "node", step(b"2", 4, b"g")), StepRow(-1, "b", "other", step(b"3"))
    assert rows.annotations(1, Annotation.SAVED) == [a, b]
    assert rows.annotations(1, Annotation.SAVED, branch="b") == [b]
    assert rows.annotations(1, Annotation.SAVED, branch="c") == []
    assert rows.annotations(3, Annotation.SAVED) == []
    rows.delete_annotations(1, Annotation.SAVED, branch="c")
    assert rows.annotations(1, Annotation.SAVED) == [a, b]
    rows.delete_annotations(1, Annotation.SAVED, branch="b")
    assert rows.annotations(1, Annotation.SAVED) == [a]
    rows.delete_annotations(1, Annotation.SAVED)
    assert rows.annotations(1, Annotation.SAVED) == []
    assert len(rows.annotations(1, Annotation.TRACE)) == len(rows.annotations(2, Annotation.SAVED)) == 1


def test_a_run_that_had_only_saved_states_begins(rows: SqliteRows, clock: Clock) -> None:
    """It keeps its key, and what was saved; its execution is the first one."""
    rows.annotate("r", Annotation.SAVED, "n", "n", step())
    clock.now = 2000
    assert rows.begin(rows.find("r"), opening()) == Fence(1, 1, 1, OURS, 30.0)
    assert [one[:8] for one in table(rows, "runs")] == [(1, "r", "p", 1, "RUNNING", None, 2000, 2000)]
    assert len(rows.annotations(1, Annotation.SAVED)) == 1


def test_which_runs_have_requests(rows: SqliteRows) -> None:
    """Those with a request that nobody has read, in the order in which they were asked for."""
    for run_id in ("r", "s", "t", "u"):
        rows.begin(None, opening(run_id))
    rows.annotate("s", Annotation.REQUEST, "cancel", "", step())
    rows.annotate("u", Annotation.REQUEST, "pause", "", step())
    rows.annotate("r", Annotation.CONTROL, "pause", "", step())
    rows.annotate("t", Annotation.WAITING, "", "", step())
    assert rows.with_requests([4, 1, 3, 2]) == [4, 2]
    assert rows.with_requests([1, 2]) == [2]
    assert rows.with_requests([1]) == []


def test_the_newest_of_a_node(rows: SqliteRows) -> None:
    """What the last execution committed or what was saved, whichever came later; nothing of earlier
    executions."""
    fence = rows.begin(None, opening())
    rows.commit(fence, attempt(0, 1, node_id="n"), step(b"1"))
    assert rows.newest_output("r", "n") == StepRow(0, "", "n", step(b"1"))
    rows.annotate("r", Annotation.SAVED, "n", "n", step(b"2", 1, b"g"))
    assert rows.newest_output("r", "n") == StepRow(-1, "n", "n", step(b"2", 1, b"g"))
    rows.commit(fence, attempt(1, 2, node_id="n"), step(b"3"))
    assert rows.newest_output("r", "n") == StepRow(1, "", "n", step(b"3"))
    rows.annotate("r", Annotation.WAITING, "0:", "n", step(b"4"))
    assert rows.newest_output("r", "n") == StepRow(1, "", "n", step(b"3"))
    rows.begin(rows.find("r"), opening())
    assert rows.newest_output("r", "n") == StepRow(-1, "n", "n", step(b"2", 1, b"g"))
    assert rows.newest_output("r", "m") is None
    assert rows.newest_output("s", "n") is None


def test_a_run_is_deleted_from_all_tables(rows: SqliteRows) -> None:
    """Other runs stay whole; its key is never used again."""
    for run_id in ("r", "s"):
        fence = rows.begin(None, opening(run_id, tags=("t",)))
        rows.commit(fence, attempt(), step())
        rows.annotate(run_id, Annotation.SAVED, "n", "n", step())
    rows.delete("s")
    names = ("runs", "inputs", "tags", "attempts", "steps")
    assert [{one[0] if name != "steps" else one[1] for one in table(rows, name)} for name in names] == [
        {1}
    ] * 5
    assert len(table(rows, "steps")) == 2
    rows.delete("nobody")
    assert rows.begin(None, opening("s")).run == 3


def test_cells(rows: SqliteRows, clock: Clock) -> None:
    """A cell is told with the time; it keeps what it was given last."""
    assert rows.read_cell("c") == (None, 1000)
    rows.write_cell("c", b"1")
    rows.write_cell("d", b"2")
    rows.write_cell("c", b"3")
    clock.now = 4000
    assert rows.read_cell("c") == (b"3", 4000)
    assert rows.read_cell("d", lock=True) == (b"2", 4000)
    assert rows.read_cell("e", lock=True) == (None, 4000)


# ---------------------------------------------------------------------- retention


def test_which_runs_have_expired(rows: SqliteRows, clock: Clock) -> None:
    """Those that ended for good before that moment, the oldest first; unfinished ones only if they are asked
    for."""
    ends = ["COMPLETED", "RESUMED", "FAILED", "CANCELLED", "PARTIAL", "SUSPENDED", "INTERRUPTED", None]
    for number, status in enumerate(ends):
        clock.now = 5000 - number
        fence = rows.begin(None, opening(str(status)))
        if status is not None:
            rows.finish(fence, RunEnd(status, None))
    clock.now = 4000
    rows.annotate("saved", Annotation.SAVED, "n", "n", step())
    ended = ["CANCELLED", "FAILED", "RESUMED", "COMPLETED"]
    everything = ["saved", "None", "INTERRUPTED", "SUSPENDED", "PARTIAL", *ended]
    assert rows.expired_run_ids(5001, unfinished=False, limit=100) == ended
    assert rows.expired_run_ids(5000, unfinished=False, limit=100) == ended[:-1]
    assert rows.expired_run_ids(5001, unfinished=False, limit=2) == ended[:2]
    assert rows.expired_run_ids(5001, unfinished=True, limit=100) == everything
    assert rows.expired_run_ids(4001, unfinished=True, limit=100) == ["saved"]


def test_the_payloads_that_stand_in_blobs(rows: SqliteRows) -> None:
    """Outputs, what steps were given, and inputs: what begins with the mark of a blob, of all runs."""
    one, two, three, four = (BLOB + digit * 32 for digit in (b"1", b"2", b"3", b"4"))
    fence = rows.begin(None, opening(input=one))
    rows.commit(fence, attempt(0, 1), step(two, 1, three))
    rows.commit(fence, attempt(1, 2), step(b"{}" + two, 1, b"plain"))
    rows.begin(None, opening("s", input=BLOB[:-1]))
    rows.annotate("s", Annotation.SAVED, "n", "n", step(four))
    assert sorted(rows.blobs()) == [one, two, three, four]


# ---------------------------------------------------------------------- reading


def test_what_is_told_of_a_run_beside_its_row(rows: SqliteRows) -> None:
    """Its parent, its tags, and its last failed attempts, the one that ended last first: of its last
    execution only."""
    old = rows.begin(None, opening())
    rows.commit(old, failed(5, 500), None)
    fence = rows.begin(rows.find("r"), opening(tags=("x", "y")))
    early = failed(0, 10, duration_ns=100)
    late = failed(1, 20, "0", 2, duration_ns=200, failure_class="budget")
    within = failed(2, 90, duration_ns=1)
    for one in (early, late, attempt(3, 400), within):
        rows.commit(fence, one, None)
    rows.annotate("r", Annotation.PARENT, "", "the parent", step())
    rows.begin(None, opening("s"))
    r, s = rows.find("r"), rows.find("s")
    assert r is not None
    assert s is not None
    report = rows.run_extras([r, s], failed=20)
    assert report == [RunExtras("the parent", ("x", "y"), [late, early, within]), RunExtras(None, (), [])]
    assert rows.run_extras([s, r], failed=2)[1].failed == [late, early]
    assert rows.run_extras([r], failed=1)[0].failed == [late]
    assert rows.run_extras([r], failed=0)[0] == RunExtras("the parent", ("x", "y"), [])


@pytest.mark.parametrize("many", [1, 3, 4, 5, 5000])
def test_ids_that_begin_with_a_text(
    rows: SqliteRows, clock: Clock, monkeypatch: pytest.MonkeyPatch, many: int
) -> None:
    """That very id first, then the newest; the same ids whether there are few or many."""
    monkeypatch.setattr(_sql_rows, "_MANY", many)
    for started, run_id in enumerate(["ab", "a", "abc", "b", "aé", "a\U0010ffff", "AB", "a%"]):
        clock.now = 1000 + started // 2
        rows.begin(None, opening(run_id))
    rows.annotate("abz", Annotation.SAVED, "n", "n", step())
    assert rows.find_run_ids("a", 20) == ["a", "a%", "a\U0010ffff", "aé", "abc", "ab"]
    assert rows.find_run_ids("a", 3) == ["a", "a%", "a\U0010ffff"]
    assert rows.find_run_ids("a", 1) == ["a"]
    assert rows.find_run_ids("ab", 20) == ["ab", "abc"]
    assert rows.find_run_ids("abz", 20) == []
    assert rows.find_run_ids("a%", 20) == ["a%"]
    assert rows.find_run_ids("aé", 20) == ["aé"]
    assert rows.find_run_ids("z", 20) == []
    assert rows.find_run_ids("", 2) == ["a%", "AB"]


def test_runs_are_listed_through_the_same_columns(rows: SqliteRows, clock: Clock) -> None:
    """A page has the rows that find() gives, the one begun last first, and says where the next one begins."""
    for number, run_id in enumerate("rstu"):
        clock.now = 1000 + number
        fence = rows.begin(
            None, opening(run_id, pipeline="p" if number else "q", tags=("odd",) if number % 2 else ())
        )
        rows.commit(fence, failed(0, 10, node_id="n") if run_id == "t" else attempt(), step())
    rows.annotate("saved", Annotation.SAVED, "n", "n", step())

    def told(query: RunQuery, limit: int = 10, after: str | None = None, look_at: int | None = None) -> Any:
        result, following = rows.runs(query, limit=limit, after=after, max_filtered=look_at)
        assert result == [rows.find(one.run_id) for one in result]
        return "".join(one.run_id for one in result), following

    assert told(RunQuery()) == ("utsr", None)
    assert told(RunQuery(), limit=3) == ("uts", "1001.2")
    assert told(RunQuery(), after="1001.2") == ("r", None)
    assert told(RunQuery(pipeline="q")) == ("r", None)
    assert told(RunQuery(tag="odd")) == ("us", None)
    assert told(RunQuery(since_ms=1002)) == ("ut", None)
    assert told(RunQuery(failure_class="semantic", node="n"), look_at=100) == ("t", None)
    assert told(RunQuery(failure_class="semantic"), look_at=2) == ("t", "1002.3")
    assert told(RunQuery(failure_class="semantic"), look_at=1) == ("", "1003.4")
    assert told(RunQuery(text="T")) == ("t", None)


def test_the_history_of_an_execution(rows: SqliteRows) -> None:
    """By process, position and time, a group before its children; each attempt with what it, and no other,
    committed."""
    first = rows.begin(None, opening())
    one, two = failed(0, 10), attempt(0, 20, "", 2)
    group, inside, again = attempt(1, 30), attempt(1, 30, "0"), attempt(1, 30, "0", 2)
    rows.commit(first, again, step(b"333"))
    rows.commit(first, two, step(b"22", 4, b"g"))
    rows.commit(first, group, step(b"4444"))
    rows.commit(first, inside, None)
    rows.commit(first, one, None)
    result = rows.find("r")
    assert result is not None
    second = rows.take_over(result, opening())
    later = attempt(0, 5)
    rows.commit(second, later, None)
    in_order = [
        (one, None),
        (two, step(b"22", 4, b"g")),
        (group, step(b"4444")),
        (inside, None),
        (again, step(b"333")),
        (later, None),
    ]
    assert list(rows.attempts(1, 1)) == in_order
    assert list(rows.attempts(1, 2)) == list(rows.attempts(2, 1)) == []
    sized = [
        replace(
            tried,
            output_bytes=None if instance is None else len(instance.output),
            epoch=2 if tried is later else 1,
        )
        for tried, instance in in_order
    ]
    assert rows.attempt_page(1, 1, limit=100, after=None) == (sized, None)
    assert rows.attempt_page(1, 1, limit=6, after=None) == (sized, None)
    assert rows.attempt_page(1, 1, limit=5, after=None) == (sized[:5], "1:1:30:2:0")
    for limit in (1, 2, 4):
        pages, after = list[AttemptRecord](), None
        while True:
            page, after = rows.attempt_page(1, 1, limit=limit, after=after)
            assert len(page) <= limit
            pages += page
            if after is None:
                break
        assert pages == sized
    assert rows.attempt_page(1, 2, limit=5, after=None) == ([], None)
    assert rows.attempts_at(1, 1, 0, "") == [sized[0], sized[1], sized[5]]
    assert rows.attempts_at(1, 1, 1, "0") == [sized[3], sized[4]]
    assert rows.attempts_at(1, 1, 1, "") == [sized[2]]
    assert (
        rows.attempts_at(1, 2, 1, "") == rows.attempts_at(2, 1, 1, "") == rows.attempts_at(1, 1, 2, "") == []
    )


def test_the_figures_of_many_runs(rows: SqliteRows, clock: Clock) -> None:
    """By span of time, pipeline, node, model, class and duration; wasted is what committed nothing and did
    not succeed."""
    for number in range(3):
        clock.now = 1000 * (number + 1)
        fence = rows.begin(None, opening(str(number)))
        rows.commit(fence, attempt(0, 1, duration_ns=4), step())
        rows.commit(fence, attempt(0, 2, duration_ns=9), None)
        rows.commit(fence, failed(1, 3, cost_pico=2), None)

    def told(since: int, bucket: int, runs: int = 10, attempts: int = 100) -> list[Tally]:
        result = rows.tally(since, bucket, runs=runs, attempts=attempts)
        return sorted(result, key=lambda one: (one.bucket, one.node_id, one.digits))

    short = Tally(1, "p", "node 0", "m", None, 1, 5, 11, 0, 4, 4, 104)
    long = Tally(1, "p", "node 0", "m", None, 1, 5, 11, 0, 9, 9, 109)
    bad = Tally(1, "p", "node 1", "m", "semantic", 1, 5, 2, 2, 7, 7, 107)
    assert told(0, 1000) == [one._replace(bucket=span) for span in (1, 2, 3) for one in (short, long, bad)]
    assert told(2000, 1000) == [one._replace(bucket=span) for span in (2, 3) for one in (short, long, bad)]
    assert told(2001, 1000) == [one._replace(bucket=3) for one in (short, long, bad)]
    assert told(0, 1000, runs=1) == [one._replace(bucket=3) for one in (short, long, bad)]
    assert sum(one.attempts for one in told(0, 1000, attempts=4)) == 4
    assert told(0, 10_000) == [
        Tally(0, "p", "node 0", "m", None, 3, 15, 33, 0, 12, 4, 104),
        Tally(0, "p", "node 0", "m", None, 3, 15, 33, 0, 27, 9, 109),
        Tally(0, "p", "node 1", "m", "semantic", 3, 15, 6, 6, 21, 7, 107),
    ]


def test_what_the_store_says_of_itself(rows: SqliteRows) -> None:
    now = SCHEMA_VERSION
    assert rows.facts() == StoreFacts(f"SQLite {sqlite3.sqlite_version}", now, None, ())
    rows.db.execute("UPDATE meta SET v = '5' WHERE k = 'schema_version'")
    assert rows.facts() == StoreFacts(f"SQLite {sqlite3.sqlite_version}", 5, None, ())
