"""Sleeps and questions of flows, and the inputs of steps that failed, as a store has them besides the commits.

``runner/flows/journal.py`` writes these notes, under ``position:kind:branch``.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from typing import Any

from stroma.checkpoint.entries import Waiting
from stroma.checkpoint.identity import is_called
from stroma.trace.outline import parse_call
from stroma.trace.story import Bar

__all__ = ["failed_input", "wait_bars"]


def wait_bars(
    waiting: Iterable[Waiting], notes: Mapping[str, bytes], first_ns: int, until_ms: int
) -> list[Bar]:
    """Return the sleeps and questions of flows as bars; of a question ``reason`` is the id by which it is answered.

    ``until_ms``: the end of those that are open.
    """
    bars: dict[str, Bar] = {}
    first_ms = first_ns / 1e6

    def add(
        at: str, label: str, outcome: str, began_ms: float, ended_ms: float, answer: str | None = None
    ) -> None:
        bars[at] = Bar(
            label, at, 1, began_ms - first_ms, max(0.0, ended_ms - began_ms), outcome, None, answer
        )

    for one in waiting:
        if not _is_wait(one.branch):  # A node that waits has an attempt.
            continue
        at, place = f"{one.position}.{one.branch}", f"{one.position}:%s:{one.branch}"
        label = f"question: {one.reason}"
        began = _read(notes.get(place % "w"))
        began_ms = began if isinstance(began, (int, float)) else until_ms
        wake = _read(notes.get(place % "s"))
        if place % "x" in notes:
            add(at, label, "expired", began_ms, wake[0] if isinstance(wake, list) else began_ms, one.node_id)
        elif one.payload is None:
            add(at, label, "open", began_ms, until_ms, one.node_id)
        else:  # When it was answered is not recorded.
            add(at, label, "answered", began_ms, began_ms, one.node_id)
    for key, data in notes.items():
        position, kind, branch = key.split(":", 2)
        at, wake = f"{position}.{branch}", _read(data) if kind == "s" else None
        if not isinstance(wake, list) or at in bars:  # The time limit of a question.
            continue
        wake_ms, began_ms = wake
        outcome = "slept" if wake_ms <= until_ms else "sleeping"
        add(at, _sleep_text(wake_ms), outcome, began_ms, min(wake_ms, max(until_ms, began_ms)))
    return list(bars.values())


def failed_input(notes: Mapping[str, bytes], position: int, branch: str) -> bytes | None:
    """Return the input of a call that failed, in stored form; None if there is none."""
    fields = _read(notes.get(f"{position}:f:{branch}"))
    text = fields.get("input_key") if isinstance(fields, dict) else None
    return text.encode() if isinstance(text, str) else None


def _is_wait(branch: str) -> bool:
    call = parse_call(branch.rpartition(".")[2]) if is_called(branch) else None
    return call is not None and call.kind == "!"


def _sleep_text(wake_ms: int) -> str:
    try:
        return f"sleep until {datetime.fromtimestamp(wake_ms / 1000, UTC).isoformat(timespec='seconds')}"
    except (ValueError, OverflowError, OSError):
        return "sleep"


def _read(data: bytes | None) -> Any:
    try:
        return None if data is None else json.loads(data)
    except ValueError:
        return None
