"""Tokens that are used in a run of a guard and in no step, or that a framework counts and the guard does not see."""

from __future__ import annotations

import asyncio
import threading
from contextlib import suppress
from typing import Final

from stroma.adapters._step import count_tokens
from stroma.checkpoint import StoreError
from stroma.cost.prices import cost_of
from stroma.cost.usage import Usage, as_report
from stroma.engine.context import ReliabilityContext
from stroma.engine.execution import current_node_or_none

__all__ = ["OutsideUsage"]

#: The id under which tokens of no step are counted.
_OUTSIDE: Final = "outside of steps"
#: Key of an execution's note: the tokens inside it that a framework has counted, and the guard has not.
_UNACCOUNTED: Final = "tokens that are not accounted for"


class OutsideUsage:
    """The usage of a run outside of its steps. Frameworks report it from any thread.

    Attributes:
        loop: that of the run, on which it is stored at once. None: the end of the run stores it.
        unaccounted: tokens that a framework has counted in this run, and the guard has not; see
            :meth:`compare`.
    """

    def __init__(self, ctx: ReliabilityContext) -> None:
        self._ctx = ctx
        self._lock = threading.Lock()
        self.loop: asyncio.AbstractEventLoop | None = None
        self.unaccounted = 0

    def report(self, usage: Usage) -> None:
        """Count tokens against the budget of the run, and in its totals, and store them for a resume.

        Raises UsageError for tokens without a known price where a cost limit could not count them.
        """
        cost = cost_of(as_report(usage))
        tokens = usage.input_tokens + usage.output_tokens
        with self._lock:
            self._ctx.cost_tracker.add(_OUTSIDE, tokens, usage.output_tokens, cost or 0.0, 0, usage.model)
        if self.loop is not None:
            with suppress(RuntimeError):  # The loop was closed under it.
                self.loop.call_soon_threadsafe(self._store)
        if cost is None and tokens:
            place = f"run {self._ctx.run_id!r}, outside of its steps,"
            problem = self._ctx.note_unpriced(_OUTSIDE, place, usage.model)
            if problem is not None:
                raise problem

    def _store(self) -> None:
        self._ctx.note_usage()
        with suppress(StoreError):  # The next step meets it too.
            pending = self._ctx.session.flush()
            if pending is not None:
                asyncio.ensure_future(pending).add_done_callback(
                    lambda done: done.cancelled() or done.exception()
                )

    def check_budget(self) -> None:
        """Raise BudgetExceeded if what the run has used exceeds its budget. For model calls in no step."""
        if self._ctx.limits:
            self._ctx.cost_tracker.check_budget(self._ctx.budget, _OUTSIDE)

    def compare(self, framework: str, tokens: int) -> None:
        """Compare a framework's own count of tokens with that of the guard; see :meth:`stroma.adapters.Guard.compare_usage`."""
        ctx, node = self._ctx, current_node_or_none()
        if node is not None and node.ctx is ctx:
            known: int = node.notes.get(_UNACCOUNTED, 0)
            counted = node.usage.tokens + sum(count_tokens(node.children or ()))
            place = f"step {node.node_id!r}"
        else:
            node, known = None, self.unaccounted
            counted, place = ctx.cost_tracker.total_tokens, f"run {ctx.run_id!r}"
        missing = tokens - counted - known
        if missing <= 0:
            return
        with self._lock:
            self.unaccounted += missing
            while node is not None:
                node.notes[_UNACCOUNTED] = node.notes.get(_UNACCOUNTED, 0) + missing
                node = node.parent
        ctx.run_logger.warning(
            "%s counted %d tokens in %s, and the guard %d: %d tokens count against no budget; attach the guard to every "
            "agent, model and tool that is used there",
            framework,
            tokens,
            place,
            counted,
            missing,
        )
