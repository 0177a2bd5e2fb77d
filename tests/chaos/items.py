"""A map over many items that is killed at random until it is done.

What it must show: every item is committed once, nothing that was committed is called again, at most the items
in flight are called twice, and the file of outputs is complete and in order; no process needs more memory for
more items.

``python -m tests.chaos.items URL FOLDER`` is the process that is killed.
"""

import asyncio
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from tests.chaos.check import Figures

from stroma import (
    FailureClass,
    FailurePolicy,
    JsonLines,
    NodeContract,
    StromaRunner,
    current_node,
    map_over,
    open_store,
)
from stroma import stroma_node as mark
from stroma.trace.events import FAILED_ITEM

AT_ONCE = 16
RUN = "many"
ROOT = Path(__file__).parents[2]
#: Every so many items one fails for good, and one fails once.
BAD, FLAKY = 997, 101


class Number(BaseModel):
    n: int


class Square(BaseModel):
    n: int
    square: int


class Nothing(BaseModel):
    pass


async def work(url: str, folder: Path) -> None:
    """Bring the run to its end. Each call is noted in a file by one write, which survives a kill."""
    side = os.open(folder / "calls", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    contract: NodeContract[Any, Any] = NodeContract(
        node_id="square", input_schema=Number, output_schema=Square
    )

    @mark("square", contract)
    async def square(state: Number) -> Any:
        os.write(side, f"{state.n}\n".encode())
        await asyncio.sleep(0)
        if state.n % BAD == BAD - 1:
            raise ValueError("it never works")
        here = current_node()
        if state.n % FLAKY == 0 and here.attempt == 1:  # Failures before a kill count.
            raise TimeoutError("once")
        return {"n": state.n, "square": state.n**2}, 3

    never = {kind: FailurePolicy(max_retries=0) for kind in FailureClass}
    never[FailureClass.RECOVERABLE] = FailurePolicy(max_retries=1, backoff_seconds=0)
    group = map_over(
        JsonLines(folder / "in.jsonl"),
        square,
        into=JsonLines(folder / "out.jsonl"),
        max_concurrency=AT_ONCE,
        on_item_failure="collect",
    )
    opened: Any = open_store(url)
    os.write(1, b"ready\n")
    async with opened as store:
        runner = StromaRunner.quick(
            store=store, run_id=RUN, resume=True, policy_map=never, max_recoveries=1_000_000
        )
        result = await runner.run([group], Nothing())
    assert result.failure is None, result.failure
    with open("/proc/self/status") as status:
        peak = next(int(line.split()[1]) for line in status if line.startswith("VmHWM"))
    os.write(1, f"{result.failed_items} {peak}\n".encode())


def start(url: str, folder: Path) -> subprocess.Popen[bytes]:
    """A process that has imported everything and is about to begin."""
    command = [sys.executable, "-m", "tests.chaos.items", url, str(folder)]
    env = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'src'}"}
    # Unbuffered: readline() would take what communicate() is to return from a process that has ended already.
    process = subprocess.Popen(
        command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=0
    )
    if process.stdout.readline() != b"ready\n":
        raise AssertionError(process.communicate()[1].decode())
    return process


def one_round(url: str, folder: Path, items: int, seed: str, longest: float) -> Figures:
    """Kill processes at random moments until one has ended. ``longest``: seconds that one is left alone."""
    draw, figures = random.Random(seed), Figures(rounds=1, runs=1)
    (folder / "in.jsonl").write_text("".join(f'{{"n": {n}}}\n' for n in range(items)))
    while True:
        process = start(url, folder)
        try:
            out, errors = process.communicate(timeout=draw.uniform(0, longest))
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.communicate()
            figures.kills += 1
            longest *= 1.1  # However slow the machine is, one of them will get to the end.
            continue
        if process.returncode != 0:
            figures.broken.append(f"{seed}: {errors.decode()[-2000:]}")
            return figures
        break
    failed, peak = map(int, out.split())
    figures.more["MB at the peak"] = peak // 1024
    _check(url, folder, items, failed, figures, seed)
    return figures


def _check(url: str, folder: Path, items: int, failed: int, figures: Figures, seed: str) -> None:
    def must(holds: bool, what: str) -> None:
        if not holds:
            figures.broken.append(f"{seed}: {what}")

    bad = list(range(BAD - 1, items, BAD))
    well = [n for n in range(items) if n % BAD != BAD - 1]
    outputs = [json.loads(line) for line in (folder / "out.jsonl").open()]
    must(outputs == [{"n": n, "square": n**2} for n in well], "the file is not complete or out of order")
    failures = [json.loads(line)["index"] for line in (folder / "out.failures.jsonl").open()]
    must(failures == bad and failed == len(bad), "failures are lost or twice there")
    must(not list(folder.glob(".*.part")), "half a file is left behind")

    opened: Any = open_store(url)
    with opened as store:
        record = store.get_run(RUN)
        attempts = store.attempts(RUN)
        steps = store.read(lambda rows: list(rows.steps(rows.find(RUN).run, record.execution)), [])
    committed = {int(step.branch): step.step.contract for step in steps if step.branch}
    must(record.status in ("COMPLETED", "RESUMED"), f"the run is {record.status}")
    must(sorted(committed) == list(range(items)), "an item is not committed")
    must(record.tokens == 3 * len(well), f"{record.tokens} tokens are counted")
    collected = [n for n, contract in committed.items() if contract.startswith(FAILED_ITEM)]
    must(sorted(collected) == bad, "other items than those that failed are collected")
    entries = Counter(int(a.branch) for a in attempts if a.branch and a.outcome in ("success", "failure"))
    calls = Counter(int(line) for line in (folder / "calls").read_text().split())
    repeated = sum(calls[n] - entries[n] for n in calls)
    must(set(calls) == set(range(items)), "an item was never called")
    must(all(calls[n] >= entries[n] for n in entries), "an attempt is kept that was never made")
    must(repeated <= AT_ONCE * figures.kills, f"{repeated} calls were repeated after {figures.kills} kills")
    figures.commits += len(committed)
    figures.repeated += repeated


FAULTS = ("items",)
ITEMS = 100_000
SECONDS = 4.0


def rounds(
    fault: str, url: str, seed: int, numbers: range, broke: Callable[[int, Figures], None], items: int = ITEMS
) -> Figures:
    figures = Figures()
    for number in numbers:
        with tempfile.TemporaryDirectory(prefix="stroma-chaos-") as name:
            folder = Path(name)
            where = f"sqlite:///{folder / 'runs.db'}" if url == "sqlite" else url
            started = time.monotonic()
            done = one_round(where, folder, items, f"{seed} {fault} {number}", SECONDS)
            done.more["seconds"] = round(time.monotonic() - started)
            if url != "sqlite":
                _delete(url)
        figures.add(done)
        if done.broken:
            broke(number, done)
    return figures


def _delete(url: str) -> None:
    async def main() -> None:
        opened: Any = open_store(url)
        async with opened as store:
            await store.delete(RUN)

    asyncio.run(main())


if __name__ == "__main__":
    asyncio.run(work(sys.argv[1], Path(sys.argv[2])))
