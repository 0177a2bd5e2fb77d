"""Live table of a run on a terminal, one line per node, which folds into a summary at its end."""

from __future__ import annotations

import sys
import threading
import time
from collections import Counter
from collections.abc import Iterable
from typing import Any, Final

from stroma._utils.text import clean, format_duration, format_tokens, format_usd, pluralize
from stroma.cli.formatting import id_word
from stroma.cli.live_rows import Place, Row, RowWait, bar, fold_rows, write_rows
from stroma.cli.output import Part, err, fit, wrap
from stroma.cli.progress import Progress, failure_message
from stroma.cli.screen import Screen
from stroma.cost.budget import ExecutionBudget, limits
from stroma.engine.execution import NodeExecution, current_node_or_none
from stroma.failures.classes import FailureClass
from stroma.failures.failure import NodeContext, diagnose
from stroma.hooks.sets import MapProgress, NodeHooks
from stroma.trace.outline import parse_call

__all__ = ["LiveProgress", "has_room"]

_MIN_COLUMNS: Final = 40
_MIN_ROWS: Final = 8
_SUMMARY_ROWS: Final = 20  # a longer pipeline is folded
_Key = tuple[Any, ...]


def has_room() -> bool:
    """Return True if stderr is a terminal that is large enough for a live table."""
    columns, rows = err.size
    return err.is_live and columns >= _MIN_COLUMNS and rows >= _MIN_ROWS


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
        self._rows: dict[_Key, Row] = {(i, ""): Row(name) for i, name in enumerate(nodes)}
        self._maps: set[Place] = set()
        self._lock = threading.RLock()
        self._is_utf8 = "utf" in (getattr(sys.stderr, "encoding", None) or "").lower()
        self._screen = Screen(err, self._draw)

    def hooks(self) -> NodeHooks:
        """Return the set of hooks for the runner."""
        return NodeHooks(
            on_node_start=self._node_start,
            on_node_success=self._node_success,
            on_node_failure=self._node_failure,
            on_run_start=self._run_start,
            on_run_end=self._run_end,
            on_node_retry=self._node_retry,
            on_node_skipped=self._node_skipped,
            on_node_cancelled=self._node_cancelled,
            on_node_suspended=self._node_suspended,
            on_budget_warning=self._budget_warning,
            on_map_progress=self._map_progress,
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
                for line in self._summary(err.columns):
                    err.line(*line)
                self._run_id = ""

    # ------------------------------------------------------------------ hooks

    async def _run_start(self, run_id: str, pipeline: str, state: dict[str, Any]) -> None:
        self.is_started = True
        self._run_id = run_id
        self._screen.open()

    async def _node_start(self, run_id: str, node_id: str, state: dict[str, Any]) -> None:
        node = current_node_or_none()
        if node is None:
            return
        with self._lock:
            row, place, now = self._row(node), _place(node), time.monotonic()
            row.waiting.pop(place, None)
            row.running[place] = now
            row.first = now if row.first is None else row.first
            row.state, row.why = "running", ""
            if place not in self._maps:
                row.attempts += 1
                row.calls.add(place)

    async def _node_success(self, run_id: str, node_id: str, state: dict[str, Any], tokens: int) -> None:
        self._end("ok")

    async def _node_failure(
        self, run_id: str, node_id: str, exc: Exception, failure_class: FailureClass
    ) -> None:
        node = current_node_or_none()
        if node is None:
            return
        failure = diagnose(exc, NodeContext(node_id, node.attempt, run_id))
        reason = failure.reason or str(failure.failure_class)
        self._reasons[_place(node)] = reason
        self._end("failed", f"{reason}, {clean(failure_message(node, failure))}")

    async def _node_retry(
        self, run_id: str, node_id: str, attempt: int, delay: float, failure_class: FailureClass
    ) -> None:
        node = current_node_or_none()
        if node is None:
            return
        with self._lock:
            row, place = self._row(node), _place(node)
            reason = self._reasons.pop(place, str(failure_class))
            row.retried.add(place)
            row.retries[clean(reason, 60)] += 1
            row.waiting[place] = RowWait(time.monotonic() + delay, f"retry after {clean(reason, 60)}")

    async def _node_skipped(self, run_id: str, node_id: str, state: dict[str, Any]) -> None:
        node = current_node_or_none()
        if node is not None:
            with self._lock:
                row = self._row(node)
                if row is self._rows.get(_key(node)):
                    row.calls.add(_place(node))
                    row.state, row.why = "restored", ""

    async def _node_cancelled(self, run_id: str, node_id: str) -> None:
        self._end("cancelled")

    async def _node_suspended(self, run_id: str, node_id: str, reason: str) -> None:
        self._end("suspended", clean(reason))

    async def _map_progress(self, run_id: str, node_id: str, progress: MapProgress) -> None:
        node = current_node_or_none()
        if node is None:
            return
        with self._lock:
            self._mark_map(node)
            row = self._row(node)
            row.progress = progress
            now = time.monotonic()
            row.first = now if row.first is None else row.first
            row.last = now

    async def _node_wait(self, run_id: str, node_id: str, reason: str, seconds: float) -> None:
        node = current_node_or_none()
        if node is not None:
            with self._lock:
                until = time.monotonic() + seconds if seconds else None
                self._row(node).waiting[_place(node)] = RowWait(until, f"waits for {clean(reason, 100)}")

    async def _limit_cooldown(self, run_id: str, limit: str, seconds: float) -> None:
        self._cooldowns[clean(limit, 60)] = time.monotonic() + seconds

    # ------------------------------------------------------------------ rows

    def _row(self, node: NodeExecution) -> Row:
        """Return the row of an execution: its own, that of other calls of this node, or that of the map around it."""
        around: NodeExecution | None = node
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
            key = _key_of(node.position, above)
        row = self._rows.get(key)
        if row is None:
            depth = node.branch.count(".") + 1 if node.branch else 0
            row = Row(node.node_id, depth)
            self._insert(key, row)
        return row

    def _mark_map(self, node: NodeExecution) -> None:
        """Count the items of this map in its row."""
        if _place(node) not in self._maps:
            self._maps.add(_place(node))
            row = self._rows.get(_key(node))
            if row is not None:
                row.attempts, row.calls = 0, set()

    def _insert(self, key: _Key, row: Row) -> None:
        """Add a row behind the last one of its position and of the group around it."""
        keys = list(self._rows)
        same = [i for i, other in enumerate(keys) if other[0] == key[0]]
        at = same[-1] + 1 if same else len(keys)
        items = list(self._rows.items())
        items.insert(at, (key, row))
        self._rows = dict(items)

    def _end(self, state: str, why: str = "") -> None:
        node = current_node_or_none()
        if node is None:
            return
        with self._lock:
            row, place, now = self._row(node), _place(node), time.monotonic()
            row.running.pop(place, None)
            row.waiting.pop(place, None)
            row.last = now
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

    def _draw(self, columns: int, rows: int) -> list[list[Part]]:
        now = time.monotonic()
        with self._lock:
            lines = self._head(columns, now)
            room = rows - len(lines) - 1  # the header of the columns
            if room > 0:
                shown, hidden = fold_rows(list(self._rows.values()), room)
                lines += write_rows(shown, hidden, columns, now, is_utf8=self._is_utf8)
        return lines[: max(0, rows)]

    def _head(self, columns: int, now: float) -> list[list[Part]]:
        run = id_word(self._run_id) if self._run_id.isprintable() else clean(self._run_id)
        right = f"  {format_duration(now - self._began)}"
        name = fit((clean(self._pipeline, 60), "bold"), columns // 2)
        used = len(name if isinstance(name, str) else name[0]) + len(right)
        lines: list[list[Part]] = [[name, fit(f": run {run}", max(0, columns - used)), (right, "dim")]]
        lines.append(self._money(columns))
        for limit, until in list(self._cooldowns.items()):
            if until <= now:
                del self._cooldowns[limit]
                continue
            text = f"limit {limit} in cooldown for {until - now:.1f} s: its provider asked to wait"
            lines.append([fit((text, "yellow"), columns)])
        return lines

    def _money(self, columns: int) -> list[Part]:
        text = f"spent {format_usd(self._spent['cost'])}, {format_tokens(int(self._spent['tokens']))}"
        parts: list[Part] = [fit(text, columns)]
        room = columns - len(text)
        for dimension, limit in limits(self._budget):
            if dimension == "latency" or not limit:
                continue
            share = self._spent[dimension] / limit
            of = format_usd(limit) if dimension == "cost" else format_tokens(int(limit))
            style = "red" if share >= 1 else "yellow" if share >= 0.8 else "green"
            more = f"; {share:.0%} of {of} "
            if len(more) + 12 <= room:
                parts += [more, (bar(share, 12, self._is_utf8), style)]
                room -= len(more) + 12
        return parts

    def _summary(self, columns: int) -> list[list[Part]]:
        now = time.monotonic()
        shown, hidden = fold_rows(list(self._rows.values()), _SUMMARY_ROWS)
        lines = [*self._head(columns, now), *write_rows(shown, hidden, columns, now, is_utf8=self._is_utf8)]
        retries = [(row, row.retries) for row in self._rows.values() if row.retries]
        for row, reasons in retries[:_SUMMARY_ROWS]:
            count = pluralize(reasons.total(), "retry").replace("retrys", "retries")
            why = ", ".join(f"{reason} {n:,}" for reason, n in Counter(reasons).most_common())
            lines += wrap([("retried: ", "yellow"), f"{clean(row.name, 60)}: {count} ({why})"], columns, 4)
        if len(retries) > _SUMMARY_ROWS:
            lines.append([f"retried: and {pluralize(len(retries) - _SUMMARY_ROWS, 'node')} more"])
        return lines


def _place(node: NodeExecution) -> Place:
    return node.position, node.branch


def _key(node: NodeExecution) -> _Key:
    """Return the same key for all calls of one node from the same place of a flow."""
    return _key_of(node.position, node.branch)


def _key_of(position: int, branch: str) -> _Key:
    parts: list[str] = []
    for part in branch.split(".") if branch else ():
        call = parse_call(part)
        parts.append(part if call is None or not call.name else f"{call.kind}{call.name}/{call.scope}")
    return position, ".".join(parts)
