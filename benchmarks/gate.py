"""What Stroma costs may not rise: ratios to the bare work, held against those that are written down.

    ./dev bench --gate            # exit code 1 if a ratio is more than 15 % above the one in gate.json
    ./dev bench --gate --slack 60 # 60 % in place of 15, where others share the caches of the processor
    ./dev bench --gate --write    # measure thoroughly, and write the ratios of this Python down
    ./dev bench --gate --slower 25    # see that it notices: all of ours takes 25 % longer

A ratio is the least CPU time of ours divided by the least of the bare work beside it, in samples that take
turns. What else goes on on the machine can only add to a sample, so both come down to their true values as
samples are taken; a ratio that stands too high is measured on until it has had every chance. No privileges
and no counters are needed. What shares the caches of the processor, as on hosts of CI, costs ours more than
the bare work: up to 40 % for minutes (2 cores of a Xeon, 1 December 2026). Hence --slack.
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

from benchmarks import work
from benchmarks.work import Run

SLACK = 15.0  # percent
_KEPT = Path(__file__).with_name("gate.json")
_SAMPLE_SECONDS = 0.01
_LEAST, _MOST = 8, 100  # rounds
_THOROUGH = 80


@dataclass
class Case:
    """``mine`` and ``base`` do ``mine_n`` and ``base_n`` nodes; the ratio is that of a node of each."""

    name: str
    mine: Callable[[int], Run]
    mine_n: int
    base: Callable[[int], Run]
    base_n: int
    costs: tuple[list[float], list[float]] = field(default_factory=lambda: ([], []))

    @property
    def ratio(self) -> float:
        return min(self.costs[0]) / min(self.costs[1])


def cases() -> list[Case]:
    return [
        Case("A: a run of one node, to validation alone", work.ours, 1, work.floor, 1),
        Case("A: a node of 100, to validation alone", work.ours, 100, work.floor, 100),
        Case("A: a node of 1,000, to validation alone", work.ours, 1000, work.floor, 1000),
        Case("B: three hooks, to none", work.watched, 100, work.ours, 100),
        Case("B: each node fails once, to validation alone", work.retried, 100, work.floor, 100),
        Case("D: a node of 1,000 with a budget, to one of 100", work.limited, 1000, work.limited, 100),
        Case("H: a child of parallel, to one of gather", work.side_by_side, 100, work.gathered, 100),
        Case("I: a step of a flow of 1,000, to a node of a list", work.flowing, 1000, work.ours, 1000),
    ]


async def _sample(run: Run, nodes: int, times: int) -> float:
    """CPU microseconds per node."""
    gc.collect()
    begin = time.process_time()
    for _ in range(times):
        assert await run() == nodes
    return (time.process_time() - begin) / (times * nodes) * 1e6


async def _measure(case: Case, limit: float | None, slower: float) -> None:
    sides = []
    for make, nodes in ((case.mine, case.mine_n), (case.base, case.base_n)):
        run = make(nodes)
        await _sample(run, nodes, 1)
        cost = await _sample(run, nodes, 1)
        sides.append((run, nodes, max(1, round(_SAMPLE_SECONDS * 1e6 / (cost * nodes)))))
    for number in range(_THOROUGH if limit is None else _MOST):
        for index, (run, nodes, times) in enumerate(sides):
            cost = await _sample(run, nodes, times)
            case.costs[index].append(cost * (1 + slower / 100) if index == 0 else cost)
        if limit is not None and number >= _LEAST and case.ratio <= limit:
            return


def print_table() -> None:
    """Print the ratios as they are, for the page about performance."""
    print("| | times |\n| --- | --- |")
    for case in cases():
        asyncio.run(_measure(case, None, 0))
        print(f"| {case.name.partition(': ')[2]} | {case.ratio:.2g} |")


def above(found: float, kept: float, slack: float = SLACK) -> bool:
    """Return True if a ratio is higher than the slack allows, in percent."""
    return found > kept * (1 + slack / 100)


def main(*, write: bool, slower: float, slack: float = SLACK) -> int:
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    known: dict[str, dict[str, float]] = json.loads(_KEPT.read_text())
    kept = {} if write else known.get(python, {})
    if not write and not kept:
        print(f"nothing is written down for Python {python}; use one of {', '.join(known)}, or --write")
        return 0
    failed, found = [], {}
    for case in cases():
        limit = None if write else kept[case.name] * (1 + slack / 100)
        asyncio.run(_measure(case, limit, slower))
        found[case.name] = round(case.ratio, 3)
        said = "" if write else f"at most {limit:.2f}"
        wrong = not write and above(case.ratio, kept[case.name], slack)
        failed += [case.name] if wrong else []
        print(
            f"{'FAIL' if wrong else 'ok':4} {case.name:50} {case.ratio:6.2f}  {said}  ({len(case.costs[0])} rounds)",
            flush=True,
        )
    if write:
        _KEPT.write_text(json.dumps({**known, python: found}, indent=2) + "\n")
    if failed:
        print(
            f"costs more than before: {'; '.join(failed)}. Profile it (docs/performance.md), or, if it must cost that, "
            "write the new ratios down with ./dev bench --gate --write and say why in the commit"
        )
    return 1 if failed else 0


if __name__ == "__main__":
    print_table()
