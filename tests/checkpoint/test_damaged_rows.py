"""A damaged row is one damaged run: every list, page and sum shows the others, over every durable store."""

from __future__ import annotations

import json
from typing import Any

import pytest
import redis
from tests.checkpoint.damage import database, loose
from tests.shared_stores import SHARED, opened, place
from tests.store_suite.journal import State, begin, commit, fail, finish, settled

from stroma.checkpoint import RunQuery, StoreError
from stroma.checkpoint.durable.integrity import parse_attempt, parse_run
from stroma.checkpoint.durable.rows import DAMAGED
from stroma.checkpoint.history import History
from stroma.checkpoint.records import ATTEMPT_COLUMNS, stored_values
from stroma.cli import main
from stroma.failures import FailureClass

pytestmark = pytest.mark.slow

RUNS = [f"r{i}" for i in range(5)]

#: What stands in the row of run r3, by kind of store. SQLite and PostgreSQL refuse other types; a file from
#: elsewhere may have been written by something that does not.
VALUES: dict[str, list[tuple[str, Any]]] = {
    "sqlite": [
        ("lease_owner", b"x"),
        ("lease_until_ms", b"x"),
        ("tokens", "x"),
        ("error", b"x"),
        ("pipeline", b"\xff"),
        ("status", b"x"),
        ("started_ms", "x"),
        ("started_ms", 7.5),
        ("started_ms", 2**63 - 1),
        ("updated_ms", b"x"),
        ("tokens", -1),
        ("execution", "x"),
        ("attempt_count", "x"),
        ("lease_epoch", b"x"),
    ],
    "postgres": [("tokens", -1), ("started_ms", 2**63 - 1), ("cost_pico", -(2**62)), ("latency_ns", -1)],
    "redis": [
        ("tokens", b"x"),
        ("started_ms", b"9" * 30),
        ("pipeline", b"\xff"),
        ("status", b"\xff"),
        ("until_ms", b"x"),
        ("execution", b"-1"),
        ("epoch", b""),
        ("owner", b"\xff"),
        ("tags", b"{"),
        ("run_id", b"other"),
        ("", b"a list"),
        ("", b"a text"),
    ],
}


async def filled(store: Any) -> None:
    for run_id in RUNS:
        session = await begin(store, run_id)
        await fail(session, 0, "n", failure=FailureClass.TERMINAL, message="no", tokens=1)
        await commit(session, 0, State(n=1), "n", attempt=2, tokens=1)
        await finish(session, "PARTIAL", "why")


def damage(kind: str, where: str, column: str, value: Any) -> None:
    if kind == "sqlite":
        with loose(where) as db:
            db.execute("PRAGMA ignore_check_constraints = 1")
            db.execute(f"UPDATE runs SET {column} = ? WHERE run_id = 'r3'", (value,))
    elif kind == "postgres":
        with database(kind, where) as db:
            db.execute(f"UPDATE runs SET {column} = ? WHERE run_id = 'r3'", value)
    else:
        assert kind == "redis", kind
        with redis.Redis.from_url(where) as client:
            if column:
                client.hset("stroma:{r3}:run", column, value)
            else:
                client.delete("stroma:{r3}:run")
                client.set("stroma:{r3}:run", value) if b"text" in value else client.lpush(
                    "stroma:{r3}:run", value
                )


def paged(store: Any, limit: int, query: RunQuery) -> list[str]:
    findings: list[str] = []
    page = store.run_page(query, limit=limit)
    while True:
        findings += [run.run_id for run in page.runs]
        assert len(findings) <= len(RUNS)
        if page.next is None:
            return findings
        page = store.run_page(query, limit=limit, after=page.next)


CASES = [(kind, column, value) for kind in SHARED for column, value in VALUES[kind]]


@pytest.mark.parametrize(("kind", "column", "value"), CASES, ids=[f"{k}-{c}-{v!r:.12}" for k, c, v in CASES])
async def test_one_damaged_row(kind: str, column: str, value: Any) -> None:
    """Whatever stands in the row of a run, it is listed once, the others are as they were, and sums go on."""
    with place(kind) as where, opened(kind, where) as store:
        await filled(store)
        others = {run.run_id: run for run in store.list_runs() if run.run_id != "r3"}
        damage(kind, where, column, value)
        listed = store.list_runs()
        assert sorted(run.run_id for run in listed) == RUNS
        assert {run.run_id: run for run in listed if run.run_id != "r3"} == others
        for limit in (1, 2, 50):
            assert sorted(paged(store, limit, RunQuery())) == RUNS
            assert set(RUNS) - {"r3"} <= set(paged(store, limit, RunQuery(failure_class="TERMINAL")))
        (shown,) = [run for run in listed if run.run_id == "r3"]
        is_readable = column == "lease_until_ms" or (kind, column, value)[1:] == ("started_ms", 2**63 - 1)
        assert (shown.status == DAMAGED) is not is_readable
        assert store.get_run("r1") == others["r1"]
        assert sum(t.attempts for t in store.tally(0, 10**15)) >= 8
        history = History(store)
        assert len(history.runs(RunQuery(), 50)) == 5
        history.story(shown)
        if not is_readable:
            assert "damaged" in (shown.error or "")
            assert (store.get_run("r3") or shown).status == DAMAGED
            for refused in (
                begin(store, "r3"),
                begin(store, "r3", if_exists="resume"),
                settled(store.cancel("r3")),
            ):
                with pytest.raises(StoreError, match=r"'r3'|of another program"):
                    await refused
        await settled(store.delete("r3"))
        assert sorted(run.run_id for run in store.list_runs()) == sorted(others)
        assert (await begin(store, "r3")).execution == 1


