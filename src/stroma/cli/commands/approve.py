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
from stroma.cli.commands.run import go_on, resume_there
from stroma.cli.errors import Code, Problem
from stroma.cli.formatting import id_word
from stroma.cli.inputs import parse_as, parse_json
from stroma.cli.loading import load_with_module
from stroma.cli.options import Running
from stroma.cli.output import emit, err
from stroma.cli.stores import Database, Keeper, db_option
from stroma.cli.suspended import approve_hint, asked, find_schema, open_ones, waiting_data, where
from stroma.cli.temporal import Cluster, cluster_options, only_here
from stroma.contracts.contract import ContractRegistry
from stroma.runner.runner import StromaRunner

__all__ = ["approve"]

_COMPLETE = ("COMPLETED", "RESUMED")


@click.command()
@click.argument("run_", metavar="RUN", shell_complete=complete_run)
@click.argument("target", metavar="FILE_OR_MODULE:NAME")
@click.argument("given", metavar="ANSWER")
@click.option("--node", metavar="NODE", help="Which node is answered, where several wait.")
@click.option("--branch", metavar="BRANCH", help="Which child of a group is, where several with one id wait.")
@click.option("--resume", is_flag=True, help="Go on with the run at once, as `stroma resume` does.")
@click.option(
    "--json",
    "as_json",
    is_flag=True,
    help='Print one JSON object, schema "stroma.approve/1"; with --resume "stroma.run/1".',
)
@db_option
@cluster_options
def approve(
    run_: str,
    target: str,
    given: str,
    node: str | None,
    branch: str | None,
    resume: bool,
    as_json: bool,
    db: str | None,
    **options: Any,
) -> int:
    """Give a suspended run the answer that it waits for.

    RUN is a run id, its beginning, or "last". The pipeline is loaded for the class that the node asked for, which
    ANSWER must satisfy: JSON, @FILE, or - for stdin. The run goes on with `stroma resume`, or with --resume. With
    --temporal it goes on by itself; --resume then waits for its result.
    """
    cluster = Cluster.take(options)
    if cluster is not None:
        only_here("the run is on the cluster, not in a store", "db")
        return _approve_there(cluster, run_, target, given, node, branch, resume, as_json)
    database = Database.choose(db)
    record = database.find(run_)
    every = database.waiting(record.run_id)
    one = _which(database, record, every, target, node, branch)
    pipeline, module = load_with_module(target)
    answer, model = _answer(database, record, one, module, target, given, node, branch)
    with database.explained():
        asyncio.run(_signal(database, record.run_id, answer, one, model))
    left = open_ones([other for other in every if other[:3] != one[:3]])
    if resume:
        err.line(f"{where(one)} has its answer")
        return go_on(Database.choose(db), record, pipeline, target, Running(as_json=as_json))
    _tell(database, record.run_id, target, one, left, as_json)
    return Code.OK


def _approve_there(
    cluster: Cluster,
    run: str,
    target: str,
    given: str,
    node: str | None,
    branch: str | None,
    resume: bool,
    as_json: bool,
) -> int:
    """The same on a cluster."""
    from stroma.cli.temporal_show import record_of

    async def look() -> tuple[RunRecord, list[Waiting]]:
        client = await cluster.connect()
        record = await record_of(cluster, client, await cluster.find(client, run))
        return record, await cluster.answer(cluster.runner(client).waiting(record.run_id))

    record, every = cluster.run(look())
    one = _which(cluster, record, every, target, node, branch)
    pipeline, module = load_with_module(target)
    answer, model = _answer(cluster, record, one, module, target, given, node, branch)

    async def tell() -> None:
        runner = cluster.runner(await cluster.connect())
        await runner.signal(record.run_id, answer, node_id=one.node_id, branch=one.branch, schema=model)

    cluster.run(tell())
    if resume:
        err.line(f"{where(one)} has its answer")
        return resume_there(cluster, record.run_id, pipeline, target, Running(as_json=as_json))
    left = open_ones([other for other in every if other[:3] != one[:3]])
    _tell(cluster, record.run_id, target, one, left, as_json)
    return Code.OK


