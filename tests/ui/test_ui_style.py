"""Rules of docs/ui-style.md."""

import re
from pathlib import Path

import stroma.ui

STATIC = Path(stroma.ui.__file__).parent / "static"
DESIGN = STATIC.parents[1] / "trace" / "static" / "design.css"
DOCS = Path(__file__).parents[2] / "docs"


def test_sizes_of_static_files() -> None:
    """Style sheets of pages and files take less than 25 kB together, as does the script, and load nothing."""
    assert sorted(path.name for path in STATIC.iterdir()) == ["icon.svg", "ui.css", "ui.js"]
    for text in (DESIGN.read_text() + (STATIC / "ui.css").read_text(), (STATIC / "ui.js").read_text()):
        assert len(text.encode()) < 25_000
        assert not re.search(r"@import|https?://|url\((?!#)|\beval\(|innerHTML", text)


def test_tokens() -> None:
    """Colours stand in the tokens of both themes, and nowhere else but in the text and ground of buttons."""
    text = DESIGN.read_text()
    themes = re.findall(r":root\{(.*?)\}", text, re.DOTALL)
    names = [set(re.findall(r"(--[a-z0-9-]+):#", theme)) for theme in themes]
    assert len(names) == 2
    assert names[0] == names[1] | {"--shadow"} or names[0] == names[1]
    rest = text[text.index("--pop:0 8px 28px #000000a6") :] + (STATIC / "ui.css").read_text()
    rules = [
        rule
        for rule in rest.split("}")[1:]
        if re.search(r"#[0-9a-f]{3,8}\b(?![^{]*\{)", rule.partition("{")[2])
    ]
    assert all(re.search(r"\.btn|button", rule) for rule in rules), rules


def test_images_of_the_page() -> None:
    """The page about the design has at most four images, each under 120 kB."""
    images = re.findall(r"\]\((images/[^)]*)\)", (DOCS / "ui-style.md").read_text())
    assert 1 <= len(images) <= 4
    assert all((DOCS / image).stat().st_size < 120_000 for image in images)
