"""axe-core and html-validate, from npm by the lock file in tests/ui/tools: test data only."""

import json
import subprocess
from pathlib import Path
from typing import Any

from tests.npm import missing, npm_packages

__all__ = ["AXE", "missing", "page_tools", "validate"]

_HERE = Path(__file__).parent / "tools"
#: All that a page says of itself at once: what WCAG 2.2 AA asks for, and what axe-core advises beside.
AXE = """axe.run(document, {resultTypes: ['violations'],
    runOnly: ['wcag2a', 'wcag2aa', 'wcag21a', 'wcag21aa', 'wcag22aa', 'best-practice']})
.then((found) => found.violations.flatMap((one) => one.nodes.map((at) =>
     `${one.id}: ${at.failureSummary} ${at.html.slice(0, 200)}`)))"""


def page_tools() -> Path | None:
    """The folder that they are installed in; None where that cannot be done."""
    return npm_packages(_HERE)


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
        f"{names[Path(page['filePath']).stem]}: {one['ruleId']}: {one['message']} "
        f"({one['line']}:{one['column']})"
        for page in json.loads(done.stdout)
        for one in page["messages"]
    ]
