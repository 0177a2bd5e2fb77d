"""The page and the example of the framework that this environment is for: both run, and print what they
say."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from tests.docs.blocks import ROOT, promised, run_python

DOCS = ROOT / "docs"
#: What CrewAI prints by itself.
_DECORATION = re.compile(r"\s*$|[╭│╰]|Flow |.*[🌊✅🔄]")
NAME = os.environ["STROMA_TEST_FRAMEWORK"]


#: Its page, and the pages about coming from it.
PAGES = [*(DOCS / "adapters").glob(f"{NAME}.md"), *sorted((DOCS / "migration").glob(f"from-{NAME}*.md"))]
#: DBOS is no framework with an adapter.
EXAMPLES = [] if NAME == "dbos" else [ROOT / "examples" / f"adapter_{NAME}.py"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(DOCS).as_posix())
def test_the_code_on_the_page_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every Python block runs, one after the other, and prints what its comments say."""
    monkeypatch.chdir(tmp_path)  # Of its stores.
    try:
        ran = list(run_python(page.read_text("utf-8"), NAME))
    except ImportError as error:
        if "or newer; upgrade it" not in str(error):
            raise
        pytest.skip(str(error))
    assert ran
    for _, code, printed in ran:
        assert [line for line in printed if not _DECORATION.match(line)] == promised(code)


def test_the_example_runs() -> None:
    """It needs neither a key nor a network, and ends well."""
    for example in EXAMPLES:
        done = subprocess.run(
            [sys.executable, example], capture_output=True, text=True, check=False, timeout=100, cwd=ROOT
        )
        assert done.returncode == 0, done.stderr
        wanted = re.search(r'Prints:\n\n(.*?)"""', example.read_text("utf-8"), re.DOTALL)
        assert wanted is not None
        printed = [line.strip() for line in done.stdout.splitlines() if line.startswith("> ")]
        assert printed == [line.strip() for line in wanted[1].splitlines() if line.strip()]
