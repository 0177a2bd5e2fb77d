"""`stroma export`."""

from __future__ import annotations

import json
from typing import Any

import click

from stroma.checkpoint.history.facts import resume_options
from stroma.checkpoint.history.reader import History
from stroma.checkpoint.records import AttemptRecord, RunRecord
from stroma.cli.commands.completion import complete_run
from stroma.cli.commands.runs import run_data
from stroma.cli.commands.show import attempt_data, facts_data, question_data
from stroma.cli.errors import Code, write_file
from stroma.cli.formatting import id_word
from stroma.cli.output import out
from stroma.cli.redaction import load_redact, redact_option
from stroma.cli.stores import Database, db_option
from stroma.cli.suspended import waiting_data
from stroma.trace.html import document

_DRAWN = 5000


@click.command()
@click.argument("run_", metavar="RUN", shell_complete=complete_run)
@click.option(
    "--format",
    "form",
    type=click.Choice(["json", "html"]),
    default="json",
    show_default=True,
    help="json: schema stroma.export/1; html: a page.",
)
@click.option("-o", "--output", "path", metavar="FILE", help="File to write instead of stdout.")
@click.option("--states/--no-states", default=True, help="Include inputs and outputs.")
@redact_option
@db_option
def export(run_: str, form: str, path: str | None, states: bool, redact: str | None, db: str | None) -> int:
    """Write one run as JSON or HTML."""
    database = Database.from_option(db)
    record = database.find(run_)
    history = History(database.reader, load_redact(redact))
    text = _text(history, database, record, form, states)
    if path is None:
        out.write(text)
        return Code.OK
    write_file(path, text)
    return Code.OK


def _text(history: History, database: Database, record: RunRecord, form: str, states: bool) -> str:
    if form == "html":
        words = id_word(record.run_id), database.target_of(record)
        command = database.command("resume", *words, options=resume_options(record))
        hint = history.resume_text(record, command)
        return document(history.story(record, max_attempts=_DRAWN, states=states, resume_command=hint))
    attempts, _ = history.attempts(record.run_id)
    waiting = history.store.waiting(record.run_id)
    data = {
        "schema": "stroma.export/1",
        "run": run_data(record),
        **facts_data(database.reader, record),
        "input": history.input_at(record.run_id, 0).shown if states else None,
        "questions": [question_data(history, one) if states else waiting_data(one) for one in waiting],
        "attempts": [_attempt(history, record, one, states) for one in attempts],
    }
    return json.dumps(data, allow_nan=False, indent=2) + "\n"


def _attempt(history: History, record: RunRecord, one: AttemptRecord, states: bool) -> dict[str, Any]:
    data = attempt_data(record, one)
    if states:
        data["output"] = None
        if one.output_bytes is not None:
            data["output"] = history.output_at(record.run_id, one.position, one.branch).shown
        rejected = history.rejected_of(record.run_id, one)
        if rejected is not None:
            data["rejected"] = rejected.to_json()
    return data
