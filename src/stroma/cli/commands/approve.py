"""`stroma approve`."""

from __future__ import annotations

import asyncio
from types import ModuleType
from typing import Any

import click

from stroma._utils.text import clean
from stroma.checkpoint.manager import CheckpointManager
from stroma.checkpoint.protocols import Waiting
from stroma.checkpoint.records import RunRecord
from stroma.cli.commands.completion import complete_run
from stroma.cli.commands.run import resume_on_temporal, resume_run
from stroma.cli.errors import Code, Problem
from stroma.cli.formatting import id_word
from stroma.cli.inputs import parse_as, parse_json
from stroma.cli.loading import load_with_module
from stroma.cli.options import RunOptions
from stroma.cli.output import emit, err
from stroma.cli.stores import Database, RunSource, db_option
from stroma.cli.suspended import answer_type, approve_hint, find_schema, place_text, unanswered, waiting_data
from stroma.cli.temporal import TemporalCluster, reject_local_options, temporal_options
from stroma.contracts.contract import ContractRegistry
from stroma.runner.runner import StromaRunner

__all__ = ["approve"]

_COMPLETE = ("COMPLETED", "RESUMED")


@click.command()
@click.argument("run_", metavar="RUN", shell_complete=complete_run)
@click.argument("target", metavar="FILE_OR_MODULE:NAME")
@click.argument("answer_text", metavar="ANSWER")
@click.option("--node", metavar="NODE", help="Node to answer, if several wait.")
@click.option("--branch", metavar="BRANCH", help="Branch of the node, if several children of one id wait.")
@click.option("--resume", is_flag=True, help="Resume the run at once, as `stroma resume` does.")
@click.option(
    "--json",
    "as_json",
    is_flag=True,
    help='Print one JSON object, schema "stroma.approve/1"; with --resume "stroma.run/1".',
)
@db_option
@temporal_options
def approve(
    run_: str,
    target: str,
    answer_text: str,
    node: str | None,
    branch: str | None,
    resume: bool,
    as_json: bool,
    db: str | None,
    **options: Any,
) -> int:
    """Answer a suspended run.

    RUN is a run id, its beginning, or "last". ANSWER is JSON, @FILE, or - for stdin, and must satisfy the class that the
    node requires, which is looked up in the pipeline. Continue the run with `stroma resume`, or with --resume. With
    --temporal it continues by itself; --resume then waits for its result.
    """
    cluster = TemporalCluster.from_options(options)
    if cluster is not None:
        reject_local_options("the run is on the cluster, not in a store", "db")
        return _approve_on_temporal(cluster, run_, target, answer_text, node, branch, resume, as_json)
    database = Database.from_option(db)
    record = database.find(run_)
    every = database.waiting(record.run_id)
    one = _find_waiting(database, record, every, target, node, branch)
    pipeline, module = load_with_module(target)
    answer, model = _parse_answer(database, record, one, module, target, answer_text, node, branch)
    with database.explain_errors():
        asyncio.run(_signal(database, record.run_id, answer, one, model))
    remaining = unanswered([other for other in every if other[:3] != one[:3]])
    if resume:
        err.line(f"{place_text(one)} is answered")
        return resume_run(Database.from_option(db), record, pipeline, target, RunOptions(as_json=as_json))
    _report(database, record.run_id, target, one, remaining, as_json)
    return Code.OK


def _approve_on_temporal(
    cluster: TemporalCluster,
    run: str,
    target: str,
    answer_text: str,
    node: str | None,
    branch: str | None,
    resume: bool,
    as_json: bool,
) -> int:
    """Answer a suspended run on Temporal; return the exit code."""
    from stroma.cli.temporal_show import record_of

    async def read_waiting() -> tuple[RunRecord, list[Waiting]]:
        client = await cluster.connect()
        record = await record_of(cluster, client, await cluster.find(client, run))
        return record, await cluster.query(cluster.runner(client).waiting(record.run_id))

    record, every = cluster.run(read_waiting())
    one = _find_waiting(cluster, record, every, target, node, branch)
    pipeline, module = load_with_module(target)
    answer, model = _parse_answer(cluster, record, one, module, target, answer_text, node, branch)

    async def send_answer() -> None:
        runner = cluster.runner(await cluster.connect())
        await runner.signal(record.run_id, answer, node_id=one.node_id, branch=one.branch, schema=model)

    cluster.run(send_answer())
    if resume:
        err.line(f"{place_text(one)} is answered")
        return resume_on_temporal(cluster, record.run_id, pipeline, target, RunOptions(as_json=as_json))
    remaining = unanswered([other for other in every if other[:3] != one[:3]])
    _report(cluster, record.run_id, target, one, remaining, as_json)
    return Code.OK


