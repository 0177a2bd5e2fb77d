"""Progress of a run on stderr, printed by hooks."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Sequence
from datetime import datetime
from typing import Any

from stroma._utils.text import clean, format_amount, format_duration, format_tokens, format_usd, typed
from stroma.checkpoint.identity import with_outer
from stroma.cli.errors import is_debugging
from stroma.cli.formatting import id_word
from stroma.cli.output import Part, err
from stroma.cost.budget import BudgetExceeded
from stroma.engine.execution import RunningNode, running_node
from stroma.failures.classes import FailureClass
from stroma.failures.failure import Failure, NodeContext, diagnose, kind_of, message_of
from stroma.hooks.sets import MapProgress, NodeHooks
from stroma.trace.result import ExecutionResult

_NAME_WIDTH = 30
_MAX_ITEM_LINES = 20  # a larger map prints one line for all items
_MAX_FAILURE_LINES = 20  # of such a map
_LINE_SECONDS = 10.0  # between two lines about such a map
_MIN_WAIT_SECONDS = 1.0  # that have a line
_INDENT = 16  # of what continues a line
_UNITS = {"tokens": "tokens", "cost": "USD", "latency": "ms"}


def failure_message(node: RunningNode | None, failure: Failure) -> str:
    """Return type and recorded message of a failure, without secrets."""
    recorded = None if node is None or node.ended is None else node.ended.failure
    return str(failure) if recorded is None else typed(recorded.error_type, recorded.message)


class Progress:
    """Hooks that print one line for each start, end, wait and restored output; none when quiet.

    Starts of items and waits of less than a second are not printed. A map with many items prints one line
    for all of them, and its first failures.

    Attributes:
        is_started: this process opened the run in the store.
        result: result of the run, also if ``run()`` raised; None until its end.
    """

    def __init__(self, *, quiet: bool) -> None:
        self._quiet = quiet
        self.is_started = False
        self.result: ExecutionResult | None = None
        self._started: dict[tuple[int, str], float] = {}
        #: Position and branch of each map that has started: what is restored has no parent.
        self._maps: set[tuple[int, str]] = set()
        #: Maps with many items, by position and branch: the remaining lines for failures.
        self._many: dict[tuple[int, str], int] = {}
        self._shown_at = 0.0

    def hooks(self) -> NodeHooks:
        """Return the set of hooks for the runner."""
        if self._quiet:
            return NodeHooks(on_run_start=self._run_start, on_run_end=self._run_end)
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
        )

    def say(self, text: str) -> bool:
        """Print lines above what is drawn in place; False if nothing is. Safe in a signal handler."""
        return False

    def close(self) -> None:
        """Remove what is drawn in place. Safe to call twice."""

    # ------------------------------------------------------------------ runs

    async def _run_start(self, run_id: str, pipeline: str, state: dict[str, Any]) -> None:
        self.is_started = True
        if self._quiet:
            return
        timed_line(
            (clean(pipeline, 60), "bold"),
            f": run {id_word(run_id) if run_id.isprintable() else clean(run_id)}",
        )

    async def _run_end(self, run_id: str, result: ExecutionResult) -> None:
        self.result = result

    async def _budget_warning(self, run_id: str, dimension: str, used: float, limit: float) -> None:
        unit = _UNITS.get(dimension, "")
        amounts = f"{format_amount(used, unit)} of {format_amount(limit, unit)}"
        timed_line(("budget: ", "yellow"), f"{amounts} used ({dimension})")

    async def _map_progress(self, run_id: str, node_id: str, progress: MapProgress) -> None:
        node, total = running_node(), progress.total
        if node is None or (total is not None and total <= _MAX_ITEM_LINES):
            return
        self._many.setdefault((node.position, node.branch), _MAX_FAILURE_LINES)
        now = time.monotonic()
        of = f"{progress.done:,}" if total is None else f"{progress.done:,} of {total:,}"
        details = [f"{of} items"]
        if progress.failed:
            details.append(f"{progress.failed:,} failed")
        if progress.rate:
            details.append(f"{progress.rate:,.1f}/s")
        if progress.seconds_left is not None and not progress.ended:
            details.append(f"{format_duration(progress.seconds_left)} left")
        if progress.ended or now - self._shown_at >= _LINE_SECONDS:
            self._shown_at = now
            self._event(node, node_id, ("items", "cyan"), *details)

    def _is_one_of_many(self, node: RunningNode | None, *, failed: bool = False) -> bool:
        """Return True if the node belongs to an item of a map with many items, which print no line."""
        around = None if node is None or not self._many else node.parent
        while around is not None:
            at = (around.position, around.branch)
            if at in self._many:
                self._many[at] -= failed
                return not failed or self._many[at] < 0
            around = around.parent
        return False

    # ------------------------------------------------------------------ nodes

    async def _node_start(self, run_id: str, node_id: str, state: dict[str, Any]) -> None:
        node = running_node()
        if node is not None and not self._is_one_of_many(node):
            if node_id.startswith("map_over("):
                self._maps.add((node.position, node.branch))
            self._started[node.position, node.branch] = time.perf_counter()
            again = f"attempt {node.attempt}" if node.attempt > 1 else ""
            if not self._item_index(node):
                self._event(node, node_id, ("start", "cyan"), again)

    async def _node_success(self, run_id: str, node_id: str, state: dict[str, Any], tokens: int) -> None:
        self._note_end(node_id, ("ok", "green"))

    async def _node_failure(
        self, run_id: str, node_id: str, exc: Exception, failure_class: FailureClass
    ) -> None:
        node = running_node()
        if self._is_one_of_many(node, failed=True):
            return
        attempt = node.attempt if node is not None else 1
        failure = diagnose(exc, NodeContext(node_id, attempt, run_id))
        verb = "BUDGET" if isinstance(exc, BudgetExceeded) else "FAILED"
        what = f"{failure_class}{f' {failure.reason}' if failure.reason else ''}"
        why = clean(failure_message(node, failure))
        self._event(node, node_id, (verb, "bold red"), what, *self._usage(), totals=True, why=why)

    async def _node_retry(
        self, run_id: str, node_id: str, attempt: int, delay: float, failure_class: FailureClass
    ) -> None:
        if delay >= _MIN_WAIT_SECONDS:
            self._note(node_id, ("wait", "yellow"), f"{format_duration(delay)}, then attempt {attempt}")

    async def _node_skipped(self, run_id: str, node_id: str, state: dict[str, Any]) -> None:
        self._note(node_id, ("restored", "blue"), "finished earlier, not called again")

    async def _node_cancelled(self, run_id: str, node_id: str) -> None:
        self._note_end(node_id, ("cancelled", "yellow"))

    async def _node_suspended(self, run_id: str, node_id: str, reason: str) -> None:
        self._event(running_node(), node_id, ("suspended", "yellow"), clean(reason))

    def _note(self, node_id: str, verb: tuple[str, str], text: str) -> None:
        node = running_node()
        if not self._is_one_of_many(node):
            self._event(node, node_id, verb, text)

    def _note_end(self, node_id: str, verb: tuple[str, str]) -> None:
        node = running_node()
        if not self._is_one_of_many(node):
            self._event(node, node_id, verb, *self._usage(), totals=True)

    def _usage(self) -> list[str]:
        """Return seconds, tokens, dollars and model of the current attempt."""
        node = running_node()
        if node is None:
            return []
        started = self._started.pop((node.position, node.branch), None)
        used = [format_duration(time.perf_counter() - started)] if started is not None else []
        if node.usage.tokens or node.usage.cost_usd:
            used += [format_tokens(node.usage.tokens), format_usd(node.usage.cost_usd)]
        if node.usage.model:
            used.append(clean(node.usage.model, 40))
        return used

    def _item_index(self, node: RunningNode) -> str:
        """Return "[17]" for item 17 of a map, and for the nodes in it; "" for other nodes."""
        for branch in with_outer(node.branch):
            above, _, index = branch.rpartition(".")
            if not index.isdecimal():
                break
            if node.kind == "item" or (node.position, above) in self._maps:
                return f"[{index}]"
        return ""

    def _event(
        self,
        node: RunningNode | None,
        node_id: str,
        verb: tuple[str, str],
        *details: str,
        totals: bool = False,
        why: str = "",
    ) -> None:
        depth, name = 0, clean(node_id, 80)
        if node is not None and node.branch:
            depth = node.branch.count(".") + 1
            name += self._item_index(node)
        name = f"{'  ' * depth}{name}".ljust(_NAME_WIDTH)
        parts: list[Part] = [name, "  ", (verb[0].ljust(9), verb[1]), " ", ", ".join(filter(None, details))]
        more: list[str] = []
        if totals and node is not None:
            spent = node.ctx.cost_tracker
            more.append(f"run: {format_tokens(int(spent.used('tokens')))}, {format_usd(spent.used('cost'))}")
        if why and (node is None or node.kind != "group"):  # The child has printed it.
            more.append(why)
        timed_line(*parts, more=more)


def timed_line(*parts: Part, more: Sequence[str] = ()) -> None:
    """Print a line on stderr, prefixed by the time of day; on a terminal, in lines that fit it.

    ``more``: texts at its end.
    """
    clock = datetime.now().strftime("%H:%M:%S.%f")[:-3]
    # Must not raise: with strict hooks that would fail the run.
    err.fitted((clock, "dim"), "  ", *parts, *((f"  | {text}", "dim") for text in more), indent=_INDENT)


class _LogPrinter(logging.Handler):
    """Print log records of the engine that no hook reports."""

    def emit(self, record: logging.LogRecord) -> None:
        if " failed at attempt " in str(record.msg) or hasattr(record, "run_status"):
            return  # The failure hook has printed it, or the command prints how the run ended.
        try:
            text = record.getMessage()
        except Exception:
            text = str(record.msg)
        if record.exc_info and record.exc_info[1] is not None:
            error = record.exc_info[1]
            text += f": {typed(kind_of(error), message_of(error))}"
            if is_debugging():
                with contextlib.suppress(Exception):  # a traceback ends with the exception's own text
                    text += "\n" + logging.Formatter().formatException(record.exc_info)
        timed_line((f"{record.levelname.lower()}: ", "yellow"), text if is_debugging() else clean(text, 600))


def show_warnings(*, quiet: bool) -> None:
    """Print warnings of the engine from now on; only errors when quiet."""
    logging.getLogger("stroma").addHandler(_LogPrinter(logging.ERROR if quiet else logging.WARNING))
