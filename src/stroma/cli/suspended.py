"""Pending questions of suspended runs: JSON data, text, and the commands that answer them."""

from __future__ import annotations

import time
from collections.abc import Sequence
from types import ModuleType
from typing import Any, Final, Literal

from pydantic import BaseModel

from stroma.checkpoint.decisions import ENDED
from stroma.checkpoint.entries import WITHDRAWN, Waiting
from stroma.checkpoint.history.facts import exceeded_limit
from stroma.checkpoint.history.reader import History
from stroma.checkpoint.manager import resolve_schema
from stroma.checkpoint.records import FAILED, RunRecord
from stroma.cli.formatting import format_local_time, id_word
from stroma.cli.stores import Database
from stroma.contracts.examples import example_text
from stroma.failures.classes import FailureClass
from stroma.trace.story import awaited_topics

#: Goes before the command that resumes a run with open questions.
WORKER_CONTINUES: Final = "then a worker of its pipeline continues the run; or continue it here"


def waiting_data(one: Waiting) -> dict[str, Any]:
    """Return a question in the form of the JSON schemas."""
    return {
        "question": one.id,
        "position": one.position,
        "branch": one.branch,
        "node_id": one.node_id,
        "reason": one.reason,
        "schema": one.schema_ref or None,
        "json_schema": one.answer_schema(),
        "answered": one.is_answered,
        "closed": one.payload == WITHDRAWN,
        "effect": None if one.effect is None else one.effect._asdict(),
    }


def find_schema(one: Waiting, modules: Sequence[ModuleType] = ()) -> type[BaseModel] | None:
    """Return the class that a node requires, if it is imported already.

    ``modules``: searched if the recorded module name does not resolve, as for a program that ran as
        ``__main__``.
    """
    recorded, _, name = one.schema_ref.partition(":")
    places = [] if recorded == "__main__" else [recorded]
    places += [module.__name__ for module in modules]
    for place in places:
        try:
            return resolve_schema(f"{place}:{name}")
        except (LookupError, TypeError):
            continue
    return None


def resume_advice(record: RunRecord, retry_after_seconds: float | None = None) -> str:
    """Return what goes before the command that resumes a run. ``retry_after_seconds``: as its server asks."""
    if record.waits_for == "resume":
        return "or continue it here"
    if record.blocked is not None:
        return f"deploy code that fits, {WORKER_CONTINUES}"
    if record.is_due_at_once:
        return WORKER_CONTINUES.removeprefix("then ")
    if record.status == "SUSPENDED":
        is_asleep = (record.error or "").startswith("sleeping until ")
        return "a worker continues it when it is due, or resume with" if is_asleep else WORKER_CONTINUES
    if (record.error or "").startswith("SharedBudgetExceeded: "):
        return "when the shared budget has room, resume with"
    if (limit := exceeded_limit(record)) is not None:
        raised = f"raise {limit} in the pipeline's budget, or with `stroma budget`; then resume with"
        return raised if limit == "max_latency_ms" else "resume with more"
    failure_class = None if record.cause is None else record.cause.failure_class
    if record.status not in FAILED or failure_class is None:
        return "resume with"
    if failure_class == FailureClass.TERMINAL:
        return "a retry will not help: fix the cause, then resume with"
    if retry_after_seconds is not None:
        when = format_local_time(int(1000 * (time.time() + retry_after_seconds)))
        return f"the server asks to wait until {when}; then resume with"
    if failure_class == FailureClass.AMBIGUOUS:  # Often a mistake in the code.
        return "see why it failed, fix what is wrong, then resume with"
    return "it may work later; resume with"


def held_hints(db: Database, run_id: str, waits_for: Literal["resume", "budget"]) -> list[str]:
    """Return the next command for a run that is paused, or waits for its budget."""
    if waits_for == "resume":
        return [f"continue a paused run: {db.hint('resume', id_word(run_id))}"]
    raised = db.hint("budget", id_word(run_id), options=("--cost-usd", "USD"))
    return [f"raise the budget: {raised}  (or --tokens, --latency-ms)"]


def topics_of(db: Database, record: RunRecord) -> list[str]:
    """Return the topics of the messages that a run waits for; none of a run that takes no message now."""
    if record.status in ENDED:
        return []
    return awaited_topics(History(db.reader).flow_waits(record, ()))


def waiting_hints(db: Database, record: RunRecord, target: str, waiting: Sequence[Waiting]) -> list[str]:
    """Return the commands that a suspended run waits for. ``waiting``: its open questions."""
    run_id = record.run_id
    if record.waits_for is not None:
        return held_hints(db, run_id, record.waits_for)
    hints = [f"answer: {line}" for line in approve_hint(db, run_id, target, waiting)]
    if any(one.effect is not None for one in waiting):
        hints.insert(
            0, f"call its reconcile again, if it has one: {db.hint('resume', id_word(run_id), target)}"
        )
    for topic in topics_of(db, record):
        options = ("--topic", topic) if topic else ()
        hints.append(f"send a message: {db.hint('send', id_word(run_id), 'MESSAGE', options=options)}")
    return hints


def approve_hint(db: Database, run_id: str, target: str, waiting: Sequence[Waiting]) -> list[str]:
    """Return one command per question that answers it, for the first five."""
    lines = []
    for one in waiting[:5]:
        answer = example_text(one.answer_schema()) or "ANSWER"
        options = ("--question", one.id)
        if one.effect is None:
            lines.append(db.hint("approve", id_word(run_id), target, answer, options=options))
            continue
        lines.append(db.hint("approve", id_word(run_id), target, options=(*options, "--done", answer)))
        lines.append(db.hint("approve", id_word(run_id), target, options=(*options, "--not-done")))
    return lines
