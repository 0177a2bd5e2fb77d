"""`stroma replay`."""

from __future__ import annotations

import asyncio
import contextlib
import sys
from dataclasses import asdict
from typing import Any

import click
from pydantic import BaseModel

from stroma._utils.text import clean, count, money, plural
from stroma.checkpoint.history import History
from stroma.checkpoint.manager import CheckpointManager
from stroma.checkpoint.memory.store import AsyncInMemoryStore
from stroma.cli.commands.completion import complete_run
from stroma.cli.errors import Code, Problem
from stroma.cli.formatting import id_word
from stroma.cli.inputs import parse_as, parse_input
from stroma.cli.loading import load_pipeline
from stroma.cli.output import emit, err, out
from stroma.cli.stores import Database, db_option
from stroma.cli.user_errors import last_frame, said
from stroma.contracts.contract import ContractRegistry
from stroma.contracts.node import Group, find_node
from stroma.contracts.schema import schema_of
from stroma.contracts.untyped import Kept
from stroma.engine.config import RunConfig
from stroma.runner.runner import Pipeline, StromaRunner
from stroma.testing.recording import RecordedRun
from stroma.testing.replaying import Replay
from stroma.testing.replaying import replay as run_again
from stroma.trace.plain import jsonable

__all__ = ["again", "recorded_run", "replay"]


@click.command()
@click.argument("run_", metavar="RUN", shell_complete=complete_run)
@click.argument("target", metavar="FILE_OR_MODULE:NAME")
@click.option(
    "--from", "start_at", metavar="NODE", help="Call the nodes from this one on: that may cost money."
)
@click.option(
    "--input",
    "given",
    metavar="JSON",
    help="What this node, or without --from the whole run, is given in place of what it was; or @FILE, or -.",
)
@click.option("--json", "as_json", is_flag=True, help='Print one JSON object, schema "stroma.replay/1".')
@db_option
def replay(
    run_: str, target: str, start_at: str | None, given: str | None, as_json: bool, db: str | None
) -> int:
    """Run a recorded run again by the code as it is now, with what its nodes returned then. Nothing is called.

    Contracts, classification, retries, budgets and the order of nodes are those of the code now. Exit code 6 if it behaves
    differently. Nothing is written to the store. RUN is a run id, its beginning, or "last".
    """
    database = Database.choose(db)
    recorded = recorded_run(database, run_)
    pipeline = load_pipeline(target)
    ids = [find_node(node).node_id for node in pipeline.nodes]
    if start_at is not None and start_at not in ids:
        raise Problem(
            f"--from {start_at!r} is no node of {target}",
            f"its nodes are: {', '.join(clean(node_id, 100) for node_id in ids)}",
            code=Code.USAGE,
        )
    state = None
    if given is not None:
        position = 0 if start_at is None else ids.index(start_at)
        state = _state(database, recorded, pipeline, target, position, given)
    found = again(recorded, pipeline, start_at=start_at, state=state)
    if as_json:
        emit(_data(found, pipeline))
    else:
        _tell(found, start_at)
    return Code.DIFFERENT if found.differences else Code.OK


def recorded_run(database: Database, run_: str) -> RecordedRun:
    """What the store has of a run. Raises Problem."""
    record = database.find(run_)
    with database.explained():
        return RecordedRun.read(database.reader, record.run_id)


def again(recorded: RecordedRun, pipeline: Pipeline, **options: Any) -> Replay:
    """Run a recorded run again. What nodes print goes to stderr. Raises Problem for what breaks off."""
    config = pipeline.config or RunConfig()
    runner = StromaRunner(ContractRegistry(), CheckpointManager(AsyncInMemoryStore()), config)
    with contextlib.redirect_stdout(sys.stderr):
        try:
            return asyncio.run(run_again(recorded, pipeline, runner=runner, **options))
        except Exception as error:
            raise Problem(
                f"the replay broke off: {said(error)}", *last_frame(error), code=Code.FAILED
            ) from error


def _state(
    database: Database, recorded: RecordedRun, pipeline: Pipeline, target: str, position: int, given: str
) -> BaseModel:
    if not position:
        return parse_input(pipeline, given, target)
    node_id = find_node(pipeline.nodes[position]).node_id
    before = find_node(pipeline.nodes[position - 1])
    if isinstance(before, Group):
        raise Problem(
            f"--input cannot stand in for what {clean(before.node_id, 200)!r} makes: a group's output is put together of its "
            "children's",
            "start at the group, or at a later node",
            code=Code.USAGE,
        )

    def fits(text: str) -> str:
        return database.hint(
            "replay", id_word(recorded.run_id), target, options=("--from", node_id, "--input", text)
        )

    model = Kept if before.contract is None else before.contract.output_schema
    asked = f"what node {clean(before.node_id, 100)!r} hands to {clean(node_id, 100)!r}"
    return parse_as(model, given, "--input", asked, fits)


def _tell(found: Replay, start_at: str | None) -> None:
    for difference in found.differences:
        where = f"{difference.at} {clean(difference.node_id, 60)}  " if difference.at else ""
        out.line((f"{difference.kind:<9}", "yellow"), f" {where}{clean(difference.message, 1000)}")
    result, run_id = found.result, clean(found.recorded.run_id)
    spent = f"{count(result.total_tokens)}, {money(result.total_cost_usd)}"
    err.line(
        f"run {run_id}: {found.recorded.status} then, "
        + (f"{found.status} now" if found.stopped is None else f"followed up to {clean(found.stopped, 300)}")
        + f" ({spent})"
    )
    if start_at is not None:
        err.line(f"called: {', '.join(clean(node_id, 60) for node_id in found.called) or 'nothing'}")
    if found.differences:
        err.line(plural(len(found.differences), "difference"))
    else:
        err.line("the code behaves as it did")


def _data(found: Replay, pipeline: Pipeline) -> dict[str, Any]:
    state = found.result.final_state
    redact = None if pipeline.config is None else pipeline.config.redact
    shown = History(None, redact)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    return {
        "schema": "stroma.replay/1",
        "run_id": found.recorded.run_id,
        "pipeline": pipeline.name,
        "then": found.recorded.status,
        "now": str(found.status),
        "same": not found.differences,
        "stopped": found.stopped,
        "called": list(found.called),
        "tokens": found.result.total_tokens,
        "cost_usd": found.result.total_cost_usd,
        "differences": [asdict(difference) for difference in found.differences],
        "final_state": None if state is None else shown.hide(jsonable(schema_of(type(state)).raw(state))),
    }
