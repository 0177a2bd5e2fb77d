"""Which test of which framework holds which line of what must be shown; read, without the frameworks."""

import ast
import re
from pathlib import Path

import pytest
from benchmarks.adapters import FRAMEWORKS as MEASURED
from tests.frameworks.kit import LINES

FRAMEWORKS = Path(__file__).parents[1] / "frameworks"
#: But for the engine that the same environments serve: it runs pipelines, and no agents. DBOS is a driver,
#: the others are backends of telemetry, instrumentations of several frameworks, and a schema. litellm and MCP
#: are no frameworks, and reach many: requests of models without tools, and tools without a model.
OTHERS = ("dbos", "grafana", "instrumented", "litellm", "mcp", "mlflow", "others", "phoenix")
FOLDERS = sorted(
    path.parent for path in FRAMEWORKS.glob("*/requirements.in") if path.parent.name not in OTHERS
)
#: Where a framework has no such thing.
NOT_THERE = {
    ("agent_framework", "sync and async"): "its agents are async alone; its tools are tested both ways",
    ("claude_agent_sdk", "sync and async"): "it is async alone",
    ("crewai", "streams"): "it gives its callers whole answers",
    ("llama_index", "streams"): "its steps return events, and stream nothing by themselves",
}


def lines_on(node: ast.AST) -> list[str]:
    """Return the lines that a test or a class of tests is marked with."""
    marks = (
        node.decorator_list if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) else ()
    )
    return [
        ast.literal_eval(line)
        for mark in marks
        if isinstance(mark, ast.Call) and isinstance(mark.func, ast.Name) and mark.func.id == "holds"
        for line in mark.args
    ]


#: The lines that each test of the contract that they share holds.
CONTRACT = {
    node.name: lines_on(node)
    for node in ast.walk(ast.parse((FRAMEWORKS / "contract.py").read_text("utf-8")))
    if isinstance(node, ast.FunctionDef)
}


def held_in(folder: Path) -> set[str]:
    """Return the lines that the tests of a framework are marked with, inherited ones among them."""
    findings: set[str] = set()
    for path in sorted(folder.glob("test_*.py")):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            findings.update(lines_on(node))
            if isinstance(node, ast.ClassDef) and "FrameworkContract" in map(ast.unparse, node.bases):
                own = {
                    name.id
                    for each in node.body
                    if isinstance(each, ast.Assign)
                    for name in each.targets
                    if isinstance(name, ast.Name)
                }
                findings.update(line for name, lines in CONTRACT.items() if name not in own for line in lines)
    return findings


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda path: path.name)
def test_every_line_is_held(folder: Path) -> None:
    """Nothing is missing for any framework, but what it does not have."""
    held = held_in(folder)
    assert held <= LINES.keys()
    assert LINES.keys() - held == {line for name, line in NOT_THERE if name == folder.name}


def test_there_are_frameworks() -> None:
    """Or all of this would hold of none."""
    assert len(FOLDERS) == 11


def test_the_overhead_of_every_adapter_is_measured() -> None:
    """``benchmarks.adapters`` knows each adapter of docs/adapters.md, and the page has a figure of each."""
    page = (FRAMEWORKS.parents[1] / "docs" / "adapters.md").read_text("utf-8")
    frameworks, _, overhead = page.partition("## Overhead")
    named = set(re.findall(r"^\|.*\]\(adapters/(\w+)\.md\) \|$", frameworks, re.MULTILINE))
    assert len(named) == 13
    assert MEASURED.keys() == {"guard", *named}
    assert {
        title
        for _, _, title in MEASURED.values()
        if not re.search(rf"^\| {title}\b.*:", overhead, re.MULTILINE)
    } == set()
