"""`stroma replay`."""

from __future__ import annotations

import asyncio
import contextlib
import sys
from dataclasses import asdict
from typing import Any

import click

from stroma._utils.text import clean, format_tokens, format_usd, pluralize
from stroma.checkpoint.history.redaction import redact_value
from stroma.checkpoint.manager import CheckpointManager
from stroma.checkpoint.memory.store import AsyncInMemoryStore
from stroma.cli.commands.completion import complete_run
from stroma.cli.errors import Code, Problem, describe_error, last_frame
from stroma.cli.inputs import find_position, parse_input_at
from stroma.cli.loading import load_pipeline
from stroma.cli.output import emit, err, out
from stroma.cli.stores import Database, db_option
from stroma.contracts.contract import ContractRegistry
from stroma.contracts.schema import schema_of
from stroma.engine.config import RunConfig
from stroma.runner.pipeline import Pipeline
from stroma.runner.runner import StromaRunner
from stroma.testing.recording import RecordedRun
from stroma.testing.replaying import Replay
from stroma.testing.replaying import replay as run_again
from stroma.trace.plain import jsonable


@click.command()
@click.argument("run_", metavar="RUN", shell_complete=complete_run)
@click.argument("target", metavar="FILE_OR_MODULE:NAME")
@click.option("--from", "start_at", metavar="NODE", help="First node to call for real; may cost money.")
@click.option(
    "--input",
    "input_text",
    metavar="JSON",
    help="Input of that node, or of the run without --from; or @FILE, or -.",
)
@click.option("--json", "as_json", is_flag=True, help='Print one JSON object, schema "stroma.replay/1".')
@db_option
def replay(
    run_: str, target: str, start_at: str | None, input_text: str | None, as_json: bool, db: str | None
) -> int:
    """Replay a recorded run by the current code, with the recorded outputs. No node is called.

    Contracts, classification, retries, budgets and the order of nodes are those of the current code. Exit
    code 6 if it behaves differently. Nothing is written to the store. RUN is a run id, a prefix of one, or
    "last".
    """
    database = Database.from_option(db)
    recorded = recorded_run(database, run_)
    pipeline = load_pipeline(target, database)
    position = 0 if start_at is None else find_position(pipeline, target, start_at)
    state = None
    if input_text is not None:
        state = parse_input_at(pipeline, position, input_text, "--input")
    outcome = replay_run(recorded, pipeline, start_at=start_at, state=state)
    if as_json:
        emit(_data(outcome, pipeline))
    else:
        _print_replay(outcome, start_at)
    return Code.DIFFERENT if outcome.differences else Code.OK


def recorded_run(database: Database, run_: str) -> RecordedRun:
    """Read a recorded run from the store. Raises Problem."""
    record = database.find(run_)
    return RecordedRun.read(database.reader, record.run_id)


def replay_run(recorded: RecordedRun, pipeline: Pipeline, **options: Any) -> Replay:
    """Replay a recorded run. Output of nodes goes to stderr. Raises Problem if the replay fails."""
    config = pipeline.config or RunConfig()
    runner = StromaRunner(ContractRegistry(), CheckpointManager(AsyncInMemoryStore()), config)
    with contextlib.redirect_stdout(sys.stderr):
        try:
            return asyncio.run(run_again(recorded, pipeline, runner=runner, **options))
        except Exception as error:
            raise Problem(
                f"the replay failed: {describe_error(error)}", *last_frame(error), code=Code.FAILED
            ) from error


def _print_replay(outcome: Replay, start_at: str | None) -> None:
    for difference in outcome.differences:
        where = f"{difference.at} {clean(difference.node_id, 60)}  " if difference.at else ""
        kind = (f"{difference.kind:<9}", "yellow")
        out.fitted(kind, f" {where}{clean(difference.message, 1000)}", indent=10)
    result, run_id = outcome.result, clean(outcome.recorded.run_id)
    spent = f"{format_tokens(result.total_tokens)}, {format_usd(result.total_cost_usd)}"
    err.line(
        f"run {run_id}: {outcome.recorded.status} then, "
        + (
            f"{outcome.status} now"
            if outcome.stopped is None
            else f"followed up to {clean(outcome.stopped, 300)}"
        )
        + f" ({spent})"
    )
    if start_at is not None:
        err.line(f"called: {', '.join(clean(node_id, 60) for node_id in outcome.called) or 'nothing'}")
    if outcome.differences:
        err.line(pluralize(len(outcome.differences), "difference"))
    else:
        err.line("the code behaves as it did")


def _data(outcome: Replay, pipeline: Pipeline) -> dict[str, Any]:
    state = outcome.result.final_state
    redact = None if pipeline.config is None else pipeline.config.redact
    return {
        "schema": "stroma.replay/1",
        "run_id": outcome.recorded.run_id,
        "pipeline": pipeline.name,
        "then": outcome.recorded.status,
        "now": str(outcome.status),
        "same": not outcome.differences,
        "stopped": outcome.stopped,
        "called": list(outcome.called),
        "tokens": outcome.result.total_tokens,
        "cost_usd": outcome.result.total_cost_usd,
        "differences": [asdict(difference) for difference in outcome.differences],
        "final_state": None
        if state is None
        else redact_value(redact, jsonable(schema_of(type(state)).raw(state))),
    }
