"""`stroma run` and `stroma resume`."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, TypeVar

import click
from pydantic import BaseModel

from stroma.checkpoint.journal import RunRecord
from stroma.cli.errors import Code, Problem, command
from stroma.cli.inputs import input_model, parse_input
from stroma.cli.job import Job
from stroma.cli.load import load_pipeline
from stroma.cli.output import err
from stroma.cli.stores import Database, db_option
from stroma.cli.trouble import said
from stroma.cli.words import clean, id_word
from stroma.config import RunConfig, new_run_id
from stroma.contracts import check_id
from stroma.nodes import find_node
from stroma.runner import Pipeline
from stroma.schemas import schema_of

__all__ = ["resume", "run"]

F = TypeVar("F", bound=Callable[..., Any])


def _dollars(_ctx: click.Context, _parameter: click.Parameter, value: float | None) -> float | None:
    if value is not None and not (math.isfinite(value) and value >= 0):
        raise click.BadParameter(f"{value} is no amount of money; give dollars, zero or more")
    return value


def _run_id(_ctx: click.Context, _parameter: click.Parameter, value: str | None) -> str | None:
    if value is not None:
        try:
            check_id(value, "the run id")
        except ValueError as error:
            raise click.BadParameter(str(error)) from None
    return value


def _running_options(func: F) -> F:
    """The options of every command that runs a pipeline."""
    for option in (
        click.option(
            "-q", "--quiet", is_flag=True, help="Say nothing on stderr unless something goes wrong."
        ),
        click.option("--json", "as_json", is_flag=True, help='Print one JSON object, schema "stroma.run/1".'),
        click.option("--budget-tokens", type=click.IntRange(min=0), metavar="N", help="Stop above N tokens."),
        click.option(
            "--budget-usd", type=float, callback=_dollars, metavar="USD", help="Stop above USD dollars."
        ),
        db_option,
    ):
        func = option(func)
    return func


@click.command()
@click.argument("target", metavar="FILE_OR_MODULE:NAME")
@click.argument("given", metavar="[INPUT]", required=False)
@click.option("--run-id", callback=_run_id, metavar="ID", help="Name the run.  [default: a fresh id]")
@click.option(
    "--resume", is_flag=True, help="Go on with the run of this --run-id if it is known, else begin it."
)
@_running_options
def run(
    target: str,
    given: str | None,
    run_id: str | None,
    resume: bool,
    db: str | None,
    budget_usd: float | None,
    budget_tokens: int | None,
    as_json: bool,
    quiet: bool,
) -> int:
    """Run a pipeline and print its final state as JSON on stdout.

    NAME is a Pipeline, or a function without arguments that returns one. INPUT is JSON, @FILE, or - for stdin; it is
    {} if it is missing. Progress goes to stderr.
    """
    if resume and run_id is None:
        raise click.UsageError("--resume needs --run-id: it tells which run to go on with")
    database = Database.choose(db)
    pipeline = load_pipeline(target)
    config = _configure(pipeline, run_id, budget_usd, budget_tokens)
    known = database.known(config.run_id) if resume else None
    if known is not None and given is None:
        state = _stored_input(database, known, pipeline, target)
    else:
        state = parse_input(pipeline, given, target)
    job = Job(target, pipeline, config, state, database, known, None, as_json, quiet)
    return job.go()


@click.command()
@click.argument("run_", metavar="RUN")
@click.argument("target", metavar="FILE_OR_MODULE:NAME", required=False)
@click.option(
    "--from", "start_at", metavar="NODE", help="Go on from this node, and forget what it and later ones made."
)
@_running_options
def resume(
    run_: str,
    target: str | None,
    start_at: str | None,
    db: str | None,
    budget_usd: float | None,
    budget_tokens: int | None,
    as_json: bool,
    quiet: bool,
) -> int:
    """Go on with a run that stopped; its finished nodes are not called again.

    RUN is a run id, its beginning, or "last". The input is the one that the run began with.
    """
    database = Database.choose(db)
    record = database.find(run_)
    if target is None:
        # The store knows a name, never code: what to import is for the user to say.
        raise Problem(
            f"run {clean(record.run_id)} was a run of the pipeline {clean(record.pipeline, 100)!r}; "
            "say where that pipeline is",
            command("resume", id_word(record.run_id), "FILE.py:NAME", options=database.words),
            code=Code.USAGE,
        )
    pipeline = load_pipeline(target)
    if start_at is not None:
        ids = [find_node(node).node_id for node in pipeline.nodes]
        if start_at not in ids:
            raise Problem(
                f"--from {start_at!r} is no node of {target}",
                f"its nodes are: {', '.join(clean(node_id, 100) for node_id in ids)}",
                code=Code.USAGE,
            )
    if record.pipeline != pipeline.name and not quiet:
        err.line(
            ("note: ", "yellow"),
            f"the run was begun by the pipeline {clean(record.pipeline, 100)!r}; this one is {clean(pipeline.name, 100)!r}",
        )
    config = _configure(pipeline, record.run_id, budget_usd, budget_tokens)
    state = _stored_input(database, record, pipeline, target)
    job = Job(target, pipeline, config, state, database, record, start_at, as_json, quiet)
    return job.go()


def _configure(
    pipeline: Pipeline, run_id: str | None, budget_usd: float | None, budget_tokens: int | None
) -> RunConfig:
    """The pipeline's own config with the command's options over it."""
    config = pipeline.config if pipeline.config is not None else RunConfig()
    limits = {"max_cost_usd": budget_usd, "max_tokens_total": budget_tokens}
    changes: dict[str, Any] = {
        "budget": config.budget.model_copy(update={k: v for k, v in limits.items() if v is not None})
    }
    if run_id is not None:
        changes["run_id"] = run_id
    elif "run_id" not in config.model_fields_set:
        changes["run_id"] = new_run_id()  # Not the one the config was made with: that names another run.
    return config.model_copy(update=changes)


def _stored_input(database: Database, record: RunRecord, pipeline: Pipeline, target: str) -> BaseModel:
    """The state that a run began with, as the first node of the pipeline takes it. Raises Problem."""
    schema = schema_of(input_model(pipeline))
    with database.explained():
        data = database.reader.input_of(record.run_id)
    why = "it is of another class"
    try:
        state = schema.decode(data)
        if schema.encode(state) == data:
            return state
    except Exception as error:
        why = said(error)
    raise Problem(
        f"run {clean(record.run_id)} did not begin with a {schema.model.__name__}, which is what the first node of "
        f"{target} takes: {why}",
        "give the pipeline that began the run, or resume it from the program that began it: "
        "runner.run(nodes, state, run_id=..., resume=True)",
        code=Code.USAGE,
    )
