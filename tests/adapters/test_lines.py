"""Which test of which framework holds which line of what must be shown of each; read, without the frameworks."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
from tests.frameworks.kit import LINES

FRAMEWORKS = Path(__file__).parents[1] / "frameworks"
#: But for the engine that the same environments serve: it runs pipelines, and no agents.
FOLDERS = sorted(path.parent for path in FRAMEWORKS.glob("*/requirements.in") if path.parent.name != "dbos")
#: Where a framework has no such thing.
NOT_THERE = {
    ("agent_framework", "sync and async"): "its agents are async alone; its tools are tested both ways",
    ("claude_agent_sdk", "sync and async"): "it is async alone",
    ("crewai", "streams"): "it gives its callers whole answers",
}


def held_in(folder: Path) -> dict[str, list[str]]:
    """The tests that say that they hold a line."""
    found: dict[str, list[str]] = {}
    for path in sorted(folder.glob("test_*.py")):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            for mark in (
                node.decorator_list if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) else ()
            ):
                if isinstance(mark, ast.Call) and isinstance(mark.func, ast.Name) and mark.func.id == "holds":
                    for line in mark.args:
                        assert isinstance(line, ast.Constant)
                        found.setdefault(str(line.value), []).append(node.name)
    return found


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda path: path.name)
def test_every_line_is_held(folder: Path) -> None:
    """Nothing is missing for any framework, but what it does not have."""
    held = held_in(folder)
    assert held.keys() <= LINES.keys()
    missing = {line for line in LINES if line not in held}
    assert missing == {line for name, line in NOT_THERE if name == folder.name}


def test_there_are_frameworks() -> None:
    """Or all of this would hold of none."""
    assert len(FOLDERS) == 10
