"""The code of the README, the pages and the examples, under the type checkers of a user."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from tests.docs.blocks import ROOT, of_page
from tests.docs.test_pages import ALL, FASTAPI

DOCS = ROOT / "docs"
EXAMPLES = ROOT / "examples"
#: Import packages that are not in the lock, without which their types are not known.
UNTYPED = [
    *EXAMPLES.glob("adapter_*.py"),
    EXAMPLES / "dispatch_arq.py",
    EXAMPLES / "fastapi_service.py",
    EXAMPLES / "rag_ingestion.py",
    *EXAMPLES.glob("research_*.py"),
    *EXAMPLES.glob("comparison/*_[!s]*.py"),
]


def lay_out(folder: Path) -> list[Path]:
    """Write the code of all pages and examples into a folder, on the line numbers of their pages. Return the
    files.

    The executed blocks of one page are one module. A block with a title is a file of that name; some import
    each other, so they stand in one folder.
    """
    sources: dict[str, str] = {}
    owners: dict[str, Path] = {}
    for page in ALL:
        if page.parent.name in ("adapters", "migration") or page in FASTAPI:
            continue
        name = re.sub(r"\W", "_", page.relative_to(ROOT).with_suffix("").as_posix())
        for block in of_page(page.read_text("utf-8")):
            if block.language != "python":
                continue
            place = f"files/{block.title}" if block.title else f"pages/{name}.py"
            assert owners.setdefault(place, page) == page, f"{page} saves {block.title}, as another page does"
            above = "" if block.title else sources.get(place, "")
            sources[place] = above + "\n" * (block.line - 1 - above.count("\n")) + block.text
    for example in EXAMPLES.rglob("*.py"):
        if example not in UNTYPED:
            inside = example.relative_to(EXAMPLES)
            # Another name than that of a file of the tutorial.
            place = f"examples/example_{inside}" if inside.parent == Path() else f"examples/{inside}"
            if inside.parent.name == "comparison":
                place = f"files/{inside.name}"  # They import each other.
            sources[place] = example.read_text("utf-8")
    for place, text in sources.items():
        path = folder / place
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, "utf-8")
    return [folder / place for place in sources]


def check_with_mypy(folder: Path, files: list[Path]) -> list[str]:
    """Return the errors that `mypy --strict` finds, without our settings and without a plugin."""
    paths = [str(folder / name) for name in ("files", "examples", ".")]
    environment = {**os.environ, "MYPYPATH": os.pathsep.join(paths), "NO_COLOR": "1"}
    command = [
        sys.executable,
        "-m",
        "mypy",
        "--strict",
        "--config-file=",
        "--no-error-summary",
        "--explicit-package-bases",
        "--cache-dir",
        str(folder / "cache"),
        *map(str, files),
    ]
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, check=False, timeout=500
    )
    assert done.returncode in (0, 1), done.stdout + done.stderr
    return [line for line in done.stdout.splitlines() if ": error: " in line]


def check_with_pyright(folder: Path) -> list[str]:
    """Return the errors that pyright finds with the settings that it has by itself."""
    settings = {"include": ["files", "examples", "pages"], "extraPaths": ["files", "examples"]}
    (folder / "pyrightconfig.json").write_text(json.dumps(settings))
    command = [
        sys.executable,
        "-m",
        "pyright",
        "--pythonpath",
        sys.executable,
        "--outputjson",
        "-p",
        str(folder),
    ]
    environment = {**os.environ, "PYRIGHT_PYTHON_IGNORE_WARNINGS": "1"}
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, check=False, timeout=500
    )
    return [
        f"{one['file']}:{one['range']['start']['line'] + 1}: {one['message']}"
        for one in json.loads(done.stdout)["generalDiagnostics"]
        if one["severity"] == "error"
    ]


@pytest.mark.slow
@pytest.mark.timeout(1100)
@pytest.mark.parametrize("checker", ["pyright", pytest.param("mypy", marks=pytest.mark.nightly)])
def test_the_code_that_a_user_copies_type_checks(checker: str, tmp_path: Path) -> None:
    """README, tutorial, how-tos, own pages and examples pass `mypy --strict` and pyright as written."""
    files = lay_out(tmp_path)
    assert len(files) > 80
    assert (check_with_mypy(tmp_path, files) if checker == "mypy" else check_with_pyright(tmp_path)) == []
