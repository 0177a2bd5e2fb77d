"""`stroma tail`."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from itertools import groupby
from typing import Any

import click

from stroma._utils.text import clean, format_duration, format_usage, short_id
from stroma.checkpoint.events import EventPlace
from stroma.checkpoint.history.bars import bar_of
from stroma.checkpoint.history.facts import is_interrupted, status_of
from stroma.checkpoint.history.reader import History
from stroma.checkpoint.history.redaction import redact_value
from stroma.checkpoint.queue import QUEUED
from stroma.checkpoint.records import AttemptRecord, RunRecord
from stroma.cli.commands.completion import complete_run
from stroma.cli.commands.runs import run_data
from stroma.cli.commands.show import attempt_data, facts_data
from stroma.cli.errors import Code
from stroma.cli.formatting import id_word, localize, style_status
from stroma.cli.output import Part, err, out
from stroma.cli.redaction import load_redact, redact_option
from stroma.cli.stores import Database, db_option
from stroma.runner.events import StreamEvent
from stroma.runner.follow import decode_events
from stroma.trace.events import place_text
from stroma.trace.outline import shown_place
from stroma.trace.redaction import Redact
from stroma.trace.terminal import cells_of, style_of

_COLUMNS = ("CLASS", "REASON", "TIME", "TOKENS", "COST", "MODEL", "MESSAGE")  # after the outcome
_WHY = ("blocked", "paused", "waits", "error", "unknown")  # facts about the end of a run
_SECONDS = 0.5  # between two reads of the store
_MAX_RUNS = 200  # runs followed at once
_MAX_ATTEMPTS = 10_000_000
_PAGE_SIZE = 100  # batches of events that are read at once
_MAX_CHARACTERS = 2000  # of what a node emitted, in a line


@click.command()
@click.argument("run_", metavar="[RUN]", required=False, shell_complete=complete_run)
@click.option("-f", "--follow", is_flag=True, help="Follow until the run ends; without RUN, until stopped.")
@click.option(
    "--lines",
    type=click.IntRange(min=0),
    default=20,
    show_default=True,
    metavar="N",
    help="Number of earlier attempts to print.",
)
@redact_option
@click.option(
    "--json", "as_json", is_flag=True, help='Print a line of JSON for each, schema "stroma.tail/1".'
)
@db_option
def tail(
    run_: str | None, follow: bool, lines: int, redact: str | None, as_json: bool, db: str | None
) -> int:
    """Follow runs: print one line for each attempt when it is recorded.

    RUN is a run id, a prefix of one, or "last"; without it, all runs that are running or start. With RUN,
    also what its nodes emit, if the run stores its events.
    """
    database = Database.from_option(db)
    hide = load_redact(redact)
    if run_ is not None:
        record = database.find(run_)
        watch = _Follower(database, as_json, hide, named=False)
        watch.print(record, lines)
        while follow and record.status in (QUEUED, "RUNNING") and not is_interrupted(record):
            time.sleep(_SECONDS)
            current = database.get_run(record.run_id)
            if current is None:
                err.line("the run was deleted")
                return Code.NOT_FOUND
            record = current
            watch.print(record)
        watch.end(record)
        return Code.OK
    store = database.reader
    watch = _Follower(database, as_json, hide, named=True)
    since = 0
    while True:
        recent = [] if database.is_empty else store.list_runs(limit=_MAX_RUNS)
        # Of the runs that ended before the first read, only the newest is printed.
        shown = [one for one in recent if since or one is recent[0] or one.status == "RUNNING"]
        watch.print_all(sorted(shown, key=lambda record: record.started_ms), None if since else lines)
        if not follow:
            return Code.OK
        since = 1
        time.sleep(_SECONDS)


class _Follower:
    """Attempts and endings of runs that were printed."""

    def __init__(self, database: Database, as_json: bool, redact: Redact | None, *, named: bool) -> None:
        self._database = database
        self._json = as_json
        self._history = History(database.reader, redact)
        self._redact = redact
        self._named = named
        self._printed: dict[tuple[str, int], set[tuple[Any, ...]]] = {}
        self._states: dict[tuple[str, int], tuple[Any, ...]] = {}
        self._ended: dict[tuple[str, int], str] = {}
        self._place = EventPlace(0, 0)

    def print(self, record: RunRecord, last: int | None = None) -> None:
        """Print new attempts, after what they emitted; on the first call only the ``last`` attempts."""
        self._print_emitted(record, of_ended=last is None)
        for one in self._fresh(record, last):
            self._print(record, one)

    def print_all(self, records: list[RunRecord], last: int | None) -> None:
        """Print new attempts of several runs in the order of their ends, then the ends of runs."""
        fresh = [(record, one) for record in records for one in self._fresh(record, last)]
        for record, one in sorted(fresh, key=lambda pair: _ended_ns(pair[1])):
            self._print(record, one)
        for record in records:
            self.end(record)

    def _fresh(self, record: RunRecord, last: int | None) -> list[AttemptRecord]:
        """Return the attempts to print; on the first look at a run at most ``last``, with a hint."""
        run = (record.run_id, record.execution)
        first_look = run not in self._printed
        fresh = self._read_new(run, record)
        if first_look and last is not None and len(fresh) > last:
            if not self._json:
                err.line(
                    (f"{len(fresh) - last:,} earlier attempts: ", "dim"),
                    self._database.hint("show", id_word(record.run_id)),
                )
            fresh = fresh[len(fresh) - last :]
        return fresh

    def _read_new(self, run: tuple[str, int], record: RunRecord) -> list[AttemptRecord]:
        """Return the attempts that were not printed, in order of their ends: a group follows its children."""
        state = (record.updated_ms, record.tokens, record.nodes, record.status)
        printed = self._printed.setdefault(run, set())
        if self._states.get(run) == state:
            return []
        attempts, _ = self._history.attempts(record.run_id, _MAX_ATTEMPTS)
        fresh = [one for one in attempts if _key(one) not in printed]
        printed.update(map(_key, fresh))
        self._states[run] = state
        return sorted(fresh, key=_ended_ns)

    def _print_emitted(self, record: RunRecord, *, of_ended: bool) -> None:
        """Print new events that nodes emitted; without ``of_ended`` those of attempts in progress only."""
        emitted: list[StreamEvent] = []
        while page := self._database.reader.read_events(record.run_id, self._place, _PAGE_SIZE):
            for place, event in decode_events(record.run_id, page, self._place):
                self._place = place
                if event.kind == "node_event":
                    emitted.append(event)
                elif not of_ended and event.kind.startswith("node_"):
                    at = (event.position, event.branch)
                    emitted = [one for one in emitted if (one.position, one.branch) != at]
            if not page.batches:
                break
        for _, same in groupby(emitted, lambda one: (one.attempt_id, one.name, type(one.data) is str)):
            self._print_events(record, list(same))

    def _print_events(self, record: RunRecord, events: list[StreamEvent]) -> None:
        """Print events of one attempt and name: texts in one line."""
        first, name = events[0], str(events[0].name)
        shown = [redact_value(self._redact, {name: event.data}).get(name) for event in events]
        if self._json:
            for event, data in zip(events, shown, strict=True):
                one = replace(event, data=data).to_dict()
                self._emit("node_event", run_id=record.run_id, node_event=one)
            return
        texts = ["".join(shown)] if all(type(one) is str for one in shown) else map(json.dumps, shown)
        for text in texts:
            place = shown_place(place_text(first.position, first.branch))
            node = f"{place:<6} {clean(str(first.node_id), 40)}  #{first.attempt}  "
            out.fitted(f"{'':8}  {node}", (clean(name, 20), "cyan"), f"  {clean(text, _MAX_CHARACTERS)}")

    def end(self, record: RunRecord) -> None:
        """Print the end of a run, once."""
        run = (record.run_id, record.execution)
        gone = is_interrupted(record)
        status = "gone" if gone else record.status
        if status == "RUNNING" or self._ended.get(run) == status:
            return
        self._ended[run] = status
        if self._json:
            self._emit("end", run=run_data(record), **facts_data(self._database.reader, record))
            return
        facts = self._history.facts(record)
        why = "".join(f"  {localize(clean(text))}" for label, text in facts if label in _WHY)
        if gone:
            hint = self._database.hint("resume", id_word(record.run_id), self._database.target_of(record))
            out.fitted(*self._name(record), style_status(status_of(record)), "  owner lost", why)
            err.hint(f"resume it: {hint}")
            return
        usage = format_usage(record.tokens, record.cost_usd)
        spent = f"  {usage}, {format_duration(record.seconds)}"
        out.fitted(*self._name(record), style_status(record.status), spent, why)

    def _name(self, record: RunRecord) -> list[Part]:
        return [(f"{short_id(record.run_id)}  ", "bold")] if self._named else []

    def _print(self, record: RunRecord, one: AttemptRecord) -> None:
        if self._json:
            attempt = attempt_data(record, one)
            self._emit("attempt", run_id=record.run_id, attempt=attempt)
            return
        when = time.strftime("%H:%M:%S", time.localtime((one.started_ms + one.duration_ms) / 1000))
        bar = bar_of(one, one.started_ns)
        cells = cells_of(bar)
        cells["TOKENS"] += " tok" if cells["TOKENS"] else ""
        more = "  ".join(cells[name] for name in _COLUMNS if cells[name])
        place = f"{when}  {cells['AT']:<6} {cells['NODE']}  #{cells['TRY']}  "
        out.fitted(*self._name(record), place, (cells["OUTCOME"], style_of(bar.outcome)), f"  {more}")

    @staticmethod
    def _emit(event: str, **fields: Any) -> None:
        data = {"schema": "stroma.tail/1", "event": event, **fields}
        out.write(json.dumps(data, allow_nan=False) + "\n")


def _ended_ns(one: AttemptRecord) -> int:
    return one.started_ns + one.duration_ns


def _key(one: AttemptRecord) -> tuple[Any, ...]:
    return one.position, one.branch, one.attempt, one.started_ms, one.duration_ms
