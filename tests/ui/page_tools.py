"""axe-core and html-validate, from npm by the lock file in tests/ui/tools: test data, no part of the project."""

from __future__ import annotations

import fcntl
import functools
import hashlib
import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

__all__ = ["AXE", "missing", "page_tools", "validate"]

_HERE = Path(__file__).parent / "tools"
_KEPT = Path(__file__).parents[2] / ".cache"
#: All that a page says of itself at once: what WCAG 2.2 AA asks for, and what axe-core advises beside.
AXE = """axe.run(document, {resultTypes: ['violations'], runOnly: ['wcag2a', 'wcag2aa', 'wcag21a', 'wcag21aa', 'wcag22aa', 'best-practice']})
.then((found) => found.violations.flatMap((one) => one.nodes.map((at) => `${one.id}: ${at.failureSummary} ${at.html.slice(0, 200)}`)))"""


def missing(what: str) -> None:
    """Skip a test here; where all must run, fail it."""
    if os.environ.get("CI"):
        pytest.fail(what)
    pytest.skip(what)


@functools.cache
def page_tools() -> Path | None:
    """The folder that they are installed in, once for each state of the lock file; None where that cannot be done."""
    lock = (_HERE / "package-lock.json").read_bytes()
    home = _KEPT / f"page-tools-{hashlib.sha256(lock).hexdigest()[:16]}"
    _KEPT.mkdir(exist_ok=True)
    with (_KEPT / "page-tools.lock").open("w") as file:  # Other workers want them too.
        fcntl.flock(file, fcntl.LOCK_EX)
        if (home / "done").exists():
            return home
        npm = shutil.which("npm")
        if npm is None:
            return None
        shutil.rmtree(home, ignore_errors=True)
        home.mkdir()
        for name in ("package.json", "package-lock.json"):
            shutil.copy(_HERE / name, home)
        # The hashes of the lock file are checked; no script of a package is run.
        command = [npm, "ci", "--ignore-scripts", "--no-audit", "--no-fund"]
        done = subprocess.run(command, cwd=home, capture_output=True, text=True, timeout=300)
        if done.returncode:
            print(done.stderr[-2000:])
            return None
        (home / "done").touch()
    return home


_RULES: dict[str, Any] = {
    "root": True,
    "extends": ["html-validate:standard"],
    "elements": ["html5"],
    "rules": {"no-inline-style": "error", "svg-focusable": "off"},
}


def validate(home: Path, pages: dict[str, str], at: Path) -> list[str]:
    """What html-validate finds wrong in pages, by their names."""
    (at / ".htmlvalidate.json").write_text(json.dumps(_RULES))
    names = {}
    for number, (name, text) in enumerate(pages.items()):
        names[str(number)] = name
        (at / f"{number}.html").write_text(text)
    program = home / "node_modules" / ".bin" / "html-validate"
    command = [str(program), "--formatter", "json", *sorted(str(path) for path in at.glob("*.html"))]
    done = subprocess.run(command, cwd=at, capture_output=True, text=True, timeout=300)
    assert done.stdout, done.stderr
    return [
        f"{names[Path(page['filePath']).stem]}: {one['ruleId']}: {one['message']} ({one['line']}:{one['column']})"
        for page in json.loads(done.stdout)
        for one in page["messages"]
    ]
