"""`stroma replay`."""

from __future__ import annotations

import asyncio
from dataclasses import asdict
from typing import Any

import click

from stroma._utils.text import clean, format_usage, pluralize
from stroma.checkpoint.history.redaction import redact_value
from stroma.checkpoint.manager import CheckpointManager
from stroma.checkpoint.memory.store import AsyncInMemoryStore
from stroma.cli.commands.completion import complete_run
from stroma.cli.errors import Code, Problem, describe_error, last_frame
from stroma.cli.loading import load_pipeline
from stroma.cli.output import emit, err, out, user_code
from stroma.cli.stores import Database, db_option
from stroma.contracts.contract import ContractRegistry
from stroma.contracts.schema import schema_of
from stroma.engine.config import RunConfig
from stroma.runner.pipeline import Pipeline
from stroma.runner.runner import StromaRunner
from stroma.testing.recording import RecordedRun
from stroma.testing.replaying import Replay
from stroma.testing.replaying import replay as run_again
from stroma.trace.outline import shown_place
from stroma.trace.plain import jsonable


@click.command()
@click.argument("run_", metavar="RUN", shell_complete=complete_run)
@click.argument("target", metavar="FILE_OR_MODULE:NAME")
@click.option("--json", "as_json", is_flag=True, help='Print one JSON object, schema "stroma.replay/1".')
@db_option
def replay(run_: str, target: str, as_json: bool, db: str | None) -> int:
    """Replay a recorded run by the current code, with the recorded outputs. No node is called.

    Contracts, classification, retries, budgets and the order of nodes are those of the current code. Exit
    code 6 if it behaves differently; a line "upcast" shows what only an upcast changed, and does not count.
    Nothing is written to the store. RUN is a run id, a prefix of one, or "last".
    """
    database = Database.from_option(db)
    pipeline = load_pipeline(target, database)
    recorded = recorded_run(database, run_)
    outcome = replay_run(recorded, pipeline)
    if as_json:
        emit(_data(outcome, pipeline))
    else:
        _print_replay(outcome)
    return Code.OK if outcome.is_same else Code.DIFFERENT


def recorded_run(database: Database, run_: str) -> RecordedRun:
    """Read a recorded run from the store. Raises Problem."""
    record = database.find(run_)
    return RecordedRun.read(database.reader, record.run_id)


def replay_run(recorded: RecordedRun, pipeline: Pipeline) -> Replay:
    """Replay a recorded run. Output of the pipeline goes to stderr. Raises Problem if the replay fails."""
    config = pipeline.config or RunConfig()
    runner = StromaRunner(ContractRegistry(), CheckpointManager(AsyncInMemoryStore()), config)
    with user_code():
        try:
            return asyncio.run(run_again(recorded, pipeline, runner=runner))
        except Exception as error:
            raise Problem(
                f"the replay failed: {describe_error(error)}", *last_frame(error), code=Code.FAILED
            ) from error


def _print_replay(outcome: Replay) -> None:
    for difference in outcome.differences:
        where = f"{shown_place(difference.at)} {clean(difference.node_id, 60)}  " if difference.at else ""
        kind = (f"{difference.kind:<9}", "yellow")
        out.fitted(kind, f" {where}{clean(difference.message, 1000)}", indent=10)
    result, run_id = outcome.result, clean(outcome.recorded.run_id)
    spent = f"{format_usage(result.total_tokens, result.total_cost_usd)}"
    now = f"{outcome.status} now"
    if outcome.stopped is not None:
        now = f"the replay ended: {clean(outcome.stopped, 300)}"
    err.line(f"run {run_id}: {outcome.recorded.status} then, {now} ({spent})")
    count = pluralize(len(outcome.differences), "difference")
    if not outcome.is_same:
        err.line(count)
    else:
        err.line("the code behaves as it did" + (f", with {count} by upcasts" if outcome.differences else ""))


def _data(outcome: Replay, pipeline: Pipeline) -> dict[str, Any]:
    state = outcome.result.final_state
    redact = None if pipeline.config is None else pipeline.config.redact
    return {
        "schema": "stroma.replay/1",
        "run_id": outcome.recorded.run_id,
        "pipeline": pipeline.name,
        "then": outcome.recorded.status,
        "now": str(outcome.status),
        "same": outcome.is_same,
        "stopped": outcome.stopped,
        "tokens": outcome.result.total_tokens,
        "cost_usd": outcome.result.total_cost_usd,
        "differences": [asdict(difference) for difference in outcome.differences],
        "final_state": None
        if state is None
        else redact_value(redact, jsonable(schema_of(type(state)).raw(state))),
    }
