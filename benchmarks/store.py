"""What a commit costs in SQLiteStore, beside raw sqlite3 on the same disk, as ratios in one run.

    ./dev run python -m benchmarks.store

A raw commit is BEGIN IMMEDIATE, an UPDATE, an INSERT of the same kilobyte and COMMIT at synchronous=FULL, in
a loop. Ours keeps an attempt as well, through the writer thread and an event loop. Medians of rounds that
take turns.
"""

from __future__ import annotations

import asyncio
import sqlite3
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from pydantic import BaseModel
from tests.store_suite.journal import row, settled

from stroma import SQLiteStore
from stroma.checkpoint import RunRequest
from stroma.checkpoint.durable import worker
from stroma.contracts.schema import schema_of

ROUNDS = 5
COMMITS = 1000
RUNS = 64


class State(BaseModel):
    text: str
    n: int = 0


STATE = State(text="x" * 1000)
SCHEMA = schema_of(STATE.__class__)


def raw(path: Path) -> float:
    """Commits a second of a plain loop."""
    db = sqlite3.connect(path, isolation_level=None)
    db.execute("PRAGMA journal_mode=WAL")
    db.execute("PRAGMA synchronous=FULL")
    db.execute("CREATE TABLE runs (run INTEGER PRIMARY KEY, tokens INTEGER, epoch INTEGER)")
    db.execute("CREATE TABLE steps (run INTEGER, position INTEGER, output BLOB, PRIMARY KEY (run, position))")
    db.execute("INSERT INTO runs VALUES (1, 0, 1)")
    data = SCHEMA.encode(STATE)
    begun = time.perf_counter()
    for position in range(COMMITS):
        db.execute("BEGIN IMMEDIATE")
        db.execute("UPDATE runs SET tokens = tokens + 1 WHERE run = 1 AND epoch = 1")
        db.execute("INSERT INTO steps VALUES (1, ?, ?)", (position, data))
        db.execute("COMMIT")
    rate = COMMITS / (time.perf_counter() - begun)
    db.close()
    return rate


def ours(path: Path, runs: int, commits: int) -> float:
    """Commits a second of so many runs at once."""

    async def main() -> float:
        async with SQLiteStore(path) as store:
            request = RunRequest("", "bench", STATE, SCHEMA)
            sessions = [
                await settled(store.open_run(request._replace(run_id=f"run {i}"))) for i in range(runs)
            ]

            async def one(session: object) -> None:
                for position in range(commits // runs):
                    await session.record(row(position, tokens=1), SCHEMA, STATE)  # type: ignore[attr-defined]

            begun = time.perf_counter()
            await asyncio.gather(*map(one, sessions))
            return commits / (time.perf_counter() - begun)

    return asyncio.run(main())


def alone(path: Path) -> float:
    """Commits a second of many runs at once if each were a transaction of its own."""
    most, worker._MAX_BATCH_SIZE = worker._MAX_BATCH_SIZE, 1  # type: ignore[misc]
    try:
        return ours(path, RUNS, COMMITS)
    finally:
        worker._MAX_BATCH_SIZE = most  # type: ignore[misc]


def main() -> None:
    cases: dict[str, Callable[[Path], float]] = {
        "raw": raw,
        "one": lambda path: ours(path, 1, COMMITS),
        "alone": alone,
        "many": lambda path: ours(path, RUNS, 8 * COMMITS),
    }
    rates: dict[str, list[float]] = {name: [] for name in cases}
    with tempfile.TemporaryDirectory(prefix="stroma-bench-") as folder:
        for number in range(ROUNDS):
            for name, case in cases.items():
                rates[name].append(case(Path(folder, f"{name}-{number}.db")))
    found = {name: statistics.median(values) for name, values in rates.items()}
    print(f"raw sqlite3, one transaction after another     {found['raw']:8,.0f} commits/s")
    print(
        f"one run                                        {found['one']:8,.0f}   a commit takes {found['raw'] / found['one']:.2f}x of a raw one"
    )
    print(f"{RUNS} runs, a transaction for each commit          {found['alone']:8,.0f}")
    print(
        f"{RUNS} runs, group commit                           {found['many']:8,.0f}   {found['many'] / found['alone']:.1f}x of that"
    )


if __name__ == "__main__":
    main()
