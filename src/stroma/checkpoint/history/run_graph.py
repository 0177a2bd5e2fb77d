"""Graph of the recorded runs of a flow: its calls and failures, and how often which call followed which."""

from __future__ import annotations

import heapq
import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from stroma._utils.svg import as_xml, cut
from stroma._utils.text import as_mermaid, format_duration, format_usd
from stroma.trace.outline import OutlineEntry, outline
from stroma.trace.story import Bar

Path = tuple[str, ...]

#: Edges begin and end here.
START: Final = "start"

_WARN_RATE: Final = 0.1


@dataclass(slots=True)
class StepNode:
    """A node of the graph.

    Attributes:
        path: its label after those of the flows and maps around it.
        kind: "node", "map", "flow", "sleep", "question" or "message".
        calls: number of calls; of a node in a map of its items.
        attempts, failed: number of attempts, and of those that failed.
        took_ms, cost_usd: durations of its attempts, and their cost.
    """

    path: Path
    kind: str
    calls: int = 0
    attempts: int = 0
    failed: int = 0
    took_ms: list[float] = field(default_factory=list)
    cost_usd: float = 0.0

    @property
    def rates(self) -> str:
        """The durations of its attempts and the cost of a call, as text; "" without an attempt."""
        if not self.took_ms:
            return ""
        ordered = sorted(self.took_ms)
        p50, p95 = (ordered[max(0, math.ceil(part * len(ordered)) - 1)] / 1000 for part in (0.5, 0.95))
        cost = f", {format_usd(self.cost_usd / self.calls)}" if self.cost_usd else ""
        return f"p50 {format_duration(p50)}, p95 {format_duration(p95)}{cost}"

    @property
    def figures(self) -> str:
        """The figures as text."""
        calls = "1 call" if self.calls == 1 else f"{self.calls:,} calls"
        if not self.failed:
            return calls
        return f"{calls}, {self.failed / self.attempts:.1%} of {self.attempts:,} attempts failed"


