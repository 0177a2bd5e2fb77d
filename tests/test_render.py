"""Rows of plain data as SVG."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET

from hypothesis import given
from hypothesis import strategies as st

from stroma.render import Box, Line, Link, as_xml, svg

SVG = "{http://www.w3.org/2000/svg}"
anything = st.text(st.characters(), max_size=60)


@given(anything)
def test_any_text_survives_xml(text: str) -> None:
    """Every text is text again once XML was read, but for what XML cannot say or a terminal would obey: U+FFFD."""
    read = ET.fromstring(f'<a b="{as_xml(text)}">{as_xml(text)}</a>')
    wanted = re.sub("[^\t\n\r\x20-\x7e\xa0-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]", "\ufffd", text)
    assert (read.text or "") == wanted


@given(anything, anything, anything)
def test_no_text_is_ever_markup(one: str, two: str, three: str) -> None:
    """Whatever ids, fields and types are called, the picture has the elements that it has for plain words."""

    def shape(a: str, b: str, c: str) -> list[str]:
        lines = (Line(a, b), Line("y", c, "error"))
        boxes = [
            Box("0", a, "node", "", lines, lines, b, c),
            Box("1", c, "parallel"),
            Box("1.0", b, "node", "1", lines),
        ]
        text = svg(boxes, [Link("0", "y", "1.0", "y"), Link("0", "", "1.0", "", "unknown")], title=a)
        return [element.tag for element in ET.fromstring(text).iter()]

    words = [text if " ".join(text.split()) else "x" for text in (one, two, three)]
    assert shape(*words) == shape("a", "b", "c")


def test_boxes_do_not_overlap_and_frames_hold_their_children() -> None:
    """Boxes stand side by side, and a frame is around what is in it, however deep."""
    lines = tuple(Line(f"field{i}", "list[str]") for i in range(4))
    boxes = [
        Box("0", "a", "node", "", (), lines), Box("1", "outer", "parallel"), Box("1.0", "b", "node", "1", lines, lines),
        Box("1.1", "inner", "parallel", "1"), Box("1.1.0", "c", "node", "1.1", lines), Box("2", "d", "node", "", lines),
    ]  # fmt: skip
    root = ET.fromstring(svg(boxes, [Link("0", "field0", "2", "field0")], title="t"))
    found = [
        tuple(float(rect.get(key, "")) for key in ("x", "y", "width", "height"))
        for rect in root.iter(f"{SVG}rect")
        if rect.get("class") in ("box", "frame")
    ]
    assert len(found) == 6

    def inside(a: tuple[float, ...], b: tuple[float, ...]) -> bool:
        return b[0] <= a[0] and b[1] <= a[1] and a[0] + a[2] <= b[0] + b[2] and a[1] + a[3] <= b[1] + b[3]

    def apart(a: tuple[float, ...], b: tuple[float, ...]) -> bool:
        return a[0] + a[2] <= b[0] or b[0] + b[2] <= a[0] or a[1] + a[3] <= b[1] or b[1] + b[3] <= a[1]

    for i, a in enumerate(found):
        for b in found[i + 1 :]:
            assert apart(a, b) or inside(a, b) or inside(b, a), (a, b)
    width, height = float(root.get("width", "")), float(root.get("height", ""))
    assert all(inside(box, (0, 0, width, height)) for box in found)


def test_nothing_at_all_is_a_picture_too() -> None:
    """No boxes, and links that lead nowhere, are drawn as nothing."""
    assert ET.fromstring(svg([], [Link("0", "a", "1", "b")], title="")).tag == f"{SVG}svg"
