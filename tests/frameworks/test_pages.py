"""The page and examples of the framework that this environment is for: they run and print what they say."""

import importlib
import os
import re
import subprocess
import sys
from importlib.metadata import version
from itertools import groupby
from pathlib import Path

import pytest
from packaging.version import Version
from tests.docs.blocks import ROOT, promised, run_python
from tests.docs.killed_page import durable_program, kill_in_each_step

from stroma import StromaRunner

DOCS = ROOT / "docs"
#: What CrewAI prints by itself.
_DECORATION = re.compile(r"\s*$|[╭│╰]|Flow |.*[🌊✅🔄]")
NAME = os.environ["STROMA_TEST_FRAMEWORK"]


ADAPTERS = list((DOCS / "adapters").glob(f"{NAME}.md"))
#: And the pages about coming from the framework.
PAGES = [*ADAPTERS, *sorted((DOCS / "migration").glob(f"from-{NAME}*.md"))]
RESEARCH = list((ROOT / "examples").glob(f"research_{NAME}.py"))
EXAMPLES = sorted((ROOT / "examples").glob(f"*_{NAME}.py"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(DOCS).as_posix())
def test_the_code_on_the_page_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every Python block runs, one after the other, and prints what its comments say."""
    skip_if_too_old(page.read_text("utf-8"))
    monkeypatch.chdir(tmp_path)  # Of its stores.
    try:
        ran = list(run_python(page.read_text("utf-8"), NAME))
    except ImportError as error:
        skip_if_too_old(str(error))
        raise
    assert ran
    for _, code, printed in ran:
        assert [line for line in printed if not _DECORATION.match(line)] == promised(code)


@pytest.mark.nightly
@pytest.mark.timeout(300)
@pytest.mark.parametrize("page", ADAPTERS, ids=lambda page: page.name)
def test_the_durable_program_of_the_page_continues_where_it_was_killed(page: Path, tmp_path: Path) -> None:
    """G5: Killed with SIGKILL in one step after the other, and started again, the program on the page of a
    framework ends as without kills, and calls no step again that was recorded."""
    skip_if_too_old(page.read_text("utf-8"))
    try:
        kill_in_each_step(durable_program(page), tmp_path)
    except AssertionError as error:
        skip_if_too_old(str(error))
        raise


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_the_example_runs(example: Path) -> None:
    """It needs neither a key nor a network, and prints what it says; parallel readers in any order."""
    command = [sys.executable, example]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=100, cwd=ROOT)
    skip_if_too_old(done.stderr)
    assert done.returncode == 0, done.stderr
    wanted = re.search(r'Prints:\n\n(.*?)"""', example.read_text("utf-8"), re.DOTALL)
    printed = [line.strip() for line in done.stdout.splitlines() if line.startswith("> ")]
    assert with_readers_sorted(printed) == with_readers_sorted(wanted[1].split("\n"))


def with_readers_sorted(lines: list[str]) -> list[str]:
    """Return the stripped lines, with those of parallel readers, which follow each other, sorted."""
    lines = [line.strip() for line in lines if line.strip()]
    groups = groupby(lines, key=lambda line: "reader." in line)
    return [line for is_parallel, group in groups for line in (sorted(group) if is_parallel else group)]


@pytest.mark.parametrize("example", RESEARCH, ids=lambda path: path.stem)
async def test_a_worker_finishes_the_research_of_a_killed_one(example: Path, tmp_path: Path) -> None:
    """A page that follows the run gets its text as it arrives, also from a replacing worker."""
    url = f"sqlite:///{tmp_path / 'research.db'}"
    command, env = [sys.executable, str(example)], {**os.environ, "STROMA_DB": url}
    asked = subprocess.run(
        [*command, "ask", "otters"], env=env, capture_output=True, text=True, check=False, timeout=100
    )
    skip_if_too_old(asked.stderr)
    run_id, text, workers = asked.stdout.strip(), "", [subprocess.Popen([*command, "worker"], env=env)]
    adapter = importlib.import_module(f"stroma.adapters.{NAME}")
    answer = adapter.InterruptAnswer("yes") if NAME == "langgraph" else adapter.ToolApproval(approved=True)
    runner = StromaRunner.quick(store=url)
    try:
        async for event in runner.follow(run_id):
            if event.kind == "run_suspended":
                workers[-1].kill()
                await runner.signal(run_id, answer)
                workers.append(subprocess.Popen([*command, "worker"], env=env))
            elif event.kind == "node_event":
                text += str(event.data)
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()
    assert (len(workers), text) == (2, "It is published as number 1")


def skip_if_too_old(message: str) -> None:
    """Skip the test if a module, by its error, or a program, by its comment, needs a newer release."""
    if "or newer; upgrade it" in message:
        pytest.skip(message)
    for package, least in re.findall(r"# Needs (\S+) (\d[\d.]*\d) or newer", message):
        if Version(version(package)) < Version(least):
            pytest.skip(f"needs {package} {least}")
