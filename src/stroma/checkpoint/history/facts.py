"""Facts about one run beside its attempts, in the words of every command, page and export.

Times are in UTC, as in stored reasons: ``2026-01-02T03:04:05+00:00``. Terminals and pages show them in the
local time zone.
"""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Final

from stroma._utils.text import clean, format_utc, pluralize
from stroma.checkpoint.entries import Finished, Intent, RunFacts, Waiting
from stroma.checkpoint.queue import COMPLETE, QUEUED
from stroma.checkpoint.records import FAILED, AttemptRecord, RunRecord
from stroma.trace.events import place_text
from stroma.trace.outline import shown_place
from stroma.trace.result import RunStatus

#: All that a run can have.
STATUSES: Final = (QUEUED, "RUNNING", *RunStatus)
_EXCEEDED: Final = re.compile(r"(?:Budget|Deadline)Exceeded: budget exceeded: (max_\w+) limit ")
#: Of `stroma resume`, which has none for the latency.
_BUDGET_OPTIONS: Final = {
    "max_cost_usd": ("--budget-usd", "USD"),
    "max_tokens_total": ("--budget-tokens", "N"),
}


def is_interrupted(record: RunRecord) -> bool:
    """Return True if a run is recorded as running, but has lost its owner."""
    return record.status == "RUNNING" and record.holder is None


def is_at_work(record: RunRecord) -> bool:
    """Return True if a process has the run open."""
    return record.status == "RUNNING" and record.holder is not None


def elapsed_seconds(record: RunRecord) -> float:
    """Return the time from the start of a run to its last record, or until now if a process has it open."""
    return max(0.0, time.time() - record.started_ms / 1000) if is_at_work(record) else record.seconds


def is_plain_code(attempts: Iterable[AttemptRecord]) -> bool:
    """Return True for attempts of steps that a program calls itself, without a pipeline."""
    return any(one.identity for one in attempts)


def status_of(record: RunRecord) -> str:
    """Return the status of a run to show: INTERRUPTED instead of RUNNING if it has lost its owner."""
    return "INTERRUPTED" if is_interrupted(record) else record.status


def is_resumable(record: RunRecord) -> bool:
    """Return True for a started, unfinished run without an owner."""
    return record.status not in (*COMPLETE, QUEUED) and record.holder is None


def resume_options(record: RunRecord) -> tuple[str, ...]:
    """Return the options without which `stroma resume` would not continue a run."""
    if record.status in COMPLETE:  # Failed items of its maps can run again.
        return ("--retry-failed",)
    end = Finished(record.status, record.error)
    if end.reason == "poison":
        return ("--force",)
    return _BUDGET_OPTIONS.get(exceeded_limit(record) or "", ())


def exceeded_limit(record: RunRecord) -> str | None:
    """Return the field of ExecutionBudget with the limit of its own that stopped a run; None of any other."""
    match = _EXCEEDED.match(record.error or "")
    return match[1] if match else None


def count_causes(records: Iterable[RunRecord]) -> list[tuple[tuple[str, str | None, str | None], int]]:
    """Count failed runs by (node, class, reason) of what stopped them, the most frequent cause first."""
    causes = [one.cause for one in records if one.cause is not None and one.status in FAILED]
    return Counter((one.node_id, one.failure_class, one.reason) for one in causes).most_common()


def node_text(one: Waiting) -> str:
    """Return the node that asks a question, and its place in the run."""
    return f"node {clean(one.node_id, 100)!r} (at {shown_place(place_text(one.position, one.branch))})"


def answer_type(one: Waiting) -> str:
    """Return the name of the class that an answer must satisfy."""
    name = one.schema_ref.partition(":")[2]
    return clean(name, 100) if name else "any JSON"


def unanswered(waiting: Sequence[Waiting]) -> list[Waiting]:
    """Return the questions without an answer."""
    return [one for one in waiting if one.payload is None]


