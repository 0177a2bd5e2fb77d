"""The environments that frameworks are tested in: what they hold, and what ./dev says of them."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
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
