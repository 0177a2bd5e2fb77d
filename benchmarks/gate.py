"""What Stroma costs may not rise: the instructions of Python that a node takes, held against those written down.

    ./dev bench --gate            # exit code 1 if a node takes 5 % more than gate.json says
    ./dev bench --gate --write    # write the counts of this Python down
    python -m benchmarks.gate     # the table of the page about performance: CPU time as ratios to the bare work

A count is the same on every machine and under any load. The work of C functions, such as validation and
pickling, is only in the table.
"""

from __future__ import annotations

import asyncio
import gc
import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from benchmarks import work
from benchmarks.work import Run

SLACK = 5  # percent
_KEPT = Path(__file__).with_name("gate.json")
_SAMPLE_SECONDS = 0.01
_ROUNDS = 80
_WARM_UP = 3  # runs; from then on the counts of runs differ by 0.01 % at most


@dataclass
class Case:
    """``mine`` and ``base`` do ``mine_n`` and ``base_n`` nodes; the ratio is that of a node of each."""

    node: str
    mine: Callable[[int], Run]
    mine_n: int
    than: str
    base: Callable[[int], Run]
    base_n: int
    costs: tuple[list[float], list[float]] = field(default_factory=lambda: ([], []))

    @property
    def name(self) -> str:
        return f"{self.node}, to {self.than}"

    @property
    def ratio(self) -> float:
        return min(self.costs[0]) / min(self.costs[1])


def cases() -> list[Case]:
    validation = ("validation alone", work.floor)
    return [
        Case("a run of one node", work.ours, 1, *validation, 1),
        Case("a node of 100", work.ours, 100, *validation, 100),
        Case("a node of 1,000", work.ours, 1000, *validation, 1000),
        Case("three hooks", work.watched, 100, "none", work.ours, 100),
        Case("each node fails once", work.retried, 100, *validation, 100),
        Case("a node of 1,000 with a budget", work.limited, 1000, "one of 100", work.limited, 100),
        Case("a child of parallel", work.side_by_side, 100, "one of gather", work.gathered, 100),
        Case("a step of a flow of 1,000", work.flowing, 1000, "a node of a list", work.ours, 1000),
    ]


async def _sample(run: Run, nodes: int, times: int) -> float:
    """CPU microseconds per node."""
    gc.collect()
    begin = time.process_time()
    for _ in range(times):
        assert await run() == nodes
    return (time.process_time() - begin) / (times * nodes) * 1e6


async def _measure(case: Case) -> None:
    """Take samples of both sides in turns; what else the machine does can only add to one, so the least is kept."""
    sides = []
    for make, nodes in ((case.mine, case.mine_n), (case.base, case.base_n)):
        run = make(nodes)
        await _sample(run, nodes, 1)
        cost = await _sample(run, nodes, 1)
        sides.append((run, nodes, max(1, round(_SAMPLE_SECONDS * 1e6 / (cost * nodes)))))
    for _ in range(_ROUNDS):
        for costs, (run, nodes, times) in zip(case.costs, sides, strict=True):
            costs.append(await _sample(run, nodes, times))


def print_table() -> None:
    """Print the ratios of CPU times, for the page about performance."""
    print("| | times |\n| --- | --- |")
    for case in cases():
        asyncio.run(_measure(case))
        print(f"| {case.name} | {case.ratio:.2g} |")


async def count_instructions(run: Run) -> int:
    """Return how many instructions of Python one run takes, after some that fill the caches."""
    for _ in range(_WARM_UP):
        await run()
    counted = 0

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        nonlocal counted
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        counted += event == "opcode"
        return trace

    others = sys.gettrace()
    gc.collect()
    gc.disable()  # Finalizers of what others left behind would be counted.
    sys._getframe().f_trace_opcodes = True  # Python 3.12 traces none if no frame wants them at settrace().
    sys.settrace(trace)
    try:
        await run()  # Python 3.13 traces a function's instructions from its second call on.
        counted = 0
        await run()
    finally:
        sys.settrace(others)
        gc.enable()
    return counted


def above(found: float, kept: float) -> bool:
    """Return True if a count is higher than the slack allows."""
    return found > kept * (1 + SLACK / 100)


def main(*, write: bool) -> int:
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    known: dict[str, dict[str, int]] = json.loads(_KEPT.read_text())
    kept = {} if write else known.get(python, {})
    if not write and not kept:
        print(f"nothing is written down for Python {python}; use one of {', '.join(known)}, or --write")
        return 0
    failed, found = [], {}
    for case in cases():
        counted = asyncio.run(count_instructions(case.mine(case.mine_n)))
        found[case.node] = round(counted / case.mine_n)
        before = kept.get(case.node, found[case.node])
        wrong = above(found[case.node], before)
        failed += [case.node] if wrong else []
        print(
            f"{'FAIL' if wrong else 'ok':4} {case.node:35} {found[case.node]:6,}  {'' if write else f'was {before:,}'}"
        )
    if write:
        _KEPT.write_text(json.dumps({**known, python: found}, indent=2) + "\n")
    if failed:
        print(
            f"takes more instructions than before: {', '.join(failed)}. Profile it (docs/performance.md), or, if it "
            "must cost that, write the new counts down with ./dev bench --gate --write and say why in the commit"
        )
    return 1 if failed else 0


if __name__ == "__main__":
    print_table()
