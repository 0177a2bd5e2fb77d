"""Live table of a run on a terminal, one line per node, which folds into a summary at its end."""

from __future__ import annotations

import contextlib
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
from rich.file_proxy import FileProxy
from rich.live import Live
from rich.table import Table
from rich.text import Text

from stroma._utils.text import clean, format_duration, format_tokens, format_usd, pluralize
from stroma.checkpoint.identity import with_outer
from stroma.cli.output import Part, err
from stroma.cli.progress import OK, RESTORED, START, Place, Progress, place_at, shown_id
from stroma.cost.budget import ExecutionBudget, limits
from stroma.engine.execution import CURRENT, RunningNode
from stroma.failures.classes import FailureClass
from stroma.hooks.sets import MapProgress, NodeHooks
from stroma.trace.outline import folded_part, parse_call

_REFRESHES: Final = 5  # a second
_SUMMARY_ROWS: Final = 20  # a longer pipeline is folded


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
        verb, what: the last thing that happened to one of its executions, and more about it.
        active: executions in progress; with the wait of each that waits.
        retried: executions that needed more than one attempt.
        retries: attempts after the first, by the reason of the failure before.
    """

    name: str
    depth: int = 0
    verb: tuple[str, str] = ("pending", "dim")
    what: str = ""
    progress: MapProgress | None = None
    attempts: int = 0
    calls: set[Place] = field(default_factory=set)
    tokens: int = 0
    cost_usd: float = 0.0
    first: float | None = None
    last: float | None = None
    active: dict[Place, RowWait | None] = field(default_factory=dict)
    retried: set[Place] = field(default_factory=set)
    retries: Counter[str] = field(default_factory=Counter)

    @property
    def waits(self) -> list[RowWait]:
        """The waits of its executions, the first to end first."""
        waits = [one for one in self.active.values() if one is not None]
        return sorted(waits, key=lambda one: inf if one.until is None else one.until)

    def detail(self, now: float, bar_cells: int) -> list[Part]:
        """Return the state in words, the most important first."""
        waits, state = self.waits, list[Part]([self.verb, f": {self.what}" if self.what else ""])
        if self.progress is not None:
            return self._map_detail(self.progress, state, now, bar_cells)
        if waits:
            return [(waits[0].describe(now), "yellow")]
        if self.active:
            return [(f"running{f', call {len(self.calls):,}' if len(self.calls) > 1 else ''}", "cyan")]
        calls = f"{len(self.calls):,} calls: " if len(self.calls) > 1 else ""
        retried = f", {len(self.retried):,} retried" if self.retried and self.verb == OK else ""
        return [calls, state[0], retried, state[1]]

    def _map_detail(self, progress: MapProgress, state: list[Part], now: float, bar_cells: int) -> list[Part]:
        done, failed = f"{progress.done:,}", f"{progress.failed:,} failed" if progress.failed else ""
        of_total = "" if progress.total is None else f"/{progress.total:,}"
        if not self.active and self.verb not in (OK, RESTORED):
            return [f"{done}{of_total or '/?'} items, ", *state]
        if not self.active:
            counts: list[Part] = [(f"{progress.done - progress.failed:,} ok", "green")]
            counts += [f", {progress.restored:,} restored"] if progress.restored else []
            counts += [", ", (f"{len(self.retried):,} retried", "yellow")] if self.retried else []
            return [
                f"{pluralize(progress.done, 'item')}: ",
                (f"{failed}, " if failed else "", "red"),
                *counts,
            ]
        bar = _bar(progress.done / progress.total, bar_cells) + " " if progress.total else ""
        parts: list[Part] = [(bar, "cyan"), done, of_total, (f" {failed}" if failed else "", "red")]
        if progress.rate:
            parts.append(f" {progress.rate:,.{0 if progress.rate >= 10 else 1}f}/s")
        if progress.seconds_left is not None:
            left = progress.seconds_left
            parts.append(f" {f'{left:.0f}s' if left < 100 else format_duration(left)} left")
        if waits := self.waits:
            parts += ["  ", (f"{len(waits)} wait: {waits[0].describe(now)}", "yellow")]
        return parts

    def figures(self, now: float) -> list[str]:
        """Return the attempts, the time from the first start to the last end, tokens and cost."""
        end = now if self.active or self.last is None else self.last
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
    active = next((number for number, row in enumerate(rows) if row.active), len(rows))
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
    counts = Counter("running" if row.active else row.verb[0] for row in hidden)
    text = ", ".join(f"{count:,} {state}" for state, count in counts.most_common())
    more = [_line((f"and {len(hidden):,} more: {text}", "dim"))] if hidden else []
    return Group(table, *more)


def _line(*parts: Part) -> Text:
    return Text.assemble(*parts, no_wrap=True, overflow="ellipsis")


class LiveProgress(Progress):
    """Hooks that show what happens in a table on the terminal, in place of lines."""

    def __init__(self, pipeline: str, nodes: Iterable[str], budget: ExecutionBudget) -> None:
        super().__init__(quiet=False)
        self._pipeline = pipeline
        self._budget = budget
        self._run_id = ""
        self._began = time.monotonic()
        self._spent = {"tokens": 0.0, "cost": 0.0}
        #: Limits in cooldown: the end of each.
        self._cooldowns: dict[str, float] = {}
        self._rows: dict[Place, Row] = {(i, ""): Row(name) for i, name in enumerate(nodes)}
        #: The row of each map.
        self._map_rows: dict[Place, Row] = {}
        self._lock = threading.RLock()
        self._screen = Screen(self._draw)

    def hooks(self) -> NodeHooks:
        """Return the set of hooks for the runner."""
        return replace(
            super().hooks(),
            on_node_wait=self._node_wait,
            on_limit_cooldown=self._limit_cooldown,
            reads_state=False,
        )

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

    async def _node_retry(
        self, _run_id: str, _node_id: str, attempt: int, delay: float, failure_class: FailureClass
    ) -> None:
        node = CURRENT.get()
        if node is not None:
            reason = clean(node.reason or str(failure_class), 60)
            with self._lock:
                row = self._row(node)
                row.retried.add(place_at(node))
                row.retries[reason] += 1
                row.active[place_at(node)] = RowWait(time.monotonic() + delay, f"retry after {reason}")

    async def _node_wait(self, _run_id: str, _node_id: str, reason: str, seconds: float) -> None:
        node = CURRENT.get()
        if node is not None:
            until = time.monotonic() + seconds if seconds else None
            with self._lock:
                self._row(node).active[place_at(node)] = RowWait(until, f"waits for {clean(reason, 100)}")

    async def _map_progress(self, _run_id: str, _node_id: str, progress: MapProgress) -> None:
        node, now = CURRENT.get(), time.monotonic()
        if node is None or not self._is_shown(node):
            return
        with self._lock:
            row = self._row(node)
            if place_at(node) not in self._map_rows:
                self._map_rows[place_at(node)] = row
                row.attempts, row.calls = 0, set()
            row.progress, row.first, row.last = progress, now if row.first is None else row.first, now

    async def _limit_cooldown(self, run_id: str, limit: str, seconds: float) -> None:
        self._cooldowns[clean(limit, 60)] = time.monotonic() + seconds

    # ------------------------------------------------------------------ rows

    def _show(self, node: RunningNode | None, verb: tuple[str, str], what: str = "", why: str = "") -> None:
        """Change the row of an execution."""
        if node is None:
            return
        with self._lock:
            row, place, now = self._row(node), place_at(node), time.monotonic()
            if verb == START:
                row.active[place] = None
                row.first = now if row.first is None else row.first
                row.attempts += place not in self._map_rows
            else:
                row.active.pop(place, None)
            if self._is_shown(node) and place not in self._map_rows:
                row.calls.add(place)
            if self._is_shown(node) and verb != START:
                row.verb, row.what = verb, ", ".join(filter(None, (what, why)))
            if verb not in (START, RESTORED):
                row.last = now
                self._count(node, row)

    def _count(self, node: RunningNode, row: Row) -> None:
        """Add the usage of an attempt that has ended to its row, and to those around it."""
        spent = node.ctx.cost_tracker
        self._spent = {"tokens": spent.used("tokens"), "cost": spent.used("cost")}
        if node.kind == "group":  # The sum of its children, which have been counted.
            return
        rows, around = {id(row): row}, node.parent
        while around is not None:
            above = self._rows.get(_key(around))
            if above is not None:
                rows[id(above)] = above
                if not around.node_id:
                    above.verb = ("flow", "")
            around = around.parent
        for one in rows.values():
            one.tokens += node.usage.tokens
            one.cost_usd += node.usage.cost_usd

    def _row(self, node: RunningNode) -> Row:
        """Return the row of an execution; calls of one node, and items of one map, share a row."""
        for branch in reversed([*with_outer(node.branch), ""]):
            row = self._map_rows.get((node.position, branch))
            if row is not None:
                return row
        depth = node.branch.count(".") + 1 if node.branch else 0
        return self._rows.setdefault(_key(node), Row(node.node_id, depth))

    def _is_shown(self, node: RunningNode) -> bool:
        """Return True unless the execution is inside a map, whose row has only sums of it."""
        return self._row(node) is self._rows.get(_key(node))

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
        title = Table.grid(expand=True, padding=(0, 2, 0, 0), pad_edge=False)
        title.width = columns
        title.add_column(no_wrap=True, ratio=1)
        title.add_column(no_wrap=True, justify="right", style="dim")
        name = Text.assemble(
            (clean(self._pipeline, max(10, columns // 2)), "bold"), f": run {shown_id(self._run_id)}"
        )
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
        table = rows_table(shown, hidden, err.columns, now)
        self._screen.console.print(Group(*self._head(err.columns, now), table))
        retried = [row for row in rows if row.retries]
        for row in retried[:_SUMMARY_ROWS]:
            total = row.retries.total()
            why = ", ".join(f"{reason} {n:,}" for reason, n in row.retries.most_common())
            count = f"{total:,} {'retry' if total == 1 else 'retries'}"
            err.fitted(("retried: ", "yellow"), f"{clean(row.name, 60)}: {count} ({why})")
        if len(retried) > _SUMMARY_ROWS:
            err.line(f"retried: and {pluralize(len(retried) - _SUMMARY_ROWS, 'node')} more")


def _key(node: RunningNode) -> Place:
    """Return the same key for all calls of one node in one flow and task, and for all items of its map."""
    *above, part = node.branch.split(".")
    call = parse_call(above[-1]) if above else None
    last = "" if call is not None and call.kind == "*" else folded_part(part, node.node_id or "")
    return node.position, ".".join([*map(folded_part, above), last])


class _Console(Console):
    def show_cursor(self, show: bool = True) -> bool:
        """Leave the cursor as it is: a process that is killed could not show it again."""
        return False


class Screen(Live):
    """A drawing at the bottom of the terminal, redrawn five times a second below all other output."""

    def __init__(self, draw: Callable[[], Any]) -> None:
        self._messages: list[str] = []  # above the drawing
        self._proxies: list[tuple[Any, FileProxy]] = []
        # The drawing goes to the terminal itself, past the replaced ``write``.
        file: Any = sys.stderr
        names = ("write", "flush", "isatty", "fileno")
        raw = SimpleNamespace(encoding=file.encoding, **{name: getattr(file, name) for name in names})
        super().__init__(
            get_renderable=lambda: Group(*map(Text, self._messages), draw()),
            console=_Console(
                file=cast("IO[str]", raw),
                color_system=None if os.environ.get("NO_COLOR") else "auto",
                highlight=False,
                markup=False,
                emoji=False,
                soft_wrap=True,
            ),
            refresh_per_second=_REFRESHES,
            transient=True,
            redirect_stdout=False,
            redirect_stderr=False,
            vertical_overflow="crop",
        )

    def open(self) -> None:
        """Draw from now on, and take over ``write`` of the terminal's files: loggers hold those objects."""
        pid = os.getpid()

        def replace(file: Any) -> None:
            raw, proxy = file.write, FileProxy(self.console, file)

            def write(text: str) -> int:
                if os.getpid() != pid:
                    return int(raw(text))  # Of a forked child.
                proxy.write(text)
                return len(text)

            file.write = write
            self._proxies.append((file, proxy))

        for file in dict.fromkeys([sys.stderr, sys.__stderr__, sys.stdout, sys.__stdout__]):
            with contextlib.suppress(AttributeError, TypeError, ValueError):
                if file is not None and file.isatty():
                    replace(file)
        self.start(refresh=True)

    def close(self) -> None:
        """Remove the drawing; everything that was printed stays. Safe to call twice."""
        for file, _ in self._proxies:
            with contextlib.suppress(AttributeError):
                del file.write
        with contextlib.suppress(OSError, ValueError):  # The terminal is gone.
            while self._messages:
                self.console.print(Text(self._messages.pop(0)))
            while self._proxies:
                self._proxies.pop()[1].flush()
            self.stop()

    def say(self, text: str) -> bool:
        """Show lines above the drawing, and return True; False if nothing is drawn.

        Safe in a signal handler: it prints nothing itself.
        """
        if self.is_started:
            self._messages.append(text.strip("\n"))
        return self.is_started

    def refresh(self) -> None:
        """Draw now, unless the process is in the background of its terminal, or that is gone."""
        if not _is_in_background():
            with contextlib.suppress(OSError, ValueError):
                super().refresh()


def _is_in_background() -> bool:
    """Return True if another process of the terminal has its input, after Ctrl-Z and `bg`."""
    try:
        return os.tcgetpgrp(2) != os.getpgrp()
    except (OSError, AttributeError):  # Standard error is not the terminal that controls this process.
        return False
