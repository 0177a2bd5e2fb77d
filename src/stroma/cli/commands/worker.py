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

from stroma._utils.text import clean, plural, span
from stroma.cli.errors import Code, Problem
from stroma.cli.exporters import Exporters, exporter_options
from stroma.cli.loading import load_pipeline
from stroma.cli.progress import listen, timed_line
from stroma.cli.signals import Stop
from stroma.cli.stores import Database, db_option
from stroma.cli.temporal import Cluster, worker_options
from stroma.cli.user_errors import last_frame, said
from stroma.engine.config import RunConfig
from stroma.hooks.sets import flatten
from stroma.runner.runner import Pipeline

__all__ = ["worker"]

#: Seconds between two lines that say how a worker is.
_HEALTH_SECONDS: Final = 60.0


@click.command()
@click.argument("targets", metavar="FILE_OR_MODULE:NAME...", nargs=-1, required=True)
@click.option(
    "--max-concurrent",
    type=click.IntRange(min=1),
    default=100,
    show_default=True,
    metavar="N",
    help="Attempts at the same time.",
)
@click.option(
    "--drain",
    type=click.FloatRange(min=0),
    default=30.0,
    show_default=True,
    metavar="SECONDS",
    help="What attempts in flight have left after a SIGTERM or Ctrl-C.",
)
@click.option("-q", "--quiet", is_flag=True, help="Say nothing on stderr unless something goes wrong.")
@exporter_options
@db_option
@worker_options
def worker(
    targets: tuple[str, ...], max_concurrent: int, drain: float, quiet: bool, db: str | None, **options: Any
) -> int:
    """Run nodes for runs on a Temporal cluster, until SIGTERM.

    Each NAME is a Pipeline, or a function without arguments that returns one. With --db, every run is written to that
    store when it has ended or waits, for `stroma runs`, `show` and `ui`. A line on stderr says when the worker is ready,
    and one each minute how it is.

    SIGTERM and Ctrl-C drain: nothing new is begun, attempts in flight have --drain seconds, the exit code is 0. What is
    still in flight then is begun again by another worker.
    """  # fmt: skip
    exporters = Exporters.take(options)
    cluster = Cluster.take(options)
    assert cluster is not None
    database = Database.choose(db) if db else None
    if database is not None and not database.keeps:
        raise Problem(f"{database.name} keeps nothing", "name a store that lasts: --db URL", code=Code.USAGE)
    pipelines = [load_pipeline(target) for target in targets]
    names = [pipeline.name for pipeline in pipelines]
    for name in {name for name in names if names.count(name) > 1}:
        raise Problem(
            f"{names.count(name)} of these pipelines are called {clean(name, 100)!r}; runs could not tell them apart",
            "give each a name of its own: Pipeline(name, nodes)",
            code=Code.USAGE,
        )
    listen(quiet=quiet)
    own = [
        one for pipeline in pipelines if pipeline.config is not None for one in flatten(pipeline.config.hooks)
    ]
    hooks = exporters.hooks(own, quiet=quiet)
    if hooks:
        pipelines = [_observed(pipeline, hooks) for pipeline in pipelines]
    serving = _Serving(cluster, pipelines, database, max_concurrent, drain, quiet)
    try:
        # What nodes print is talk.
        with contextlib.redirect_stdout(sys.stderr):
            return cluster.run(serving.serve())
    finally:
        exporters.close()


def _observed(pipeline: Pipeline, hooks: Sequence[Any]) -> Pipeline:
    config = pipeline.config or RunConfig()
    config = config.model_copy(update={"hooks": Exporters.joined(hooks, flatten(config.hooks))})
    return Pipeline(pipeline.name, pipeline.nodes, config=config)


class _Serving:
    """One worker, from its first poll to its end."""

    def __init__(
        self,
        cluster: Cluster,
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

        # So that a namespace or a key that is wrong is told now, and not tried for ever.
        await self._cluster.has_workers(client)
        self._count = _counter()
        made = stroma_worker(
            client, self._cluster.task_queue, self._pipelines, payloads=self._cluster.payloads,
            store=None if self._database is None else self._database.store,
            max_concurrent=self._max_concurrent,
            identity=f"{os.getpid()}@{socket.gethostname()}",
            graceful_shutdown_timeout=timedelta(seconds=self._drain),
            interceptors=[self._count],
        )  # fmt: skip
        running = asyncio.ensure_future(made.run())
        asked = asyncio.Event()
        says = {
            name: f"draining: attempts in flight have {span(self._drain)}; what is left is begun again by another "
            "worker. Again to stop at once"
            for name in ("SIGINT", "SIGTERM")
        }
        waiting = asyncio.ensure_future(asked.wait())
        after = "what was in flight is begun again by another worker"
        stop = Stop(waiting, asked.set, patience=span(self._drain), after=after, says=says)
        begun = time.monotonic()
        self._say("ready", self._ready())
        health = asyncio.ensure_future(self._tell_health(begun))
        try:
            await asyncio.wait([running, waiting], return_when=asyncio.FIRST_COMPLETED)
            if not running.done():
                await made.shutdown()
            await running
        except Exception as error:
            raise Problem(
                f"the worker of {self._cluster.name} ended: {said(error)}",
                *last_frame(error),
                "mend that, then start it again; its runs wait for it",
                code=Code.ENVIRONMENT,
            ) from error
        finally:
            health.cancel()
            waiting.cancel()
            if self._database is not None:
                await self._database.close()
        self._say("drained", f"after {stop.signal}; {self._count.told()} in {span(time.monotonic() - begun)}")
        return Code.OK

    def _ready(self) -> str:
        nodes = ", ".join(f"{clean(p.name, 60)!r} ({plural(len(p.nodes), 'node')})" for p in self._pipelines)
        store = "" if self._database is None else f", written to {self._database.name}"
        return f"{nodes} on {self._cluster.name}, {plural(self._max_concurrent, 'attempt')} at once{store}"

    async def _tell_health(self, begun: float) -> None:
        while True:
            await asyncio.sleep(_HEALTH_SECONDS)
            self._say("well", f"{self._count.told()} in {span(time.monotonic() - begun)}")

    def _say(self, what: str, more: str) -> None:
        if not self._quiet:
            timed_line("worker ", (what, "green"), f": {more}")


def _counter() -> Any:
    """Counts what a worker does. (Its base class is imported with the driver.)"""
    from temporalio.worker import ActivityInboundInterceptor, ExecuteActivityInput, Interceptor

    class Counting(ActivityInboundInterceptor):
        async def execute_activity(self, input: ExecuteActivityInput) -> Any:
            count.at_work += 1
            try:
                return await super().execute_activity(input)
            finally:
                count.at_work -= 1
                count.done += 1

    class Counter(Interceptor):
        done = at_work = 0

        def intercept_activity(self, next: ActivityInboundInterceptor) -> ActivityInboundInterceptor:
            return Counting(next)

        def told(self) -> str:
            left = f", {self.at_work} at work" if self.at_work else ""
            return f"{plural(self.done, 'task')} done{left}"

    count = Counter()
    return count
