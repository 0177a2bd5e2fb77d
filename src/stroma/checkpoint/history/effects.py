"""The calls of a run's effects in words: those in flight, those with an unknown outcome, and statements."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping

from stroma._utils.text import clean
from stroma.checkpoint.entries import Intent, Waiting
from stroma.checkpoint.history.reader import is_interrupted
from stroma.checkpoint.records import RunRecord
from stroma.trace.events import place_text

__all__ = ["describe_effects", "effect_state"]


def effect_state(record: RunRecord, call: Intent) -> str:
    """Return "in_flight" or "unknown" for a call without an outcome, else "happened" or "not_done"."""
    if call.is_unknown:
        return "in_flight" if record.status == "RUNNING" and not is_interrupted(record) else "unknown"
    return "happened" if call.has_output else "not_done"


def describe_effects(
    record: RunRecord,
    calls: Mapping[tuple[int, str], Intent],
    waiting: Iterable[Waiting],
    when: Callable[[int], str],
) -> Iterator[tuple[str, str]]:
    """Yield (label, text) of each call in flight or without an outcome, and of each statement about a call.

    Without calls that a question is about. ``when``: formats milliseconds since the epoch.
    """
    questions = {(one.position, one.branch, one.call_number) for one in waiting}
    for (position, branch), call in calls.items():
        effect = f"{clean(call.node_id, 100)} (at {clean(place_text(position, branch), 200)})"
        about = f"call {call.number} since {when(call.started_ms)}, idempotency key {clean(call.key, 200)}"
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
            source = "reconcile" if stated.source == "reconcile" else "a person"
            yield "stated", f"{effect}: call {stated.number} {what}, as {source} stated"
