"""Graph of the recorded runs of a flow: its calls and failures, and how often which call followed which."""

from __future__ import annotations

import heapq
import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from stroma._utils.svg import Box, Mood, steps_svg
from stroma._utils.text import as_mermaid, format_duration, format_usd, pluralize
from stroma.trace.outline import WAITS, OutlineEntry, outline
from stroma.trace.story import Bar

Path = tuple[str, ...]

#: Edges begin and end here.
START: Final = "start"

#: Part of the attempts that failed, from which on a node is marked as failing.
_FAILING: Final = 0.1


@dataclass(slots=True)
class StepNode:
    """Figures about a node of the graph, or about all calls of a node.

    Attributes:
        path: its label after those of the flows and maps around it.
        kind: "node", "map", "flow", "sleep", "question" or "message".
        calls: number of calls; of a node in a map of its items.
        attempts, failed: number of attempts, and of those that failed.
        took_ms: time of each attempt; of a flow of each call, in all processes and waits.
        busy_ms, cost_usd: sums over its attempts.
    """

    path: Path
    kind: str
    calls: int = 0
    attempts: int = 0
    failed: int = 0
    took_ms: list[float] = field(default_factory=list)
    busy_ms: float = 0.0
    cost_usd: float = 0.0

    def add(self, call: OutlineEntry) -> None:
        """Count one call."""
        self.calls += 1
        if call.kind in WAITS:
            return
        self.attempts += len(call.bars)
        self.failed += sum(bar.outcome == "failure" for bar in call.bars)
        self.took_ms += call.times_ms
        self.busy_ms += sum(bar.took_ms for bar in call.bars)
        self.cost_usd += sum(bar.cost_usd for bar in call.bars)

    def quantile(self, part: float) -> float:
        """Return the seconds that at least this fraction of the attempts does not exceed; 0 without any."""
        ordered = sorted(self.took_ms)
        return ordered[max(0, math.ceil(part * len(ordered)) - 1)] / 1000 if ordered else 0.0

    @property
    def failure_rate(self) -> float:
        return self.failed / self.attempts if self.attempts else 0.0

    @property
    def is_failing(self) -> bool:
        return self.failure_rate > _FAILING

    @property
    def figures(self) -> str:
        """Its calls and failures as text."""
        failed = f", {self.failure_rate:.1%} of {self.attempts:,} attempts failed" if self.failed else ""
        return f"{pluralize(self.calls, 'call')}{failed}"

    @property
    def lines(self) -> tuple[str, ...]:
        """All figures as text: calls and failures, then durations and the cost of a call if it has any."""
        if not self.took_ms:
            return (self.figures,)
        cost = f", {format_usd(self.cost_usd / self.calls)} a call" if self.cost_usd else ""
        p50, p95 = (format_duration(self.quantile(part)) for part in (0.5, 0.95))
        return self.figures, f"p50 {p50}, p95 {p95}{cost}"


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
            before = order.before(entry.began_ms)
            for source in before:
                self.edges[calls[source][1], path] += 1
            if not before:
                self.edges[outer or (START,), path] += 1
            order.add(number, entry.began_ms, entry.ended_ms)
        return [calls[number][1] for number in order.before(float("inf"))]

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
        node.add(entry)
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
            "edges": [{"from": a, "to": b, "count": count} for (a, b), count in self.edges.items()],
            "ends": [{"from": a, "status": end, "count": n} for (a, end), n in self.ends.items()],
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
                if node.is_failing:
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
        return f"{self.name}: {pluralize(self.runs, 'run')}"

    def svg(self) -> str:
        """Return the graph as a self-contained SVG image."""
        title = self._title()
        boxes = [Box(START, title, "")]
        names: dict[Path, str] = {(): "", (START,): START}
        order = {path: number for number, path in enumerate(self.nodes)}
        # Each node before those inside it.
        paths = sorted(order, key=lambda path: [order[path[:size]] for size in range(1, len(path) + 1)])
        for number, path in enumerate(paths, 1):
            node = self.nodes[path]
            names[path] = str(number)
            mood: Mood = "failing" if node.is_failing else ""
            boxes.append(Box(str(number), path[-1], node.kind, names[path[:-1]], rates=node.lines, mood=mood))
        links = [(names[source], names[target], count) for (source, target), count in self.edges.items()]
        for status in dict.fromkeys(status for _, status in self.ends):
            boxes.append(Box(f"end {status}", status, ""))
        links += [(names[path], f"end {status}", count) for (path, status), count in self.ends.items()]
        return steps_svg(boxes, links, title=title)


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


class _CallOrder:
    """Finds what each call of a flow followed. Calls are added in the order of their starts."""

    def __init__(self) -> None:
        self._running: list[tuple[float, int, float]] = []  # A heap of (end, number, start).
        self._ended: list[tuple[float, int, float]] = []
        self._latest_start = float("-inf")

    def add(self, number: int, began: float, ended: float) -> None:
        heapq.heappush(self._running, (ended, number, began))

    def before(self, time: float) -> list[int]:
        """Return the calls that ended by a time with no other one between; times only rise."""
        while self._running and self._running[0][0] <= time:
            call = heapq.heappop(self._running)
            self._ended.append(call)
            self._latest_start = max(self._latest_start, call[2])
        # One that ended before another began, which has ended too, is followed by that one.
        latest = self._latest_start
        self._ended = [one for one in self._ended if one[0] > latest or one[2] == latest]
        return sorted(number for _, number, _ in self._ended)
