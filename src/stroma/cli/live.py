"""Live table of a run on a terminal, one line per node, which folds into a summary at its end."""

from __future__ import annotations

import contextlib
import functools
import os
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from math import inf
from types import SimpleNamespace
from typing import IO, Any, Final, NamedTuple, cast

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from stroma._utils.text import clean, format_duration, format_tokens, format_usd, pluralize
from stroma.cli.formatting import id_word
from stroma.cli.output import Part, err
from stroma.cli.progress import Progress, failure_message
from stroma.cost.budget import ExecutionBudget, limits
from stroma.engine.execution import RunningNode, running_node
from stroma.failures.classes import FailureClass
from stroma.failures.failure import NodeContext, diagnose
from stroma.hooks.sets import MapProgress, NodeHooks
from stroma.trace.outline import folded_part

_REFRESHES: Final = 5  # a second
_SUMMARY_ROWS: Final = 20  # a longer pipeline is folded
_STYLES: Final = {
    "running": "cyan",
    "ok": "green",
    "failed": "bold red",
    "restored": "blue",
    "pending": "dim",
    "waiting": "yellow",
    "suspended": "yellow",
    "cancelled": "yellow",
}
#: Position and branch of one execution.
Place = tuple[int, str]


class RowWait(NamedTuple):
    """A wait of one execution. ``until``: on the clock of the table; None if nobody can tell."""

    until: float | None
    text: str

    def describe(self, now: float) -> str:
        return self.text if self.until is None else f"{max(0.0, self.until - now):.1f} s: {self.text}"


@dataclass(slots=True)
class Row:
    """One line of the table: a node, or the calls of one node in a loop, or all items of a map.

    Attributes:
        running: start of each execution in progress.
        state: that of the last execution that ended, with its reason in ``why``.
        retried: executions that needed more than one attempt.
        retries: attempts after the first, by the reason of the failure before.
    """

    name: str
    depth: int = 0
    progress: MapProgress | None = None
    attempts: int = 0
    calls: set[Place] = field(default_factory=set)
    tokens: int = 0
    cost_usd: float = 0.0
    first: float | None = None
    last: float | None = None
    state: str = "pending"
    why: str = ""
    running: dict[Place, float] = field(default_factory=dict)
    waiting: dict[Place, RowWait] = field(default_factory=dict)
    retried: set[Place] = field(default_factory=set)
    retries: Counter[str] = field(default_factory=Counter)

    @property
    def is_active(self) -> bool:
        if self.progress is not None:
            return not self.progress.ended and self.state in ("running", "pending")
        return bool(self.running or self.waiting)

    @property
    def next_wait(self) -> RowWait:
        """The wait that ends first."""
        return min(self.waiting.values(), key=lambda one: inf if one.until is None else one.until)

    def detail(self, now: float, bar_cells: int) -> list[Part]:
        """Return the state in words, the most important first."""
        if self.progress is not None:
            return self._map_detail(self.progress, now, bar_cells)
        if self.waiting:
            return [(self.next_wait.describe(now), "yellow")]
        if self.running:
            many = f", call {len(self.calls):,}" if len(self.calls) > 1 else ""
            return [(f"running{many}", "cyan")]
        calls = f"{len(self.calls):,} calls: " if len(self.calls) > 1 else ""
        retried = f", {len(self.retried):,} retried" if self.retried and self.state == "ok" else ""
        why = f": {self.why}" if self.why else ""
        return [calls, (self.state, _STYLES.get(self.state, "")), f"{retried}{why}"]

    def _map_detail(self, progress: MapProgress, now: float, bar_cells: int) -> list[Part]:
        failed: list[Part] = [(f"{progress.failed:,} failed", "red")] if progress.failed else []
        if self.state in ("failed", "cancelled", "suspended"):
            items = f"{progress.done:,}/{progress.total or '?'} items, "
            return [items, (self.state, _STYLES[self.state]), f": {self.why}" if self.why else ""]
        if not self.is_active:
            parts: list[Part] = [f"{pluralize(progress.done, 'item')}: ", *failed, ", " if failed else ""]
            parts.append((f"{progress.done - progress.failed:,} ok", "green"))
            if self.retried:
                parts += [", ", (f"{len(self.retried):,} retried", "yellow")]
            return [*parts, f", {progress.restored:,} restored" if progress.restored else ""]
        parts = [f"{progress.done:,}{'' if progress.total is None else f'/{progress.total:,}'}"]
        if progress.total:
            parts = [(_bar(progress.done / progress.total, bar_cells), "cyan"), " ", *parts]
        parts += [" ", *failed] if failed else []
        if progress.rate:
            parts.append(f" {progress.rate:,.{0 if progress.rate >= 10 else 1}f}/s")
        if progress.seconds_left is not None:
            left = progress.seconds_left
            parts.append(f" {f'{left:.0f}s' if left < 100 else format_duration(left)} left")
        if self.waiting:
            parts += ["  ", (f"{len(self.waiting)} wait: {self.next_wait.describe(now)}", "yellow")]
        return parts

    def figures(self, now: float) -> list[str]:
        """Return the attempts, the time from the first start to the last end, tokens and cost."""
        end = now if self.is_active or self.last is None else self.last
        return [
            f"{self.attempts:,}" if self.attempts else "",
            "" if self.first is None else format_duration(end - self.first),
            f"{self.tokens:,}" if self.tokens else "",
            format_usd(self.cost_usd) if self.cost_usd else "",
        ]


