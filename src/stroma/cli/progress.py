"""Progress of a run on stderr, printed by hooks."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterator, Sequence
from datetime import datetime
from typing import Any, Final

from stroma._utils.access import error_text
from stroma._utils.text import clean, format_amount, format_duration, format_tokens, format_usd, typed
from stroma.checkpoint.identity import with_outer
from stroma.cli.errors import is_debugging
from stroma.cli.formatting import id_word
from stroma.cli.output import Part, err
from stroma.cost.budget import BudgetExceeded
from stroma.engine.execution import CURRENT, RunningNode
from stroma.failures.classes import FailureClass
from stroma.hooks.sets import MapProgress, NodeHooks
from stroma.trace.result import ExecutionResult

_NAME_WIDTH: Final = 30
_MAX_ITEM_LINES: Final = 20  # a larger map prints one line for all items
_MAX_FAILURE_LINES: Final = 20  # of such a map
_LINE_SECONDS: Final = 10.0  # between two lines about such a map
_MIN_WAIT_SECONDS: Final = 1.0  # that have a line
_INDENT: Final = 16  # of what continues a line
_UNITS: Final = {"tokens": "tokens", "cost": "USD", "latency": "ms"}
#: Position and branch of one execution.
Place = tuple[int, str]
#: Words for what happens to an execution, with their styles.
START: Final = ("start", "cyan")
OK: Final = ("ok", "green")
FAILED: Final = ("FAILED", "bold red")
OVER_BUDGET: Final = ("BUDGET", "bold red")
CANCELLED: Final = ("cancelled", "yellow")
SUSPENDED: Final = ("suspended", "yellow")
WAIT: Final = ("wait", "yellow")
RESTORED: Final = ("restored", "blue")
ITEMS: Final = ("items", "cyan")
_ENDS: Final = (OK, FAILED, OVER_BUDGET, CANCELLED, SUSPENDED)


def place_at(node: RunningNode) -> Place:
    """Return the position and branch of an execution."""
    return node.position, node.branch


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
        #: Maps that have reported their progress, with the remaining lines for failures of many items.
        self._maps: dict[Place, int | None] = {}
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

    # ------------------------------------------------------------------ hooks

    async def _run_start(self, run_id: str, pipeline: str, state: dict[str, Any]) -> None:
        self.is_started = True
        if not self._quiet:
            timed_line((clean(pipeline, 60), "bold"), f": run {shown_id(run_id)}")

    async def _run_end(self, run_id: str, result: ExecutionResult) -> None:
        self.result = result

    async def _budget_warning(self, run_id: str, dimension: str, used: float, limit: float) -> None:
        unit = _UNITS.get(dimension, "")
        amounts = f"{format_amount(used, unit)} of {format_amount(limit, unit)}"
        timed_line(("budget: ", "yellow"), f"{amounts} used ({dimension})")

    async def _node_start(self, *_: Any) -> None:
        node = CURRENT.get()
        if node is not None:
            self._show(node, START, f"attempt {node.attempt}" if node.attempt > 1 else "")

    async def _node_success(self, *_: Any) -> None:
        self._show(CURRENT.get(), OK)

    async def _node_failure(
        self, _run_id: str, _node_id: str, exc: Exception, failure_class: FailureClass
    ) -> None:
        node = CURRENT.get()
        failed = None if node is None or node.ended is None else node.ended.failure
        kind, message = (None, "") if failed is None else (failed.error_type, failed.message)
        reason = "" if failed is None or failed.reason is None else f" {failed.reason}"
        verb = OVER_BUDGET if isinstance(exc, BudgetExceeded) else FAILED
        self._show(node, verb, f"{failure_class}{reason}", clean(typed(kind, message)))

    async def _node_retry(
        self, _run_id: str, _node_id: str, attempt: int, delay: float, failure_class: FailureClass
    ) -> None:
        if delay >= _MIN_WAIT_SECONDS:
            self._show(CURRENT.get(), WAIT, f"{format_duration(delay)}, then attempt {attempt}")

    async def _node_skipped(self, *_: Any) -> None:
        self._show(CURRENT.get(), RESTORED, "finished earlier, not called again")

    async def _node_cancelled(self, *_: Any) -> None:
        self._show(CURRENT.get(), CANCELLED)

    async def _node_suspended(self, _run_id: str, _node_id: str, reason: str) -> None:
        self._show(CURRENT.get(), SUSPENDED, clean(reason))

    async def _map_progress(self, _run_id: str, _node_id: str, progress: MapProgress) -> None:
        node, total = CURRENT.get(), progress.total
        if node is None:
            return
        has_many = total is None or total > _MAX_ITEM_LINES
        self._maps.setdefault(place_at(node), _MAX_FAILURE_LINES if has_many else None)
        now = time.monotonic()
        if not has_many or not (progress.ended or now - self._shown_at >= _LINE_SECONDS):
            return
        self._shown_at = now
        details = [f"{progress.done:,}{'' if total is None else f' of {total:,}'} items"]
        if progress.failed:
            details.append(f"{progress.failed:,} failed")
        if progress.rate:
            details.append(f"{progress.rate:,.1f}/s")
        if progress.seconds_left is not None and not progress.ended:
            details.append(f"{format_duration(progress.seconds_left)} left")
        self._show(node, ITEMS, ", ".join(details))

    # ------------------------------------------------------------------ lines

    def _show(self, node: RunningNode | None, verb: tuple[str, str], what: str = "", why: str = "") -> None:
        """Print what happened to an execution. ``why``: the message of a failure."""
        if node is None or self._is_hidden(node, verb):
            return
        depth = node.branch.count(".") + 1 if node.branch else 0
        index = next((f"[{at[1].rpartition('.')[2]}]" for at, _ in self._items_around(node)), "")
        if index and verb == START:
            return
        name = f"{'  ' * depth}{clean(node.node_id, 80)}{index}".ljust(_NAME_WIDTH)
        details, more = [what], []
        if verb in _ENDS:
            details += _usage(node)
            spent = node.ctx.cost_tracker
            more.append(f"run: {format_tokens(int(spent.used('tokens')))}, {format_usd(spent.used('cost'))}")
        if why and node.kind != "group":  # The child has printed it.
            more.append(why)
        text = ", ".join(filter(None, details))
        timed_line(name, "  ", (verb[0].ljust(9), verb[1]), " ", text, more=more)

    def _items_around(self, node: RunningNode) -> Iterator[tuple[Place, Place]]:
        """Yield the place of each item of a map that a node is in, and that of the map, innermost first."""
        for branch in with_outer(node.branch):
            outer = node.position, branch.rpartition(".")[0]
            if outer in self._maps:
                yield (node.position, branch), outer

    def _is_hidden(self, node: RunningNode, verb: tuple[str, str]) -> bool:
        """Return True in an item of a map with many, which prints no line but for its first failures."""
        for _, at in self._items_around(node):
            left = self._maps[at]
            if left is not None:
                if verb not in (FAILED, OVER_BUDGET) or left <= 0:
                    return True
                self._maps[at] = left - 1
                return False
        return False


def shown_id(run_id: str) -> str:
    """Return the id of a run for a line."""
    return id_word(run_id) if run_id.isprintable() else clean(run_id)


def _usage(node: RunningNode) -> list[str]:
    """Return seconds, tokens, dollars and model of the attempt that has ended."""
    used = [] if node.duration_ms is None else [format_duration(node.duration_ms / 1000)]
    if node.usage.tokens or node.usage.cost_usd:
        used += [format_tokens(node.usage.tokens), format_usd(node.usage.cost_usd)]
    if node.usage.model:
        used.append(clean(node.usage.model, 40))
    return used


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
            text += f": {error_text(error)}"
            if is_debugging():
                with contextlib.suppress(Exception):  # a traceback ends with the exception's own text
                    text += "\n" + logging.Formatter().formatException(record.exc_info)
        timed_line((f"{record.levelname.lower()}: ", "yellow"), text if is_debugging() else clean(text, 600))


def show_warnings(*, quiet: bool) -> None:
    """Print warnings of the engine from now on; only errors when quiet."""
    logging.getLogger("stroma").addHandler(_LogPrinter(logging.ERROR if quiet else logging.WARNING))
