"""`stroma worker`."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import sys
import time
from collections.abc import Sequence
from datetime import timedelta
from typing import Any, Final

import click

from stroma._utils.text import clean, format_duration, pluralize
from stroma.cli.errors import Code, Problem
from stroma.cli.exporters import Exporters, exporter_options
from stroma.cli.health import HEALTH_HELP, HealthAddress
from stroma.cli.loading import load_pipeline
from stroma.cli.local_worker import LocalWorker
from stroma.cli.progress import show_warnings, timed_line
from stroma.cli.signals import StopSignals
from stroma.cli.stores import Database, db_option
from stroma.cli.temporal import TemporalCluster, reject_local_options, temporal_options
from stroma.cli.user_errors import describe_error, last_frame
from stroma.engine.config import RunConfig
from stroma.hooks.sets import flatten
from stroma.runner.pipeline import Pipeline

__all__ = ["worker"]

#: Seconds between two status lines.
_HEALTH_SECONDS: Final = 60.0


@click.command()
@click.argument("targets", metavar="FILE_OR_MODULE:NAME...", nargs=-1, required=True)
@click.option(
    "--concurrency",
    type=click.IntRange(min=1),
    metavar="N",
    help="Maximum number of concurrent runs; of attempts with --temporal.  [default: 10; 100]",
)
@click.option(
    "--poll",
    type=click.FloatRange(min=0.01),
    default=1.0,
    show_default=True,
    metavar="SECONDS",
    help="Mean time between two looks for due runs.",
)
@click.option(
    "--drain",
    type=click.FloatRange(min=0),
    default=30.0,
    show_default=True,
    metavar="SECONDS",
    help="Seconds for steps in flight after SIGTERM or Ctrl-C.",
)
@click.option("--health", type=HealthAddress(), metavar="[HOST:]PORT", help=HEALTH_HELP)
@click.option("-q", "--quiet", is_flag=True, help="Print only errors on stderr.")
@exporter_options
@db_option
@temporal_options
def worker(
    targets: tuple[str, ...],
    concurrency: int | None,
    poll: float,
    drain: float,
    health: tuple[str, int] | None,
    quiet: bool,
    db: str | None,
    **options: Any,
) -> int:
    """Continue runs that stopped, until SIGTERM.

    Each NAME is what `stroma run` takes, with the same settings. The worker continues runs in the store of --db whose
    process died or shut down, suspended runs whose sleep or timeout is over, and those whose question was answered. Any
    number of workers on any number of machines may share a store; each run is continued by one of them.

    With --temporal it serves runs of a Temporal task queue instead. With --db, every run is then written to that store
    when it ends or is suspended, for `stroma runs`, `show` and `ui`.

    Status lines go to stderr: one when the worker is ready, then one per minute. SIGTERM and Ctrl-C drain: nothing new
    starts, steps in flight have --drain seconds, the exit code is 0. Another worker continues the runs; steps still in
    flight then are called again.
    """  # fmt: skip
    exporters = Exporters.from_options(options)
    cluster = TemporalCluster.from_options(options)
    if cluster is not None:
        reject_local_options("its server starts and watches the runs", "poll", "health")
    database = Database.from_option(db) if db or cluster is None else None
    if database is not None and not database.is_durable:
        raise Problem(f"{database.name} is not durable", "name a durable store: --db URL", code=Code.USAGE)
    pipelines = [load_pipeline(target) for target in targets]
    names = [pipeline.name for pipeline in pipelines]
    for name in {name for name in names if names.count(name) > 1}:
        raise Problem(
            f"{names.count(name)} of these pipelines have the name {clean(name, 100)!r}",
            "use distinct names: Pipeline(name, nodes)",
            code=Code.USAGE,
        )
    show_warnings(quiet=quiet)
    own = [
        one for pipeline in pipelines if pipeline.config is not None for one in flatten(pipeline.config.hooks)
    ]
    hooks = exporters.hooks(own, quiet=quiet)
    if hooks:
        pipelines = [_with_hooks(pipeline, hooks) for pipeline in pipelines]
    if cluster is None:
        assert database is not None
        local = LocalWorker(pipelines, database, concurrency or 10, poll, drain, health, quiet)
        try:
            return local.execute()
        finally:
            exporters.close()
    serving = _Serving(cluster, pipelines, database, concurrency or 100, drain, quiet)
    try:
        # Output of nodes goes to stderr.
        with contextlib.redirect_stdout(sys.stderr):
            return cluster.run(serving.serve())
    finally:
        exporters.close()


def _with_hooks(pipeline: Pipeline, hooks: Sequence[Any]) -> Pipeline:
    config = pipeline.config or RunConfig()
    config = config.model_copy(update={"hooks": Exporters.merge(hooks, flatten(config.hooks))})
    return Pipeline(pipeline.name, pipeline.nodes, config=config)


class _Serving:
    """One worker, from its first poll to its end."""

    def __init__(
        self,
        cluster: TemporalCluster,
        pipelines: list[Pipeline],
        database: Database | None,
        max_concurrent: int,
        drain: float,
        quiet: bool,
    ) -> None:
        self._cluster = cluster
        self._pipelines = pipelines
        self._database = database
        self._max_concurrent = max_concurrent
        self._drain = drain
        self._quiet = quiet
        self._count: Any = None

    async def serve(self) -> int:
        client = await self._cluster.connect()
        from stroma.drivers.temporal.plugin import stroma_worker

        # Fails at once for a wrong namespace or key, which the worker would retry for ever.
        await self._cluster.has_workers(client)
        self._count = _counter()
        worker_ = stroma_worker(
            client, self._cluster.task_queue, self._pipelines, payloads=self._cluster.payloads,
            store=None if self._database is None else self._database.store,
            max_concurrent=self._max_concurrent,
            identity=f"{os.getpid()}@{socket.gethostname()}",
            graceful_shutdown_timeout=timedelta(seconds=self._drain),
            interceptors=[self._count],
        )  # fmt: skip
        running = asyncio.ensure_future(worker_.run())
        shutdown_requested = asyncio.Event()
        messages = {
            name: f"draining: attempts in flight have {format_duration(self._drain)}; others are repeated by another "
            "worker. Repeat the signal to stop at once"
            for name in ("SIGINT", "SIGTERM")
        }
        waiting = asyncio.ensure_future(shutdown_requested.wait())
        after = "attempts in flight are repeated by another worker"
        stop = StopSignals(
            waiting,
            shutdown_requested.set,
            patience=format_duration(self._drain),
            after=after,
            messages=messages,
        )
        started = time.monotonic()
        self._print("ready", self._ready())
        health = asyncio.ensure_future(self._report_health(started))
        try:
            await asyncio.wait([running, waiting], return_when=asyncio.FIRST_COMPLETED)
            if not running.done():
                await worker_.shutdown()
            await running
        except Exception as error:
            raise Problem(
                f"the worker of {self._cluster.name} ended: {describe_error(error)}",
                *last_frame(error),
                "fix that, then restart it; its runs are waiting",
                code=Code.ENVIRONMENT,
            ) from error
        finally:
            health.cancel()
            waiting.cancel()
            if self._database is not None:
                await self._database.close()
        self._print(
            "drained",
            f"after {stop.signal}; {self._count.describe()} in {format_duration(time.monotonic() - started)}",
        )
        return Code.OK

    def _ready(self) -> str:
        nodes = ", ".join(
            f"{clean(p.name, 60)!r} ({pluralize(len(p.nodes), 'node')})" for p in self._pipelines
        )
        store = "" if self._database is None else f", written to {self._database.name}"
        return f"{nodes} on {self._cluster.name}, {pluralize(self._max_concurrent, 'attempt')} at once{store}"

    async def _report_health(self, started: float) -> None:
        while True:
            await asyncio.sleep(_HEALTH_SECONDS)
            self._print("well", f"{self._count.describe()} in {format_duration(time.monotonic() - started)}")

    def _print(self, what: str, more: str) -> None:
        if not self._quiet:
            timed_line("worker ", (what, "green"), f": {more}")


def _counter() -> Any:
    """Return an interceptor that counts attempts; its base class is imported with the driver."""
    from temporalio.worker import ActivityInboundInterceptor, ExecuteActivityInput, Interceptor

    class Counting(ActivityInboundInterceptor):
        async def execute_activity(self, input: ExecuteActivityInput) -> Any:
            count.in_flight += 1
            try:
                return await super().execute_activity(input)
            finally:
                count.in_flight -= 1
                count.done += 1

    class Counter(Interceptor):
        done = in_flight = 0

        def intercept_activity(self, next: ActivityInboundInterceptor) -> ActivityInboundInterceptor:
            return Counting(next)

        def describe(self) -> str:
            in_flight = f", {self.in_flight} in flight" if self.in_flight else ""
            return f"{pluralize(self.done, 'task')} done{in_flight}"

    count = Counter()
    return count
