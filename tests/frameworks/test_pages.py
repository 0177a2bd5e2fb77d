"""The page and the example of the framework that this environment is for: both run, and print what they say."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import types
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
#: What CrewAI prints by itself.
_DECORATION = re.compile(r"\s*$|[╭│╰]|Flow |.*[🌊✅🔄]")
NAME = os.environ["STROMA_TEST_FRAMEWORK"]


def test_the_code_on_the_page_runs(capsys: pytest.CaptureFixture[str]) -> None:
    """Every Python block runs, one after the other, and prints what its comments say."""
    text = (ROOT / "docs" / "adapters" / f"{NAME}.md").read_text("utf-8")
    module = types.ModuleType(f"page_{NAME}")
    sys.modules[module.__name__] = module  # Annotations are looked up there.
    blocks = re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    assert blocks
    for code in blocks:
        capsys.readouterr()
        exec(compile(code, f"{NAME}.md", "exec"), module.__dict__)
        printed = [line for line in capsys.readouterr().out.splitlines() if not _DECORATION.match(line)]
        assert printed == re.findall(r"^[ ]*print\(.*\)  # (.+)$", code, re.MULTILINE)


def test_the_example_runs() -> None:
    """It needs neither a key nor a network, and ends well."""
    example = ROOT / "examples" / f"adapter_{NAME}.py"
    done = subprocess.run(
        [sys.executable, example], capture_output=True, text=True, check=False, timeout=100, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    wanted = re.search(r'Prints:\n\n(.*?)"""', example.read_text("utf-8"), re.DOTALL)
    assert wanted is not None
    printed = [line.strip() for line in done.stdout.splitlines() if line.startswith("> ")]
    assert printed == [line.strip() for line in wanted[1].splitlines() if line.strip()]
