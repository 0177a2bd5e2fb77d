"""`stroma run` and `stroma resume`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import click
from pydantic import BaseModel, ValidationError

from stroma._utils.text import clean
from stroma.checkpoint.records import RunRecord
from stroma.cli.commands.completion import complete_run
from stroma.cli.errors import Code, Problem
from stroma.cli.formatting import id_word
from stroma.cli.inputs import parse_as, parse_input, stored_input
from stroma.cli.loading import load_pipeline
from stroma.cli.local_run import Fork, Job
from stroma.cli.options import Running, run_id_option, running_options
from stroma.cli.output import err
from stroma.cli.resume_plan import tell_plan
from stroma.cli.stores import Database
from stroma.cli.temporal import Cluster, cluster_options, only_here
from stroma.cli.temporal_run import ClusterJob
from stroma.cli.user_errors import said
from stroma.contracts.node import Group, find_node
from stroma.contracts.untyped import Kept
from stroma.engine.config import RunConfig, new_run_id
from stroma.runner.runner import Pipeline

__all__ = ["go_on", "resume", "resume_there", "run"]


@click.command()
@click.argument("target", metavar="FILE_OR_MODULE:NAME")
@click.argument("given", metavar="[INPUT]", required=False)
@click.option("--run-id", callback=run_id_option, metavar="ID", help="Name the run.  [default: a fresh id]")
@click.option(
    "--resume", is_flag=True, help="Go on with the run of this --run-id if it is known, else begin it."
)
@click.option(
    "--tag",
    "tags",
    multiple=True,
    metavar="TAG",
    help="A word to find the run by: stroma runs --tag TAG; may be repeated.",
)
@click.option("--detach", is_flag=True, help="With --temporal: begin the run, print its id, and leave.")
@running_options
@cluster_options
def run(
    target: str,
    given: str | None,
    run_id: str | None,
    resume: bool,
    tags: tuple[str, ...],
    detach: bool,
    db: str | None,
    **running: Any,
) -> int:
    """Run a pipeline and print its final state as JSON on stdout.

    NAME is a Pipeline, or a function without arguments that returns one. INPUT is JSON, @FILE, or - for stdin; it is
    {} if it is missing. Progress goes to stderr. With --temporal, workers run the nodes: see stroma worker. Ctrl-C asks the
    run to end there, SIGTERM leaves it as it is.
    """
    if resume and run_id is None:
        raise click.UsageError("--resume needs --run-id: it tells which run to go on with")
    cluster = _cluster(running)
    options = Running.of(**running)
    if cluster is not None:
        return _run_there(cluster, target, given, run_id, options, tags, resume=resume, detach=detach)
    if detach:
        raise click.UsageError("--detach needs --temporal: a run of this process ends with it")
    database = Database.choose(db)
    pipeline = load_pipeline(target)
    config = _tagged(_configure(pipeline, run_id, options), tags)
    known = database.known(config.run_id) if resume else None
    if known is not None and given is None:
        state = stored_input(database, known, pipeline, target)
    else:
        state = parse_input(pipeline, given, target)
    job = Job(target, pipeline, config, state, database, known, None, options)
    return job.go()


@click.command()
@click.argument("run_", metavar="RUN", shell_complete=complete_run)
@click.argument("target", metavar="FILE_OR_MODULE:NAME", required=False)
@click.option(
    "--from", "start_at", metavar="NODE", help="Go on from this node, and forget what it and later ones made."
)
@click.option(
    "--fork", is_flag=True, help="With --from: as a new run, with an id of its own; this one stays as it is."
)
@click.option(
    "--retry-failed",
    is_flag=True,
    help="Run the items of maps again that failed while the others went on, and what comes after those maps.",
)
@click.option("--force", is_flag=True, help="Also a run that was given up because its process kept dying.")
@click.option(
    "--state",
    metavar="JSON",
    help="With --fork: the input of that node, in place of what it had; or @FILE, or -.",
)
@click.option(
    "--dry-run", is_flag=True, help="Only say what would be kept, what that saves, and what would be called."
)
@running_options
@cluster_options
def resume(
    run_: str,
    target: str | None,
    start_at: str | None,
    fork: bool,
    retry_failed: bool,
    force: bool,
    state: str | None,
    dry_run: bool,
    db: str | None,
    **running: Any,
) -> int:
    """Go on with a run that stopped; its finished nodes are not called again.

    RUN is a run id, its beginning, or "last". The input is the one that the run began with.
    """
    cluster = _cluster(running)
    options = Running.of(**running)
    if cluster is not None:
        only_here(
            "a cluster goes on where a run has stopped",
            "start_at",
            "fork",
            "retry_failed",
            "force",
            "state",
            "dry_run",
        )
        return _resume_there(cluster, run_, target, options)
    if fork and start_at is None:
        raise click.UsageError("--fork needs --from: it tells where the new run begins")
    if retry_failed and start_at is not None:
        raise click.UsageError(
            "--retry-failed says by itself where to go on, --from makes all items anew; give one"
        )
    if state is not None and not fork:
        raise click.UsageError("--state needs --fork: what a run has made is not changed, only in a new one")
    if start_at is not None and options.if_running == "attach":
        raise click.UsageError("--attach waits for what somebody else makes, --from makes it anew; give one")
    database = Database.choose(db)
    record = database.find(run_)
    if dry_run and target is None:
        if start_at is not None:
            raise click.UsageError("--dry-run with --from needs the pipeline: it tells where that node is")
        return tell_plan(database, record, None, None, None, options.as_json)
    if target is None:
        # The store knows a name, never code: what to import is for the user to say.
        raise Problem(
            f"run {clean(record.run_id)} was a run of the pipeline {clean(record.pipeline, 100)!r}; "
            "say where that pipeline is",
            database.hint("resume", id_word(record.run_id), "FILE.py:NAME"),
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
        if fork and not dry_run:
            return _fork(database, record, pipeline, target, options, ids.index(start_at), state)
    if dry_run:
        return tell_plan(database, record, pipeline, target, start_at, options.as_json)
    changes = {"retry_failed_items": retry_failed, "force_resume": force}
    return go_on(database, record, pipeline, target, options, start_at, changes=changes)


def _cluster(running: dict[str, Any]) -> Cluster | None:
    """The cluster of --temporal, if it was given, with nothing beside it that is for this machine alone."""
    cluster = Cluster.take(running)
    if cluster is not None:
        only_here("the workers write to a store: stroma worker --db", "db")
        only_here("the workers send telemetry: stroma worker", "otel", "prometheus", "sentry", "datadog")
        only_here("the run does not end with this command: see --detach", "drain")
        only_here("the server itself gives the run of a lost worker to another one", "take_over")
    return cluster


def _run_there(
    cluster: Cluster,
    target: str,
    given: str | None,
    run_id: str | None,
    options: Running,
    tags: tuple[str, ...],
    *,
    resume: bool,
    detach: bool,
) -> int:
    pipeline = load_pipeline(target)
    config = _tagged(_configure(pipeline, run_id, options), tags)
    state: BaseModel | None = None
    if given is not None or not (
        (resume or options.if_running == "attach") and cluster.run(cluster.knows(config.run_id))
    ):
        state = parse_input(pipeline, given, target)
    return ClusterJob(target, pipeline, config, state, cluster, options, resume, detach).go()


def _resume_there(cluster: Cluster, run: str, target: str | None, options: Running) -> int:
    run_id = cluster.run(cluster.find_id(run))
    if target is None:
        raise Problem(
            "say where the pipeline of the run is",
            cluster.hint("resume", id_word(run_id), "FILE.py:NAME"),
            code=Code.USAGE,
        )
    return resume_there(cluster, run_id, load_pipeline(target), target, options)


def resume_there(cluster: Cluster, run_id: str, pipeline: Pipeline, target: str, options: Running) -> int:
    """Go on with a run of a cluster, and return the exit code. Raises Problem."""
    config = _configure(pipeline, run_id, options)
    return ClusterJob(target, pipeline, config, None, cluster, options).go()


def go_on(
    database: Database,
    record: RunRecord,
    pipeline: Pipeline,
    target: str,
    options: Running,
    start_at: str | None = None,
    *,
    changes: Mapping[str, bool] | None = None,
) -> int:
    """Resume a run, and return the exit code; ``changes`` to its config. Raises Problem."""
    _note_another(record, pipeline, options)
    config = _configure(pipeline, record.run_id, options)
    if changes:
        config = config.model_copy(update={name: value for name, value in changes.items() if value})
    state = stored_input(database, record, pipeline, target)
    return Job(target, pipeline, config, state, database, record, start_at, options).go()


def _fork(
    database: Database,
    record: RunRecord,
    pipeline: Pipeline,
    target: str,
    options: Running,
    position: int,
    given: str | None,
) -> int:
    """Run on from a position of a run, as a new one."""
    start_at = find_node(pipeline.nodes[position]).node_id

    def again(fits: str) -> str:
        words = ("--from", start_at, "--fork", "--state", fits)
        return database.hint("resume", id_word(record.run_id), target, options=words)

    _note_another(record, pipeline, options)
    edited: BaseModel | None = None
    if given is not None and position:
        # It takes the place of what the node before has made, and so must be that.
        before = find_node(pipeline.nodes[position - 1])
        if isinstance(before, Group):
            raise Problem(
                f"--state cannot stand in for what {clean(before.node_id, 200)!r} makes: a group's output is put "
                "together of its children's",
                "fork at the group, or at a later node",
                code=Code.USAGE,
            )
        model = Kept if before.contract is None else before.contract.output_schema
        asked = f"what node {clean(before.node_id, 100)!r} hands to {clean(start_at, 100)!r}"
        edited = parse_as(model, given, "--state", asked, again)
    if given is not None and not position:
        state = edited = parse_input(pipeline, given, target)
    else:
        state = stored_input(database, record, pipeline, target)
    if position and not _has_output(database, record, position - 1):
        node_id = find_node(pipeline.nodes[position - 1]).node_id
        raise Problem(
            f"run {clean(record.run_id)} has no output of node {clean(node_id, 100)!r}, which stands before "
            f"{clean(start_at, 100)!r}",
            "fork at an earlier node",
            code=Code.NOT_FOUND,
        )
    config = _configure(pipeline, new_run_id(), options)
    fork = Fork(record.run_id, position, edited)
    return Job(target, pipeline, config, state, database, None, start_at, options, fork).go()


def _has_output(database: Database, record: RunRecord, position: int) -> bool:
    with database.explained():
        attempts = database.reader.attempts(record.run_id)
    return any(a.position == position and not a.branch and a.output is not None for a in attempts)


def _tagged(config: RunConfig, tags: tuple[str, ...]) -> RunConfig:
    try:
        together = RunConfig(tags=(*config.tags, *tags)).tags
    except ValidationError as error:
        raise click.UsageError(f"--tag: {said(error)}") from None
    return config.model_copy(update={"tags": together})


def _note_another(record: RunRecord, pipeline: Pipeline, options: Running) -> None:
    if record.pipeline != pipeline.name and not options.quiet:
        err.line(
            ("note: ", "yellow"),
            f"the run was begun by the pipeline {clean(record.pipeline, 100)!r}; this one is {clean(pipeline.name, 100)!r}",
        )


def _configure(pipeline: Pipeline, run_id: str | None, options: Running) -> RunConfig:
    """The pipeline's own config with the command's options over it."""
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
        changes["run_id"] = new_run_id()  # Not the one the config was made with: that names another run.
    return config.model_copy(update=changes)
