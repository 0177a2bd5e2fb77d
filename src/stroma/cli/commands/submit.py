"""`stroma submit` and `stroma drive`: store a run for workers, and continue one run in this process."""

from __future__ import annotations

import asyncio
from datetime import datetime, timedelta
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import click

from stroma._utils.text import clean, pluralize
from stroma.checkpoint.manager import CheckpointManager
from stroma.cli.commands.completion import complete_run
from stroma.cli.errors import Code, Problem, describe_error
from stroma.cli.exporters import FLUSH_SECONDS
from stroma.cli.formatting import SPAN, format_local_time, id_word, to_iso
from stroma.cli.inputs import parse_input
from stroma.cli.loading import load_served
from stroma.cli.options import FiniteRange, add_tags, run_id_option
from stroma.cli.output import emit_fields, err, out, user_code
from stroma.cli.signals import serve_until_signal
from stroma.cli.stores import Database, db_option
from stroma.cli.temporal import TemporalCluster, temporal_options
from stroma.contracts.contract import ContractRegistry
from stroma.engine.config import RunConfig, new_run_id
from stroma.runner.drive import Blocked, Busy, DriveOutcome, Ended, Suspended
from stroma.runner.pipeline import Pipeline
from stroma.runner.runner import StromaRunner

if TYPE_CHECKING:
    from stroma.drivers.temporal.runner import TemporalRunner

_FAILED: Final = ("FAILED", "PARTIAL", "CANCELLED")
_DRAIN_SECONDS: Final = 30.0


@click.command()
@click.argument("target", metavar="FILE_OR_MODULE:NAME")
@click.argument("input_text", metavar="[INPUT]", required=False)
@click.option("--run-id", callback=run_id_option, metavar="ID", help="Id of the run.  [default: a new id]")
@click.option("--delay", type=SPAN, metavar="SPAN", help="Earliest start from now on, such as 90s or 2h.")
@click.option(
    "--expires", type=SPAN, metavar="SPAN", help="Latest start from now on; the run fails after it."
)
@click.option(
    "--priority", type=int, default=0, show_default=True, metavar="N", help="Lower numbers start first."
)
@click.option("--key", metavar="TEXT", help="Runs of one key share the workers fairly with others.")
@click.option("--tag", "tags", multiple=True, metavar="TAG", help="Tag of the run; may be repeated.")
@click.option("--json", "as_json", is_flag=True, help='Print one JSON object, schema "stroma.submit/1".')
@db_option
@temporal_options
def submit(
    target: str,
    input_text: str | None,
    run_id: str | None,
    tags: tuple[str, ...],
    as_json: bool,
    db: str | None,
    **options: Any,
) -> int:
    """Submit a run, which a worker starts (see `stroma worker`), and print its id.

    NAME and INPUT are those of `stroma run`. Submitting the same run id with the same input again changes
    nothing. With --temporal, its server chooses the worker.
    """
    cluster = TemporalCluster.from_options(options)
    database = Database.from_option(db)
    pipeline = load_served(target, database, refuse_default=True)
    durable = database.require_durable()
    database.prepare()
    state = parse_input(pipeline, input_text)
    config = add_tags(pipeline.config or RunConfig(), tags)
    config = config.model_copy(update={"run_id": run_id or new_run_id()})
    local = StromaRunner(ContractRegistry(), CheckpointManager(database.store), config)
    times: dict[str, timedelta | None] = {name: options[name] for name in ("delay", "expires")}

    async def store() -> str:
        try:
            runner: StromaRunner | TemporalRunner = local
            if cluster is not None:
                client = await cluster.connect()
                from stroma.drivers.temporal import runner as temporal

                runner = temporal.TemporalRunner(client, cluster.task_queue, database.store, config)
            handle = await runner.submit(
                pipeline,
                state,
                run_id=config.run_id,
                priority=options["priority"],
                key=options["key"],
                **times,
            )
            await durable.attribute(handle.run_id, {"target": target})  # For the hints of later commands.
            return await handle.status()
        finally:
            await database.close()

    try:
        status = asyncio.run(store()) if cluster is None else cluster.run(store())
    except (TypeError, ValueError) as error:
        raise Problem(f"the run cannot be submitted: {describe_error(error)}") from error
    if as_json:
        emit_fields("stroma.submit/1", run_id=config.run_id, pipeline=pipeline.name, status=status)
        return Code.OK
    out.line(clean(config.run_id))
    if status == "QUEUED":
        words = () if cluster is None else cluster.words
        err.line(f"queued for a worker: {database.hint('worker', target, options=words)}")
        for line in database.other_stores:
            err.line(f"the run is in {database.name}; {line}")
    else:
        err.line(f"the run is {status} already: {database.hint('show', id_word(config.run_id))}")
    return Code.OK


