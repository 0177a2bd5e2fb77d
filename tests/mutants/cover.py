"""Which tests run which lines of the core, and how long each of them takes."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# What the core is, by the names that the command line takes.
MODULES: dict[str, tuple[str, ...]] = {
    "engine": ("_engine.py",),
    "hooks": ("hooks.py",),
    "failures": ("failures.py",),
    "cost": ("cost.py",),
    "trace": ("trace.py",),
    "session": ("checkpoint/_session.py",),
    "sqlite": (
        "checkpoint/sqlite.py",
        "checkpoint/_sqlite_connection.py",
        "checkpoint/_sqlite_file.py",
        "checkpoint/_sqlite_rows.py",
    ),
}
# The tests that may kill: those of the core, without servers and without processes of their own.
TESTS = (
    *(
        f"tests/test_{name}.py"
        for name in (
            "attempts_held", "breaker", "classifiers", "concurrency", "corners", "cost_held", "delivery", "details",
            "engine", "failures_held", "groups", "groups_held", "guarantees", "handing_on", "hook_machine", "hooks",
            "hooks_held", "hostile", "jsonable_held", "limits", "map", "observing", "one_attempt", "operations",
            "ownership", "page", "prices", "promises", "properties", "published_surface", "refusals_held", "repair",
            "resumable", "resume", "rules", "seed_page", "seldom", "sentences", "shared_budget", "stream", "suspend",
            "times_held", "told", "trace_held", "trace_shown_held", "usage",
        )
    ),
    *(
        f"tests/checkpoint/test_{name}.py"
        for name in ("cells", "conformance", "hostile_payloads", "machine", "payloads", "session_forks_held", "session_held",
            "session_rows_held", "sqlite", "sqlite_connection_held", "sqlite_details", "sqlite_file_held", "sqlite_rows_held")
    ),
)  # fmt: skip
LEFT_OUT = "not postgres and not redis"


@dataclass(frozen=True, slots=True)
class Coverage:
    """``seconds`` of each test that passes; ``lines``: file below src/stroma -> line -> names of tests."""

    seconds: dict[str, float]
    lines: dict[str, dict[int, list[str]]]

    def tests(self, file: str, first: int, last: int, begin: int, end: int) -> set[str]:
        """The tests that run changed lines; where no test is seen to, those of the function, then those of the file."""
        lines = self.lines.get(file, {})
        for span in (range(first, last + 1), range(begin, end + 1), lines):
            found = {test for line in span for test in lines.get(line, ())} & self.seconds.keys()
            if found:
                return found
        return set()


def digest(paths: Iterable[Path]) -> str:
    total = hashlib.sha256()
    for path in sorted(paths):
        total.update(f"{path.name}\n".encode() + path.read_bytes())
    return total.hexdigest()


def measure(root: Path, files: tuple[str, ...], folder: Path) -> Coverage:
    """Run the tests of the core once under coverage. What is known is kept in folder: all of it for as long as the source
    stays as it is, and then that of each file of tests for as long as it does.
    """
    kept = folder / "coverage.json"
    source = digest((root / "src").rglob("*.py"))
    tests = {test: digest([root / test]) for test in TESTS if (root / test).exists()}
    data: dict[str, Any] = {"source": source, "tests": {}, "seconds": {}, "lines": {}}
    if kept.exists() and (old := json.loads(kept.read_text()))["source"] == source:
        data = old
    stale = [test for test, name in tests.items() if data["tests"].get(test) != name]
    if stale:
        print(f"running {len(stale)} files of tests under coverage ...", flush=True)
        with tempfile.TemporaryDirectory(prefix="stroma-coverage-") as place:
            rc, junit, database = Path(place, "rc"), Path(place, "junit.xml"), Path(place, "data")
            rc.write_text("[run]\nsource_pkgs = stroma\n")
            subprocess.run(
                [
                    sys.executable, "-m", "pytest", "-q", "-n", "2", "--dist=worksteal", "-p", "no:cacheprovider",
                    "--hypothesis-seed=0", "-k", LEFT_OUT, "--cov", f"--cov-config={rc}", "--cov-context=test",
                    "--cov-report=", f"--junitxml={junit}", *stale,
                ],
                cwd=root, env={**os.environ, "COVERAGE_FILE": str(database)}, check=False,
            )  # fmt: skip
            keep(data, read(root, files, database, junit), set(stale))
        data["tests"] = tests
        folder.mkdir(parents=True, exist_ok=True)
        kept.write_text(json.dumps(data))
    return Coverage(
        data["seconds"],
        {file: {int(line): tests for line, tests in found.items()} for file, found in data["lines"].items()},
    )


def keep(data: dict[str, Any], found: Coverage, renewed: set[str]) -> None:
    """Put what was found in the place of what was known of the tests in those files."""

    def old(test: str) -> bool:
        return test.partition("::")[0] in renewed

    data["seconds"] = {test: s for test, s in data["seconds"].items() if not old(test)} | found.seconds
    for lines in data["lines"].values():
        for line, tests in lines.items():
            lines[line] = [test for test in tests if not old(test)]
    for file, by_line in found.lines.items():
        known = data["lines"].setdefault(file, {})
        for number, tests in by_line.items():
            known.setdefault(str(number), []).extend(tests)


def read(root: Path, files: tuple[str, ...], database: Path, junit: Path) -> Coverage:
    """What a run of pytest left in its two files."""
    from coverage import CoverageData

    took: dict[tuple[str, str], float] = {}
    for case in ElementTree.parse(junit).iter("testcase"):
        if not {child.tag for child in case} & {"failure", "error", "skipped"}:
            took[case.get("classname", ""), case.get("name", "")] = float(case.get("time", 0))
    data = CoverageData(str(database))
    data.read()
    seconds: dict[str, float] = {}
    lines: dict[str, dict[int, list[str]]] = {}
    for file in files:
        by_line = data.contexts_by_lineno(str(root / "src" / "stroma" / file))
        for line, contexts in by_line.items():
            tests = sorted({context.rpartition("|")[0] for context in contexts} - {""})
            for test in tests:
                path, _, rest = test.partition("::")
                head, bracket, tail = rest.partition("[")
                *classes, function = head.split("::")
                case = (
                    ".".join([path.removesuffix(".py").replace("/", "."), *classes]),
                    function + bracket + tail,
                )
                if case in took:
                    seconds[test] = took[case]
            lines.setdefault(file, {})[line] = [test for test in tests if test in seconds]
    return Coverage(seconds, lines)
