"""Drive runs that Temporal assigns to this process, until a signal ends it."""

from __future__ import annotations

import asyncio
import contextlib
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass

from stroma._utils.text import clean, format_duration, pluralize
from stroma.cli.errors import Code, Problem, describe_error, last_frame
from stroma.cli.progress import timed_line
from stroma.cli.signals import drain_on_signal
from stroma.cli.stores import Database
from stroma.cli.temporal import TemporalCluster
from stroma.runner.pipeline import Pipeline

__all__ = ["TemporalWorker"]


@dataclass(frozen=True, slots=True)
class TemporalWorker:
    """One worker, from its first poll to its end."""

    cluster: TemporalCluster
    pipelines: Sequence[Pipeline]
    database: Database
    max_concurrency: int
    drain_seconds: float
    quiet: bool
    place: str | None = None

    def execute(self) -> int:
        """Serve until a signal, and return the exit code. Raises Problem."""
        if self.place is None:
            self.database.prepare()
        # Output of nodes goes to stderr.
        with contextlib.redirect_stdout(sys.stderr):
            return self.cluster.run(self._serve())

    async def _serve(self) -> int:
        client = await self.cluster.connect()
        from stroma.drivers.temporal.worker import stroma_worker

        # Fails at once for a wrong namespace or key, which the worker would retry for ever.
        await self.cluster.has_workers(client)
        try:
            worker = stroma_worker(
                client,
                self.cluster.task_queue,
                self.pipelines,
                store=self.database.store if self.place is None else None,
                place=self.place,
                max_concurrency=self.max_concurrency,
                drain_seconds=self.drain_seconds,
            )
        except (TypeError, ValueError) as error:
            raise Problem(
                f"the worker cannot start: {describe_error(error)}", *last_frame(error), code=Code.USAGE
            ) from error
        running = asyncio.ensure_future(worker.run())
        shutdown_requested = asyncio.Event()
        waiting = asyncio.ensure_future(shutdown_requested.wait())
        stop = drain_on_signal(waiting, shutdown_requested.set, self.drain_seconds)
        started = time.monotonic()
        self._print("ready", self._describe())
        try:
            await asyncio.wait([running, waiting], return_when=asyncio.FIRST_COMPLETED)
            if not running.done():
                await worker.shutdown()
            await running
        except Exception as error:
            raise Problem(
                f"the worker of {self.cluster.name} ended: {describe_error(error)}",
                *last_frame(error),
                "fix that, then restart it; its runs are waiting",
                code=Code.ENVIRONMENT,
            ) from error
        finally:
            waiting.cancel()
            await self.database.close()
        self._print("drained", f"after {stop.signal}, {format_duration(time.monotonic() - started)}")
        return Code.OK

    def _describe(self) -> str:
        names = ", ".join(repr(clean(one.name, 60)) for one in self.pipelines)
        if self.place is not None:
            calls = pluralize(self.max_concurrency, "call")
            return f"{names} at place {clean(self.place, 100)!r} of {self.cluster.address}, {calls} at once"
        runs = pluralize(self.max_concurrency, "run")
        return f"{names} on {self.cluster.name}, in {self.database.name}, {runs} at once"

    def _print(self, what: str, more: str) -> None:
        if not self.quiet:
            timed_line("worker ", (what, "green"), f": {more}")
