"""Attempts of a run: their places, their order, and their bars in a drawing."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any

from stroma.checkpoint.identity import is_called
from stroma.checkpoint.records import AttemptRecord
from stroma.trace.rejected import RejectedOutput
from stroma.trace.story import Bar

__all__ = ["bar_of", "in_order", "place_of", "sum_waste"]


def place_of(attempt: AttemptRecord) -> str:
    """Return the place of an attempt in its run: "2", or "2.0" for a child of a group."""
    return f"{attempt.position}.{attempt.branch}" if attempt.branch else str(attempt.position)


def in_order(attempts: Iterable[AttemptRecord]) -> list[AttemptRecord]:
    """Return attempts with each group before its children, and these by their index: item 10 after item 9.

    Steps that a node calls come in the order in which they started, each with what is inside it.
    """
    unsorted = list(attempts)
    #: The start of each step that code called, or of the first attempt inside it.
    starts: dict[tuple[int, str], int] = {}
    for one in unsorted:
        if is_called(one.branch):
            for place in _enclosing_branches(one.branch):
                at = (one.position, place)
                starts[at] = min(starts.get(at, one.started_ns), one.started_ns)

    def key(attempt: AttemptRecord) -> tuple[int, list[tuple[int, str]], int, int]:
        branch = [
            (int(part), "") if part.isdecimal() else (starts.get((attempt.position, place), -1), part)
            for place in _enclosing_branches(attempt.branch)
            for part in (place.rpartition(".")[2],)
        ]
        return attempt.position, branch, attempt.started_ms, attempt.attempt

    return sorted(unsorted, key=key)


def _enclosing_branches(branch: str) -> list[str]:
    """Return each branch on the way to a branch, the branch itself last: "0" and "0.2" for "0.2"."""
    if not branch:
        return []
    return list(itertools.accumulate(branch.split("."), lambda outer, part: f"{outer}.{part}"))


def sum_waste(attempts: Iterable[AttemptRecord]) -> tuple[int, float]:
    """Return the tokens and US dollars of the attempts without a committed output."""
    wasted = [attempt for attempt in attempts if attempt.output_bytes is None]
    return sum(attempt.tokens for attempt in wasted), sum(attempt.cost_usd for attempt in wasted)


def bar_of(
    attempt: AttemptRecord,
    first_ns: int,
    input_value: Any = None,
    output_value: Any = None,
    rejected: RejectedOutput | None = None,
) -> Bar:
    """Return the bar of an attempt in a drawing. ``first_ns``: start of the first attempt."""
    waited = 0 < attempt.function_ms <= attempt.duration_ms - 1
    return Bar(
        node_id=attempt.node_id,
        at=place_of(attempt),
        attempt=attempt.attempt,
        began_ms=(attempt.started_ns - first_ns) / 1e6,
        took_ms=attempt.duration_ms,
        outcome=attempt.outcome,
        failure_class=attempt.failure_class,
        reason=attempt.reason,
        message=attempt.text,
        tokens=attempt.tokens,
        output_tokens=attempt.output_tokens,
        cost_usd=attempt.cost_usd,
        model=attempt.model,
        is_committed=attempt.output_bytes is not None,
        input_state=input_value,
        output_state=output_value,
        function_ms=attempt.function_ms if waited else None,
        rejected=rejected,
        is_damaged=attempt.damaged,
    )
