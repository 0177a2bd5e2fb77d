"""`stroma run` and `stroma resume`."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Final, NamedTuple

import click

from stroma._utils.text import clean, pluralize
from stroma.checkpoint.history.facts import is_resumable
from stroma.checkpoint.history.reader import History
from stroma.checkpoint.records import RunQuery, RunRecord
from stroma.cli.commands.completion import complete_run
from stroma.cli.commands.control import hand_to_workers
from stroma.cli.commands.runs import filter_options, print_runs
from stroma.cli.errors import Code, Problem
from stroma.cli.inputs import find_call, parse_input, parse_input_at, parse_output, stored_input
from stroma.cli.loading import load_pipeline
from stroma.cli.local_run import LocalRun
from stroma.cli.options import RunOptions, add_tags, run_id_option, run_options
from stroma.cli.output import err, out
from stroma.cli.resume_plan import print_plan
from stroma.cli.signals import reset_signals
from stroma.cli.stores import Database
from stroma.contracts.node import FlowNode, find_node
from stroma.engine.config import RunConfig, new_run_id
from stroma.runner.pipeline import Pipeline

_ALL: Final = 10_000_000
_SEVERITY: Final = (0, 7, 5, 1, 4, 2, 3, 130)  # exit codes, the worst last


@click.command()
@click.argument("target", metavar="FILE_OR_MODULE:NAME")
@click.argument("input_text", metavar="[INPUT]", required=False)
@click.option("--run-id", callback=run_id_option, metavar="ID", help="Id of the run.  [default: a new id]")
@click.option("--resume", is_flag=True, help="Resume the run of --run-id if it exists, else start it.")
@click.option("--restart", is_flag=True, help="Start the run of --run-id again, and discard its outputs.")
@click.option(
    "--tag", "tags", multiple=True, metavar="TAG", help="Tag for `stroma runs --tag TAG`; may be repeated."
)
@run_options
def run(
    target: str,
    input_text: str | None,
    run_id: str | None,
    resume: bool,
    restart: bool,
    tags: tuple[str, ...],
    db: str | None,
    **click_options: Any,
) -> int:
    """Run a pipeline and print its final state as JSON on stdout.

    NAME is a flow or a Pipeline. Without a config it has the settings of the StromaRunner in its file. INPUT
    is JSON, @FILE, or - for stdin; {} by default. Progress goes to stderr. A run id that has not ended, or
    has called an effect, needs --resume or --restart.
    """
    if (resume or restart) and run_id is None:
        name = "resume" if resume else "restart"
        raise click.UsageError(f"--{name} needs --run-id, the id of the run to {name}")
    if resume and restart:
        raise click.UsageError("--resume and --restart exclude each other; pass one")
    options = RunOptions.from_click(**click_options)
    database = Database.from_option(db, quiet=options.quiet)
    pipeline = load_pipeline(target, database, quiet=options.quiet)
    config = add_tags(_configure(pipeline, run_id, options), tags)
    if restart:
        config = config.model_copy(update={"if_exists": "restart", "resume": False})
    record = database.get_run(config.run_id) if resume else None
    if record is not None and input_text is None:
        state = stored_input(database, record, pipeline, target)
    else:
        state = parse_input(pipeline, input_text)
    return LocalRun(target, pipeline, config, state, database, record, None, options).execute()


@click.command()
@click.argument("words", metavar="[RUN]... [FILE_OR_MODULE:NAME]", nargs=-1, shell_complete=complete_run)
@click.option("--from", "start_at", metavar="NODE", help="Resume at this node and discard later outputs.")
@click.option("--fork", is_flag=True, help="With --from, also a call of a flow: start a new run.")
@click.option(
    "--retry-failed", is_flag=True, help="Rerun failed items of maps, and the nodes after those maps."
)
@click.option("--force", is_flag=True, help="Also resume a run that was abandoned after repeated crashes.")
@click.option("--state", metavar="JSON", help="With --fork: new input of that node; or @FILE, or -.")
@click.option("--output", metavar="JSON", help="With --fork: output of that node, in place of calling it.")
@click.option("--dry-run", is_flag=True, help="Print restored outputs, savings and calls; run nothing.")
@filter_options
@run_options
def resume(
    words: tuple[str, ...],
    query: RunQuery,
    start_at: str | None,
    fork: bool,
    retry_failed: bool,
    force: bool,
    state: str | None,
    output: str | None,
    dry_run: bool,
    db: str | None,
    **click_options: Any,
) -> int:
    """Resume stopped runs without repeating finished nodes.

    RUN is a run id or "last". The input is the original one. Without FILE_OR_MODULE:NAME,
    a worker continues the run: a pause is taken back, and a run that failed, was cancelled or stopped is due.

    Without --from, --budget-usd and --budget-tokens set the limit of the run, for each process that continues
    it. It replaces the config's until `stroma budget` or another resume changes it.

    Several runs are resumed one after the other, and listed at the end as by `stroma runs`; the exit code is
    the worst. Instead of RUN, pass filters as to `stroma runs`: all runs that match are resumed, the oldest
    first, unless they have an owner, are complete, or are queued.
    """
    options = RunOptions.from_click(**click_options)
    _check_options(start_at, options, fork=fork, retry_failed=retry_failed)
    values = [name for name, text in (("--state", state), ("--output", output)) if text is not None]
    if values and not fork:
        raise click.UsageError(f"{values[0]} needs --fork: outputs of an existing run cannot be changed")
    if len(values) > 1:
        raise click.UsageError("--state and --output exclude each other; pass one")
    database = Database.from_option(db, quiet=options.quiet)
    records, target, pipeline = _select(database, words, query, quiet=options.quiet)
    is_one = query == RunQuery() and len(records) == 1
    if not is_one and (fork or (dry_run and options.as_json)):
        raise click.UsageError("--fork, and --dry-run with --json, take one RUN")
    if target is None:
        limits = (options.budget_usd, options.budget_tokens)
        if dry_run or start_at is not None or retry_failed or force or limits != (None, None):
            raise click.UsageError("these options need the pipeline: pass FILE_OR_MODULE:NAME")
    changes = {"retry_failed_items": retry_failed, "force_resume": force}

    def resume_one(database: Database, record: RunRecord, options: RunOptions) -> int:
        if pipeline is None or target is None:
            hand_to_workers(database, record)
            return Code.OK
        if dry_run:
            compare_names(record, pipeline, quiet=options.quiet)
        stored = ResumedRun(database, record, pipeline, target)
        if start_at is not None and fork and not dry_run:
            return _fork(stored, options, start_at, state, output)
        if start_at is not None and find_call(pipeline, target, start_at)[1] is not None:
            raise Problem(
                f"--from {start_at!r} is not a node of {target}, which is a flow",
                "a call of a flow can only start a new run: add --fork, without --dry-run",
            )
        if dry_run:
            return print_plan(database, record, pipeline, target, start_at, options.as_json)
        return resume_run(stored, options, start_at, changes=changes)

    if is_one:
        return resume_one(database, records[0], options)
    codes: list[int] = []
    with asyncio.Runner() as loop:  # One loop for all: clients of the pipeline's module may belong to it.
        for record in records:
            if dry_run or not options.quiet:
                (out if dry_run else err).line((f"run {clean(record.run_id)}", "bold"))
            try:
                # A run closes its store.
                own = database if dry_run else Database.from_option(db, quiet=True)
                codes.append(resume_one(own, record, replace(options, loop=loop)))
            except Problem as problem:
                problem.show()
                codes.append(problem.code)
            reset_signals()
            if codes[-1] == Code.INTERRUPTED:
                break
    ends = [end for one in records[: len(codes)] if (end := database.get_run(one.run_id)) is not None]
    if not dry_run and (ends or options.as_json):
        print_runs(database, ends, len(ends), as_json=options.as_json)
    if len(codes) < len(records):
        err.line(f"{pluralize(len(records) - len(codes), 'run')} not resumed")
    elif not records:
        err.line(f"no run that can be resumed matches in {database.name}")
    return max(codes, key=_SEVERITY.index, default=Code.OK)


def _select(
    database: Database, words: tuple[str, ...], query: RunQuery, *, quiet: bool
) -> tuple[list[RunRecord], str | None, Pipeline | None]:
    """Return the runs that a command names or that match its filters, and its pipeline, if it has one."""
    names, target = list(words), None
    if names and ":" in names[-1] and database.get_run(names[-1]) is None:
        target = names.pop()
    if bool(names) is (query != RunQuery()):
        raise click.UsageError("pass RUN, or a filter such as --failed, and not both")
    pipeline = None if target is None else load_pipeline(target, database, quiet=quiet)
    if names:
        records = [database.find(name, to_change=True) for name in names]
        return list({one.run_id: one for one in records}.values()), target, pipeline
    matching = [] if database.is_empty else History(database.reader).runs(query, _ALL)
    return [one for one in reversed(matching) if is_resumable(one)], target, pipeline


def _check_options(start_at: str | None, options: RunOptions, *, fork: bool, retry_failed: bool) -> None:
    """Raise UsageError for options of ``resume`` that exclude or need each other."""
    if fork and start_at is None:
        raise click.UsageError("--fork needs --from, the node where the new run starts")
    if retry_failed and start_at is not None:
        raise click.UsageError("--retry-failed and --from exclude each other; pass one")
    if start_at is not None and options.if_running == "attach":
        raise click.UsageError("--attach and --from exclude each other; pass one")


class ResumedRun(NamedTuple):
    """A stored run, and the pipeline to resume it with."""

    database: Database
    record: RunRecord
    pipeline: Pipeline
    target: str


def resume_run(
    run: ResumedRun,
    options: RunOptions,
    start_at: str | None = None,
    *,
    changes: Mapping[str, bool] | None = None,
) -> int:
    """Resume a run and return the exit code. ``changes``: overrides of its config. Raises Problem."""
    database, record, pipeline, target = run
    compare_names(record, pipeline, quiet=options.quiet)
    config = _configure(pipeline, record.run_id, options)
    if changes:
        config = config.model_copy(update={name: value for name, value in changes.items() if value})
    state = stored_input(database, record, pipeline, target)
    return LocalRun(target, pipeline, config, state, database, record, start_at, options).execute()


def _fork(
    run: ResumedRun, options: RunOptions, start_at: str, input_text: str | None, output_text: str | None
) -> int:
    database, record, pipeline, target = run
    position, call = find_call(pipeline, target, start_at)
    if call is not None and input_text is not None:
        raise Problem(
            f"--state replaces the input of a node, and {start_at!r} is a call of a flow",
            "to give the output of that call, pass --output",
        )
    compare_names(record, pipeline, quiet=options.quiet)
    edited = None if input_text is None else parse_input_at(pipeline, position, input_text)
    output = None if output_text is None else parse_output(pipeline, position, call, output_text)
    config, forks = _configure(pipeline, new_run_id(), options), record.run_id
    fork = LocalRun(target, pipeline, config, edited, database, None, start_at, options, forks, output)
    return fork.execute()


def compare_names(record: RunRecord, pipeline: Pipeline, *, quiet: bool) -> None:
    """Print a note if a list has another name than the run. Raises Problem for another flow."""
    if record.pipeline == pipeline.name:
        return
    names = f"{clean(record.pipeline, 100)!r}; this one is {clean(pipeline.name, 100)!r}"
    if any(isinstance(find_node(node), FlowNode) for node in pipeline.nodes):
        raise Problem(
            f"run {record.run_id!r} was started by the pipeline {names}", "pass that pipeline or flow"
        )
    if not quiet:
        err.line(("note: ", "yellow"), f"the run was started by the pipeline {names}")


def _configure(pipeline: Pipeline, run_id: str | None, options: RunOptions) -> RunConfig:
    config = pipeline.config if pipeline.config is not None else RunConfig()
    limits = {"max_cost_usd": options.budget_usd, "max_tokens_total": options.budget_tokens}
    changes: dict[str, Any] = {
        "budget": config.budget.model_copy(update={k: v for k, v in limits.items() if v is not None})
    }
    if options.if_running is not None:
        changes["if_running"] = options.if_running
    if run_id is not None:
        changes["run_id"] = run_id
    elif "run_id" not in config.model_fields_set:
        changes["run_id"] = new_run_id()  # The generated id of a config belongs to its first run.
    return config.model_copy(update=changes)
