"""Waits of flows, and the inputs of steps that failed, as a store has them besides the commits.

``runner/flows/journal.py`` writes these notes, under ``position:kind:branch``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from typing import Any

from stroma.checkpoint.entries import Waiting
from stroma.checkpoint.errors import CorruptCheckpoint
from stroma.checkpoint.flow_notes import FailureNote, decode_flow_note, message_label
from stroma.checkpoint.identity import is_called
from stroma.trace.outline import parse_call
from stroma.trace.story import Bar

__all__ = ["failed_input", "wait_bars"]


def wait_bars(
    waiting: Iterable[Waiting], notes: Mapping[str, bytes], first_ns: int, until_ms: int
) -> list[Bar]:
    """Return the waits of flows as bars. ``reason``: the class of the answer, or the topic of the message.

    ``until_ms``: the end of those that are open.
    """
    bars: dict[str, Bar] = {}
    first_ms = first_ns / 1e6

    def add(
        at: str, label: str, outcome: str, began_ms: float, ended_ms: float, reason: str | None = None
    ) -> None:
        bars[at] = Bar(
            label, at, 1, began_ms - first_ms, max(0.0, ended_ms - began_ms), outcome, None, reason
        )

    for one in waiting:
        if not _is_wait(one.branch):  # A node that waits has an attempt.
            continue
        at, place = f"{one.position}.{one.branch}", f"{one.position}:%s:{one.branch}"
        label, answer = f"question: {one.reason}", one.schema_ref.rpartition(":")[2]
        began = _read(notes, place % "w")
        began_ms = until_ms if began is None else began
        wake = _read(notes, place % "s")
        if place % "x" in notes:
            add(at, label, "expired", began_ms, began_ms if wake is None else wake[0], answer)
        elif one.payload is None:
            add(at, label, "open", began_ms, until_ms, answer)
        else:  # When it was answered is not recorded.
            add(at, label, "answered", began_ms, began_ms, answer)
    for key in notes:
        position, kind, branch = [*key.split(":", 2), "", ""][:3]
        wait = _read(notes, key) if kind == "r" else None
        if wait is not None:
            topic, began_ms = wait
            place, outcome, ended_ms = f"{position}:%s:{branch}", "receiving", until_ms
            wake, message = _read(notes, place % "s"), _read(notes, place % "m")
            if message is not None:
                outcome, ended_ms = "received", message.at_ms
            elif place % "x" in notes:
                outcome, ended_ms = "missed", began_ms if wake is None else wake[0]
            add(f"{position}.{branch}", message_label(topic), outcome, began_ms, ended_ms, topic)
    for key in notes:
        position, kind, branch = [*key.split(":", 2), "", ""][:3]
        at, wake = f"{position}.{branch}", _read(notes, key) if kind == "s" else None
        if wake is None or at in bars:  # The time limit of another wait.
            continue
        wake_ms, began_ms = wake
        outcome = "slept" if wake_ms <= until_ms else "sleeping"
        add(at, _sleep_text(wake_ms), outcome, began_ms, min(wake_ms, max(until_ms, began_ms)))
    return list(bars.values())


def failed_input(notes: Mapping[str, bytes], position: int, branch: str) -> bytes | None:
    """Return the input of a call that failed, in stored form; None if there is none."""
    fields: FailureNote | None = _read(notes, f"{position}:f:{branch}")
    return None if fields is None or fields.input_key is None else fields.input_key.encode()


def _is_wait(branch: str) -> bool:
    call = parse_call(branch.rpartition(".")[2]) if is_called(branch) else None
    return call is not None and call.kind == "!"


def _sleep_text(wake_ms: int) -> str:
    try:
        return f"sleep until {datetime.fromtimestamp(wake_ms / 1000, UTC).isoformat(timespec='seconds')}"
    except (ValueError, OverflowError, OSError):
        return "sleep"


def _read(notes: Mapping[str, bytes], key: str) -> Any:
    """Return the value of a note; None without one, or for a damaged one: the rest is still shown."""
    data = notes.get(key)
    try:
        return None if data is None else decode_flow_note("", key, key.split(":", 2)[1], data)
    except (CorruptCheckpoint, LookupError):
        return None
