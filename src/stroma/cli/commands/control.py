"""`stroma pause`, `stroma cancel` and `stroma send`: requests about a run, in whatever process it is."""

from __future__ import annotations

from typing import Any

import click

from stroma._utils.text import clean
from stroma.checkpoint.durable.states import AsyncStates
from stroma.checkpoint.entries import Finished
from stroma.checkpoint.flow_notes import message_label
from stroma.checkpoint.history.facts import resume_options, status_of, unanswered
from stroma.checkpoint.manager import CheckpointManager
from stroma.checkpoint.queue import QUEUED
from stroma.checkpoint.records import RunRecord
from stroma.cli.commands.completion import complete_run
from stroma.cli.errors import Problem
from stroma.cli.formatting import id_word, localize
from stroma.cli.inputs import parse_json
from stroma.cli.output import emit, emit_fields, err
from stroma.cli.stores import Database, db_option
from stroma.cli.suspended import resume_advice, topics_of, waiting_hints
from stroma.contracts.contract import ContractRegistry
from stroma.runner.runner import StromaRunner
from stroma.runner.stored_runs import request


def hand_to_workers(database: Database, record: RunRecord) -> None:
    """Make a stopped run due for workers. Raises Problem for one that waits, is at work or is complete."""
    name, target, store = id_word(record.run_id), database.target_of(record), database.reader
    here = database.hint("resume", name, target, options=resume_options(record))
    run = f"run {clean(record.run_id)}"
    if Finished(record.status, record.error).reason == "poison":
        raise Problem(f"{run} was abandoned: {clean(record.error or '', 500)}", here)
    if record.status == QUEUED:
        raise Problem(f"{run} is queued: a worker starts it", database.hint("worker", target))
    if record.status == "SUSPENDED" and record.waits_for != "resume":
        hints = waiting_hints(database, record, target, unanswered(store.waiting(record.run_id)))
        hints.append(f"{resume_advice(record)}: {here}")
        raise Problem(f"{run} is {clean(localize(record.wait_text or ''), 500)}", *hints)
    if not database.run(_make_due(store, record.run_id)):
        record = database.get_run(record.run_id) or record
        what = (
            f"is running in {clean(record.holder)}" if record.holder else f"has ended: it is {record.status}"
        )
        raise Problem(f"{run} {what}", f"details: {database.hint('show', name)}")
    after = database.get_run(record.run_id)
    if after is not None and after.holder is not None:
        err.line(f"{run} is not paused any more: {clean(after.holder)} continues it")
        return
    err.line(f"{run} is due: a worker that serves pipeline {clean(record.pipeline, 100)!r} continues it")
    err.line(f"or continue it here: {here}")


async def _make_due(store: AsyncStates, run_id: str) -> bool:
    return await request(store, run_id, "unpause") or await store.reopen(run_id)


@click.command()
@click.argument("run_", metavar="RUN", shell_complete=complete_run)
@click.option("--json", "as_json", is_flag=True, help='Print one JSON object, schema "stroma.pause/1".')
@db_option
def pause(run_: str, as_json: bool, db: str | None) -> None:
    """Pause a run until it is resumed.

    When this command ends, within about a second, no process starts another attempt of the run. Attempts in
    flight finish and are stored; then the run is SUSPENDED. Workers do not continue it until `stroma resume
    RUN` removes the pause. RUN is a run id or "last".
    """
    database = Database.from_option(db)
    record = database.find(run_, to_change=True)
    is_paused = database.run(request(database.reader, record.run_id, "pause"))
    after = database.get_run(record.run_id) or record
    outcome = "ended" if not is_paused else "paused" if after.holder is None else "asked"
    run = f"run {clean(record.run_id)}"
    if outcome == "ended":
        message = f"{run} has ended already: it is {after.status}; nothing was changed"
    elif outcome == "paused":
        message = f"{run} is {after.status}, paused"
    elif database.reader.is_request_pending(record.run_id):
        message = (
            f"{run} will be paused: {after.holder} has not read the request, and may begin further attempts"
        )
    else:
        message = f"{run} is paused: {after.holder} begins no further attempt; those at work finish"
    _print(as_json, "stroma.pause/1", after, outcome, after.holder, message)
    if is_paused and not as_json:
        err.line(f"continue it: {database.hint('resume', id_word(record.run_id))}")


