"""Simulate processes that share a store, and check what they were promised.

usage: ./dev run python -m tests.simulation [--seeds N] [--first N] [--fault NAME ...] [--workers N]

Each seed is one history of three processes; the same seed gives the same one. Seeds that break a promise are
printed with what is wrong, and the first one with its history. `--first SEED --seeds 1` runs one again.
`--fault` puts back a fault that the simulation must find: see `faults.py`.

Exit code 0 if every promise held, 1 if one was broken, 2 for wrong arguments.
"""

import argparse
import concurrent.futures
import os
import sys
import time
from collections import Counter
from collections.abc import Iterable
from typing import NamedTuple

from tests.simulation.world import FAULTS, World, simulate

PORTION = 100  # seeds that a worker does at once
MOST_SHOWN = 5


class Outcome(NamedTuple):
    """What some seeds came to."""

    seeds: int
    events: int
    broken: list[tuple[int, list[str]]]
    faults: Counter[str]


def look(seeds: Iterable[int], faults: tuple[str, ...] = (), *, most: int | None = None) -> Outcome:
    """Simulate seeds, up to the first ``most`` that break a promise."""
    events, number, broken, struck = 0, 0, list[tuple[int, list[str]]](), Counter[str]()
    for seed in seeds:
        world = simulate(seed, *faults)
        number += 1
        events += len(world.history)
        struck += world.faults
        if world.problems:
            broken.append((seed, world.problems))
            if most is not None and len(broken) >= most:
                break
    return Outcome(number, events, broken, struck)


def explain(world: World) -> str:
    """Return the history of a world, what is wrong with it, and how to run it again."""
    lines = [f"{when:9.4f}  {who:5} {' '.join(map(_shown, more))}" for when, who, *more in world.history]
    faults = "".join(f" --fault {fault}" for fault in world.put_in)
    return "\n".join(
        [
            f"seed {world.seed}: {world.kind}, limit {world.limit} tokens, places {world.places()}",
            *lines,
            *(f"broken: {problem}" for problem in world.problems),
            f"again: ./dev run python -m tests.simulation --first {world.seed} --seeds 1{faults}",
        ]
    )


def _shown(value: object) -> str:
    return str(value) if len(str(value)) < 300 else f"{str(value)[:300]} ..."


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.simulation", description=(__doc__ or "").split("\n\n")[0]
    )
    parser.add_argument("--seeds", type=int, default=300, help="how many (300)")
    parser.add_argument("--first", type=int, default=0, help="the first one (0)")
    parser.add_argument("--fault", action="append", default=[], choices=FAULTS, help="put one back")
    parser.add_argument(
        "--workers", type=int, default=os.cpu_count() or 1, help="processes that share the work"
    )
    value = parser.parse_args(argv)
    faults, seeds = tuple(value.fault), range(value.first, value.first + value.seeds)
    began = time.monotonic()
    if value.seeds == 1:
        world = simulate(value.first, *faults)
        print(explain(world))
        return 1 if world.problems else 0
    portions = [seeds[first : first + PORTION] for first in range(0, len(seeds), PORTION)]
    findings: list[Outcome] = []
    with concurrent.futures.ProcessPoolExecutor(value.workers) as pool:
        for outcome in pool.map(look, portions, [faults] * len(portions)):
            findings.append(outcome)
            for seed, problems in outcome.broken:
                print(f"seed {seed}: {'; '.join(problems)}", file=sys.stderr, flush=True)
            if sum(len(one.broken) for one in findings) >= MOST_SHOWN:
                pool.shutdown(cancel_futures=True)
                break
    struck: Counter[str] = sum((one.faults for one in findings), Counter())
    broken = [seed for one in findings for seed, _ in one.broken]
    print(
        f"{sum(one.seeds for one in findings)} seeds in {time.monotonic() - began:.0f} s, "
        f"{sum(one.events for one in findings)} events, {len(broken)} broken"
    )
    print("struck: " + ", ".join(f"{count} x {fault}" for fault, count in sorted(struck.items())))
    if broken:
        print(explain(simulate(broken[0], *faults)), file=sys.stderr)
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
