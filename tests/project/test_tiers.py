"""The tiers of tests, the gate of benchmarks and the errors for warnings are what they claim to be."""

import ast
import json
import re
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from benchmarks import gate, hooks, work
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


async def test_the_gate_counts_the_instructions_of_a_run() -> None:
    """Runs of the same nodes take the same number within a thousandth; six percent more is too much."""
    one, other = [await gate.count_instructions(work.ours(20)) for _ in range(2)]
    more = await gate.count_instructions(work.ours(21))
    assert one == pytest.approx(other, rel=0.001)
    assert 1.03 < more / one < 1.06
    assert gate.above(106, 100)
    assert not gate.above(104, 100)


def test_each_case_of_the_gate_has_its_figure() -> None:
    """A case that nobody wrote a figure down for would be no gate."""
    entry = json.loads(Path(gate.__file__).with_name("gate.json").read_text())
    assert entry
    for python, figures in entry.items():
        assert list(figures) == [case.node for case in gate.cases()], python


def test_every_question_about_hooks_is_found(tmp_path: Path) -> None:
    """`benchmarks.hooks --unset` finds what a run without hooks asks about them, in each file that does."""
    package = tmp_path / "stroma"
    shutil.copytree(hooks.SOURCE / "engine", package / "engine", ignore=shutil.ignore_patterns("__pycache__"))
    assert hooks.strip_questions(package) >= 10
    for path in package.rglob("*.py"):
        compile(path.read_text(), str(path), "exec")


def warn_from(module: str, category: type[Warning]) -> None:
    """Raise a warning that is attributed to a module."""
    scope: dict[str, Any] = {"__name__": module, "warnings": warnings, "category": category}
    exec("warnings.warn('old', category)", scope)


@pytest.mark.parametrize("category", [DeprecationWarning, PendingDeprecationWarning])
@pytest.mark.parametrize("module", ["stroma", "stroma.checkpoint.sqlite.store", "tests.project.test_tiers"])
def test_a_deprecation_in_our_own_code_is_an_error(module: str, category: type[Warning]) -> None:
    """Whatever our modules call that will be removed fails the test that notices it."""
    with pytest.raises(category, match="old"):
        warn_from(module, category)


@pytest.mark.parametrize("category", [DeprecationWarning, PendingDeprecationWarning])
def test_a_deprecation_in_foreign_code_is_a_warning(category: type[Warning]) -> None:
    """A dependency that deprecates something of its own is no fault of ours."""
    with pytest.warns(category, match="old"):
        warn_from("a_dependency", category)