def _bar(share: float, cells: int) -> str:
    done = min(cells, max(0, round(share * cells)))
    is_utf8 = "utf" in (getattr(sys.stderr, "encoding", None) or "").lower()
    full, empty = ("█", "░") if is_utf8 else ("#", "-")
    return full * done + empty * (cells - done)


def fold_rows(rows: Sequence[Row], room: int) -> tuple[list[Row], list[Row]]:
    """Return the rows to show, those around the first one at work, and the others."""
    if len(rows) <= room:
        return list(rows), []
    active = next((number for number, row in enumerate(rows) if row.is_active), len(rows))
    room = max(0, room - 1)  # A line says how many others there are.
    start = max(0, min(active - room // 2, len(rows) - room))
    return list(rows[start : start + room]), [*rows[:start], *rows[start + room :]]


def rows_table(rows: Sequence[Row], hidden: Sequence[Row], columns: int, now: float) -> Group:
    """Return a table with a line for each row, none wider than ``columns``, and a line for what is hidden."""
    table = Table(
        box=None, pad_edge=False, expand=True, width=columns, header_style="dim", padding=(0, 2, 0, 0)
    )
    table.add_column(no_wrap=True, max_width=min(32, columns // 4))
    table.add_column(no_wrap=True, ratio=1)
    # A narrow terminal does without some figures: tokens go first, the cost last.
    shown = [i for i, least in enumerate((52, 44, 60, 30)) if columns >= least]
    for i in shown:
        table.add_column(("TRY", "TIME", "TOKENS", "COST")[i], justify="right", no_wrap=True)
    for row in rows:
        name = f"{'  ' * min(row.depth, 4)}{clean(row.name, 200)}"
        figures = row.figures(now)
        detail = Text.assemble(*row.detail(now, 16 if columns >= 110 else 6))
        table.add_row(name, detail, *(figures[i] for i in shown))
    counts = Counter("running" if row.is_active else row.state for row in hidden)
    text = ", ".join(f"{count:,} {state}" for state, count in counts.most_common())
    more = [_line((f"and {len(hidden):,} more: {text}", "dim"))] if hidden else []
    return Group(table, *more)


def _line(*parts: Part) -> Text:
    return Text.assemble(*parts, no_wrap=True, overflow="ellipsis")


def _update(change: Callable[..., None]) -> Any:
    """Make a hook of a method that changes the table: it gets the current node, and holds the lock."""

    @functools.wraps(change)
    async def hook(self: LiveProgress, _run_id: str, *event: Any) -> None:
        node = running_node()
        if node is not None:
            with self._lock:
                change(self, node, *event)

    return hook


class LiveProgress(Progress):
    """Hooks that keep a table of the nodes on the terminal up to date."""

    def __init__(self, pipeline: str, nodes: Iterable[str], budget: ExecutionBudget) -> None:
        super().__init__(quiet=False)
        self._pipeline = pipeline
        self._budget = budget
        self._run_id = ""
        self._began = time.monotonic()
        self._spent = {"tokens": 0.0, "cost": 0.0}
        #: Limits in cooldown: the end of each.
        self._cooldowns: dict[str, float] = {}
        self._reasons: dict[Place, str] = {}
        self._rows: dict[Place, Row] = {(i, ""): Row(name) for i, name in enumerate(nodes)}
        self._maps: set[Place] = set()
        self._lock = threading.RLock()
        self._screen = Screen(self._draw)

    def hooks(self) -> NodeHooks:
        """Return the set of hooks for the runner."""
        more = {"on_node_wait": self._node_wait, "on_limit_cooldown": self._limit_cooldown}
        return replace(super().hooks(), **more, reads_state=False)

    def say(self, text: str) -> bool:
        """Print lines above the table; False if it is not shown. Safe in a signal handler."""
        return self._screen.say(text)

    def close(self) -> None:
        """Replace the table by a summary. Safe to call twice."""
        self._screen.close()
        with self._lock:
            if self._run_id:
                self._print_summary()
                self._run_id = ""

    # ------------------------------------------------------------------ hooks

    async def _run_start(self, run_id: str, pipeline: str, state: dict[str, Any]) -> None:
        self.is_started = True
        self._run_id = run_id
        self._screen.open()

    @_update
    def _node_start(self, node: RunningNode, *_: Any) -> None:
        row, place, now = self._row(node), _place(node), time.monotonic()
        row.waiting.pop(place, None)
        row.running[place] = now
        row.first = now if row.first is None else row.first
        row.state, row.why = "running", ""
        if place not in self._maps:
            row.attempts += 1
            row.calls.add(place)

    @_update
    def _node_success(self, node: RunningNode, *_: Any) -> None:
        self._end(node, "ok")

    @_update
    def _node_failure(self, node: RunningNode, node_id: str, exc: Exception, _class: FailureClass) -> None:
        failure = diagnose(exc, NodeContext(node_id, node.attempt, self._run_id))
        reason = failure.reason or str(failure.failure_class)
        self._reasons[_place(node)] = reason
        self._end(node, "failed", f"{reason}, {clean(failure_message(node, failure))}")

    @_update
    def _node_retry(
        self, node: RunningNode, _id: str, _attempt: int, delay: float, failure_class: FailureClass
    ) -> None:
        row, place = self._row(node), _place(node)
        reason = clean(self._reasons.pop(place, str(failure_class)), 60)
        row.retried.add(place)
        row.retries[reason] += 1
        row.waiting[place] = RowWait(time.monotonic() + delay, f"retry after {reason}")

    @_update
    def _node_skipped(self, node: RunningNode, *_: Any) -> None:
        row = self._row(node)
        if row is self._rows.get(_key(node)):
            row.calls.add(_place(node))
            row.state, row.why = "restored", ""

    @_update
    def _node_cancelled(self, node: RunningNode, *_: Any) -> None:
        self._end(node, "cancelled")

    @_update
    def _node_suspended(self, node: RunningNode, _id: str, reason: str) -> None:
        self._end(node, "suspended", clean(reason))

    @_update
    def _map_progress(self, node: RunningNode, _id: str, progress: MapProgress) -> None:
        self._mark_map(node)
        row = self._row(node)
        row.progress = progress
        now = time.monotonic()
        row.first = now if row.first is None else row.first
        row.last = now

    @_update
    def _node_wait(self, node: RunningNode, _id: str, reason: str, seconds: float) -> None:
        until = time.monotonic() + seconds if seconds else None
        self._row(node).waiting[_place(node)] = RowWait(until, f"waits for {clean(reason, 100)}")

    async def _limit_cooldown(self, run_id: str, limit: str, seconds: float) -> None:
        self._cooldowns[clean(limit, 60)] = time.monotonic() + seconds

    # ------------------------------------------------------------------ rows

    def _row(self, node: RunningNode) -> Row:
        """Return the row of an execution; calls of one node, and items of one map, share a row."""
        around: RunningNode | None = node
        while around is not None:
            # Items of a resumed map are restored before its first progress.
            # The execution of a flow has no id.
            if around.parent is not None and (around.parent.node_id or "").startswith("map_over("):
                self._mark_map(around.parent)
            if _place(around) in self._maps:
                node = around
            around = around.parent
        key = _key(node)
        if node.kind == "item" and node.parent is None:  # It is restored, without the map around it.
            above = node.branch.rpartition(".")[0]
            self._maps.add((node.position, above))
            key = node.position, _fold_branch(above)
        row = self._rows.get(key)
        if row is None:
            depth = node.branch.count(".") + 1 if node.branch else 0
            row = Row(node.node_id, depth)
            self._rows[key] = row
        return row

    def _mark_map(self, node: RunningNode) -> None:
        if _place(node) not in self._maps:
            self._maps.add(_place(node))
            row = self._rows.get(_key(node))
            if row is not None:
                row.attempts, row.calls = 0, set()

    def _end(self, node: RunningNode, state: str, why: str = "") -> None:
        row, place = self._row(node), _place(node)
        row.running.pop(place, None)
        row.waiting.pop(place, None)
        row.last = time.monotonic()
        if row is self._rows.get(_key(node)):
            row.state, row.why = state, why
        spent = node.ctx.cost_tracker
        self._spent = {"tokens": spent.used("tokens"), "cost": spent.used("cost")}
        if node.kind == "group":  # The sum of its children, which have been counted.
            return
        rows = {id(row): row}
        around = node.parent
        while around is not None:
            if around.node_id or _key(around) in self._rows:
                above = self._row(around)
                rows[id(above)] = above
                if not around.node_id:
                    above.state = "flow"
            around = around.parent
        for one in rows.values():
            one.tokens += node.usage.tokens
            one.cost_usd += node.usage.cost_usd

    # ------------------------------------------------------------------ drawing

    @property
    def _ordered(self) -> list[Row]:
        """The rows by position; those of one position as they came."""
        return [row for _, row in sorted(self._rows.items(), key=lambda one: one[0][0])]

    def _draw(self) -> Group:
        columns, rows = err.size
        now = time.monotonic()
        with self._lock:
            head = self._head(columns - 1, now)
            shown, hidden = fold_rows(self._ordered, max(0, rows - 2 - len(head)))
            return Group(*head, rows_table(shown, hidden, columns - 1, now))

    def _head(self, columns: int, now: float) -> list[Table | Text]:
        run = id_word(self._run_id) if self._run_id.isprintable() else clean(self._run_id)
        title = Table.grid(expand=True, padding=(0, 2, 0, 0), pad_edge=False)
        title.width = columns
        title.add_column(no_wrap=True, ratio=1)
        title.add_column(no_wrap=True, justify="right", style="dim")
        name = Text.assemble((clean(self._pipeline, max(10, columns // 2)), "bold"), f": run {run}")
        title.add_row(name, format_duration(now - self._began))
        lines: list[Table | Text] = [title, self._money()]
        for limit, until in list(self._cooldowns.items()):
            if until <= now:
                del self._cooldowns[limit]
                continue
            text = f"limit {limit} in cooldown for {until - now:.1f} s: its provider asked to wait"
            lines.append(_line((text, "yellow")))
        return lines

    def _money(self) -> Text:
        parts: list[Part] = [
            f"spent {format_usd(self._spent['cost'])}, {format_tokens(int(self._spent['tokens']))}"
        ]
        for dimension, limit in limits(self._budget):
            if dimension == "latency" or not limit:
                continue
            share = self._spent[dimension] / limit
            of = format_usd(limit) if dimension == "cost" else format_tokens(int(limit))
            style = "red" if share >= 1 else "yellow" if share >= 0.8 else "green"
            parts += [f"; {share:.0%} of {of} ", (_bar(share, 12), style)]
        return _line(*parts)

    def _print_summary(self) -> None:
        now, rows = time.monotonic(), self._ordered
        shown, hidden = fold_rows(rows, _SUMMARY_ROWS)
        self._screen.print(Group(*self._head(err.columns, now), rows_table(shown, hidden, err.columns, now)))
        retried = [row for row in rows if row.retries]
        for row in retried[:_SUMMARY_ROWS]:
            total = row.retries.total()
            why = ", ".join(f"{reason} {n:,}" for reason, n in row.retries.most_common())
            count = f"{total:,} {'retry' if total == 1 else 'retries'}"
            err.fitted(("retried: ", "yellow"), f"{clean(row.name, 60)}: {count} ({why})")
        if len(retried) > _SUMMARY_ROWS:
            err.line(f"retried: and {pluralize(len(retried) - _SUMMARY_ROWS, 'node')} more")


def _place(node: RunningNode) -> Place:
    return node.position, node.branch


def _key(node: RunningNode) -> Place:
    """Return the same key for all calls of one node in one flow and task."""
    above, dot, part = node.branch.rpartition(".")
    return node.position, _fold_branch(above) + dot + folded_part(part, node.node_id or "")


def _fold_branch(branch: str) -> str:
    return ".".join(map(folded_part, branch.split("."))) if branch else ""


class _Console(Console):
    def show_cursor(self, show: bool = True) -> bool:
        """Leave the cursor as it is: a process that is killed could not show it again."""
        return False


class _Live(Live):
    def refresh(self) -> None:
        """Draw again, unless the process is in the background of its terminal, or that is gone."""
        if not _is_in_background():
            with contextlib.suppress(OSError, ValueError):
                super().refresh()


class Screen:
    """A drawing at the bottom of the terminal, redrawn five times a second below all other output."""

    def __init__(self, draw: Callable[[], Any]) -> None:
        self._draw = draw
        self._live: Live | None = None
        self._is_open = False
        self._pid = os.getpid()
        self._messages: list[str] = []  # above the drawing
        self._partial = ""  # printed without a line end so far
        self._patched: list[IO[str]] = []

    def open(self) -> None:
        """Draw from now on. Safe to call twice."""
        file = sys.stderr
        if self._live is not None or file is None:
            return
        # The drawing goes to the terminal itself, past the replaced ``write``.
        names = ("write", "flush", "isatty", "fileno")
        raw = SimpleNamespace(encoding=file.encoding, **{name: getattr(file, name) for name in names})
        self._live = _Live(
            get_renderable=lambda: Group(*map(Text, self._messages), self._draw()),
            console=_Console(
                file=cast("IO[str]", raw),
                color_system=None if os.environ.get("NO_COLOR") else "auto",
                highlight=False,
                markup=False,
                emoji=False,
            ),
            refresh_per_second=_REFRESHES,
            transient=True,
            redirect_stdout=False,
            redirect_stderr=False,
            vertical_overflow="crop",
        )
        self._is_open = True
        self._capture()
        self._live.start(refresh=True)

    def close(self) -> None:
        """Remove the drawing; everything that was printed stays. Safe to call twice."""
        if self._live is None or not self._is_open:
            return
        self._is_open = False
        for file in self._patched:
            with contextlib.suppress(AttributeError):
                del file.write
        with contextlib.suppress(OSError, ValueError):  # The terminal is gone.
            for text in self._messages:
                self.print(Text(text))
            if self._partial:
                self.print(Text.from_ansi(self._partial))
            self._messages.clear()
            self._live.stop()

    def say(self, text: str) -> bool:
        """Show lines above the drawing, and return True; False if nothing is drawn.

        Safe in a signal handler: it prints nothing itself.
        """
        if self._is_open:
            self._messages.append(text.strip("\n"))
        return self._is_open

    def print(self, what: Any) -> None:
        """Print above the drawing."""
        if self._live is not None:
            self._live.console.print(what, soft_wrap=isinstance(what, Text))

    def refresh(self) -> None:
        """Draw now."""
        if self._live is not None:
            self._live.refresh()

    def _capture(self) -> None:
        """Take over ``write`` of stderr and stdout on a terminal: loggers hold those objects."""
        for file in dict.fromkeys([sys.stderr, sys.__stderr__, sys.stdout, sys.__stdout__]):
            with contextlib.suppress(AttributeError, TypeError, ValueError):
                if file is not None and file.isatty():
                    file.write = self._replacement(file.write)  # type: ignore[method-assign]
                    self._patched.append(file)

    def _replacement(self, raw: Callable[[str], int]) -> Callable[[str], int]:
        def write(text: str) -> int:
            if os.getpid() != self._pid:
                return raw(text)  # Of a forked child.
            whole, end, self._partial = (self._partial + text).rpartition("\n")
            if end:
                # Of a line that was written over, as progress bars do, what stood there last.
                lines = [line.rpartition("\r")[2] for line in whole.split("\n")]
                self.print(Text("\n").join(map(Text.from_ansi, lines)))
            return len(text)

        return write


def _is_in_background() -> bool:
    """Return True if another process of the terminal has its input, after Ctrl-Z and `bg`."""
    try:
        return os.tcgetpgrp(2) != os.getpgrp()
    except (OSError, AttributeError):  # Standard error is not the terminal that controls this process.
        return False
