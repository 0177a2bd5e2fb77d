"""The example of the page of LangGraph about durable graphs: it prints what it says, however often it is
killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from tests.docs.blocks import ROOT, commands, of_page

PAGE = of_page((ROOT / "docs" / "adapters" / "langgraph.md").read_text("utf-8"))
#: Runs the example in a process that kills itself at a boundary of the run.
KILLED = """
import random, runpy, sys
from stroma.engine.interceptors import INTERCEPTORS
from tests.flows.program_world import Kills
INTERCEPTORS.insert(0, Kills(random.Random(sys.argv[1]), kill=True))
runpy.run_path("support.py", run_name="__main__")
"""


def expected() -> list[str]:
    (console,) = [block for block in PAGE if block.language == "console"]
    ((command, lines),) = commands(console.text)
    assert command == "python support.py"
    return lines


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'src'}"}
    return subprocess.run(
        [sys.executable, "-W", "ignore", *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=100,
        cwd=folder,
        env=env,
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (file,) = [block for block in PAGE if block.title]
    (tmp_path / file.title).write_text(file.text, "utf-8")
    return tmp_path


def test_the_example_prints_what_the_page_shows(folder: Path) -> None:
    """The program of the page prints what is below it."""
    done = run(folder, "support.py")
    assert (done.returncode, done.stdout.splitlines()) == (0, expected()), done.stderr


@pytest.mark.timeout(300)
def test_the_same_command_continues_a_killed_example(folder: Path) -> None:
    """G5: Killed with SIGKILL at several records, the program ends with its last line once its command is
    repeated."""
    kills = 0
    for seed in ("a", "b", "c", "d", "e", "f"):
        done = run(folder, "-c", KILLED, seed)
        if done.returncode == 0:
            break
        assert done.returncode == -signal.SIGKILL, done.stderr
        kills += 1
    assert kills
    done = run(folder, "support.py")
    assert (done.returncode, done.stdout.splitlines()[-1:]) == (0, expected()[-1:]), done.stderr
