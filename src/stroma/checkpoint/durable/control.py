"""Requests about a run from any process: cancel, pause, change the budget.

A request is stored as an annotation of its own, so that none overwrites another. The owner, or whoever opens the run next,
moves it to those that hold: a request that is no longer pending was read.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any, Final

from stroma.checkpoint.durable.integrity import checksum, is_intact
from stroma.checkpoint.durable.rows import Annotation, Rows, Step, StepRow
from stroma.checkpoint.entries import RunControl

__all__ = [
    "CANCEL",
    "PAUSE",
    "accept_requests",
    "forget_requests",
    "read_control",
    "request",
    "request_budget",
]

#: Keys of requests. That of a budget ends with its number: the last one counts.
CANCEL: Final = "cancel"
PAUSE: Final = "pause"
_BUDGET: Final = "budget"
_KINDS: Final = (Annotation.CONTROL, Annotation.REQUEST)


def request(rows: Rows, run_id: str, key: str, data: bytes = b"") -> None:
    """Store a request about an existing run."""
    rows.annotate(run_id, Annotation.REQUEST, key, key, Step("", "", data, checksum(data)))


def request_budget(rows: Rows, run_id: str, run: Any, limits: Mapping[str, float]) -> None:
    """Store a request for other limits, by field of ExecutionBudget. ``run``: the run's key in the store, which is locked."""
    earlier = [row.branch for kind in _KINDS for row in rows.annotations(run, kind)]
    numbers = [int(key.split()[1]) for key in earlier if key.startswith(_BUDGET)]
    key = f"{_BUDGET} {max(numbers, default=0) + 1:09d}"
    request(rows, run_id, key, json.dumps(dict(limits)).encode())


def read_control(rows: Rows, run: Any) -> RunControl:
    """Return all requests about a run, read or not. ``run``: its key in the store."""
    return _to_control([row for kind in _KINDS for row in rows.annotations(run, kind)])


def accept_requests(rows: Rows, run_id: str, run: Any) -> RunControl | None:
    """Make the requests that nobody has read hold. Return all that hold; None if none was pending."""
    pending = list(rows.annotations(run, Annotation.REQUEST))
    if not pending:
        return None
    holding = list(rows.annotations(run, Annotation.CONTROL))
    for row in pending:
        rows.delete_annotations(run, Annotation.REQUEST, row.branch)
        rows.annotate(run_id, Annotation.CONTROL, row.branch, row.branch, row.step)
    return _to_control([*holding, *pending])


def forget_requests(rows: Rows, run: Any, *keys: str) -> None:
    """Delete requests about a run, read or not."""
    for kind in _KINDS:
        for key in keys:
            rows.delete_annotations(run, kind, key)


def _to_control(requests: Iterable[StepRow]) -> RunControl:
    by_key = {row.branch: row.step for row in requests}
    budget: dict[str, float] = {}
    for key in sorted(by_key):
        step = by_key[key]
        if key.startswith(_BUDGET) and is_intact(step.output, step.sha256):
            budget.update(json.loads(step.output))
    return RunControl(CANCEL in by_key, PAUSE in by_key, budget)
