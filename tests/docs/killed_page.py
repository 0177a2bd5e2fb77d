"""Durable programs of pages, killed inside of one step after the other and started again until they end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

from tests.docs.blocks import ROOT, blocks, promised

#: Runs a program that notes its steps, and kills itself in the first one that it calls after a commit: the
#: function has returned, and nothing is stored.
_MORTAL = """
import runpy, sys
from stroma.engine.context import INTERCEPTORS
from stroma.testing.crash import Boundary, Deaths

def note(what, of):
    if what == "committed" or of.point == "before_node":
        position, branch = (of.position, of.branch) if isinstance(of, Boundary) else of
        with open("steps", "a") as file:
            file.write(f"{what} {position}.{branch}\\n")

def is_due(boundary):
    return sys.argv[1] == "killed" and boundary.point == "after_node" and deaths.life.committed

deaths = Deaths(is_due, kill=True, report=note)
INTERCEPTORS.insert(0, deaths)
runpy.run_path("program.py", run_name="__main__")
"""


def durable_program(page: Path) -> str:
    """Return the program of a page that has a run id and resumes. Raises AssertionError if there is none."""
    programs = [
        code for _, code in blocks(page.read_text("utf-8")) if "run_id=" in code and "resume=True" in code
    ]
    assert programs, f"{page.name} has no complete program with run_id= and resume=True"
    return programs[0]


def _live(program: str, folder: Path, life: str) -> subprocess.CompletedProcess[str]:
    folder.mkdir(exist_ok=True)
    (folder / "program.py").write_text(program, "utf-8")
    env = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'src'}"}
    command = [sys.executable, "-W", "ignore", "-c", _MORTAL, life]
    return subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=250, cwd=folder, env=env
    )


def kill_in_each_step(program: str, folder: Path) -> None:
    """Kill a program in one step after the other. It ends as without kills, and repeats no recorded step."""
    plain = _live(program, folder / "plain", "plain")
    assert plain.returncode == 0, plain.stderr
    expected = promised(program)[-1]
    kills = 0
    while (done := _live(program, folder / "killed", "killed")).returncode:
        assert done.returncode == -signal.SIGKILL, done.stderr
        kills += 1
        assert kills < 9, "it begins again in each life"
    assert kills
    assert plain.stdout.splitlines()[-1] == done.stdout.splitlines()[-1] == expected
    recorded = set[str]()
    for line in (folder / "killed" / "steps").read_text("utf-8").splitlines():
        what, _, place = line.partition(" ")
        assert place not in recorded, f"{place} was called again"
        if what == "committed":
            recorded.add(place)