def _answer(
    database: Keeper,
    record: RunRecord,
    one: Waiting,
    module: ModuleType,
    target: str,
    given: str,
    node: str | None,
    branch: str | None,
) -> tuple[Any, Any]:
    """ANSWER as what the node asked for, and the class of that. Raises Problem."""
    answer: Any
    if one.schema_ref:
        model = find_schema(one, module)
        if model is None:
            raise Problem(
                f"{where(one)} of run {clean(record.run_id)} asks for {clean(one.schema_ref, 200)}, which {target} "
                "neither defines nor imports",
                "give the pipeline that the run is of; its module must have that class at its top level",
                code=Code.NOT_FOUND,
            )

        def again(fits: str) -> str:
            return database.hint(
                "approve", id_word(record.run_id), target, fits, options=_named(node, branch)
            )

        answer = parse_as(model, given, "ANSWER", f"what {where(one)} asks for, {asked(one)}", again)
    else:
        model, answer = None, parse_json(given, "ANSWER")[0]
    return answer, model


def _tell(
    database: Keeper, run_id: str, target: str, one: Waiting, left: list[Waiting], as_json: bool
) -> None:
    hint = database.hint("resume", id_word(run_id), target)
    if as_json:
        emit(
            {
                "schema": "stroma.approve/1",
                "run_id": run_id,
                "answered": waiting_data(one) | {"answered": True},
                "suspended": [waiting_data(other) for other in left],
                "resume": database.command("resume", id_word(run_id), target),
            }
        )
        return
    err.line(f"{where(one)} of run {clean(run_id)} has its answer; go on with: {hint}")
    for other in left:
        err.line(f"  still without one: {where(other)}: {clean(other.reason)}")


def _which(
    database: Keeper,
    record: RunRecord,
    every: list[Waiting],
    target: str,
    node: str | None,
    branch: str | None,
) -> Waiting:
    """The one node that is answered. Raises Problem: none waits, or several do."""
    waiting = [] if record.status in _COMPLETE else open_ones(every)
    found = [one for one in waiting if node in (None, one.node_id) and branch in (None, one.branch)]
    if len(found) == 1:
        return found[0]
    name = clean(record.run_id)
    if found:
        raise Problem(
            f"{len(found)} nodes of run {name} wait; say which one is answered",
            *[f"{where(one)}: {clean(one.reason)}, asks for {asked(one)}" for one in found[:20]],
            f"for example: {approve_hint(database, record.run_id, target, found, limit=1)[0]}",
            code=Code.USAGE,
        )
    if waiting:
        raise Problem(
            f"run {name} does not wait there",
            *[f"it waits at {where(one)}: {clean(one.reason)}" for one in waiting[:20]],
            code=Code.NOT_FOUND,
        )
    if every and record.status not in _COMPLETE:
        what = f"go on with: {database.hint('resume', id_word(record.run_id), target)}"
        raise Problem(f"run {name} has its answer already", what, code=Code.NOT_FOUND)
    raise Problem(
        f"run {name} waits for nothing: it is {record.status}",
        f"look closer: {database.hint('show', id_word(record.run_id))}",
        code=Code.NOT_FOUND,
    )


def _named(node: str | None, branch: str | None) -> tuple[str, ...]:
    named = () if node is None else ("--node", node)
    return named if branch is None else (*named, "--branch", branch)


async def _signal(database: Database, run_id: str, answer: Any, one: Waiting, model: Any) -> None:
    runner = StromaRunner(ContractRegistry(), CheckpointManager(database.store))
    try:
        await runner.signal(run_id, answer, node_id=one.node_id, branch=one.branch, schema=model)
    finally:
        await database.close()
