"""How the cost grows with nodes, size of the state, concurrent runs and children: docs/images/growth-*.svg.

    ./dev bench --growth [--rounds N]

Least CPU time over the rounds, ours and the bare work in turn.
"""

from __future__ import annotations

import asyncio
import gc
import json
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from benchmarks import chart, work
from stroma import NodeContract, StromaRunner, stroma_node

IMAGES = Path(__file__).parents[1] / "docs" / "images"
_SECONDS = 0.03

Do = Callable[[], Awaitable[Any]]


class Rows(BaseModel):
    i: int
    rows: list[dict[str, Any]]


def _state(kilobytes: int) -> dict[str, Any]:
    """So many rows of about half a kilobyte."""
    row = {"name": "row", "score": 0.5, "tags": ["a", "b", "c"], "meta": {"page": 1}, "text": "x" * 420}
    return {"i": 0, "rows": [{"id": k, **row} for k in range(2 * kilobytes)]}


def sized(kilobytes: int, nodes: int = 4) -> tuple[Do, Do]:
    """Ours and bare: nodes that hand on a state of so many kilobytes."""
    start = _state(kilobytes)

    async def node(state: Any) -> dict[str, Any]:
        return {"i": state.i + 1, "rows": state.rows}

    sequence: list[Any] = []
    for k in range(nodes):
        contract: Any = NodeContract(node_id=f"n{k}", input_schema=Rows, output_schema=Rows)
        sequence.append(stroma_node(f"n{k}", contract)(node))

    async def mine() -> None:
        result = await StromaRunner.quick().run(sequence, Rows(**start))
        assert result.status == "COMPLETED"

    async def bare() -> None:
        state = start
        for _ in range(nodes):
            state = Rows.model_validate(await node(Rows.model_validate(state))).__dict__

    return mine, bare


def at_once(runs: int) -> tuple[Do, Do]:
    mine, bare = work.ours(10), work.floor(10)

    async def many(run: Do) -> None:
        await asyncio.gather(*(run() for _ in range(runs)))

    return lambda: many(mine), lambda: many(bare)


async def _least(pair: tuple[Do, Do], units: int, rounds: int) -> tuple[float, float]:
    """CPU microseconds of a unit: ours and bare."""
    found: tuple[list[float], list[float]] = ([], [])
    times = []
    for call in pair:
        await call()
        begin = time.process_time()
        await call()
        times.append(max(1, round(_SECONDS / max(1e-6, time.process_time() - begin))))
    for _ in range(rounds):
        for call, count, costs in zip(pair, times, found, strict=True):
            gc.collect()
            begin = time.process_time()
            for _ in range(count):
                await call()
            costs.append((time.process_time() - begin) / (count * units) * 1e6)
    return min(found[0]), min(found[1])


def main(rounds: int) -> int:
    axes: list[tuple[str, str, list[int], Callable[[int], tuple[Do, Do]], Callable[[int], int]]] = [
        (
            "nodes in a run",
            "us per node",
            [1, 10, 100, 1000, 5000],
            lambda n: (work.ours(n), work.floor(n)),
            lambda n: n,
        ),
        ("KB of state", "us per node", [1, 10, 100, 1000], sized, lambda _: 4),
        ("runs at once", "us per node", [1, 10, 100, 1000], at_once, lambda n: 10 * n),
        (
            "children",
            "us per child",
            [1, 10, 100, 1000],
            lambda n: (work.side_by_side(n), work.gathered(n)),
            lambda n: n,
        ),
    ]
    drawn, figures = [], {}
    for across, up, xs, make, units in axes:
        mine: dict[float, float] = {}
        bare: dict[float, float] = {}
        for x in xs:
            mine[x], bare[x] = asyncio.run(_least(make(x), units(x), rounds))
            print(
                f"{across:16} {x:6,}  {mine[x]:10.2f} {up}, bare {bare[x]:10.2f}  {mine[x] / bare[x]:.2f}x",
                flush=True,
            )
        drawn.append((across, up, {"Stroma": mine, "bare": bare}))
        figures[across] = {"stroma": mine, "bare": bare}
    for name, theme in chart.THEMES.items():
        text = chart.panels("CPU time, as things grow", drawn, theme)
        (IMAGES / f"growth-{name}.svg").write_text(text)
    print(json.dumps(figures))
    return 0
