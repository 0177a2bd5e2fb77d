"""Change the core in every small way and see the tests fail: mutation testing, a long job.

usage: ./dev mutants --all [MODULE ...] [--sample N] [--seed S] [--minutes M] [--workers N] [--again] [--report] [--show]

MODULE is one of engine, hooks, failures, cost, trace, session, sqlite; without one, all. The mutants are those of mutmut, and
calls and raises that are left out. Each is tried in a copy of the tree with the tests that run the changed line: those that
killed its neighbours first, then the quick ones, the first failure ends it. What was tried is kept in .cache/mutants and not
tried again while the file stays as it is; --again tries those once more that no test killed. --sample takes N mutants of each
module, the same ones for the same seed, and a larger sample contains a smaller one.

Survivors are judged in tests/mutants/judged.toml: "equivalent" (no test can tell) or "harmless" (nothing that is promised
depends on it). Exit code 0 if at least 90 % of those that are not equivalent were killed and every survivor is judged.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import queue
import random
import re
import subprocess
import sys
import tempfile
import threading
import time
import tomllib
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tests.mutants.__main__ import PYTEST, ROOT, Copy
from tests.mutants.cover import LEFT_OUT, MODULES, Coverage, measure
from tests.mutants.mutant import Mutant

SOURCE = ROOT / "src" / "stroma"
CACHE = ROOT / ".cache" / "mutants"
RESULTS = CACHE / "results.jsonl"
JUDGED = ROOT / "tests" / "mutants" / "judged.toml"
ENOUGH = 0.9
# The quickest tests first: most mutants go no further.
FIRST_SECONDS, FIRST_TESTS = 10.0, 100
ALL_SECONDS = 25.0
NEIGHBOURS = 12


@dataclass(frozen=True, slots=True)
class Result:
    """``verdict``: killed, timeout or survived; ``by``: the test; ``digest``: of the file that was changed."""

    key: str
    digest: str
    verdict: str
    by: str
    seconds: float


def digest(file: str) -> str:
    return hashlib.sha256((SOURCE / file).read_bytes()).hexdigest()[:16]


def generated(file: str) -> list[Mutant]:
    """The mutants of a file, kept for as long as it stays as it is."""
    kept = CACHE / f"{file.replace('/', '-')}-{digest(file)}.json"
    if not kept.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        command = [os.environ["STROMA_TOOLS"], "-m", "tests.mutants.generate", str(SOURCE), file]
        kept.write_text(
            subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True).stdout
        )
    return [Mutant(**data) for data in json.loads(kept.read_text())]


def sample(module: str, count: int | None, seed: int) -> list[Mutant]:
    found = [mutant for file in MODULES[module] for mutant in generated(file)]
    if count is not None:
        random.Random(f"{seed}:{module}").shuffle(found)
    return [mutant for mutant in found if not _is_listed(mutant)][:count]


def _is_listed(mutant: Mutant) -> bool:
    """Whether it changes a name in ``__all__``: other tests than those of the core read that."""
    return not mutant.function and re.match(r'__all__ |\s*"\w+",?\n$', mutant.old) is not None


def results() -> dict[tuple[str, str], Result]:
    """The last result of each mutant, by its key and the digest of its file."""
    if not RESULTS.exists():
        return {}
    rows = [Result(**json.loads(line)) for line in RESULTS.read_text().splitlines()]
    return {(row.key, row.digest): row for row in rows}


class Worker:
    """A copy of the tree with a process in it that forks for each mutant."""

    def __init__(self, root: Path, coverage: Coverage, killers: dict[str, Counter[str]]) -> None:
        self.copy = Copy(root)
        self.coverage = coverage
        self.killers = killers
        env = {**self.copy._environ(), "STROMA_MUTANTS": "1"}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.mutants.worker"],
            cwd=root, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip

    def close(self) -> None:
        self.process.kill()
        self.process.wait()

    def test(self, tests: list[str], seconds: float) -> tuple[int | None, str]:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        order = {"arguments": [*PYTEST, "-k", LEFT_OUT, *tests], "seconds": seconds}
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()
        answer = json.loads(self.process.stdout.readline())
        return answer["code"], answer["output"]

    def attempt(self, mutant: Mutant) -> tuple[str, str]:
        """(verdict, what killed it)"""
        path = self.copy.root / "src" / "stroma" / mutant.file
        source = path.read_text(encoding="utf-8")
        path.write_text(mutant.source(source), encoding="utf-8")
        try:
            for tests in self.stages(mutant):
                expected = sum(self.coverage.seconds[test] for test in tests)
                code, output = self.test(tests, 60 + 5 * expected)
                if code is None:
                    return "timeout", ""
                if code != 0:
                    failed = re.search(r"^(?:FAILED|ERROR) (.+?)(?: - .*)?$", output, re.MULTILINE)
                    return "killed", failed[1] if failed else f"exit code {code}"
        finally:
            path.write_text(source, encoding="utf-8")
        return "survived", ""

    def stages(self, mutant: Mutant) -> list[list[str]]:
        tests = self.coverage.tests(mutant.file, mutant.first, mutant.last, mutant.begin, mutant.end)
        name = f"{mutant.file}:{mutant.function}"
        # A test that killed a neighbour is likely to kill this one.
        likely = [test for test, _ in self.killers[name].most_common(NEIGHBOURS) if test in tests]
        quick = sorted(tests - set(likely), key=lambda test: (self.coverage.seconds[test], test))
        stages: list[list[str]] = [likely, [], []]
        spent = 0.0
        for test in quick:
            spent += self.coverage.seconds[test]
            if spent > ALL_SECONDS and stages[1]:
                break
            first = spent <= FIRST_SECONDS and len(stages[1]) < FIRST_TESTS
            stages[1 if first else 2].append(test)
        return [stage for stage in stages if stage]


def run(wanted: list[Mutant], coverage: Coverage, workers: int, until: float) -> None:
    """Try the mutants, one line each, until the time is over."""
    waiting: queue.SimpleQueue[Mutant] = queue.SimpleQueue()
    for mutant in wanted:
        waiting.put(mutant)
    functions = {
        mutant.key: f"{mutant.file}:{mutant.function}"
        for m in MODULES.values()
        for f in m
        for mutant in generated(f)
    }
    killers: dict[str, Counter[str]] = {name: Counter() for name in functions.values()}
    for row in results().values():
        if row.by and row.key in functions and row.by in coverage.seconds:
            killers[functions[row.key]][row.by] += 1
    writing = threading.Lock()

    def work(worker: Worker) -> None:
        while time.monotonic() < until:
            try:
                mutant = waiting.get_nowait()
            except queue.Empty:
                return
            begin = time.monotonic()
            verdict, by = worker.attempt(mutant)
            row = Result(mutant.key, digest(mutant.file), verdict, by, round(time.monotonic() - begin, 1))
            with writing:
                if by in coverage.seconds:
                    killers[functions[mutant.key]][by] += 1
                with RESULTS.open("a") as file:
                    file.write(json.dumps(asdict(row)) + "\n")
                print(f"{verdict:8s} {row.seconds:6.1f} s  {mutant.key} line {mutant.first} {by}", flush=True)

    with tempfile.TemporaryDirectory(prefix="stroma-mutants-") as folder:
        running = [Worker(Path(folder) / str(index), coverage, killers) for index in range(workers)]
        threads = [threading.Thread(target=work, args=(worker,), daemon=True) for worker in running]
        try:
            # A test that is not found would look like one that fails.
            code, output = running[0].test(["--collect-only", *coverage.seconds], 600)
            if code != 0:
                raise SystemExit(
                    f"{output}\nnot every test of the core is found; remove {CACHE / 'coverage.json'}"
                )
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        finally:
            for worker in running:
                worker.close()


def judged() -> dict[str, dict[str, Any]]:
    return tomllib.loads(JUDGED.read_text()).get("mutant", {}) if JUDGED.exists() else {}


def report(modules: dict[str, list[Mutant]], show: bool) -> bool:
    """Print what became of the mutants, module by module; whether that is enough."""
    rows, verdicts = results(), judged()
    enough = True
    columns = ("of", "tried", "killed", "timeout", "survived", "equivalent", "harmless", "unjudged")
    print("module   " + "".join(f"{column:>11s}" for column in columns) + "   score")
    total: Counter[str] = Counter()
    for module, found in modules.items():
        counts = Counter({"of": sum(len(generated(file)) for file in MODULES[module])})
        unjudged = []
        for mutant in found:
            row = rows.get((mutant.key, digest(mutant.file)))
            if row is None:
                continue
            counts["tried"] += 1
            counts[row.verdict] += 1
            if row.verdict == "survived":
                verdict = verdicts.get(mutant.key, {}).get("verdict", "unjudged")
                counts[verdict] += 1
                if verdict == "unjudged":
                    unjudged.append(mutant)
        print(f"{module:9s}" + _line(counts, columns))
        total += counts
        enough = enough and not unjudged and _score(counts) >= ENOUGH
        if show:
            for mutant in unjudged:
                print(f"\n{mutant.key}  {mutant.file}:{mutant.first} {mutant.function}\n{mutant.shown()}")
    print(f"{'all':9s}" + _line(total, columns))
    return enough


def _line(counts: Counter[str], columns: tuple[str, ...]) -> str:
    return "".join(f"{counts[column]:11d}" for column in columns) + f"{_score(counts):8.1%}"


def _score(counts: Counter[str]) -> float:
    """Killed mutants, of those that were tried and can be told from the source."""
    told = counts["tried"] - counts["equivalent"]
    return (counts["killed"] + counts["timeout"]) / told if told else 1.0


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="./dev mutants --all", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument(
        "modules", nargs="*", metavar="MODULE", choices=[*MODULES, []], help=", ".join(MODULES)
    )
    parser.add_argument("--sample", type=int, metavar="N", help="so many mutants of each module")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="which ones (0)")
    parser.add_argument("--minutes", type=float, default=24 * 60, metavar="M", help="stop after that time")
    parser.add_argument("--workers", type=int, default=min(os.cpu_count() or 1, 8), metavar="N")
    parser.add_argument("--again", action="store_true", help="try survivors once more")
    parser.add_argument("--report", action="store_true", help="run nothing")
    parser.add_argument("--show", action="store_true", help="print the survivors that nobody judged")
    options = parser.parse_args(argv)
    until = time.monotonic() + 60 * options.minutes
    modules = {name: sample(name, options.sample, options.seed) for name in options.modules or MODULES}
    if not options.report:
        coverage = measure(ROOT, tuple(file for files in MODULES.values() for file in files), CACHE)
        known, verdicts = results(), judged()
        wanted = []
        for mutant in (mutant for found in modules.values() for mutant in found):
            row = known.get((mutant.key, digest(mutant.file)))
            again = (
                options.again and row is not None and row.verdict == "survived" and mutant.key not in verdicts
            )
            if row is None or again:
                wanted.append(mutant)
        run(wanted, coverage, options.workers, until)
    return 0 if report(modules, options.show) else 1