def _parse_answer(
    database: RunSource,
    record: RunRecord,
    one: Waiting,
    module: ModuleType,
    target: str,
    answer_text: str,
    node: str | None,
    branch: str | None,
) -> tuple[Any, Any]:
    """Return ANSWER as an instance of the required class, and that class. Raises Problem."""
    answer: Any
    if one.schema_ref:
        model = find_schema(one, module)
        if model is None:
            raise Problem(
                f"{place_text(one)} of run {clean(record.run_id)} requires {clean(one.schema_ref, 200)}, which {target} "
                "neither defines nor imports",
                "pass the pipeline of the run; its module must have that class at its top level",
                code=Code.NOT_FOUND,
            )

        def retry_command(fits: str) -> str:
            return database.hint(
                "approve", id_word(record.run_id), target, fits, options=_node_options(node, branch)
            )

        answer = parse_as(
            model,
            answer_text,
            "ANSWER",
            f"what {place_text(one)} asks for, {answer_type(one)}",
            retry_command,
        )
    else:
        model, answer = None, parse_json(answer_text, "ANSWER")[0]
    return answer, model


def _report(
    database: RunSource, run_id: str, target: str, one: Waiting, remaining: list[Waiting], as_json: bool
) -> None:
    hint = database.hint("resume", id_word(run_id), target)
    if as_json:
        emit(
            {
                "schema": "stroma.approve/1",
                "run_id": run_id,
                "answered": waiting_data(one) | {"answered": True},
                "suspended": [waiting_data(other) for other in remaining],
                "resume": database.command("resume", id_word(run_id), target),
            }
        )
        return
    err.line(f"{place_text(one)} of run {clean(run_id)} is answered; resume with: {hint}")
    for other in remaining:
        err.line(f"  still waiting: {place_text(other)}: {clean(other.reason)}")


def _find_waiting(
    database: RunSource,
    record: RunRecord,
    every: list[Waiting],
    target: str,
    node: str | None,
    branch: str | None,
) -> Waiting:
    """Return the question to answer. Raises Problem if there is none, or several."""
    waiting = [] if record.status in _COMPLETE else unanswered(every)
    matching = [one for one in waiting if node in (None, one.node_id) and branch in (None, one.branch)]
    if len(matching) == 1:
        return matching[0]
    name = clean(record.run_id)
    if matching:
        raise Problem(
            f"{len(matching)} nodes of run {name} are waiting; select one",
            *[
                f"{place_text(one)}: {clean(one.reason)}, asks for {answer_type(one)}"
                for one in matching[:20]
            ],
            f"for example: {approve_hint(database, record.run_id, target, matching, limit=1)[0]}",
            code=Code.USAGE,
        )
    if waiting:
        raise Problem(
            f"run {name} is not waiting there",
            *[f"it is waiting at {place_text(one)}: {clean(one.reason)}" for one in waiting[:20]],
            code=Code.NOT_FOUND,
        )
    if every and record.status not in _COMPLETE:
        what = f"resume with: {database.hint('resume', id_word(record.run_id), target)}"
        raise Problem(f"run {name} is answered already", what, code=Code.NOT_FOUND)
    raise Problem(
        f"run {name} is not waiting for an answer: it is {record.status}",
        f"details: {database.hint('show', id_word(record.run_id))}",
        code=Code.NOT_FOUND,
    )


def _node_options(node: str | None, branch: str | None) -> tuple[str, ...]:
    named = () if node is None else ("--node", node)
    return named if branch is None else (*named, "--branch", branch)


async def _signal(database: Database, run_id: str, answer: Any, one: Waiting, model: Any) -> None:
    runner = StromaRunner(ContractRegistry(), CheckpointManager(database.store))
    try:
        await runner.signal(run_id, answer, node_id=one.node_id, branch=one.branch, schema=model)
    finally:
        await database.close()
