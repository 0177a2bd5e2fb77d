"""Large runs and large stores: what opens, resumes and lists them takes bounded time and memory.

``python -m benchmarks.scale`` has the figures, of larger stores too.
"""

import sqlite3
import time
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import pytest
from tests.checkpoint import large_stores
from tests.checkpoint.large_stores import Num, run_name
from tests.servers import RedisServer
from tests.servers_postgres import PostgresServer

from stroma import RunStatus, SQLiteStore, StromaRunner
from stroma.checkpoint import RunQuery, open_store
from stroma.checkpoint.postgres.store import PostgresStore
from stroma.cli import main as stroma_command

T = TypeVar("T")
#: (runs, attempts and commits of each): a million in all where filling is fast.
SHAPES = {"sqlite": (1000, 1000), "postgres": (1000, 100), "redis": (5000, 10)}
# Far above what any of it takes: some ms, and 0.6 s where Redis looks at each run.
SECONDS = 5.0
BYTES = 20_000_000


@pytest.fixture(scope="module", params=list(SHAPES))
def filled(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a store with many attempts."""
    if request.param == "sqlite":
        url = f"sqlite:///{tmp_path_factory.mktemp('scale') / 'runs.db'}"
        large_stores.fill(url, *SHAPES["sqlite"])
        yield url
    elif request.param == "postgres":
        server = PostgresServer()
        large_stores.fill(server.dsn, *SHAPES["postgres"])
        yield server.dsn
        server.stop()
    else:
        with RedisServer(appendonly="no") as redis:
            large_stores.fill(redis.url, *SHAPES["redis"])
            yield redis.url


def shape(url: str) -> tuple[int, int]:
    return SHAPES[{"postgresql": "postgres", "unix": "redis"}.get(url.partition(":")[0], "sqlite")]


def measured(call: Callable[[], T]) -> T:
    """The value of a call, which must take bounded time, and bounded memory when called again."""
    started = time.perf_counter()
    value = call()
    assert time.perf_counter() - started < SECONDS
    tracemalloc.start()
    call()
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < BYTES
    return value


@pytest.mark.nightly
async def test_a_store_of_many_attempts(filled: str) -> None:
    """Listing, finding, reading and resuming a run, and beginning another, do not read the whole store."""
    runs, attempts = shape(filled)
    some = runs // 2
    async with open_store(filled) as store:
        assert len(measured(store.list_runs)) == 50
        assert [r.run_id for r in measured(lambda: store.list_runs(status="FAILED"))][-1] == run_name(999)
        assert measured(lambda: store.list_runs(status="RUNNING")) == []
        assert len(measured(lambda: store.list_runs(pipeline="p7"))) == runs // 1000
        failed = measured(lambda: store.run_page(RunQuery(statuses=("FAILED", "PARTIAL"))))
        assert [r.run_id for r in failed.runs][-1] == run_name(999)
        for none in (
            RunQuery(failure_class="TERMINAL"),
            RunQuery(text="nowhere"),
            RunQuery(tag="none"),
            RunQuery(node="x"),
        ):
            assert measured(lambda: store.run_page(none)) == ([], None)  # noqa: B023
        first = measured(lambda: store.attempt_page(run_name(some), limit=50))
        assert len(first.attempts) == min(50, attempts)
        newest = [run_name(i) for i in range(runs - 1, runs - 21, -1)]
        assert measured(lambda: store.find_run("run-")) == newest
        assert measured(lambda: store.find_run(run_name(some)[:-1]))[-1] == run_name(some)
        assert measured(lambda: store.find_run("last")) == newest[:1]
        run = measured(lambda: store.get_run(run_name(some)))
        assert run.nodes == attempts
        assert len(measured(lambda: store.attempts(run_name(some)))) == attempts
        for operation, result in (
            ("resume one", attempts),
            ("start one, with a commit", None),
            ("`gc` that finds nothing", 0),
        ):
            started = time.perf_counter()
            assert await large_stores.OPERATIONS[operation](store, runs) == result
            assert time.perf_counter() - started < SECONDS


@pytest.mark.nightly
def test_a_long_run_in_new_tables() -> None:
    """A PostgreSQL server without statistics, as after the tables were made, reads a long run's attempts."""
    server = PostgresServer()
    try:
        large_stores.fill(server.dsn, 1, 5000, vacuum=False)
        store = PostgresStore(server.dsn)
        started = time.perf_counter()
        report = store.attempts(run_name(0))
        assert time.perf_counter() - started < SECONDS
        assert [a.node_id for a in report] == [f"n{i}" for i in range(5000)]
        assert {a.output for a in report} == {large_stores.OUTPUT}
        store.close()
    finally:
        server.stop()


@pytest.mark.nightly
def test_commands_on_a_store_of_many_attempts(filled: str, capsys: pytest.CaptureFixture[str]) -> None:
    """`stroma runs` and `stroma show` do not read the whole store either."""
    runs, attempts = shape(filled)
    for arguments, lines in ((["runs"], 21), (["show", run_name(runs // 2)], attempts + 8)):
        assert not measured(lambda: stroma_command([*arguments, "--db", filled]))  # noqa: B023
        assert len(capsys.readouterr().out.splitlines()) >= lines


@pytest.mark.nightly
async def test_a_run_of_ten_thousand_nodes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run of 10,000 nodes that stopped at the last one goes on in seconds, and calls only that."""
    calls: list[int] = []
    nodes: list[Any] = large_stores.long_nodes(10_000, calls)
    async with SQLiteStore(tmp_path / "runs.db", synchronous="normal") as store:
        runner = StromaRunner.quick(store=store, run_id="long", policy_map={"AMBIGUOUS": {"max_retries": 0}})
        monkeypatch.setenv("STOPS", "1")
        assert (await runner.run(nodes, Num())).status is RunStatus.PARTIAL
        calls.clear()
        monkeypatch.delenv("STOPS")
        started = time.perf_counter()
        result = await runner.run(nodes, Num(), resume=True)
        assert time.perf_counter() - started < 10
        assert (result.status, result.final_state) == (RunStatus.RESUMED, Num(n=10_000))
        assert calls == [9_999]
        assert store.attempts("long")[-1].node_id == "n9999"


PAGES = {
    "all": RunQuery(),
    "failed": RunQuery(statuses=("FAILED", "PARTIAL")),
    "pipeline": RunQuery(pipeline="p7"),
    "tag": RunQuery(tag="none"),
    "since": RunQuery(since_ms=5),
    "class": RunQuery(failure_class="TERMINAL"),
    "node": RunQuery(node="n"),
    "text": RunQuery(text="nowhere"),
}


@pytest.mark.parametrize("page", list(PAGES))
def test_no_page_reads_all_runs(page: str, tmp_path: Path) -> None:
    """SQLite reads each page in the order of an index from its beginning: nothing is sorted or skipped."""
    large_stores.fill(f"sqlite:///{tmp_path / 'x.db'}", 200, 1)
    with SQLiteStore(tmp_path / "x.db") as store:
        messages: list[str] = []

        after = large_stores._middle(store, 200)

        def read(rows: Any) -> Any:
            rows.db.set_trace_callback(messages.append)
            return rows.runs(PAGES[page], limit=20, after=after, max_filtered=20_000)

        store.read(read, None)
        pages = [text for text in messages if "ORDER BY" in text]
        assert pages
        with sqlite3.connect(tmp_path / "x.db") as db:
            for text in pages:
                plan = [row[3] for row in db.execute(f"EXPLAIN QUERY PLAN {text}")]
                assert any("USING INDEX" in line or "USING COVERING INDEX" in line for line in plan), plan
                if PAGES[page].needs_scan and plan[0].startswith("CO-ROUTINE"):
                    assert "LIMIT 20000" in text, "of so many runs that an index gave, in its order"
                else:
                    assert not any(line.startswith("SCAN") or "TEMP B-TREE" in line for line in plan), plan
        db.close()