def facts_of(
    record: RunRecord, facts: RunFacts, waiting: Sequence[Waiting], describe_answer: Callable[[Waiting], str]
) -> Iterator[tuple[str, str]]:
    """Yield (label, text) of each fact about a run: owner, deaths, why it is blocked, questions, effects.

    ``waiting``: its questions, answered ones too.
    """
    if record.parent is not None:
        yield "parent", f"{clean(record.parent, 4000)}, source of this fork"
    if record.version is not None:
        yield "version", clean(record.version)
    if record.execution > 1:
        yield "execution", f"{record.execution} of this id"
    if record.tags:
        yield "tags", clean(", ".join(record.tags), 1000)
    if record.status == "RUNNING":
        until = "" if facts.lease_until_ms is None else f", lease until {format_utc(facts.lease_until_ms)}"
        state = " is gone" if record.holder is None else until
        yield (
            "owner",
            f"{clean(facts.owner or 'unknown', 200)}{state}; last record {format_utc(record.updated_ms)}",
        )
    if facts.deaths:
        yield "deaths", f"its process died {pluralize(facts.deaths, 'time')}"
    if facts.failed_items and record.status != "RUNNING":
        yield (
            "failed",
            f"{pluralize(facts.failed_items, 'item')}, the run continued without them; resume it with "
            "--retry-failed to run them again",
        )
    if record.blocked is not None:
        mark = record.blocked
        code = f"code {clean(mark.codes[-1], 120)} could not continue it: " if mark.codes else ""
        yield "blocked", f"since {format_utc(mark.since_ms)}; {code}{clean(mark.message, 1000)}"
    is_waiting = record.wait_text is not None and record.waits_for is None and not record.is_due_at_once
    if record.due_ms is not None and (record.status == QUEUED or is_waiting):
        due = format_utc(record.due_ms)
        since = "since " if record.due_ms <= time.time() * 1000 else ""
        if due not in (record.error or ""):  # "sleeping until ..."
            yield "due", f"{due} at the latest, even if nothing arrives" if is_waiting else f"{since}{due}"
    if facts.live_runs:
        running = f"{pluralize(sum(facts.live_runs.values()), 'run')} of its pipeline"
        if record.key is not None:
            running += f", {facts.live_runs.get(record.key, 0)} of its key"
        limits = "the limits of the pipeline (max_runs, max_runs_per_key)"
        yield "running", f"{running}; a worker starts this one once {limits} leave a place"
    is_open = record.status not in COMPLETE
    for one in waiting:
        if one.is_answered:
            yield "answered", f"{describe_answer(one)}, {format_utc(one.answered_ms)}"
        elif one.payload is not None:
            yield "closed", describe_answer(one)
        elif is_open:
            yield "waits", f"{node_text(one)}: {clean(one.text, 1000)} (asks for {answer_type(one)})"
    if record.waits_for == "resume":
        yield "paused", "no attempt begins until somebody resumes it"
    elif record.wait_text is None:
        if record.error:
            yield "error", clean(record.error, 2000)
    elif record.is_due_at_once:
        yield "due", clean(record.wait_text.removeprefix("due "), 1000)
    elif not unanswered(waiting):
        yield "waits", clean(record.wait_text, 1000)
    yield from _effects(record, facts.effects, waiting)


def effect_state(record: RunRecord, call: Intent) -> str:
    """Return "in_flight" or "unknown" for a call without an outcome, else "happened" or "not_done"."""
    if call.is_unknown:
        return "in_flight" if is_at_work(record) else "unknown"
    return "happened" if call.has_output else "not_done"


def _effects(
    record: RunRecord, calls: Mapping[tuple[int, str], Intent], waiting: Sequence[Waiting]
) -> Iterator[tuple[str, str]]:
    """Yield each call in flight or without an outcome, and each statement about a call.

    Without calls that a question is about.
    """
    questions = {(one.position, one.branch, one.call_number) for one in waiting}
    for (position, branch), call in calls.items():
        effect = f"{clean(call.node_id, 100)} (at {shown_place(place_text(position, branch))})"
        began, key = format_utc(call.started_ms), clean(call.key, 200)
        about = f"call {call.number} since {began}, idempotency key {key}"
        state = effect_state(record, call)
        if state == "in_flight":
            yield "in flight", f"{effect}: {about}"
        elif state == "unknown" and (position, branch, call.number) not in questions:
            gone = "its process is gone" if is_interrupted(record) else "it was cut off"
            yield (
                "unknown",
                f"{effect}: {about}; {gone}, and nobody knows if it happened until the run is resumed and "
                "reconcile or a person states it",
            )
        stated = call.statement
        if stated is not None:
            what = "happened" if stated.happened else "did not happen"
            if stated.source == "reconcile":
                yield "stated", f"{effect}: call {stated.number} {what}, as reconcile stated"
            elif (position, branch, stated.number) not in questions:  # Else its answer is listed.
                yield "stated", f"{effect}: call {stated.number} {what}, as a person stated"