@click.command()
@click.argument("run_", metavar="RUN", shell_complete=complete_run)
@click.argument("targets", metavar="FILE_OR_MODULE:NAME...", nargs=-1, required=True)
@click.option(
    "--max-seconds",
    type=FiniteRange(min=0, min_open=True),
    metavar="SECONDS",
    help="End at the first step boundary after this time.",
)
@click.option("--json", "as_json", is_flag=True, help='Print one JSON object, schema "stroma.drive/1".')
@db_option
def drive(
    run_: str, targets: tuple[str, ...], max_seconds: float | None, as_json: bool, db: str | None
) -> int:
    """Continue one run as far as possible: the job of a scheduler such as Kubernetes.

    RUN is the id of a run of one of the pipelines. A run that is not due, or has an owner, is left alone.
    SIGTERM and Ctrl-C end the run at the next step boundary; a later call continues it. Exit code 0: it has
    completed; 1: it has failed; 7: it is suspended; 130: it was interrupted and is due at once; 3: another
    process owns it, or this code does not fit it.
    """
    database = Database.from_option(db)
    pipelines = [load_served(target, database) for target in targets]
    database.require_durable()
    record = database.find(run_, to_change=True)
    try:
        with user_code():
            outcome = asyncio.run(_drive(database, record.run_id, pipelines, max_seconds))
    except (TypeError, ValueError) as error:
        raise Problem(f"the run cannot be driven: {describe_error(error)}") from error
    code, message, data = _describe(outcome)
    if as_json:
        emit_fields("stroma.drive/1", run_id=record.run_id, **data)
    err.line(f"run {clean(record.run_id)} {message}")
    return code


async def _drive(
    database: Database, run_id: str, pipelines: list[Pipeline], max_seconds: float | None
) -> DriveOutcome:
    # Without a config of its own, the runner uses that of each pipeline.
    runner = StromaRunner(ContractRegistry(), CheckpointManager(database.store))
    driving = asyncio.ensure_future(runner.drive(run_id, pipelines=pipelines, max_seconds=max_seconds))
    message = "ending at the next step boundary; repeat the signal to stop at once"
    try:
        await serve_until_signal(
            driving,
            partial(runner.shutdown, drain_seconds=_DRAIN_SECONDS),
            _DRAIN_SECONDS,
            message=message,
            after="the run can be driven again",
        )
        return driving.result()
    finally:
        await runner.aclose(timeout_seconds=FLUSH_SECONDS)
        await database.close()


def _ms(at: datetime) -> int:
    return int(1000 * at.timestamp())


def _describe(outcome: DriveOutcome) -> tuple[Code, str, dict[str, Any]]:
    """Return the exit code of an outcome, its message, and its fields as JSON."""
    if isinstance(outcome, Ended):
        code = Code.FAILED if outcome.status in _FAILED else Code.OK
        return code, f"has ended: {outcome.status}", {"outcome": "ended", "status": outcome.status}
    if isinstance(outcome, Suspended):
        until = outcome.until and format_local_time(_ms(outcome.until))
        questions = f", {pluralize(len(outcome.questions), 'question')} open" if outcome.questions else ""
        data = {
            "outcome": "suspended",
            "until": outcome.until and to_iso(_ms(outcome.until)),
            "questions": [one.reason for one in outcome.questions],
        }
        return Code.SUSPENDED, f"is suspended{f' until {until}' if until else ''}{questions}", data
    if isinstance(outcome, Busy):
        until = outcome.until and format_local_time(_ms(outcome.until))
        data = {
            "outcome": "busy",
            "until": outcome.until and to_iso(_ms(outcome.until)),
            "owner": outcome.owner,
        }
        return Code.ENVIRONMENT, f"is owned by {clean(outcome.owner)}, at least until {until}", data
    if isinstance(outcome, Blocked):
        data = {"outcome": "blocked", "reason": outcome.reason}
        return Code.ENVIRONMENT, f"cannot be continued by this code: {clean(outcome.reason, 1000)}", data
    return Code.INTERRUPTED, "was interrupted at a step boundary, and is due at once", {"outcome": "yielded"}
