"""`stroma worker`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import click

from stroma.cli.exporters import Exporters, ListenAddress, exporter_options
from stroma.cli.loading import load_pipeline, load_served, note_target, refuse_same_names
from stroma.cli.options import FiniteRange
from stroma.cli.progress import show_warnings
from stroma.cli.stores import Database, db_option
from stroma.cli.temporal import TemporalCluster, temporal_options
from stroma.cli.workers import LocalWorker, PipelineWorker, TemporalWorker
from stroma.engine.config import RunConfig
from stroma.hooks.sets import flatten
from stroma.runner.pipeline import Pipeline


@click.command()
@click.argument("targets", metavar="FILE_OR_MODULE:NAME...", nargs=-1, required=True)
@click.option(
    "--concurrency",
    type=click.IntRange(min=1),
    default=10,
    show_default=True,
    metavar="N",
    help="Maximum number of concurrent runs.",
)
@click.option(
    "--poll",
    type=FiniteRange(min=0.01),
    metavar="SECONDS",
    help="Mean time between two looks for due runs.  [default: 1]",
)
@click.option(
    "--drain",
    type=FiniteRange(min=0),
    default=30.0,
    show_default=True,
    metavar="SECONDS",
    help="Seconds for steps in flight after SIGTERM or Ctrl-C.",
)
@click.option("--place", metavar="PLACE", help="Call nodes with this place, in place of driving runs.")
@click.option(
    "--health",
    type=ListenAddress(),
    metavar="[HOST:]PORT",
    help="Answer GET /healthz there, on 127.0.0.1 by default.",
)
@click.option("-q", "--quiet", is_flag=True, help="Print only errors on stderr.")
@exporter_options
@db_option
@temporal_options
def worker(
    targets: tuple[str, ...],
    concurrency: int,
    poll: float | None,
    drain: float,
    place: str | None,
    health: tuple[str, int] | None,
    quiet: bool,
    db: str | None,
    **options: Any,
) -> int:
    """Execute submitted runs and continue stopped ones, until SIGTERM.

    Each NAME is what `stroma run` takes, with the same settings. The worker continues runs in the store of
    --db whose process died or shut down, suspended runs whose sleep or timeout is over, and those whose
    question was answered. Any number of workers on any number of machines may share a store; each run is
    continued by one of them.

    With --temporal, its server chooses the worker of each run, and starts another one if that worker is lost.
    With --place too, the worker calls the functions of nodes that have this place (experimental); it does not
    use --db.

    Status lines go to stderr: one when the worker is ready, then one per minute. SIGTERM and Ctrl-C drain:
    nothing new starts, steps in flight have --drain seconds, the exit code is 0. Another worker continues the
    runs; steps still in flight then are called again.
    """
    exporters = Exporters.from_options(options)
    cluster = TemporalCluster.from_options(options)
    if place is not None and cluster is None:
        raise click.UsageError("--place needs --temporal HOST:PORT")
    if cluster is not None and (poll, health) != (None, None):
        raise click.UsageError("--poll and --health do not go with --temporal: its server watches the runs")
    database = Database.from_option(db, quiet=quiet)
    database.require_durable()
    load = load_served if place is None else load_pipeline  # With a place, it drives no runs.
    pipelines = [load(target, database, refuse_default=place is None, quiet=quiet) for target in targets]
    refuse_same_names(pipelines)
    show_warnings(quiet=quiet)
    own = [
        one for pipeline in pipelines if pipeline.config is not None for one in flatten(pipeline.config.hooks)
    ]
    hooks = exporters.hooks(own, quiet=quiet)
    pipelines = [
        _with_hooks(pipeline, [*hooks, note_target(target)])
        for pipeline, target in zip(pipelines, targets, strict=True)
    ]
    if place is None:
        database.prepare()
    settings: dict[str, Any] = {
        "pipelines": pipelines,
        "database": database,
        "max_concurrency": concurrency,
        "drain_seconds": drain,
        "quiet": quiet,
    }
    serving: PipelineWorker
    if cluster is None:
        serving = LocalWorker(**settings, poll_seconds=poll or 1.0, health_address=health)
    else:
        serving = TemporalWorker(**settings, cluster=cluster, place=place)
    try:
        return serving.execute()
    finally:
        exporters.close()


def _with_hooks(pipeline: Pipeline, hooks: Sequence[Any]) -> Pipeline:
    config = pipeline.config or RunConfig()
    config = config.model_copy(update={"hooks": Exporters.merge(hooks, flatten(config.hooks))})
    return pipeline.with_config(config)
