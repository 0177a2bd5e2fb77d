"""Drive runs in this process until a signal ends it: due runs of a store, or those that Temporal assigns."""

from __future__ import annotations

import asyncio
import collections
import contextlib
import json
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from stroma._utils.text import clean, format_duration, format_host, pluralize
from stroma.checkpoint.manager import CheckpointManager
from stroma.checkpoint.records import describe_wait
from stroma.cli.errors import Code, Problem, cannot_listen, describe_error, last_frame
from stroma.cli.exporters import FLUSH_SECONDS
from stroma.cli.formatting import localize
from stroma.cli.output import user_code
from stroma.cli.progress import timed_line
from stroma.cli.signals import serve_until_signal
from stroma.cli.stores import Database
from stroma.cli.temporal import TemporalCluster
from stroma.contracts.contract import ContractRegistry
from stroma.failures.errors import WAITING_FOR_ANSWER
from stroma.runner.pipeline import Pipeline
from stroma.runner.runner import StromaRunner
from stroma.runner.worker import WorkerHealth
from stroma.trace.result import ExecutionResult

_READ_SECONDS: Final = 5.0


@contextlib.asynccontextmanager
async def serve_health(
    address: tuple[str, int] | None, read: Callable[[], tuple[bool, dict[str, Any]]]
) -> AsyncIterator[str | None]:
    """Answer requests, of any path, while the context is open; yield the address with the real port for 0.

    A HEAD request gets the head of the answer only.

    ``read`` returns True for 200 or False for 503, and the JSON to answer. Raises Problem for an address in
    use.
    """
    if address is None:
        yield None
        return

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            async with asyncio.timeout(_READ_SECONDS):
                request = await reader.readuntil(b"\r\n\r\n")
                is_ok, body = read()
                status = "200 OK" if is_ok else "503 Service Unavailable"
                data = json.dumps(body).encode() + b"\n"
                head = (
                    f"HTTP/1.1 {status}\r\nContent-Type: application/json\r\nContent-Length: {len(data)}\r\n"
                    "Cache-Control: no-store\r\nConnection: close\r\n\r\n"
                )
                writer.write(head.encode() + (b"" if request.startswith(b"HEAD ") else data))
                await writer.drain()
        except (OSError, EOFError, asyncio.LimitOverrunError):
            pass  # The client left, is slow, or does not speak HTTP.
        finally:
            writer.close()

    host, port = address
    try:
        server = await asyncio.start_server(answer, host, port)
    except OSError as error:
        raise cannot_listen("", address, error, "pass another --health") from error
    try:
        bound = server.sockets[0].getsockname()
        yield f"http://{format_host(bound[0])}:{bound[1]}/healthz"
    finally:
        server.close()


@dataclass(slots=True, kw_only=True)
class PipelineWorker(ABC):
    """A worker of some pipelines."""

    pipelines: Sequence[Pipeline]
    database: Database
    max_concurrency: int
    drain_seconds: float
    quiet: bool

    def execute(self) -> int:
        """Serve until a signal, and return the exit code. Raises Problem."""
        try:
            with user_code():
                return self._run()
        except (TypeError, ValueError) as error:
            raise Problem(f"the worker cannot start: {describe_error(error)}", *last_frame(error)) from error

    def _run(self) -> int:
        return asyncio.run(self._serve())

    @abstractmethod
    async def _serve(self) -> int: ...

    @property
    def _names(self) -> str:
        return ", ".join(repr(clean(one.name, 60)) for one in self.pipelines)

    def _print(self, what: str, more: str) -> None:
        if not self.quiet:
            timed_line("worker ", (what, "green"), f": {more}")


