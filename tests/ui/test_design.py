"""Rules of docs/design.md."""

from __future__ import annotations

import re
from pathlib import Path

import stroma.ui

STATIC = Path(stroma.ui.__file__).parent / "static"
DOCS = Path(__file__).parents[2] / "docs"


def test_sizes_of_static_files() -> None:
    """There is one style sheet and one script, each under 25 kB, and they load nothing."""
    assert sorted(path.name for path in STATIC.iterdir()) == ["icon.svg", "ui.css", "ui.js"]
    for name in ("ui.css", "ui.js"):
        text = (STATIC / name).read_text()
        assert len(text.encode()) < 25_000, name
        assert not re.search(r"@import|https?://|url\((?!#)|\beval\(|innerHTML", text), name


def test_tokens() -> None:
    """Colours stand in the tokens of both themes, and nowhere else but in the text and ground of buttons."""
    text = (STATIC / "ui.css").read_text()
    themes = re.findall(r":root\{(.*?)\}", text, re.DOTALL)
    names = [set(re.findall(r"(--[a-z0-9-]+):#", theme)) for theme in themes]
    assert len(names) == 2
    assert names[0] == names[1] | {"--shadow"} or names[0] == names[1]
    rest = text[text.index("*{box-sizing") :]
    rules = [
        rule for rule in rest.split("}") if re.search(r"#[0-9a-f]{3,8}\b(?![^{]*\{)", rule.partition("{")[2])
    ]
    assert all(re.search(r"\.btn|button", rule) for rule in rules), rules


def test_images_of_the_page() -> None:
    """The page about the design has at most four images, each under 120 kB."""
    images = re.findall(r"\]\((images/[^)]*)\)", (DOCS / "design.md").read_text())
    assert 1 <= len(images) <= 4
    assert all((DOCS / image).stat().st_size < 120_000 for image in images)
