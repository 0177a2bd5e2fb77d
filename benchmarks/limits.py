"""How far one process goes: runs a second, runs at once, nodes in a run, size of a state, events in a trace.

    ./dev run python -m benchmarks.limits

Each line is a process of its own: seconds of CPU, and by how much the work raised the peak of its memory.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from benchmarks import work
from benchmarks.growth import sized
from benchmarks.scale import environment, memory_kb
from stroma import SQLiteStore, StromaRunner

ROOT = Path(__file__).parents[1]


async def in_turn(runs: int, nodes: int) -> None:
    run = work.ours(nodes)
    for _ in range(runs):
        await run()


async def at_once(runs: int, nodes: int) -> None:
    run = work.ours(nodes, work.yielding)
    await asyncio.gather(*(run() for _ in range(runs)))


async def durable(runs: int, nodes: int) -> None:
    with tempfile.TemporaryDirectory(prefix="stroma-bench-") as folder:
        async with SQLiteStore(Path(folder, "runs.db")) as store:
            run = work.ours(nodes, store=store)
            await asyncio.gather(*(run() for _ in range(runs)))


async def large(kilobytes: int, nodes: int) -> None:
    mine, _ = sized(kilobytes, nodes)
    await mine()


async def events(_: int, nodes: int) -> None:
    result = await StromaRunner.quick().run(work.sequence(nodes), work.In(**work.START))
    assert len(result.trace.to_json()) > 100 * nodes


#: By what is done: the work, how many runs (or kilobytes), and nodes.
CASES: dict[str, tuple[Callable[[int, int], Awaitable[None]], int, int]] = {
    "5,000 runs of 1 node, one after the other": (in_turn, 5000, 1),
    "1,000 runs of 10 nodes, one after the other": (in_turn, 1000, 10),
    "1,000 runs of 10 nodes at once": (at_once, 1000, 10),
    "10,000 runs of 10 nodes at once": (at_once, 10_000, 10),
    "300 runs of 10 nodes at once, in SQLite": (durable, 300, 10),
    "a run of 10,000 nodes": (in_turn, 1, 10_000),
    "a run of 100,000 nodes": (in_turn, 1, 100_000),
    "4 nodes on a state of 10 MB": (large, 10_000, 4),
    "4 nodes on a state of 50 MB": (large, 50_000, 4),
    "a trace of 100,000 events, as JSON": (events, 1, 100_000),
}


async def _child(name: str) -> None:
    call, number, nodes = CASES[name]
    await call(min(number, 2), 2)
    before = memory_kb("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # Forget the highest peak so far.
    begin, cpu = time.perf_counter(), time.process_time()
    await call(number, nodes)
    wall, cpu = time.perf_counter() - begin, time.process_time() - cpu
    print(json.dumps([cpu, wall, (memory_kb("VmHWM") - before) / 1024]))


def main() -> None:
    if sys.argv[1:2] == ["--child"]:
        return asyncio.run(_child(sys.argv[2]))
    print("| what | CPU s | wall s | memory, MB |\n| --- | --- | --- | --- |")
    for name in CASES:
        command: list[Any] = [sys.executable, "-m", "benchmarks.limits", "--child", name]
        done = subprocess.run(command, capture_output=True, text=True, env=environment(), cwd=ROOT)
        cpu, wall, mb = json.loads(done.stdout) if not done.returncode else (0.0, 0.0, 0.0)
        said = "" if not done.returncode else f" {done.stderr.strip().splitlines()[-1]}"
        print(f"| {name}{said} | {cpu:.2f} | {wall:.1f} | {mb:.0f} |", flush=True)
    return None


if __name__ == "__main__":
    main()