@dataclass(slots=True, kw_only=True)
class LocalWorker(PipelineWorker):
    """One worker of a store.

    Attributes:
        health_address: (host, port) of the server for probes; None: without one.
    """

    poll_seconds: float
    health_address: tuple[str, int] | None
    _health: WorkerHealth = field(init=False)
    _outcomes: collections.Counter[str] = field(default_factory=collections.Counter)
    _failed_tries: int = 0  # How often a run could not be continued.

    def __post_init__(self) -> None:
        self._health = WorkerHealth(reads_queue=self.health_address is not None)

    async def _serve(self) -> int:
        # Without a config of its own, the runner uses that of each pipeline.
        runner = StromaRunner(ContractRegistry(), CheckpointManager(self.database.store))
        started = time.monotonic()

        async def drain() -> None:
            self._health.is_draining = True
            await runner.shutdown(drain_seconds=self.drain_seconds)

        try:
            async with serve_health(self.health_address, self._read_health) as url:
                serving = asyncio.ensure_future(
                    runner.serve(
                        *self.pipelines,
                        max_concurrency=self.max_concurrency,
                        poll_seconds=self.poll_seconds,
                        health=self._health,
                        on_result=self._report,
                    )
                )
                ready = self._describe() + (f", {url}" if url else "")
                starting = asyncio.ensure_future(self._report_start(ready))
                try:
                    signal = await serve_until_signal(serving, drain, self.drain_seconds, quiet=self.quiet)
                finally:
                    starting.cancel()
        finally:
            await runner.aclose(timeout_seconds=FLUSH_SECONDS)
            await self.database.close()
        self._print("drained", f"after {signal}; {self._progress(started)}")
        return Code.OK

    def _read_health(self) -> tuple[bool, dict[str, Any]]:
        health = self._health
        status = "ok" if health.is_ok else "draining" if health.is_draining else "store not readable"
        return health.is_ok, {
            "schema": "stroma.health/1",
            "status": status,
            "active": health.active,
            "continued": self._outcomes.total(),
            "queued": health.queued,
            "oldest_due_seconds": health.oldest_due_seconds,
            "blocked": health.blocked,
            "unserved": {name: counts for name, counts in health.unserved.items() if counts},
        }

    def _report(self, run_id: str, outcome: ExecutionResult | Exception) -> None:
        if isinstance(outcome, Exception):
            self._failed_tries += 1  # The log has the exception.
            return
        status = str(outcome.status)
        self._outcomes[status] += 1
        if not self.quiet:
            timed_line("run ", clean(run_id), f": {status}{_describe_stop(outcome)}")

    async def _report_start(self, ready: str) -> None:
        await self._health.started.wait()
        self._print("ready", ready)
        for name, counts in self._health.unserved.items():
            for version, count in counts.items():
                verb = "waits" if count == 1 else "wait"
                served = f"{clean(name, 60)} version {clean(version, 60)}, which is not served here"
                self._print("note", f"{pluralize(count, 'run')} {verb} for {served}")

    def _describe(self) -> str:
        runs = pluralize(self.max_concurrency, "run")
        return f"{self._names} in {self.database.name}, {runs} at once, polling every {self.poll_seconds:g} s"

    def _progress(self, started: float) -> str:
        counts = ", ".join(f"{number} {status}" for status, number in sorted(self._outcomes.items()))
        took = format_duration(time.monotonic() - started)
        times = pluralize(self._outcomes.total(), "time")
        done = f"continued runs {times} in {took} ({counts})" if counts else f"continued no run in {took}"
        tries = pluralize(self._failed_tries, "time")
        return done + (f"; could not continue a run {tries}" if self._failed_tries else "")


@dataclass(slots=True, kw_only=True)
class TemporalWorker(PipelineWorker):
    """One worker of a Temporal server. ``place``: it calls the nodes with this place, and drives no runs."""

    cluster: TemporalCluster
    place: str | None

    def _run(self) -> int:
        return self.cluster.run(self._serve())

    async def _serve(self) -> int:
        client = await self.cluster.connect()
        from stroma.drivers.temporal.worker import stroma_worker

        worker = stroma_worker(
            client,
            self.cluster.task_queue,
            self.pipelines,
            store=self.database.store if self.place is None else None,
            place=self.place,
            max_concurrency=self.max_concurrency,
            drain_seconds=self.drain_seconds,
        )
        running = asyncio.ensure_future(worker.run())
        self._print("ready", self._describe())
        try:
            signal = await serve_until_signal(running, worker.shutdown, self.drain_seconds, quiet=self.quiet)
        except Exception as error:
            raise Problem(
                f"the worker ended: {describe_error(error)}",
                *last_frame(error),
                "fix that, then restart it; its runs are waiting",
                code=Code.ENVIRONMENT,
            ) from error
        finally:
            await self.database.close()
        self._print("drained", f"after {signal}")
        return Code.OK

    def _describe(self) -> str:
        queue = self.cluster.task_queue if self.place is None else self.place
        what = "task queue" if self.place is None else "place"
        return f"{self._names} at {what} {clean(queue, 100)!r} of {self.cluster.address}"


def _describe_stop(result: ExecutionResult) -> str:
    """Return the failure of a run, or the reasons of a suspended one, after a comma; else ""."""
    if (failure := result.failure) is not None and not result.suspended:
        return f", {clean(f'{failure.node_id}: {failure.reason or failure.failure_class}: {failure}', 300)}"
    questions = {one.reason for one in result.questions}
    reasons = [describe_wait(one) for one in result.suspended if one not in questions]
    reasons += [
        f"the outcome of effect {clean(one.node_id, 100)!r} is unknown: ask its provider again with "
        "`stroma resume`, or state it with `stroma approve`"
        if one.kind == "effect"
        else f"{WAITING_FOR_ANSWER}{one.reason}"
        for one in result.questions
    ]
    return "".join(f", {localize(clean(one, 300))}" for one in reasons)
