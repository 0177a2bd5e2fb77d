"""Rows of plain data as SVG."""

import re
import xml.etree.ElementTree as ET

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stroma._utils.svg import Box, Line, Link, as_xml, steps_svg, svg
from stroma._utils.text import visible

SVG = "{http://www.w3.org/2000/svg}"
anything = st.text(st.characters(), max_size=60)


@given(anything)
def test_any_text_survives_xml(text: str) -> None:
    """Every text is visible once XML was read; what XML cannot say or a terminal would obey is U+FFFD."""
    read = ET.fromstring(f'<a b="{as_xml(text)}">{as_xml(text)}</a>')
    wanted = re.sub("[^\t\n\r\x20-\x7e\xa0-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]", "\ufffd", text)
    wanted = visible(wanted, "\n\t\r")
    assert (read.text or "") == wanted


@pytest.mark.core
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
        Box("0", "a", "node", "", (), lines),
        Box("1", "outer", "parallel"),
        Box("1.0", "b", "node", "1", lines, lines),
        Box("1.1", "inner", "parallel", "1"),
        Box("1.1.0", "c", "node", "1.1", lines),
        Box("2", "d", "node", "", lines),
    ]
    root = ET.fromstring(svg(boxes, [Link("0", "field0", "2", "field0")], title="t"))
    findings = [
        tuple(float(rect.get(key, "")) for key in ("x", "y", "width", "height"))
        for rect in root.iter(f"{SVG}rect")
        if rect.get("class") in ("box", "frame")
    ]
    assert len(findings) == 6

    def inside(a: tuple[float, ...], b: tuple[float, ...]) -> bool:
        return b[0] <= a[0] and b[1] <= a[1] and a[0] + a[2] <= b[0] + b[2] and a[1] + a[3] <= b[1] + b[3]

    def apart(a: tuple[float, ...], b: tuple[float, ...]) -> bool:
        return a[0] + a[2] <= b[0] or b[0] + b[2] <= a[0] or a[1] + a[3] <= b[1] or b[1] + b[3] <= a[1]

    for i, a in enumerate(findings):
        for b in findings[i + 1 :]:
            assert apart(a, b) or inside(a, b) or inside(b, a), (a, b)
    width, height = float(root.get("width", "")), float(root.get("height", ""))
    assert all(inside(box, (0, 0, width, height)) for box in findings)


@pytest.mark.core
def test_links_go_around_the_boxes_between() -> None:
    """A link over a column runs below its boxes, and what one line feeds in a column goes together."""
    lines = tuple(Line(f"field{i}", "str") for i in range(3))
    boxes = [
        Box("0", "a", "node", "", (), lines),
        Box("1", "b", "node", "", lines * 3, lines),
        Box("2", "outer", "parallel"),
        Box("2.0", "c", "node", "2", lines),
        Box("2.1", "d", "node", "2", lines),
    ]
    links = [
        Link("0", "field0", "2.0", "field1"),
        Link("0", "field0", "2.1", "field2"),
        Link("0", "field1", "2.1", "field0"),
    ]
    root = ET.fromstring(svg(boxes, links, title="t"))
    middle = next(
        r
        for r in list(root.iter(f"{SVG}rect"))[1:]
        if r.get("class") == "box" and float(r.get("height", "")) > 200
    )
    bottom = float(middle.get("y", "")) + float(middle.get("height", ""))
    right = float(middle.get("x", "")) + float(middle.get("width", ""))
    lanes = []
    for path in root.iter(f"{SVG}path"):
        if path.get("class", "").strip() != "link" or "H" not in path.get("d", ""):
            continue
        _, across, down, along, *_ = re.findall(r"[HV]([\d.]+)", "H0" + path.get("d", ""))
        assert float(across) < float(middle.get("x", "")) < right < float(along)
        lanes.append(float(down))
    assert len(lanes) == 3
    assert lanes[0] == lanes[1] != lanes[2]
    assert bottom < min(lanes) < max(lanes) < float(root.get("height", ""))


def test_a_link_between_neighbours_stays_between_them() -> None:
    """A link to the next column bends in the gap between the two boxes, and leaves neither of them again."""
    boxes = [
        Box("0", "a", "node", "", (), (Line("x", "str"),)),
        Box("1", "b", "node", "", (Line("y", "str"),)),
    ]
    root = ET.fromstring(svg(boxes, [Link("0", "x", "1", "y")], title="t"))
    path = next(path for path in root.iter(f"{SVG}path") if "C" in path.get("d", ""))
    start, *bends, end = [float(x) for x in re.findall(r"([\d.]+) [\d.]+", path.get("d", ""))]
    assert all(start < bend < end for bend in bends)


def test_tips_of_arcs_point_at_their_step() -> None:
    """The tip of an arc between steps lies beside the step that it leads to, and points at it."""
    boxes = [Box(name, name, "node") for name in "abc"]
    root = ET.fromstring(steps_svg(boxes, [("a", "c", 1), ("c", "a", 2), ("b", "b", 3)], title="t"))
    tips = [path.get("d", "") for path in root.iter(f"{SVG}path") if path.get("class") == "tip"]
    assert [re.sub(r"M[\d.]+ [\d.]+", "", tip) for tip in tips] == ["v10l-7 -5z", "v10l7 -5z", "v10l7 -5z"]


def test_nothing_at_all_is_a_picture_too() -> None:
    """No boxes, and links that lead nowhere, are drawn as nothing."""
    assert ET.fromstring(svg([], [Link("0", "a", "1", "b")], title="")).tag == f"{SVG}svg"