@dataclass(slots=True)
class RunGraph:
    """The steps that runs took.

    A call follows those that ended before it began with no other call between: the call before, after a
    ``gather`` the last call of each task.

    Attributes:
        name: the pipeline.
        runs: number of runs.
        nodes: by path, in the order in which they were first seen.
        edges: number of transitions by source and target. The first calls in a flow or map follow the call of
            that.
        ends: number of runs that ended after a node, by its path and the status of the run.
    """

    name: str
    runs: int = 0
    nodes: dict[Path, StepNode] = field(default_factory=dict)
    edges: dict[tuple[Path, Path], int] = field(default_factory=lambda: defaultdict(int))
    ends: dict[tuple[Path, str], int] = field(default_factory=lambda: defaultdict(int))
    has_calls: bool = False

    # ------------------------------------------------------------------ building

    def add_run(self, bars: Iterable[Bar], waits: Iterable[Bar], status: str) -> None:
        """Count one run."""
        self.runs += 1
        entries = outline(bars, waits)
        is_flow = len(entries) == 1 and _has_steps(entries[0])
        last = self._add_level(entries[0].entries if is_flow else entries, ())
        for path in last or [(START,)]:
            self.ends[path, status] += 1

    def _add_level(self, entries: Sequence[OutlineEntry], outer: Path) -> list[Path]:
        """Count the calls of one flow. Return the paths of those that nothing followed."""
        calls = [(entry, self._add(entry, outer)) for entry in sorted(entries, key=_start)]
        order = _CallOrder()
        for number, (entry, path) in enumerate(calls):
            scope = entry.call.scope if entry.call is not None else ""
            before = order.before(scope, entry.began_ms)
            for source in before:
                self.edges[calls[source][1], path] += 1
            if not before:
                self.edges[outer or (START,), path] += 1
            order.add(number, scope, entry.began_ms, entry.ended_ms)
        return [calls[number][1] for number in order.ends()]

    def _add(self, entry: OutlineEntry, outer: Path) -> Path:
        """Count a call and what is inside it. Return its path."""
        self.has_calls |= entry.call is not None
        has_steps = _has_steps(entry)
        path = (*outer, _label(entry))
        node = self.nodes.get(path)
        if node is None:
            kind = "flow" if has_steps and entry.kind == "node" else entry.kind
            node = self.nodes[path] = StepNode(path, kind)
        elif has_steps and node.kind == "node":
            node.kind = "flow"
        node.calls += 1
        if entry.kind in ("node", "map"):
            node.attempts += len(entry.bars)
            node.failed += sum(bar.outcome == "failure" for bar in entry.bars)
            node.took_ms += [bar.took_ms for bar in entry.bars]
            node.cost_usd += sum(bar.cost_usd for bar in entry.bars)
        if entry.kind == "map":
            for item in entry.entries:
                self.edges[path, self._add(item, path)] += 1
        elif has_steps:
            self._add_level(entry.entries, path)
        return path

    # ------------------------------------------------------------------ drawing

    def data(self) -> dict[str, Any]:
        """Return plain data, for JSON."""
        fields = ("path", "kind", "calls", "attempts", "failed")
        return {
            "pipeline": self.name,
            "runs": self.runs,
            "nodes": [{name: getattr(one, name) for name in fields} for one in self.nodes.values()],
            "edges": [
                {"from": source, "to": target, "count": count}
                for (source, target), count in self.edges.items()
            ],
            "ends": [
                {"from": path, "status": status, "count": count}
                for (path, status), count in self.ends.items()
            ],
        }

    def mermaid(self) -> str:
        """Return the graph as a Mermaid flow chart."""
        ids: dict[Path, str] = {path: f"n{number}" for number, path in enumerate(self.nodes)}
        ids[(START,)] = START
        inside: dict[Path, list[StepNode]] = {}
        for node in self.nodes.values():
            inside.setdefault(node.path[:-1], []).append(node)
        lines = ["flowchart TD", f'    {START}(["{as_mermaid(self._title())}"])']
        failing: list[str] = []

        def write(outer: Path, indent: str) -> None:
            for node in inside.get(outer, ()):
                name, label = ids[node.path], f"{as_mermaid(node.path[-1])}<br/>{as_mermaid(node.figures)}"
                opening, closing = _SHAPES.get(node.kind, ("[", "]"))
                if node.path in inside:
                    # Edges lead to a node in it: Mermaid draws none from a subgraph to itself.
                    lines.append(f'{indent}subgraph {name}_inside[" "]')
                    lines.append(f'{indent}    {name}["{label}"]')
                    write(node.path, indent + "    ")
                    lines.append(f"{indent}end")
                else:
                    lines.append(f'{indent}{name}{opening}"{label}"{closing}')
                if node.failed > _WARN_RATE * node.attempts:
                    failing.append(name)

        write((), "    ")
        for (source, target), count in self.edges.items():
            lines.append(f"    {ids[source]} -->|{count}| {ids[target]}")
        for status in dict.fromkeys(status for _, status in self.ends):
            lines.append(f'    end_{status}(["{status}"])')
        for (path, status), count in self.ends.items():
            lines.append(f"    {ids[path]} -->|{count}| end_{status}")
        lines += [f"    style {name} stroke:#dc2626,stroke-width:2px" for name in failing]
        return "\n".join(lines) + "\n"

    def _title(self) -> str:
        return f"{self.name}: {'1 run' if self.runs == 1 else f'{self.runs:,} runs'}"

    def svg(self) -> str:
        """Return the graph as a self-contained SVG image."""
        title = self._title()
        boxes = [ArcBox(START, title, "")]
        names: dict[Path, str] = {(START,): START}
        order = {path: number for number, path in enumerate(self.nodes)}
        # Each node before those inside it.
        paths = sorted(order, key=lambda path: [order[path[:size]] for size in range(1, len(path) + 1)])
        for number, path in enumerate(paths):
            node = self.nodes[path]
            names[path] = str(number)
            is_failing = node.failed > _WARN_RATE * node.attempts
            boxes.append(ArcBox(str(number), path[-1], node.figures, len(path) - 1, is_failing, node.rates))
        links = [(names[source], names[target], count) for (source, target), count in self.edges.items()]
        for status in dict.fromkeys(status for _, status in self.ends):
            boxes.append(ArcBox(f"end {status}", status, ""))
        links += [(names[path], f"end {status}", count) for (path, status), count in self.ends.items()]
        return arc_diagram(boxes, links, title=title)


_SHAPES: Final = {"sleep": ("([", "])"), "question": ("{{", "}}"), "message": ("{{", "}}")}


def _start(entry: OutlineEntry) -> tuple[float, str]:
    return (entry.began_ms, entry.at)


def _has_steps(entry: OutlineEntry) -> bool:
    return entry.kind == "node" and any(child.call is not None for child in entry.entries)