@click.command()
@click.argument("run_", metavar="RUN", shell_complete=complete_run)
@click.option("--json", "as_json", is_flag=True, help='Print one JSON object, schema "stroma.cancel/1".')
@db_option
def cancel(run_: str, as_json: bool, db: str | None) -> None:
    """Cancel a run.

    The process that runs it, wherever it is, ends it as CANCELLED within about a second; a run without an
    owner is CANCELLED at once. Finished nodes are stored, and the run can be resumed. RUN is a run id or
    "last".
    """
    database = Database.from_option(db)
    record = database.find(run_, to_change=True)
    is_requested = database.run(database.reader.cancel(record.run_id))
    after = database.get_run(record.run_id) or record
    owner, run = after.holder or record.holder, f"run {clean(record.run_id)}"
    if not is_requested:
        outcome, owner = "ended", None
        message = f"{run} has ended already: it is {after.status}; nothing was changed"
    elif after.holder is None and after.status == "CANCELLED":
        outcome, owner = "cancelled", None
        message = f"{run} is CANCELLED; it had no owner"
    else:
        outcome = "asked"
        message = (
            f"{owner or 'its owner'} will cancel {run} within about a second, unless a node blocks it "
            "or its code "
            "reads no requests"
        )
    _print(as_json, "stroma.cancel/1", after, outcome, owner, message)


def _print(
    as_json: bool, schema: str, record: RunRecord, outcome: str, holder: str | None, message: str
) -> None:
    if as_json:
        data: dict[str, Any] = {"run_id": record.run_id, "outcome": outcome, "holder": holder}
        emit({"schema": schema, **data, "status": status_of(record)})
    else:
        err.line(message)


@click.command()
@click.argument("run_", metavar="RUN", shell_complete=complete_run)
@click.argument("text", metavar="MESSAGE")
@click.option("--topic", default="", metavar="TEXT", help="Topic that the flow receives it on.")
@click.option("--id", "message_id", metavar="ID", help="Id of the message; sent again, it changes nothing.")
@click.option("--json", "as_json", is_flag=True, help='Print one JSON object, schema "stroma.send/1".')
@db_option
def send(run_: str, text: str, topic: str, message_id: str | None, as_json: bool, db: str | None) -> None:
    """Send a message to a run, whose flow receives it.

    RUN is a run id or "last". MESSAGE is JSON, @FILE, or - for stdin. `flow.receive` takes
    the messages of a topic in the order in which they were sent. Workers of its pipeline continue a suspended
    run; without any, use `stroma resume`.
    """
    message, _, source = parse_json(text, "MESSAGE")
    database = Database.from_option(db)
    record = database.find(run_, to_change=True)
    runner = StromaRunner(ContractRegistry(), CheckpointManager(database.store))
    try:
        database.run(runner.send(record.run_id, message, topic=topic, id=message_id))
    except (TypeError, ValueError) as error:
        raise Problem(f"{source} cannot be sent: {error}") from error
    if as_json:
        emit_fields("stroma.send/1", run_id=record.run_id, topic=topic, status=status_of(record))
        return
    err.line(f"the message to run {clean(record.run_id)} is stored")
    if record.status == "SUSPENDED":
        target = database.target_of(record)
        resume = database.hint("resume", id_word(record.run_id), target)
        if topic not in topics_of(database, record):
            why = clean(localize(record.wait_text or ""), 500)
            err.line(f"no flow.receive of the run waits for a {message_label(topic)}: it is {why}")
            questions = unanswered(database.reader.waiting(record.run_id))
            for line in waiting_hints(database, record, target, questions):
                err.line(line)
            return
        err.line(
            f"a worker that serves pipeline {clean(record.pipeline, 100)!r} continues the run; "
            f"or continue it here: {resume}"
        )
