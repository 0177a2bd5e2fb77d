"""Releases of frameworks: the tested range, the environments of tests, and which test holds which line."""

import ast
import re
import subprocess
import sys
import tomllib
import warnings
from pathlib import Path

import pytest
from benchmarks.adapters import FRAMEWORKS as MEASURED
from tests.frameworks.kit import LINES

from stroma.adapters import _releases
from stroma.adapters._releases import RELEASES, imports_of

ROOT = Path(__file__).parents[2]


def test_the_ranges_are_those_of_the_extras() -> None:
    """What an error names as supported is what the extra installs."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for extra, (name, lowest, below) in RELEASES.items():
        needs = [need.partition(";")[0] for need in extras[extra] if not need.startswith("stroma-runner[")]
        assert needs == [f"{name}>={lowest},<{below}"]


@pytest.mark.parametrize(
    ("installed", "tested"),
    [("1.0.9", False), ("1.0.10", True), ("1.2.24", True), ("2.0.0rc1", False), ("2.0", False)],
)
def test_another_release_is_named_with_those_that_are_supported(
    installed: str, tested: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A release that cannot be imported says which is installed and what is supported, not "install it"."""
    monkeypatch.setattr(_releases, "installed_version", lambda _: installed)
    with pytest.raises(ImportError) as refused, imports_of("langgraph"):
        raise ImportError("cannot import name 'Pregel'")
    message = str(refused.value)
    assert message.startswith(f"langgraph {installed} is installed, and ")
    assert "cannot import name 'Pregel'" in message
    assert "install it" not in message
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with imports_of("langgraph"):
            pass
    assert [str(one.message).partition(":")[0] for one in caught] == (
        []
        if tested
        else [f"langgraph {installed} is installed, and its adapter supports langgraph>=1.0.10,<2"]
    )


FOLDERS = sorted(path.parent for path in (ROOT / "tests" / "frameworks").glob("*/requirements.in"))
#: Of backends of telemetry and of instrumentations of several frameworks, which no extra has.
BACKENDS = {"grafana", "instrumented", "mlflow", "phoenix"}
ADAPTED = [folder for folder in FOLDERS if folder.name not in BACKENDS | {"others"}]
EXTRAS: dict[str, list[str]] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
    "optional-dependencies"
]


def requirements(folder: Path) -> list[str]:
    """What the framework's own lines ask for, before those of Stroma and of its tests."""
    text = (folder / "requirements.in").read_text().split("# Of Stroma itself")[0]
    return [line.replace('"', "'") for line in text.splitlines() if line and not line.startswith("#")]


@pytest.mark.parametrize("folder", ADAPTED, ids=lambda path: path.name)
def test_the_tested_ranges_are_those_of_the_extras(folder: Path) -> None:
    """Who installs an extra gets releases between those that were tested."""
    offered = {requirement for needs in EXTRAS.values() for requirement in needs}
    assert requirements(folder)
    assert set(requirements(folder)) <= offered


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda path: path.name)
@pytest.mark.parametrize("release", ["newest", "lowest"])
def test_everything_is_pinned_with_hashes(folder: Path, release: str) -> None:
    """Nothing is fetched that was not looked at, from wherever a machine gets its packages."""
    text = (folder / f"{release}.txt").read_text()
    assert "://" not in text
    pinned = re.findall(r"^([\w.-]+)==\S+.*?((?: \\\n    --hash=\S+)*)$", text, re.MULTILINE)
    assert pinned
    assert [name for name, hashes in pinned if "--hash=sha256:" not in hashes] == []
    names = {name for name, _ in pinned}
    wanted = {re.split(r"[<>=;\[ ]", requirement)[0] for requirement in requirements(folder)}
    assert wanted | {"pydantic", "genai-prices", "pytest"} <= names


@pytest.mark.parametrize("folder", ADAPTED, ids=lambda path: path.name)
def test_every_framework_has_tests_a_page_and_an_example(folder: Path) -> None:
    """Each framework has tests, a page, an example and one module: shared code belongs to the guard."""
    assert list(folder.glob("test_*.py"))
    assert (ROOT / "docs" / "adapters" / f"{folder.name}.md").exists()
    assert (ROOT / "examples" / f"adapter_{folder.name}.py").exists()
    assert f"(adapters/{folder.name}.md)" in (ROOT / "docs" / "adapters.md").read_text()
    module = ROOT / "src" / "stroma" / "adapters" / f"{folder.name}.py"
    assert len(module.read_text().splitlines()) < 600


@pytest.mark.slow
def test_an_unknown_framework_is_named() -> None:
    """./dev says which there are, and installs nothing."""
    command = [sys.executable, "dev", "test", "--framework", "lnagraph"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "which framework? One of: " + ", ".join(folder.name for folder in FOLDERS) in done.stderr


@pytest.mark.slow
def test_without_their_environment_the_tests_of_frameworks_are_not_collected() -> None:
    """The main environment has none of them; what it cannot run is not counted as run."""
    command = [sys.executable, "-m", "pytest", "tests/frameworks", "-q", "-p", "no:cacheprovider", "--co"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 5, done.stdout  # No tests were collected.


FRAMEWORKS = Path(__file__).parents[1] / "frameworks"
#: But for the engine that the same environments serve: it runs pipelines, and no agents. DBOS is a driver,
#: the others are backends of telemetry, instrumentations of several frameworks, and a schema. litellm and MCP
#: are no frameworks, and reach many: requests of models without tools, and tools without a model.
OTHERS = ("dbos", "grafana", "instrumented", "litellm", "mcp", "mlflow", "others", "phoenix")
COVERED = sorted(
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


@pytest.mark.parametrize("folder", COVERED, ids=lambda path: path.name)
def test_every_line_is_held(folder: Path) -> None:
    """Nothing is missing for any framework, but what it does not have."""
    held = held_in(folder)
    assert held <= LINES.keys()
    assert LINES.keys() - held == {line for name, line in NOT_THERE if name == folder.name}


def test_there_are_frameworks() -> None:
    """Or all of this would hold of none."""
    assert len(COVERED) == 11


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