@pytest.mark.parametrize(("column", "value"), VALUES["sqlite"])
async def test_commands_and_a_damaged_row(
    tmp_path: Any, capsys: pytest.CaptureFixture[str], column: str, value: Any
) -> None:
    """`runs`, `show` and `doctor` go on, and name the damaged run."""
    path = str(tmp_path / "runs.db")
    with opened("sqlite", path) as store:
        await filled(store)
    damage("sqlite", path, column, value)

    assert main(["runs", "--json", "--db", path]) == 0
    listed = json.loads(capsys.readouterr().out)["runs"]
    assert sorted(run["run_id"] for run in listed) == RUNS
    for words in (["runs"], ["show", "r1"], ["show", "r3"], ["show", "r3", "--json"]):
        assert main([*words, "--db", path]) == 0, capsys.readouterr().err
    assert main(["doctor", "--db", path]) in (0, 3)
    assert "internal error" not in capsys.readouterr().err


async def test_damaged_attempts(tmp_path: Any) -> None:
    """An attempt whose row is damaged is shown as such, and its run is summed up all the same."""
    path = str(tmp_path / "runs.db")
    with opened("sqlite", path) as store:
        await filled(store)
        for column, value in (
            ("duration_ns", "x"),
            ("tokens", 2**63 - 1),
            ("cost_pico", "x"),
            ("node_id", b"x"),
            ("message", b"x"),
            ("model", b"x"),
            ("failure_class", b"x"),
            ("outcome", b"x"),
        ):
            with loose(path) as db:
                db.execute(f"UPDATE attempts SET {column} = ? WHERE run IN (2, 3) AND attempt = 1", (value,))
            assert len(store.attempts("r1")) == len(store.attempt_page("r1").attempts) == 2
            assert len(store.run_page().runs) == 5
            assert sum(t.attempts for t in store.tally(0, 10**15)) >= 6
            History(store).story(store.get_run("r1"))
        (first, second) = store.attempts("r1")
        assert (first.damaged, first.outcome, first.tokens) == (True, DAMAGED, 2**63 - 1)
        assert (second.damaged, second.outcome) == (False, "success")
        assert main(["show", "r1", "--db", path]) == 3  # It is shown, and said to be damaged.


@pytest.mark.parametrize("key", ["attempts:1", "steps:1", "annotations:-4", "failed:1", "nodes:1"])
@pytest.mark.parametrize("value", ["text", "field"])
async def test_keys_in_redis_that_hold_something_else(key: str, value: str) -> None:
    """A key of another type, or with fields that are none of ours, harms no other run."""
    with place("redis") as where, opened("redis", where) as store:
        await filled(store)
        with redis.Redis.from_url(where) as client:
            client.delete(f"stroma:{{r3}}:{key}")
            if value == "text":
                client.set(f"stroma:{{r3}}:{key}", "x")
            else:
                client.hset(f"stroma:{{r3}}:{key}", "\\xff", "\\xff")
        assert sorted(run.run_id for run in store.list_runs()) == RUNS
        for query in (RunQuery(), RunQuery(node="n"), RunQuery(text="r")):
            assert set(RUNS) - {"r3"} <= set(paged(store, 2, query))
        assert sum(t.attempts for t in store.tally(0, 10**15)) >= 8
        assert len(store.attempts("r1")) == 2


def test_what_a_row_may_hold() -> None:
    """Every value that no store writes is named; each one damages a row that was right."""
    right = (
        1,
        "r",
        "p",
        1,
        "RUNNING",
        None,
        1,
        2,
        3,
        4,
        5,
        "owner",
        1,
        -1.5,
        0,
        0,
        0,
        9,
        7,
        0,
        "key",
        "2",
        "blocked",
        1,
        2,
        "codes",
        "claim",
    )
    assert parse_run(right) == right
    for at in range(1, len(right)):
        for wrong in (b"x", 1.5 if at != 13 else None, [], "x" if isinstance(right[at], int | float) else 7):
            row = parse_run((*right[:at], wrong, *right[at + 1 :]))
            assert (row.status, row.owner) == (DAMAGED, None)
            assert row._fields[at] in (row.error or "")
    good = (0, 1, "", 1, "n", 1, "success", None, None, None, 1, 1, 1, None, 0, None, None, None)
    assert stored_values(parse_attempt(good)) == good
    for at in range(len(good)):
        row2 = parse_attempt((*good[:at], b"x", *good[at + 1 :]))
        assert (row2.outcome, ATTEMPT_COLUMNS[at] in (row2.message or "")) == (DAMAGED, True)
