"""`stroma approve`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any, NamedTuple
from urllib.parse import unquote

import click

from stroma._utils.text import clean, pluralize
from stroma.checkpoint.entries import NOT_DONE, Waiting
from stroma.checkpoint.errors import RequestRefused
from stroma.checkpoint.history.facts import answer_type, is_plain_code, node_text, status_of, unanswered
from stroma.checkpoint.history.reader import History
from stroma.checkpoint.manager import CheckpointManager
from stroma.checkpoint.queue import COMPLETE
from stroma.checkpoint.records import FAILED, RunRecord
from stroma.cli.commands.completion import complete_run
from stroma.cli.commands.run import ResumedRun, compare_names, resume_run
from stroma.cli.errors import Code, Problem
from stroma.cli.formatting import id_word
from stroma.cli.inputs import parse_as, parse_json
from stroma.cli.loading import load_object, report_other_stores
from stroma.cli.options import RunOptions
from stroma.cli.output import emit_fields, err
from stroma.cli.stores import Database, db_option
from stroma.cli.suspended import WORKER_CONTINUES, approve_hint, find_schema, waiting_data
from stroma.contracts.contract import ContractRegistry, NotDone
from stroma.runner.runner import StromaRunner


@click.command()
@click.argument("run_", metavar="RUN", shell_complete=complete_run)
@click.argument("target", metavar="FILE_OR_MODULE:NAME")
@click.argument("answer_text", metavar="[ANSWER]", required=False)
@click.option("--done", metavar="JSON", help="An effect happened: the output of its call.")
@click.option("--not-done", is_flag=True, help="An effect did not happen: call it again.")
@click.option("--question", metavar="ID", help="Question to answer; `stroma show` lists the ids.")
@click.option("--resume", is_flag=True, help="Resume the run at once, as `stroma resume` does.")
@click.option(
    "--json",
    "as_json",
    is_flag=True,
    help='Print one JSON object, schema "stroma.approve/1"; with --resume "stroma.run/1".',
)
@click.option("-q", "--quiet", is_flag=True, help="Print only errors on stderr.")
@db_option
def approve(
    run_: str,
    target: str,
    answer_text: str | None,
    done: str | None,
    not_done: bool,
    question: str | None,
    resume: bool,
    as_json: bool,
    quiet: bool,
    db: str | None,
) -> int:
    """Answer a suspended run.

    RUN is a run id or "last". FILE_OR_MODULE:NAME is its pipeline, or the agent or graph of a
    framework, whose own call then continues it. ANSWER is JSON, @FILE, or - for stdin, and must satisfy the
    class that the node requires, which is looked up in the pipeline. Workers of its pipeline continue the
    run; without any, use `stroma resume`, or --resume. --question may be left out while one question is open,
    except for an effect.

    For an effect whose last call has an unknown outcome, pass the outcome in place of ANSWER: --done with its
    output, or --not-done.
    """
    database = Database.from_option(db)
    is_incomplete = answer_text is None and done is None and not not_done and _is_json(target)
    loaded = None if is_incomplete else load_object(target)
    if loaded is not None:
        report_other_stores(loaded, database, quiet=as_json or quiet)
    record = database.find(run_, to_change=True)
    questions = database.reader.waiting(record.run_id)
    if loaded is None:
        words = (id_word(record.run_id), database.target_of(record), target)
        options = () if question is None else ("--question", question)
        raise Problem(
            f"FILE_OR_MODULE:NAME is missing: {clean(target, 200)} is in its place",
            f"pass the pipeline before the answer: {database.hint('approve', *words, options=options)}",
        )
    statements = [_Statement(answer_text)] if answer_text is not None else []
    statements += [_Statement(done, "--done")] if done is not None else []
    statements += [_Statement(None, "--not-done")] if not_done else []
    if len(statements) != 1:
        raise Problem(
            f"approve got {'several answers' if statements else 'no answer'}",
            "pass ANSWER, or for an effect one of --done JSON and --not-done",
            *_open_questions(database, record, questions, target),
        )
    request = _Approval(target, statements[0], question)
    one = _find_waiting(database, record, questions, request)
    attempts = database.reader.attempts_at(record.run_id, one.position, one.branch)
    # A run of plain code, such as that of a framework, has no pipeline: its program continues it.
    pipeline = loaded.to_pipeline() if resume or not is_plain_code(attempts) else None
    if pipeline is not None:
        compare_names(record, pipeline, quiet=as_json or resume or quiet)
    try:
        answer, model = _parse_answer(database, record, one, loaded.module, request)
    except Problem:
        if one.payload is None:
            raise
        raise _other_answer(database, record, one) from None
    runner = StromaRunner(ContractRegistry(), CheckpointManager(database.store))
    try:
        database.run(runner.signal(record.run_id, answer, question=one.id, schema=model))
    except RequestRefused as error:
        now = next((each for each in database.reader.waiting(record.run_id) if each.id == one.id), None)
        if now is None or now.payload is None:
            raise
        raise _other_answer(database, record, now) from error
    if resume and pipeline is not None:
        if not quiet:
            err.line(f"{node_text(one)} {_answered(one)}")
        run_options = RunOptions(as_json=as_json, quiet=quiet)
        return resume_run(ResumedRun(Database.from_option(db), record, pipeline, target), run_options)
    remaining = unanswered([other for other in questions if other.id != one.id])
    resumable = None if pipeline is None else target
    if as_json or not quiet:
        _report(database, record, resumable, one, remaining, as_json)
    return Code.OK


def _answered(one: Waiting) -> str:
    return "is answered" if one.payload is None else "already has this answer"


def _other_answer(database: Database, record: RunRecord, one: Waiting) -> Problem:
    """Return the problem of an answer to a question that has another one, or takes none any more."""
    answer = "--not-done" if one.payload == NOT_DONE else History(database.reader).answer_text(one)
    why = f"already has the answer {answer}; an accepted answer cannot be changed"
    if not one.is_answered:
        why = "is closed: the run no longer waits for its answer"
    return Problem(
        f"{node_text(one)} of run {clean(record.run_id)} {why}",
        f"details: {database.hint('show', id_word(record.run_id))}",
    )


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


class _Statement(NamedTuple):
    """The answer: its text, None with --not-done; and the option that it was passed with, "" for ANSWER."""

    text: str | None
    option: str = ""


@dataclass(frozen=True, slots=True)
class _Approval:
    """Arguments of one call. ``answer``: None for an effect that did not happen."""

    target: str
    answer: _Statement
    question: str | None


def _parse_answer(
    database: Database, record: RunRecord, one: Waiting, module: ModuleType, request: _Approval
) -> tuple[Any, Any]:
    """Return ANSWER as an instance of the required class, and that class. Raises Problem."""
    answer: Any
    text, option = request.answer
    if (one.effect is not None) != bool(option):
        why = "asks a question, and is not an effect"
        if one.effect is not None:
            why = "is an effect: state if its call happened"
        raise Problem(
            f"{node_text(one)} of run {clean(record.run_id)} {why}",
            *approve_hint(database, record.run_id, request.target, [one]),
        )
    if text is None:
        return NotDone(), None
    if one.schema_ref:
        model = find_schema(one, [module])
        if model is None:
            raise Problem(
                f"{node_text(one)} of run {clean(record.run_id)} requires "
                f"{clean(one.schema_ref, 200)}, which {request.target} "
                "neither defines nor imports",
                "pass the pipeline of the run; its module must have that class at its top level",
                code=Code.NOT_FOUND,
            )
        requirement = f"what {node_text(one)} asks for, {answer_type(one)}"
        answer = parse_as(model, text, option or "ANSWER", requirement)
    else:
        model, answer = None, parse_json(text, option or "ANSWER")[0]
    return answer, model


def _framework_hint(run_id: str) -> str:
    return f"continue it with the framework's own call, under run_id={clean(run_id)!r} and resume=True"


def _report(
    database: Database,
    record: RunRecord,
    target: str | None,
    one: Waiting,
    remaining: list[Waiting],
    as_json: bool,
) -> None:
    """Print what was answered. ``target``: the pipeline to resume; None for a run of a framework."""
    run_id = record.run_id
    if as_json:
        emit_fields(
            "stroma.approve/1",
            run_id=run_id,
            answered=waiting_data(one) | {"answered": True},
            suspended=[waiting_data(other) for other in remaining],
            resume=None if target is None else database.command("resume", id_word(run_id), target),
        )
        return
    if record.status in COMPLETE:
        hint = f"the run is {record.status}"
    elif target is None:
        hint = _framework_hint(run_id)
    else:
        verb = WORKER_CONTINUES.removeprefix("then ")
        if record.status in (*FAILED, "CANCELLED"):  # No worker continues it by itself.
            verb = f"the run is {record.status}; resume it"
        hint = f"{verb}: {database.hint('resume', id_word(run_id), target)}"
    err.line(f"{node_text(one)} of run {clean(run_id)} {_answered(one)}; {hint}")
    for other in remaining:
        err.line(f"  still waiting: {node_text(other)}: {clean(other.text, 500)}")


def _open_questions(
    database: Database, record: RunRecord, every: list[Waiting], target: str
) -> Iterator[str]:
    """Yield a line for each open question, and for each command that answers one."""
    waiting = [] if record.status in COMPLETE else unanswered(every)
    for one in waiting[:20]:
        yield f"{node_text(one)}: {clean(one.text, 500)}, asks for {answer_type(one)}"
    for line in approve_hint(database, record.run_id, target, waiting):
        yield f"answer: {line}"


def _find_waiting(database: Database, record: RunRecord, every: list[Waiting], request: _Approval) -> Waiting:
    """Return the question to answer. Raises Problem if there is none, or several."""
    waiting = [] if record.status in COMPLETE else unanswered(every)
    # An answered question may be named, or be the only one: the same answer again is fine.
    known = every if request.question is not None or not waiting else waiting
    matching = [one for one in known if request.question in (None, one.id, unquote(one.id))]
    # What is stated about an effect is about one call: by now the question may be about another one.
    if len(matching) == 1 and (request.question is not None or matching[0].effect is None):
        return matching[0]
    name = clean(record.run_id)
    if waiting:
        problem = f"question {request.question!r} of run {name} is not open"
        if request.question is None:
            problem = f"run {name} has {pluralize(len(waiting), 'open question')}; pass --question"
        raise Problem(
            problem,
            *_open_questions(database, record, every, request.target),
            code=Code.USAGE if request.question is None else Code.NOT_FOUND,
        )
    if record.status == "SUSPENDED":
        raise Problem(
            f"run {name} is suspended without a question: "
            f"{clean(record.error or 'no reason is recorded', 500)}",
            f"a run of a pipeline: {database.hint('resume', id_word(record.run_id), request.target)}",
            f"a run of a guard: {_framework_hint(record.run_id)}",
        )
    raise Problem(
        f"run {name} is not waiting for an answer: it is {status_of(record)}",
        f"details: {database.hint('show', id_word(record.run_id))}",
    )
