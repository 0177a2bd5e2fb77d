"""A map over 20,000 items on a Temporal cluster, one of whose workers is killed in the middle.

What it must show: the run ends, every item is in the output, in order; only items in flight at the kill are called twice; and
no history becomes longer than the bound that the runner was given, however many items there are.
"""

from __future__ import annotations

import asyncio
import os
import pickle
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from tests.chaos.check import Figures
from tests.chaos.cluster_worker import connect
from tests.chaos.rounds import Processes, apart
from tests.servers_temporal import TemporalServer

from stroma import NodeContract, Pipeline, RunStatus, map_over, stroma_node
from stroma.temporal import TemporalRunner, stroma_worker

ITEMS = 20_000
AT_ONCE = 64
#: Events after which a run goes on with a fresh history; a page of items is seen through, and takes some more.
HISTORY, PAGE = 5_000, 3_000
ROUND_SECONDS = 3_000.0


class Number(BaseModel):
    n: int


class Square(BaseModel):
    square: int


class Numbers(BaseModel):
    numbers: list[int]


class Sum(BaseModel):
    total: int


class Squares(BaseModel):
    squares: list[Square]


def pipeline(calls: int | None = None) -> Pipeline:
    @stroma_node("square", NodeContract(node_id="square", input_schema=Number, output_schema=Square))
    async def square(state: Number) -> dict[str, int]:
        assert calls is not None
        os.write(calls, f"{state.n}\n".encode())
        return {"square": state.n**2}

    @stroma_node("sum", NodeContract(node_id="sum", input_schema=Squares, output_schema=Sum))
    async def add(state: Squares) -> dict[str, int]:
        # In order: a wrong one is another sum.
        return {"total": sum((i + 1) * one.square for i, one in enumerate(state.squares))}

    return Pipeline("items", [map_over("numbers", square, into="squares", max_concurrency=AT_ONCE), add])


def work(address: str, folder: Path) -> None:
    async def serve() -> None:
        calls = os.open(folder / "calls", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        client = await connect(address)
        async with stroma_worker(client, "items", [pipeline(calls)], payloads=str(folder / "states")):
            await asyncio.Event().wait()

    asyncio.run(serve())


async def run(address: str, folder: Path, items: int, figures: Figures) -> None:
    client = await connect(address)
    runner = TemporalRunner(
        client, "items", payloads=str(folder / "states"), history_events=HISTORY, heartbeat_seconds=5,
        redelivery_seconds=0.1,
    )  # fmt: skip
    result = await runner.run(pipeline(), Numbers(numbers=list(range(items))), run_id="many")
    expected = Sum(total=sum((n + 1) * n**2 for n in range(items)))
    if result.status is not RunStatus.COMPLETED or result.final_state != expected:
        why = result.failure and result.failure.message
        figures.broken.append(f"I5: the run is {result.status}: {why or 'its state is another one'}")
    called = Counter((folder / "calls").read_text().split())
    if len(called) != items:
        figures.broken.append(f"I1: {len(called)} of {items} items were called")
    figures.commits = len(called)
    figures.repeated = sum(called.values()) - len(called)
    if figures.repeated > AT_ONCE:
        figures.broken.append(f"I3: {figures.repeated} calls were repeated, {AT_ONCE} may be in flight")
    lengths = await _histories(client)
    figures.more.update({"histories": len(lengths), "events in the longest": max(lengths)})
    if max(lengths) > HISTORY + PAGE:
        figures.broken.append(f"a history has {max(lengths)} events, {HISTORY} were asked for")


async def _histories(client: Any) -> list[int]:
    """How many events each history of the run has."""
    while True:  # The server lists what it has a moment later.
        findings = [one.history_length async for one in client.list_workflows("WorkflowId = 'many'")]
        if findings and all(findings):
            return findings
        await asyncio.sleep(0.2)


def _round(folder: Path, items: int, draw: random.Random, address: str) -> Figures:
    figures = Figures(rounds=1, runs=1)
    instance = Processes("", str(folder / "calls"), str(folder / "errors"))
    try:
        workers = [instance.call(lambda: work(address, folder)) for _ in range(2)]
        report = folder / "told"

        def drive() -> None:
            mine = Figures()
            asyncio.run(run(address, folder, items, mine))
            report.write_bytes(pickle.dumps(mine))

        driver = instance.call(drive)
        at = draw.randint(items // 10, items // 2)
        calls = folder / "calls"
        lines = lambda: calls.read_bytes().count(b"\n") if calls.exists() else 0  # noqa: E731
        while driver in instance.alive and lines() < at:
            instance.poll()
            time.sleep(0.2)
        instance.kill(workers[0])
        instance.call(lambda: work(address, folder))
        if not instance.wait(ROUND_SECONDS, until=lambda: driver not in instance.alive):
            figures.broken.append(f"I5: it did not end in {ROUND_SECONDS:g} s")
        figures.kills, figures.broken = instance.kills, figures.broken + instance.broken
        if report.exists():
            result = pickle.loads(report.read_bytes())
            figures.commits, figures.repeated, figures.more = result.commits, result.repeated, result.more
            figures.broken += result.broken
    finally:
        instance.end()
    return figures


def rounds(seed: int, numbers: range, broke: Callable[[int, Figures], None], items: int = ITEMS) -> Figures:
    """Some rounds. ``broke`` is told of each that broke an invariant."""
    total = Figures()
    for number in numbers:
        draw = random.Random(f"{seed} items {number}")
        with tempfile.TemporaryDirectory(prefix="stroma-items-") as folder:
            server = TemporalServer()
            try:
                figures = apart(lambda: _round(Path(folder), items, draw, server.address))  # noqa: B023
            finally:
                server.kill()
        total.add(figures)
        if figures.broken:
            broke(number, figures)
            print(f"round {number} is broken", file=sys.stderr)
    return total