def _label(entry: OutlineEntry) -> str:
    call = entry.call
    if entry.kind == "question":  # By its key, or the class of its answer: its text may differ in each run.
        return f"question {entry.bars[0].reason if call is None or call.name else call.number}"
    if entry.kind == "sleep":
        return "sleep" if call is None or call.name else f"sleep {call.number}"
    return entry.label


class _Family:
    """The calls of a scope and of the scopes that it started: those that have ended, and those that go on."""

    def __init__(self) -> None:
        self.running: list[tuple[float, int, float]] = []  # A heap of (end, number, start).
        self.ended: list[tuple[float, int, float]] = []
        self.latest_start = float("-inf")

    def add(self, number: int, began: float, ended: float) -> None:
        heapq.heappush(self.running, (ended, number, began))

    def before(self, time: float) -> list[int]:
        """Return the calls that ended by a time with no other one between; times only rise."""
        while self.running and self.running[0][0] <= time:
            call = heapq.heappop(self.running)
            self.ended.append(call)
            self.latest_start = max(self.latest_start, call[2])
        # One that ended before another began, which has ended too, is followed by that one.
        self.ended = [one for one in self.ended if one[0] > self.latest_start or one[2] == self.latest_start]
        return sorted(number for _, number, _ in self.ended)


class _CallOrder:
    """Finds what each call of a flow followed. Calls are added in the order of their starts."""

    def __init__(self) -> None:
        self._families: defaultdict[str, _Family] = defaultdict(_Family)
        self._scopes: set[str] = set()

    def add(self, number: int, scope: str, began: float, ended: float) -> None:
        self._scopes.add(scope)
        for outer in _outer_scopes(scope):
            self._families[outer].add(number, began, ended)

    def before(self, scope: str, began: float) -> list[int]:
        """Return the numbers of the calls that a call follows."""
        outer_scopes = _outer_scopes(scope) if scope not in self._scopes else [scope]
        for outer in outer_scopes:
            calls = self._families[outer].before(began) if outer in self._families else []
            if calls:
                return calls
        return []

    def ends(self) -> list[int]:
        """Return the calls that nothing followed."""
        return self._families[""].before(float("inf")) if "" in self._families else []


def _outer_scopes(scope: str) -> list[str]:
    """Return a scope and those around it, the innermost first: "-0-1", "-0" and ""."""
    scopes = [scope]
    while scope:
        scope = scope.rpartition("-")[0]
        scopes.append(scope)
    return scopes


_BOX_WIDTH: Final = 420
_BOX_HEIGHT: Final = 40
_GAP: Final = 34
_INDENT: Final = 26
_MARGIN: Final = 24
_LONGEST_TITLE: Final = 26
_LONGEST_NOTE: Final = 52
_STYLE: Final = """
svg{background:#fff;font-family:system-ui,-apple-system,'Segoe UI',Roboto,sans-serif}
.box{fill:#eef2ff;stroke:#94a3b8}.failing .box{stroke:#dc2626;stroke-width:2}.end .box{fill:#f8fafc}
.title{font-size:13px;font-weight:600;fill:#0f172a}.note{font-size:11px;fill:#475569}
.link{fill:none;stroke:#6366f1}.tip{fill:#6366f1}
.count{font-size:11px;fill:#334155;paint-order:stroke;stroke:#fff;stroke-width:3px}
@media(prefers-color-scheme:dark){svg{background:#0f172a}.box{fill:#312e81;stroke:#64748b}
.failing .box{stroke:#f87171}
.end .box{fill:#1e293b}.title{fill:#f1f5f9}.note{fill:#cbd5e1}.link{stroke:#a5b4fc}.tip{fill:#a5b4fc}
.count{fill:#e2e8f0;stroke:#0f172a}}
"""


@dataclass(frozen=True, slots=True)
class ArcBox:
    """A box. ``depth``: of its indentation below its parent. ``rates``: figures at its right edge."""

    id: str
    title: str
    note: str
    depth: int = 0
    is_failing: bool = False
    rates: str = ""


