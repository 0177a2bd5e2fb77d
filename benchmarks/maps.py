"""100,000 items through map_over, next to a plain TaskGroup loop with the same work.

    ./dev run python -m benchmarks.maps [--items 100000] [--small 10000] [--rounds 3] [--work-ms 0]

Every line is a process of its own. Items are lines of a file, outputs lines of another one; 64 run at once.
The plain loop reads a line, validates it, awaits the same function under a semaphore, validates the output
and writes it: it keeps nothing, so a crash loses everything. Peaks are the process's whole memory. The last
lines kill the run with SIGKILL at random moments and resume it until it ends; then each item must be
committed once and the file complete, in order.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import signal
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from benchmarks.scale import environment, memory_kb
from stroma import (
    AsyncInMemoryStore,
    JsonLines,
    NodeContract,
    SQLiteStore,
    StromaRunner,
    map_over,
    stroma_node,
)

AT_ONCE = 64


class Document(BaseModel):
    n: int
    text: str


class Fact(BaseModel):
    n: int
    words: int


class Nothing(BaseModel):
    pass


async def extract(document: Document, seconds: float) -> dict[str, int]:
    if seconds:
        await asyncio.sleep(seconds)
    return {"n": document.n, "words": len(document.text.split())}


async def plain(folder: Path, seconds: float) -> None:
    gate = asyncio.Semaphore(AT_ONCE)
    with (folder / "in.jsonl").open("rb") as source, (folder / "out.jsonl").open("wb") as out:

        async def one(line: bytes) -> None:
            try:
                made = Fact.model_validate(await extract(Document.model_validate_json(line), seconds))
                out.write(made.model_dump_json().encode() + b"\n")
            finally:
                gate.release()

        async with asyncio.TaskGroup() as group:
            for line in source:
                await gate.acquire()
                group.create_task(one(line))


async def mapped(folder: Path, seconds: float, store: Any) -> None:
    contract = NodeContract(node_id="extract", input_schema=Document, output_schema=Fact)

    @stroma_node("extract", contract)
    async def node(document: Document) -> dict[str, int]:
        return await extract(document, seconds)

    work = map_over(
        JsonLines(folder / "in.jsonl"), node, into=JsonLines(folder / "out.jsonl"), max_concurrency=AT_ONCE
    )
    result = await StromaRunner.quick(store=store, run_id="map", resume=True).run([work], Nothing())
    assert result.failure is None, result.failure


def child(kind: str, folder: Path, seconds: float) -> None:
    async def main() -> None:
        begun = time.perf_counter()
        if kind == "plain":
            await plain(folder, seconds)
        elif kind == "memory":
            await mapped(folder, seconds, AsyncInMemoryStore())
        else:
            async with SQLiteStore(folder / "runs.db") as store:
                await mapped(folder, seconds, store)
        print(json.dumps([time.perf_counter() - begun, memory_kb("VmHWM") / 1024]), flush=True)

    asyncio.run(main())


def start(kind: str, folder: Path, seconds: float) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "benchmarks.maps", "--child", kind, str(folder), str(seconds)]
    return subprocess.Popen(
        command, env=environment(), cwd=Path(__file__).parents[1], stdout=subprocess.PIPE, text=True
    )


def measured(kind: str, items: int, seconds: float) -> tuple[float, float]:
    with tempfile.TemporaryDirectory(prefix="stroma-bench-") as name:
        folder = Path(name)
        fill(folder, items)
        process = start(kind, folder, seconds)
        out, _ = process.communicate()
        assert process.returncode == 0, kind
        check(folder, items, in_order=kind != "plain")
        spent, peak = json.loads(out)
        return spent, peak


def fill(folder: Path, items: int) -> None:
    with (folder / "in.jsonl").open("w") as file:
        for n in range(items):
            file.write(json.dumps({"n": n, "text": f"document {n} " + "of some words " * 10}) + "\n")


def check(folder: Path, items: int, *, in_order: bool) -> None:
    with (folder / "out.jsonl").open() as file:
        found = [json.loads(line)["n"] for line in file]
    assert (found if in_order else sorted(found)) == list(range(items)), (
        "outputs are lost, twice there or out of order"
    )


def killed(items: int, seconds: float) -> tuple[int, float, float]:
    """Kill it until it is done. How often, seconds in all, the highest peak of a process that ended by itself."""
    draw = random.Random(items)
    with tempfile.TemporaryDirectory(prefix="stroma-bench-") as name:
        folder = Path(name)
        fill(folder, items)
        kills, begun, longest = 0, time.perf_counter(), items / 40_000 + 1
        while True:
            process = start("sqlite", folder, seconds)
            try:
                out, _ = process.communicate(timeout=draw.uniform(0.7, longest))
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGKILL)
                process.communicate()
                kills, longest = kills + 1, longest * 1.2  # However slow the machine is, one gets to the end.
                continue
            assert process.returncode == 0
            break
        check(folder, items, in_order=True)
        with sqlite3.connect(folder / "runs.db") as db:
            rows = "SELECT count(*), count(DISTINCT branch) FROM {} WHERE branch <> ''"
            (steps, places) = db.execute(rows.format("steps")).fetchone()
            (tries, tried) = db.execute(rows.format("attempts") + " AND outcome = 'success'").fetchone()
        assert steps == places == tries == tried == items, (steps, places, tries, tried)
        return kills, time.perf_counter() - begun, json.loads(out)[1]


def main() -> None:
    if sys.argv[1:2] == ["--child"]:
        return child(sys.argv[2], Path(sys.argv[3]), float(sys.argv[4]))
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--items", type=int, default=100_000)
    parser.add_argument("--small", type=int, default=10_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--work-ms", type=float, default=0.0)
    options = parser.parse_args()
    seconds = options.work_ms / 1000
    print("| what | items | seconds | items/s | to plain | peak MB |\n|---|---|---|---|---|---|")
    for items in (options.small, options.items):
        # In turn, so that a machine that slows down slows all of them down.
        runs: dict[str, list[tuple[float, float]]] = {"plain": [], "memory": [], "sqlite": []}
        for _ in range(options.rounds):
            for kind, done in runs.items():
                done.append(measured(kind, items, seconds))
        base = statistics.median(spent for spent, _ in runs["plain"])
        for kind, done in runs.items():
            spent, peak = statistics.median(s for s, _ in done), max(p for _, p in done)
            print(
                f"| {kind} | {items:,} | {spent:.2f} | {items / spent:,.0f} | {spent / base:.1f} | {peak:.0f} |",
                flush=True,
            )
    kills, spent, peak = killed(options.items, seconds)
    print(f"| sqlite, killed {kills} times and resumed | {options.items:,} | {spent:.2f} | | | {peak:.0f} |")
    return None


if __name__ == "__main__":
    main()
