"""The strip of a timeline: one small cell for each of many children, such as the items of a map."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

from stroma._utils.svg import as_xml
from stroma._utils.text import pluralize
from stroma.trace.outline import OutlineEntry

__all__ = ["strip_of"]

#: Columns of a strip and the size of its cells in pixels, up to so many cells.
_SIZES: Final = ((600, 60, 14), (4000, 100, 10), (1 << 60, 200, 6))
#: Class of a cell's colour: succeeded at once, after a retry, failed, stopped, without an attempt.
_CLASSES: Final = {"g": "good", "r": "warn", "b": "bad", "w": "run", "x": "dim"}


def strip_of(entry: OutlineEntry, children: Sequence[OutlineEntry], attempt_prefix: str) -> str:
    """Return a cell for each of these children of an entry. ``attempt_prefix``: address of the attempts of the run, without the place."""
    prefix = f"{entry.at}."
    parts = [child.at.removeprefix(prefix) for child in children]
    if all(part.isdecimal() and len(part) < 7 for part in parts) and children[0].at.startswith(prefix):
        tones = ["x"] * (max(map(int, parts)) + 1)
        for part, child in zip(parts, children, strict=True):
            tones[int(part)] = _cell(child)
        where = f'data-prefix="{as_xml(prefix)}"'
    else:
        tones = [_cell(child) for child in children]
        where = f'data-places="{as_xml(" ".join(child.at for child in children))}"'
    columns, size = next((wide, size) for most, wide, size in _SIZES if len(tones) <= most)
    columns = min(columns, len(tones))
    inner = size - (1 if size < 8 else 2)
    paths: dict[str, list[str]] = {}
    for at, tone in enumerate(tones):
        row, column = divmod(at, columns)
        paths.setdefault(tone, []).append(f"M{column * size} {row * size}h{inner}v{inner}h-{inner}z")
    drawn = "".join(f'<path class="f-{_CLASSES[tone]}" d="{"".join(path)}"/>' for tone, path in paths.items())
    counts = {tone: len(path) for tone, path in paths.items()}
    ok = counts.get("g", 0) + counts.get("r", 0)
    words = ", ".join(
        text
        for count, text in (
            (ok, f"{ok:,} ok"),
            (counts.get("r", 0), f"{counts.get('r', 0):,} of them retried"),
            (counts.get("b", 0), f"{counts.get('b', 0):,} failed"),
            (counts.get("w", 0), f"{counts.get('w', 0):,} stopped"),
            (counts.get("x", 0), f"{counts.get('x', 0):,} without an attempt"),
        )
        if count
    )
    height = math.ceil(len(tones) / columns) * size
    return (
        f'<div class="strip"><p>{pluralize(len(tones), "item")}: {words} <output class="dim"></output></p>'
        f'<svg class="cells" width="{columns * size}" height="{height}" viewBox="0 0 {columns * size} {height}" role="img" aria-label="{pluralize(len(tones), "item")}: {words}" '
        f'data-cells="{"".join(tones)}" data-columns="{columns}" data-size="{size}" data-attempt="{as_xml(attempt_prefix)}" {where}>'
        f'{drawn}<path class="at" d=""/></svg></div>'
    )


def _cell(entry: OutlineEntry) -> str:
    if not entry.bars:
        return "x"
    if entry.bars[-1].outcome in ("success", "forked"):
        return "r" if entry.was_retried else "g"
    return "b" if entry.has_failed else "w"