def arc_diagram(boxes: Sequence[ArcBox], links: Iterable[tuple[str, str, int]], *, title: str) -> str:
    """Return an image of boxes in a column. ``links``: source, target and count, drawn as the width."""
    rows = {box.id: number for number, box in enumerate(boxes)}
    links = [link for link in links if link[0] in rows and link[1] in rows]
    spans = [abs(rows[target] - rows[source]) for source, target, _ in links]
    reach = 30 + 16 * max(spans, default=0) ** 0.75
    left = _MARGIN + reach
    depth = max((box.depth for box in boxes), default=0)
    width = left + _BOX_WIDTH + depth * _INDENT + reach + _MARGIN
    height = 2 * _MARGIN + len(boxes) * (_BOX_HEIGHT + _GAP) - _GAP
    most = max((count for _, _, count in links), default=1)
    ends = [_edges(box, rows[box.id], left) for box in boxes]
    drawn = [
        _arc(
            ends[rows[source]],
            ends[rows[target]],
            rows[target] - rows[source],
            count,
            1 + 3 * math.sqrt(count / most),
        )
        for source, target, count in links
    ]
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:.0f}" height="{height:.0f}" '
            f'viewBox="0 0 {width:.0f} {height:.0f}" role="img" aria-label="{as_xml(title)}">',
            f"<title>{as_xml(title)}</title>",
            f"<style>{_STYLE}</style>",
            *(arc for arc, _ in drawn),
            *(_box(box, place) for box, place in zip(boxes, ends, strict=True)),
            *(count for _, count in drawn),
            "</svg>",
            "",
        ]
    )


#: Left and right edge, top and bottom.
_Edges = tuple[float, float, float, float]


def _edges(box: ArcBox, row: int, left: float) -> _Edges:
    top = _MARGIN + row * (_BOX_HEIGHT + _GAP)
    x = left + box.depth * _INDENT
    return x, x + _BOX_WIDTH, top, top + _BOX_HEIGHT


def _arc(source: _Edges, target: _Edges, span: int, count: int, width: float) -> tuple[str, str]:
    """Return the path of a link with its tip, and its count."""
    if span == 1:
        x, y1, y2 = (max(source[0], target[0]) + _BOX_WIDTH / 4, source[3], target[2])
        path, tip = f"M{x:.1f} {y1:.1f}V{y2 - 6:.1f}", f"M{x - 5:.1f} {y2 - 7:.1f}h10l-5 7z"
        at, anchor = (x + 8, (y1 + y2) / 2 + 4), "start"
    else:
        side, sign = (1, 1) if span > 1 else (0, -1)
        x1, x2 = source[side], target[side]
        y1, y2 = source[2] + _BOX_HEIGHT * 0.7, target[2] + _BOX_HEIGHT * 0.3
        if span == 0:  # A call of the same node again.
            y1, y2 = y2, y1
        far = (max(x1, x2) if sign > 0 else min(x1, x2)) + sign * (30 + 16 * abs(span) ** 0.75) * 4 / 3
        path = f"M{x1:.1f} {y1:.1f}C{far:.1f} {y1:.1f} {far:.1f} {y2:.1f} {x2 + sign * 6:.1f} {y2:.1f}"
        tip = f"M{x2 + sign * 7:.1f} {y2 - 5:.1f}v10l{-sign * 7} -5z"
        at, anchor = ((x1 + x2) / 8 + far * 3 / 4, (y1 + y2) / 2 + 4), "middle"
    return (
        f'<path class="link" d="{path}" stroke-width="{width:.1f}"/><path class="tip" d="{tip}"/>',
        f'<text class="count" x="{at[0]:.1f}" y="{at[1]:.1f}" text-anchor="{anchor}">{count:,}</text>',
    )


def _box(box: ArcBox, place: _Edges) -> str:
    x, _, top, _ = place
    kind = "failing" if box.is_failing else "step" if box.note else "end"
    middle = top + (18 if box.note else 25)
    note = (
        f'<text class="note" x="{x + 14:.1f}" y="{top + 33:.1f}">'
        f"{as_xml(cut(box.note, _LONGEST_NOTE))}</text>"
    )
    rates = ""
    if box.rates:
        at = f'x="{x + _BOX_WIDTH - 12:.1f}" y="{top + 18:.1f}" text-anchor="end"'
        rates = f'<text class="note" {at}>{as_xml(box.rates)}</text>'
    return (
        f'<g class="{kind}"><rect class="box" x="{x:.1f}" y="{top:.1f}" width="{_BOX_WIDTH}" '
        f'height="{_BOX_HEIGHT}" rx="8"/>'
        f'<text class="title" x="{x + 14:.1f}" y="{middle:.1f}">'
        f"{as_xml(cut(box.title, _LONGEST_TITLE))}<title>{as_xml(box.title)}</title></text>"
        f"{note if box.note else ''}{rates}</g>"
    )
