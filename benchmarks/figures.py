"""Measure the tables of the documentation again, and write them into its pages.

    ./dev bench --write [--only REGEX]    # only what REGEX finds: compare, growth, or a command

A page names the command of a table in a comment. What the command prints is written below the comment, with
the machine, the date and the load.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks import compare, growth

ROOT = Path(__file__).parents[1]
_BLOCK = re.compile(r"(?<=<!-- written by )python -m ([^\n]+) -->\n.*?(?=<!-- to here -->)", re.DOTALL)


def measured(command: str) -> str:
    """Return what a command prints, and where and when it was measured."""
    load = os.getloadavg()[0]
    path = os.pathsep.join((str(ROOT), str(ROOT / "src")))
    done = subprocess.run(
        [sys.executable, "-m", *shlex.split(command)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": path},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    about = compare.machine()
    return (
        f"{done.stdout.strip()}\n\n{about['machine']}; Python {about['python']}; commit {about['commit']}, "
        f"{about['date']}; load {load:.1f} at the start.\n"
    )


def main(counts: list[int], rounds: int, only: str) -> int:
    def timed(name: str, measure: Callable[[], object]) -> None:
        print(f"measuring {name}", file=sys.stderr, flush=True)
        begun = time.monotonic()
        measure()
        print(f"{name} took {time.monotonic() - begun:.0f} s", file=sys.stderr, flush=True)

    wholes: dict[str, Callable[[], object]] = {
        "compare": lambda: compare.main(counts, rounds, write=True),
        "growth": lambda: growth.main(rounds),
    }
    for name, measure in wholes.items():
        if re.search(only, name):
            timed(name, measure)
    for page in sorted((ROOT / "docs").rglob("*.md")):
        for block in re.finditer(_BLOCK, page.read_text("utf-8")):
            command = block[1]

            def write(page: Path = page, block: re.Match[str] = block) -> None:
                fresh = f"python -m {block[1]} -->\n{measured(block[1])}"
                page.write_text(page.read_text("utf-8").replace(block[0], fresh), "utf-8")

            if re.search(only, command):
                timed(command, write)
    return 0
