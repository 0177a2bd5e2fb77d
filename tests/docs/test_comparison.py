"""The table of docs/comparison.md about lines of code has what the programs in examples/comparison have."""

from __future__ import annotations

import ast
import re
from pathlib import Path

from tests.docs.blocks import ROOT

PROGRAMS = ROOT / "examples" / "comparison"
SYSTEMS = ("stroma", "pydantic_ai", "langgraph", "dbos", "temporal")


def count_lines(path: Path) -> int:
    """Return the lines of a program without its docstring, blank lines and comments."""
    text = path.read_text("utf-8")
    docstring = ast.parse(text).body[0]
    lines = [line.strip() for line in text.splitlines()[docstring.end_lineno :]]
    return sum(bool(line) and not line.startswith("#") for line in lines)


def test_the_table_of_lines_has_what_the_programs_have() -> None:
    """Each row has the count of each program, and no program is left out."""
    page = (ROOT / "docs" / "comparison.md").read_text("utf-8")
    rows = re.findall(r"^\| .*\(\.\./examples/comparison/(\w+)_stroma\.py\).* \|$", page, re.MULTILINE)
    shown = {
        task: [int(cell) for cell in re.findall(r"\[(\d+)\]\(\.\./examples/comparison/" + task, page)]
        for task in rows
    }
    assert shown == {
        task: [count_lines(PROGRAMS / f"{task}_{system}.py") for system in SYSTEMS] for task in rows
    }
    there = {path.stem for path in PROGRAMS.glob("*_*.py")}
    assert there == {f"{task}_{system}" for task in rows for system in SYSTEMS}
