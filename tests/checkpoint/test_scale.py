"""Large runs and large stores: what opens, resumes and lists them takes bounded time and memory."""

import sqlite3
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import pytest
from pydantic import BaseModel

from stroma import NodeContract, RunStatus, SQLiteStore, StromaRunner, stroma_node
from stroma.testing.stores import begin, finish

T = TypeVar("T")
RUNS, ATTEMPTS = 1000, 1000
# Far above what any of it takes (a few ms), far below what reading all rows would.
SECONDS = 1.0
BYTES = 20_000_000


class Num(BaseModel):
    n: int = 0


@pytest.fixture(scope="module")
def million(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of a thousand runs with a thousand attempts and commits each."""
    path = tmp_path_factory.mktemp("scale") / "runs.db"
    SQLiteStore(path)._file.open().close()
    db = sqlite3.connect(path, isolation_level=None)
    db.execute("PRAGMA synchronous=OFF")
    db.execute("BEGIN")
    numbers = f"WITH RECURSIVE r(i) AS (SELECT 0 UNION ALL SELECT i + 1 FROM r WHERE i < {RUNS - 1})"
    steps = f", a(j) AS (SELECT 0 UNION ALL SELECT j + 1 FROM a WHERE j < {ATTEMPTS - 1})"
    db.execute(f"""{numbers} INSERT INTO runs (run, run_id, pipeline, execution, status, started_ms, updated_ms, tokens,
        cost_pico, latency_ns, lease_epoch) SELECT i + 1, printf('run-%04d', i), 'p', 1, 'COMPLETED', i, i, 1, 1, 1, 1 FROM r""")
    db.execute(f"""{numbers} INSERT INTO inputs SELECT i + 1, 1, '', x'7b7d', x'' FROM r""")
    db.execute(f"""{numbers}{steps} INSERT INTO attempts SELECT i + 1, 1, 1, j, j, '', 1, 'node', 1, 'success', NULL, NULL,
        NULL, 1, 0, 1, NULL FROM r, a""")
    db.execute(f"""{numbers}{steps} INSERT INTO steps (run, execution, position, branch, node_id, epoch, attempt, started_ns,
        contract, schema_ref, output, sha256) SELECT i + 1, 1, j, '', 'node', 1, 1, j, '', '', x'7b7d',
        x'44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a' FROM r, a""")
    db.execute("COMMIT")
    db.close()
    return path


def measured(call: Callable[[], T]) -> T:
    """The value of a call, which must take bounded time and memory."""
    tracemalloc.start()
    begun = time.perf_counter()
    value = call()
    seconds = time.perf_counter() - begun
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert seconds < SECONDS
    assert most < BYTES
    return value


async def test_a_store_of_a_million_attempts(million: Path) -> None:
    """Listing, finding and reading one run, and beginning another, do not read the whole store."""
    async with SQLiteStore(million) as store:
        assert len(measured(store.list_runs)) == 50
        assert measured(lambda: store.find_run("run-05")) == [f"run-{i:04d}" for i in range(599, 579, -1)]
        assert measured(lambda: store.find_run("last")) == ["run-0999"]
        run = measured(lambda: store.get_run("run-0500"))
        assert run is not None
        assert run.nodes == ATTEMPTS
        assert len(measured(lambda: store.attempts("run-0500"))) == ATTEMPTS
        begun = time.perf_counter()
        await finish(await begin(store, "a new one"))
        assert time.perf_counter() - begun < SECONDS


async def test_a_run_of_ten_thousand_nodes(tmp_path: Path) -> None:
    """A run of 10,000 nodes that stopped at the last one goes on in seconds, and calls only that."""
    calls: list[int] = []
    stops = [True]

    def make(number: int) -> Any:
        async def func(state: Num) -> Any:
            calls.append(number)
            if number == 9_999 and stops[0]:
                raise ValueError("the last one")
            return {"n": state.n + 1}

        contract: NodeContract[Any, Any] = NodeContract(
            node_id=f"n{number}", input_schema=Num, output_schema=Num
        )
        return stroma_node(f"n{number}", contract)(func)

    nodes = [make(number) for number in range(10_000)]
    async with SQLiteStore(tmp_path / "runs.db", synchronous="normal") as store:
        runner = StromaRunner.quick(store=store, run_id="long", policy_map={"AMBIGUOUS": {"max_retries": 0}})
        assert (await runner.run(nodes, Num())).status is RunStatus.PARTIAL
        calls.clear()
        stops[0] = False
        begun = time.perf_counter()
        result = await runner.run(nodes, Num(), resume=True)
        assert time.perf_counter() - begun < 10
        assert (result.status, result.final_state) == (RunStatus.RESUMED, Num(n=10_000))
        assert calls == [9_999]
