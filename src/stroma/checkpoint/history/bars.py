"""Bars of a drawing of a run: its attempts, in their order, and the waits of its flows.

``runner/flows/journal.py`` writes the notes about waits and failed calls, under ``position:kind:branch``.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any, Final

from stroma._utils.text import format_utc
from stroma.checkpoint.entries import WITHDRAWN, Intent, Waiting
from stroma.checkpoint.errors import CorruptCheckpoint
from stroma.checkpoint.flow_notes import FailureNote, decode_flow_note, message_label
from stroma.checkpoint.history.facts import is_at_work
from stroma.checkpoint.identity import is_called
from stroma.checkpoint.records import AttemptRecord, RunRecord
from stroma.trace.events import place_text
from stroma.trace.outline import parse_call
from stroma.trace.story import Bar, InProgress

_DIED: Final = "its process stopped or died"


def place_of(attempt: AttemptRecord) -> str:
    """Return the place of an attempt in its run: "2", or "2.0" for a child of a group."""
    return place_text(attempt.position, attempt.branch)


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


def first_start_ns(record: RunRecord, attempts: Sequence[AttemptRecord], *, has_deaths: bool = False) -> int:
    """Return the start of the first attempt.

    That of the run without one, and if a process died in its first attempt. ``has_deaths``: a process died
    under the run.
    """
    is_lost = has_deaths and record.execution == 1 and min((one.epoch for one in attempts), default=1) > 1
    started = [] if is_lost else [one.started_ns for one in attempts]
    return min(started, default=record.started_ms * 1_000_000)


def bar_of(attempt: AttemptRecord, first_ns: int) -> Bar:
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
        function_ms=attempt.function_ms if waited else None,
        is_damaged=attempt.damaged,
    )


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
        at, note_key = f"{one.position}.{one.branch}", partial(_note_key, one.position, one.branch)
        label, answer = f"question: {one.reason}", one.schema_ref.rpartition(":")[2]
        began = _read(notes, note_key("w"))
        began_ms = until_ms if began is None else began
        wake = _read(notes, note_key("s"))
        if note_key("x") in notes or one.payload == WITHDRAWN:
            add(at, label, "expired", began_ms, began_ms if wake is None else wake[0], answer)
        elif one.payload is None:
            add(at, label, "open", began_ms, until_ms, answer)
        else:
            add(at, label, "answered", began_ms, one.answered_ms, answer)
    for key in notes:
        position, kind, branch = [*key.split(":", 2), "", ""][:3]
        wait = _read(notes, key) if kind == "r" else None
        if wait is not None:
            topic, began_ms = wait
            note_key, outcome, ended_ms = partial(_note_key, position, branch), "receiving", until_ms
            wake, message = _read(notes, note_key("s")), _read(notes, note_key("m"))
            if message is not None:
                outcome, ended_ms = "received", message.at_ms
            elif note_key("x") in notes:
                outcome, ended_ms = "missed", began_ms if wake is None else wake[0]
            add(f"{position}.{branch}", message_label(topic), outcome, began_ms, ended_ms, topic)
    for key in notes:
        position, kind, branch = [*key.split(":", 2), "", ""][:3]
        at, wake = f"{position}.{branch}", _read(notes, key) if kind == "s" else None
        if wake is None or at in bars:  # The time limit of another wait.
            continue
        wake_ms, began_ms = wake
        outcome = "slept" if wake_ms <= until_ms else "sleeping"
        add(
            at, f"sleep until {format_utc(wake_ms)}", outcome, began_ms, min(wake_ms, max(until_ms, began_ms))
        )
    return list(bars.values())


def failed_input(notes: Mapping[str, bytes], position: int, branch: str) -> bytes | None:
    """Return the input of a call that failed, in stored form; None if there is none."""
    fields: FailureNote | None = _read(notes, _note_key(position, branch, "f"))
    return None if fields is None or fields.input_key is None else fields.input_key.encode()


def _note_key(position: int | str, branch: str, kind: str) -> str:
    return f"{position}:{kind}:{branch}"


def _is_wait(branch: str) -> bool:
    call = parse_call(branch.rpartition(".")[2]) if is_called(branch) else None
    return call is not None and call.kind == "!"


def _read(notes: Mapping[str, bytes], key: str) -> Any:
    """Return the value of a note; None without one, or for a damaged one: the rest is still shown."""
    data = notes.get(key)
    try:
        return None if data is None else decode_flow_note("", key, key.split(":", 2)[1], data)
    except (CorruptCheckpoint, LookupError):
        return None


def attempts_by_end(attempts: Sequence[AttemptRecord]) -> list[AttemptRecord]:
    """Return the attempts of nodes of the pipeline itself, the latest end last."""
    return sorted(
        (one for one in attempts if not one.branch), key=lambda one: one.started_ns / 1e6 + one.duration_ms
    )


def resumes_of(
    attempts: Sequence[AttemptRecord], waits: Sequence[Bar], calls: Iterable[Intent], first_ns: int
) -> list[tuple[float, float, str]]:
    """Return the stretches after which a run was continued, each with what it waited for or how it stopped.

    In ms from ``first_ns`` on. ``calls``: of its effects. ``first_ns``: before the first attempt if a process
    died without one.
    """
    stretches: list[tuple[float, float, str]] = []
    cut_off = _cut_off(attempts, calls)
    epoch, ended, cause = 0, 0.0, _DIED
    for one in sorted((one for one in attempts if one.epoch), key=lambda one: one.started_ns):
        began = (one.started_ns - first_ns) / 1e6
        # The first process of a queued run or of a fork did not continue it.
        if one.epoch > epoch and began > ended and one.epoch > 1:
            causes = [bar.node_id for bar in waits if ended - 1 <= bar.began_ms <= began]
            causes += [f"{_DIED} during {call}" for at, call in cut_off if epoch <= at < one.epoch]
            stretches.append((ended, began, next(iter(causes), cause)))
        epoch = max(epoch, one.epoch + (one.outcome == "forked"))
        if began + one.duration_ms > ended:
            ended = began + one.duration_ms
            cause = _DIED if one.outcome in ("success", "forked") else f"{one.node_id}: {one.outcome}"
    return stretches


def _cut_off(attempts: Iterable[AttemptRecord], calls: Iterable[Intent]) -> list[tuple[int, str]]:
    """Return the epoch and the text of each call of an effect whose process recorded no end of its attempt.

    Of each effect the last call is known, and the last one about which there is a statement.
    """
    last = {(one.position, one.branch, one.epoch): one.started_ms for one in in_order(attempts)}
    return [
        (one.epoch, f"call {one.number} of {call.node_id!r}")
        for call in calls
        for one in (call, call.statement)
        if one is not None and last.get((call.position, call.branch, one.epoch), 0) < one.started_ms
    ]


def open_waits(
    record: RunRecord, attempts: Sequence[AttemptRecord], waiting: Sequence[Waiting]
) -> dict[str, str]:
    """Return what attempts of a suspended run wait for, by place. ``waiting``: its open questions."""
    if record.status != "SUSPENDED":
        return {}
    texts = {}
    for one in waiting:
        at = place_text(one.position, one.branch)
        what = "an answer" if one.effect is None else "word of how its call ended"
        texts[at] = f"suspended: waits for {what}"
    ended = attempts_by_end(attempts)
    if record.waits_for is not None and ended:
        texts.setdefault(place_of(ended[-1]), record.wait_text or "")
    return texts


def find_progress(
    record: RunRecord, attempts: Sequence[AttemptRecord], first_ns: int, names: Sequence[str]
) -> InProgress | None:
    """Return the node that is believed to run; None if none does, or its group is drawn as in progress.

    Attempts are recorded when they end. ``names``: the nodes of the pipeline; [] if they are not known.
    """
    if not is_at_work(record):
        return None
    ended = attempts_by_end(attempts)
    known = {one.position for one in ended}
    if any(one.branch and one.position not in known for one in attempts):
        return None
    if not ended:
        return InProgress("0", names[0] if names else "first node", record.started_ms - first_ns / 1e6)
    last = ended[-1]
    since = (last.started_ns - first_ns) / 1e6 + last.duration_ms
    if last.outcome not in ("success", "forked"):
        return InProgress(place_of(last), last.node_id, since)
    position = last.position + 1
    if names and position >= len(names):
        return None
    return InProgress(str(position), names[position] if names else "next node", since)
