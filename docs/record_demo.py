"""Record the demo as one SVG for each width: docs/images/demo-80.svg and demo-120.svg.

./dev run python docs/record_demo.py
"""

from __future__ import annotations

import os
import re
import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.terminal_theme import MONOKAI
from rich.text import Text

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from tests.cli.terminal import run_on_terminal  # noqa: E402

_MAX_BYTES = 300_000


def record(columns: int) -> str:
    """Return the demo on a terminal of this width, as an SVG that loads nothing."""
    with tempfile.TemporaryDirectory(prefix="stroma-") as folder:
        env = {**os.environ, "STROMA_PROGRAM": "./dev run stroma", "TMPDIR": folder}
        env.pop("NO_COLOR", None)
        command = [sys.executable, "-m", "stroma", "demo", "--dir", f"{folder}/demo"]
        code, emulator, written = run_on_terminal(
            command, Path(folder), env, columns=columns, rows=40, seconds=120
        )
    if code:
        raise SystemExit(f"the demo ended with {code}:\n{written}")
    console = Console(record=True, width=columns, file=open(os.devnull, "w"), force_terminal=True)  # noqa: SIM115
    console.print(Text.from_ansi(emulator.styled.replace(folder, "/tmp")), soft_wrap=True)
    svg = console.export_svg(title="./dev demo", theme=MONOKAI, unique_id=f"demo{columns}")
    return re.sub(r"@font-face \{.*?\}\s*", "", svg, flags=re.DOTALL).replace("Fira Code", "ui-monospace")


def main() -> None:
    """Write both files."""
    for columns in (80, 120):
        svg = record(columns)
        assert len(svg.encode()) < _MAX_BYTES
        path = ROOT / "docs" / "images" / f"demo-{columns}.svg"
        path.parent.mkdir(exist_ok=True)
        path.write_text(svg, encoding="utf-8")
        print(f"{path.relative_to(ROOT)}: {len(svg.encode()):,} bytes")


if __name__ == "__main__":
    main()
