"""Strike runs with faults and check that what was promised holds.

usage: ./dev chaos [--fault NAME ...] [--rounds N] [--store URL] [--runs N] [--seed S]
       [--first N]

Each fault prints one line of figures. Its rounds are drawn from the seed and their number, so that one of
them can be repeated with --first N --rounds 1; when a signal arrives is up to the machine all the same. The
fault "items" (a map over 100,000 items, a minute for each round) strikes only where it is named. An interrupt
ends with the figures so far.

Exit code 0 if every invariant held, 1 if one was broken, 2 for wrong arguments.
"""

import argparse
import sys
import time

from tests.chaos import effects, items, power, queue, restored, rounds, servers, unrest
from tests.chaos.check import Figures

STRIKES = {"restored": "restores", "powercut": "cuts", "fsync": "failures", **unrest.STRIKES}
PROCESSES = {**rounds.FAULTS, **unrest.FAULTS, **restored.FAULTS, **effects.FAULTS, **queue.FAULTS}
FAULTS = (*PROCESSES, *power.FAULTS, *items.FAULTS)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="./dev chaos", description=__doc__.split("\n\n")[0])
    parser.add_argument("--fault", action="append", choices=FAULTS, help="which; all that the store can have")
    parser.add_argument(
        "--rounds", type=int, default=20, help="of each fault (20); cuts, for powercut and fsync"
    )
    parser.add_argument(
        "--store",
        default="sqlite",
        help="sqlite (new files), postgres, redis (a server of the tests), or the URL of a store to fill",
    )
    parser.add_argument("--runs", type=int, default=12, help="of each round of queue and temporal (12)")
    parser.add_argument("--seed", type=int, default=int(time.time()), help="what chance begins with")
    parser.add_argument("--first", type=int, default=0, help="the number of the first round")
    value = parser.parse_args(argv)
    numbers = range(value.first, value.first + value.rounds)
    broken = 0

    with servers.served(value.store) as (url, server):

        def can_have(fault: str) -> bool:
            # Only a store of its own file can lose its power without its neighbours. A map of 100,000 items
            # takes a minute for each round: it is struck where somebody asks for it.
            if fault in items.FAULTS:
                return bool(value.fault)
            return (
                value.store == "sqlite"
                if fault in power.FAULTS
                else unrest.can_have(value.store, fault, server)
            )

        for fault in value.fault or filter(can_have, FAULTS):
            if not can_have(fault):
                parser.error(f"--store {value.store} cannot have the fault {fault}")

            def broke(number: int, figures: Figures, fault: str = fault) -> None:
                for what in figures.broken:
                    print(f"broken: {what}", file=sys.stderr)
                print(
                    f"again: ./dev chaos --store {value.store} --seed {value.seed} --fault {fault} "
                    f"--first {number} --rounds 1",
                    file=sys.stderr,
                    flush=True,
                )

            if fault in PROCESSES:
                strike = PROCESSES[fault]
                figures = rounds.rounds(fault, strike, url, server, value.seed, numbers, broke, value.runs)
            elif fault in items.FAULTS:
                figures = items.rounds(fault, url, value.seed, numbers, broke)
            else:
                figures = power.rounds(fault, value.seed, numbers, broke)
            print(figures.line(fault, STRIKES.get(fault, "kills")), flush=True)
            broken += len(figures.broken)
    if broken:
        print(f"{broken} invariants broken; seed {value.seed}", file=sys.stderr)
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
