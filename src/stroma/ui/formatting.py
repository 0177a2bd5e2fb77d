"""Text, addresses and responses of pages."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Collection, Iterable
from typing import Any, Final
from urllib.parse import quote_plus, urlencode

from markupsafe import Markup, escape
from starlette.responses import Response

from stroma._utils.svg import as_xml
from stroma._utils.text import clean, replace_utc, visible
from stroma.checkpoint.history.bars import bar_of, place_of
from stroma.checkpoint.history.comparison import changes
from stroma.checkpoint.history.facts import is_interrupted
from stroma.checkpoint.history.redaction import Payload
from stroma.checkpoint.queue import COMPLETE
from stroma.checkpoint.records import FAILED, AttemptRecord, RunQuery, RunRecord
from stroma.failures.classes import describe_class
from stroma.trace.html import tree
from stroma.trace.outline import duration
from stroma.trace.terminal import cells_of
from stroma.trace.timeline import time_tag
from stroma.ui.components import chip

_FILTERS: Final = ("tag", "node", "class", "pipeline")
#: A word of a search that finds blocked runs.
BLOCKED_FILTER: Final = "is:blocked"


def parse_search(text: str, status: str, kind: str) -> RunQuery:
    """Parse a search: filters such as "tag:nightly node:extract", and words for ids, pipelines and errors."""
    filters: dict[str, Any] = {"failure_class": kind or None}
    rest = []
    for word in _words(text):
        name, colon, value = word.partition(":")
        if word == BLOCKED_FILTER:
            filters["blocked"] = True
        elif colon and value and name in _FILTERS:
            filters["failure_class" if name == "class" else name] = (
                value.upper() if name == "class" else value
            )
        else:
            rest.append(word)
    statuses = FAILED if status == "failed" else (status,) if status else ()
    return RunQuery(statuses=statuses, text=" ".join(rest) or None, **filters)


def quoted(name: str) -> str:
    """Return a name as one word of a search."""
    return f'"{name}"' if " " in name else name


def _words(text: str) -> list[str]:
    """Return the words of a search; spaces inside quotes, as in node:"read page", are part of a word."""
    return [word.replace('"', "") for word in re.findall(r'(?:[^\s"]|"[^"]*"?)+', text)]


def ago(ms: int) -> str:
    """Return how long ago a time was; ``ms`` since the epoch."""
    seconds = max(0, time.time_ns() // 1_000_000 - ms) // 1000
    for size, name in ((86_400, "d"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds // size:,} {name} ago"
    return f"{seconds} s ago" if seconds >= 5 else "just now"


def cause_text(record: RunRecord) -> str:
    """Return the cause of a failed run, or the need of a suspended one, as text."""
    if is_interrupted(record):
        return "owner lost"
    if record.status in COMPLETE or record.status == "RUNNING":
        return ""  # A failed attempt of a run that goes on is tried again.
    return record.stop_text or ""


def attempt_key(attempt: AttemptRecord) -> tuple[int, str, int, int]:
    """Return the key that identifies an attempt within its run."""
    return attempt.position, attempt.branch, attempt.attempt, attempt.started_ns


def restored_starts(record: RunRecord, attempts: list[AttemptRecord]) -> set[int]:
    """Return the starts of attempts whose outputs a later process has restored."""
    return {
        one.started_ns
        for one in attempts
        if one.output_bytes is not None and (one.epoch < record.epoch or one.outcome == "forked")
    }


def to_address(path: str, **query: Any) -> str:
    """Return a path with its query; empty values are omitted."""
    inputs = {name: value for name, value in query.items() if value not in (None, "")}
    return f"{path}?{urlencode(inputs, errors='replace')}" if inputs else path


def attempt_address(record: RunRecord, attempt: AttemptRecord, path: str = "/attempt") -> str:
    """Return the address of an attempt's page."""
    # Without urlencode: a page has thousands of links. Branches are numbers and dots.
    at = quote_plus(place_of(attempt)) if attempt.branch else attempt.position
    return f"{path}?id={quote_plus(record.run_id, errors='replace')}&at={at}&began={attempt.started_ns}"


def duration_text(attempt: AttemptRecord) -> str:
    """Format the duration of an attempt."""
    return duration(attempt.duration_ms, attempt.function_ms or None)


def attempt_rows(attempts: Iterable[tuple[AttemptRecord, str]], restored: Collection[int]) -> Markup:
    """Return the rows of the table of attempts. ``attempts``: each with its address."""
    # Not a template: a page has thousands.
    return Markup("".join(_attempt_row(*one, restored) for one in attempts))


def _attempt_row(attempt: AttemptRecord, address: str, restored: Collection[int]) -> str:
    texts = cells_of(bar_of(attempt, 0), 160)
    cells = {name: as_xml(text) for name, text in texts.items()}
    why = describe_class(cells["CLASS"], cells["REASON"])
    mark = ' <span class="dim">restored</span>' if attempt.started_ns in restored else ""
    return (
        f'<tr data-row><td class="mono" data-name="At">{cells["AT"]}</td>'
        f'<td data-name="Node"><a data-open href="{as_xml(address)}">{cells["NODE"]}</a></td>'
        f'<td class="num" data-name="Try">{cells["TRY"]}</td><td data-name="Outcome">'
        f"{chip(attempt.outcome, texts['OUTCOME'])}{mark}</td>"
        f'<td data-name="Class">{why}</td>'
        f'<td class="num" data-name="Took">{cells["TIME"]}</td>'
        f'<td class="num" data-name="Tokens">{cells["TOKENS"]}</td>'
        f'<td class="num" data-name="Cost">{cells["COST"]}</td>'
        f'<td data-name="Message" class="cause-cell">{cells["MESSAGE"]}</td></tr>\n'
    )


def compare_facts(before: AttemptRecord, this: AttemptRecord) -> list[Any]:
    """Return the differences between an attempt and the previous one at its position."""
    facts = [
        {
            "outcome": one.outcome,
            "class": one.failure_class,
            "reason": one.reason,
            "message": one.text,
            "model": one.model,
            "seconds": round(one.duration_ms / 1000, 3),
            "tokens": one.tokens,
            "cost_usd": one.cost_usd,
        }
        for one in (before, this)
    ]
    return changes(facts[0], facts[1])


def state_tree(payload: Payload, invalid_fields: list[str]) -> dict[str, Any]:
    """Return a state as a tree for the page, or the problem that prevents it."""
    if payload.problem is not None:
        return {"problem": payload.problem, "tree": None}
    # trace/html.py escapes all text.
    return {"problem": None, "tree": Markup(tree(payload.value, invalid_fields))}


def mark_controls(value: Any) -> Any:
    """Return text with escapes for invisible characters, and any other value unchanged."""
    return visible(value, "\n\t\r") if type(value) is str else value


def local_times(text: str) -> Markup:
    """Return a text whose times are shown in the time zone of the reader."""
    escaped = str(escape(mark_controls(text)))
    return Markup(replace_utc(escaped, time_tag))


def to_json(value: Any) -> str:
    """Encode a value as JSON of at most 300 characters, all printable."""
    return clean(json.dumps(value, ensure_ascii=False), 300)


def as_attachment(name: str) -> dict[str, str]:
    """Return the response headers of a download."""
    return {"content-disposition": f'attachment; filename="{name}"'}


def json_file(value: Any, name: str) -> Response:
    """Return a response that downloads a value as a JSON file."""
    text = json.dumps(value, allow_nan=False, default=str)
    return Response(text.encode(), media_type="application/json", headers=as_attachment(name))
