"""What Stroma costs beside its peers and the bare work. See the modules that are named here.

./dev bench [--nodes 1,10,100,1000] [--rounds N]    # benchmarks.compare: a table
./dev bench --write [--only REGEX]                   # benchmarks.figures: all tables and charts of the docs
./dev bench --growth                                 # benchmarks.growth: plots
./dev bench --gate [--write]                         # benchmarks.gate: no node takes more instructions than before
"""

from __future__ import annotations

import argparse
import sys


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="./dev bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--gate", action="store_true")
    what.add_argument("--growth", action="store_true")
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--only", default="")
    parser.add_argument("--nodes", default="1,10,100,1000")
    parser.add_argument("--rounds", type=int, default=7)
    given = parser.parse_args()
    if given.gate:
        from benchmarks import gate

        return gate.main(write=given.write)
    if given.growth:
        from benchmarks import growth

        return growth.main(given.rounds)
    counts = [int(n) for n in given.nodes.split(",")]
    if given.write:
        from benchmarks import figures

        return figures.main(counts, given.rounds, given.only)
    from benchmarks import compare

    return compare.main(counts, given.rounds, write=False)


if __name__ == "__main__":
    sys.exit(main())
