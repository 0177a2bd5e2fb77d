"""The tiers are what they claim to be: see tests/conftest.py."""

import ast
import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.tiers import CORE_PATHS, PROFILES, SLOW_PATHS, examples

pytest_plugins = ["pytester"]

ROOT = Path(__file__).parents[2]
SLOW = {"slow", "nightly"}


def marks_of(path: Path) -> list[tuple[str, set[str]]]:
    """Return the docstring and the marks of each test in a file; a test has the marks of its class too."""

    def walk(body: list[ast.stmt], outer: set[str]) -> Iterator[tuple[str, set[str]]]:
        for node in body:
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                continue
            result = re.findall(r"pytest\.mark\.(\w+)", " ".join(map(ast.unparse, node.decorator_list)))
            marks = outer | set(result)
            if isinstance(node, ast.ClassDef):
                yield from walk(node.body, marks)
            elif node.name.startswith("test"):
                yield ast.get_docstring(node) or "", marks

    return list(walk(ast.parse(path.read_text("utf-8")).body, set()))


def test_every_guarantee_has_a_test_in_the_core_tier() -> None:
    """Each guarantee is named by a core test, which needs no process or server, and is not marked slow."""
    page = (ROOT / "docs" / "guarantees.md").read_text("utf-8")
    promised = set(re.findall(r"^## (G\d+)$", page, re.MULTILINE))
    held: set[str] = set()
    for path in (ROOT / "tests").rglob("test_*.py"):
        name = path.relative_to(ROOT).as_posix()
        for docstring, marks in marks_of(path):
            assert not ("core" in marks and marks & SLOW), (path, docstring)
            if (
                ("core" in marks or name in CORE_PATHS)
                and not marks & SLOW
                and not name.startswith(SLOW_PATHS)
            ):
                held |= set(re.findall(r"\bG\d+\b", docstring))
    assert promised
    assert promised <= held


def test_paths_of_tiers_exist() -> None:
    """A file that moved is not left behind in the table of tiers."""
    for name in (*SLOW_PATHS, *CORE_PATHS):
        assert list(ROOT.glob(f"{name}*")), name


def test_examples_follow_the_profile() -> None:
    """A property tries no more examples than its profile allows, and all of them in the nightly one."""
    from hypothesis import settings

    profile = settings.get_current_profile_name()
    assert examples(1000).max_examples == (1000 if profile == "nightly" else PROFILES[profile])
    assert examples(1).max_examples == 1


def test_durations_are_recorded_for_every_tier() -> None:
    """`./dev test` says how long each of its tiers takes."""
    recorded = json.loads((ROOT / "tests" / "durations.json").read_text("utf-8"))
    assert set(recorded["tiers"]) >= {"default", "all", "core"}
    for tests, seconds in recorded["tiers"].values():
        assert tests > 0
        assert seconds > 0


@pytest.mark.slow
def test_a_process_in_the_default_tier_is_noticed(pytester: pytest.Pytester) -> None:
    """A test without a mark that starts a process fails, and the message names the mark it lacks."""
    pytester.makeini("[pytest]\nasyncio_default_fixture_loop_scope = function\nmarkers = slow\n")
    pytester.makeconftest((ROOT / "tests" / "conftest.py").read_text("utf-8"))
    pytester.makepyfile("""
        import subprocess, sys, pytest

        def test_one(): subprocess.run([sys.executable, "-c", ""])

        @pytest.mark.slow
        def test_two(): subprocess.run([sys.executable, "-c", ""])
    """)
    # Its plugin would be unloaded with its hooks left behind: forks of later tests would run them.
    result = pytester.runpytest_inprocess("-p", "no:ddtrace")
    result.assert_outcomes(passed=2, errors=1)
    result.stdout.fnmatch_lines(["*test_one started a process (*); mark it with @pytest.mark.slow*"])
