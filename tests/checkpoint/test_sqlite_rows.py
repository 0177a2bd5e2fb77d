"""Rows of a SQLite store: leases, with a clock that stands still, and the places of annotations."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from stroma.checkpoint.durable.integrity import input_step
from stroma.checkpoint.durable.owner import Owner, boot_id, new_owner
from stroma.checkpoint.durable.rows import Annotation, Opening
from stroma.checkpoint.queue import ClaimRequest, RunLimits
from stroma.checkpoint.sqlite import connection as _sqlite_rows
from stroma.checkpoint.sqlite.connection import SqliteRows
from stroma.checkpoint.sqlite.file import DatabaseFile, connect

OURS = str(new_owner(None))
THEIRS = str(new_owner(None)._replace(boot="another start of the machine"))
#: By the clock that leases go by.
NOW_MS = 500_000


@pytest.fixture
def rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[SqliteRows]:
    monkeypatch.setattr(_sqlite_rows, "_clock_ms", lambda: NOW_MS)
    monkeypatch.setattr(_sqlite_rows, "_BOOT", Owner.read(OURS).boot)
    db = DatabaseFile(str(tmp_path / "runs.db"), "normal", connect, 15.0).open()
    yield SqliteRows(db)
    db.close()


def opening(owner: str) -> Opening:
    return Opening("r", "p", owner, 30.0, input_step("c", b"{}"))


@pytest.mark.parametrize(
    ("until", "left"), [(500_001, 0.001), (500_000, 0.0), (499_999, -0.001), (498_000, -2.0)]
)
def test_what_is_left_of_a_lease(rows: SqliteRows, until: int, left: float) -> None:
    """To its last millisecond it has a holder, and not any longer."""
    owner = str(Owner.read(OURS)._replace(pid=os.getpid() + 1, space=0))
    fence = rows.begin(None, opening(owner))
    rows.db.execute("UPDATE runs SET lease_until_ms = ?", (until,))
    result = rows.find("r")
    assert result.left_seconds == left
    assert (result.holder is None) == (left < 0)
    assert fence.owner == owner


def test_a_lease_of_another_start_of_the_machine_has_expired(rows: SqliteRows) -> None:
    rows.begin(None, opening(THEIRS))
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


def _is_time_of_day(now: Any) -> None:
    low = time.time_ns() // 1_000_000
    assert low <= now() <= time.time_ns() // 1_000_000


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
