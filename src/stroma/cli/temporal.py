"""--temporal: the Temporal server of a command, and runs on the workers that it chooses."""

from __future__ import annotations

import asyncio
import re
import sys
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, TypeVar, cast

import click

from stroma._utils.text import clean
from stroma.cli.errors import Code, Problem
from stroma.cli.stores import Database

if TYPE_CHECKING:
    from temporalio.client import Client
    from temporalio.service import RPCError

    from stroma.drivers.temporal.runner import TemporalRunner
    from stroma.engine.config import RunConfig
from typing import TYPE_CHECKING

from pydantic import BaseModel

from stroma.checkpoint.entries import Waiting
from stroma.cli.formatting import id_word
from stroma.cli.output import emit_fields, err
from stroma.cli.progress import timed_lines
from stroma.cli.report import RunReport
from stroma.cli.signals import StopSignals
from stroma.engine.config import RunConfig
from stroma.runner.pipeline import Pipeline
from stroma.trace.result import ExecutionResult, RunStatus

if TYPE_CHECKING:
    from stroma.cli.options import RunOptions
    from stroma.drivers.temporal.runner import TemporalRunner
    from stroma.runner.submission import RunHandle

__all__ = ["TemporalCluster", "TemporalRun", "reject_local_options", "temporal_options"]

F = TypeVar("F", bound=Callable[..., Any])
T = TypeVar("T")
#: Default task queue of runs and workers.
TASK_QUEUE: Final = "stroma"
#: Seconds after its last poll within which a worker counts as alive.
_POLLS_SECONDS: Final = 90.0


def _address(_ctx: click.Context, _parameter: click.Parameter, value: str | None) -> str | None:
    if value is not None:
        host, _, port = value.rpartition(":")
        if not host or not port.isdecimal() or not 0 < int(port) < 65536:
            raise click.BadParameter(
                f"{value!r} is not the address of a Temporal server; pass HOST:PORT, such as localhost:7233"
            )
    return value


def temporal_options(func: F) -> F:
    """Add --temporal and its options to a command; the runs are in the store of --db."""
    for option in (
        click.option("--tls", is_flag=True, help="Use TLS, with TEMPORAL_TLS_... and TEMPORAL_API_KEY."),
        click.option(
            "--namespace",
            metavar="NAME",
            help="Namespace on the server.  [env: TEMPORAL_NAMESPACE; default: default]",
        ),
        click.option(
            "--task-queue", metavar="QUEUE", help=f"Task queue of the workers.  [default: {TASK_QUEUE}]"
        ),
        click.option(
            "--temporal",
            "address",
            callback=_address,
            metavar="HOST:PORT",
            help="Temporal server that chooses the worker of each run.",
        ),
    ):
        func = option(func)
    return func


def reject_local_options(why: str, *names: str) -> None:
    """Raise UsageError if one of these options is on the command line together with --temporal."""
    context = click.get_current_context()
    for parameter in context.command.params:
        settings = context.get_parameter_source(parameter.name or "")
        if parameter.name in names and settings is click.core.ParameterSource.COMMANDLINE:
            raise click.UsageError(f"{parameter.opts[-1]} does not go with --temporal: {why}")


@dataclass(frozen=True, slots=True)
class TemporalCluster:
    """Temporal server and task queue of a command, and the options that select them again: ``words``."""

    address: str
    task_queue: str
    namespace: str | None
    tls: bool
    words: tuple[str, ...]

    @classmethod
    def from_options(cls, options: dict[str, Any]) -> TemporalCluster | None:
        """Remove the Temporal options from ``options`` and return them; None without --temporal."""
        settings = {name: options.pop(name) for name in ("address", "task_queue", "namespace", "tls")}
        if settings["address"] is None:
            unused = [name for name in ("task_queue", "namespace", "tls") if settings[name]]
            if unused:
                raise click.UsageError(f"--{unused[0].replace('_', '-')} needs --temporal HOST:PORT")
            return None
        words = ["--temporal", settings["address"]]
        for name in ("task_queue", "namespace"):
            if settings[name] is not None:
                words += [f"--{name.replace('_', '-')}", settings[name]]
        if settings["tls"]:
            words.append("--tls")
        return cls(**{**settings, "task_queue": settings["task_queue"] or TASK_QUEUE}, words=tuple(words))

    @property
    def name(self) -> str:
        return f"task queue {clean(self.task_queue, 100)!r} of {self.address}"

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine that talks to the server. Raises Problem."""
        try:
            return asyncio.run(work)
        except Exception as error:
            rpc_error = getattr(sys.modules.get("temporalio.service"), "RPCError", ())
            if not isinstance(error, rpc_error):
                raise
            raise self._problem(cast("RPCError", error)) from error

    async def connect(self) -> Client:
        """Return a connected client. Raises Problem."""
        try:
            from temporalio.client import Client
            from temporalio.envconfig import ClientConfigProfile

            import stroma.drivers.temporal  # noqa: F401
        except ImportError as error:
            raise Problem(
                "--temporal needs the package temporalio",
                "install it with: pip install 'stroma-runner[temporal]'",
                code=Code.ENVIRONMENT,
            ) from error
        try:
            profile = ClientConfigProfile.load()
        except Exception as error:
            raise Problem(
                f"the settings of the Temporal client cannot be read: {clean(str(error), 300)}",
                "correct the variables TEMPORAL_... or the file that TEMPORAL_CONFIG_FILE names",
            ) from error
        settings: dict[str, Any] = {**profile.to_client_connect_config(), "target_host": self.address}
        if self.namespace is not None:
            settings["namespace"] = self.namespace
        if self.tls and not settings.get("tls"):
            settings["tls"] = True
        try:
            return await Client.connect(**settings)
        except (RuntimeError, ValueError) as error:
            # The text quotes structures of a library; the message of the system is among them.
            message = re.search(r'message: "([^"]+)"', str(error))
            why = clean(message[1] if message else str(error).removeprefix("Failed client connect: "), 300)
            raise Problem(
                f"no Temporal server answers at {self.address}: {why}",
                "check the address, --tls and the API key; a server for tests: temporal server start-dev",
                code=Code.ENVIRONMENT,
            ) from error

    async def runner(self, database: Database, config: RunConfig | None = None) -> TemporalRunner:
        """Connect, and return a runner for the runs of a store. Raises Problem."""
        client = await self.connect()
        from stroma.drivers.temporal.runner import TemporalRunner

        return TemporalRunner(client, self.task_queue, database.store, config)

    def _problem(self, error: RPCError) -> Problem:
        """Return the Problem for an error of the server."""
        what, fix = f"failed with {error.status.name}", "repeat the command when the server is available"
        if error.status.name == "NOT_FOUND" and "amespace" in error.message:
            what, fix = "does not have the namespace", "check --namespace"
        elif error.status.name in ("PERMISSION_DENIED", "UNAUTHENTICATED"):
            what = "denied access"
            fix = (
                "set TEMPORAL_API_KEY, or the certificates in TEMPORAL_TLS_CLIENT_CERT_PATH and ..._KEY_PATH"
            )
        return Problem(f"{self.address} {what}: {clean(error.message, 300)}", fix, code=Code.ENVIRONMENT)

    async def has_workers(self, client: Client) -> bool:
        """Return True if a worker has polled the task queue recently."""
        from temporalio.api.enums.v1 import TaskQueueType
        from temporalio.api.taskqueue.v1 import TaskQueue
        from temporalio.api.workflowservice.v1 import DescribeTaskQueueRequest

        executions = await client.workflow_service.describe_task_queue(
            DescribeTaskQueueRequest(
                namespace=client.namespace,
                task_queue=TaskQueue(name=self.task_queue),
                task_queue_type=TaskQueueType.TASK_QUEUE_TYPE_ACTIVITY,
            )
        )
        since = time.time() - _POLLS_SECONDS
        return any(poller.last_access_time.ToSeconds() >= since for poller in executions.pollers)


#: Seconds until the task queue of a run that has not started is checked for workers.
_QUIET_SECONDS: Final = 5.0


@dataclass(frozen=True, slots=True)
class TemporalRun:
    """One run on Temporal."""

    target: str
    pipeline: Pipeline
    config: RunConfig
    state: BaseModel
    cluster: TemporalCluster
    database: Database
    options: RunOptions
    resume: bool = False

    def execute(self) -> int:
        """Submit the run, print the report, and return the exit code. Raises Problem."""
        self.database.prepare()
        started = time.perf_counter()
        result, waiting, stopped_by = self.cluster.run(self._drive())
        if result is None:
            return self._report_detached(stopped_by)
        report = RunReport(
            result,
            self.pipeline.name,
            self.target,
            self.database,
            stopped_by,
            time.perf_counter() - started,
            self.config.budget,
            waiting=waiting,
        )
        report.print(json=self.options.as_json, quiet=self.options.quiet)
        return int(report.code)

    def _report_detached(self, stopped_by: str | None) -> int:
        """Print how to follow a run that continues without this command."""
        run_id = self.config.run_id
        if not self.options.quiet:
            why = f" ({stopped_by})" if stopped_by else ""
            err.line(("detached", "yellow"), f"{why}: run {clean(run_id)} continues without this command")
            err.line(f"  follow it: {self.database.hint('tail', id_word(run_id))}")
            err.line(f"  or cancel it: {self.database.hint('cancel', id_word(run_id))}")
        if self.options.as_json:
            emit_fields("stroma.detached/1", run_id=run_id, pipeline=self.pipeline.name)
        return Code.OK

    async def _drive(self) -> tuple[ExecutionResult | None, list[Waiting], str | None]:
        try:
            runner = await self.cluster.runner(self.database, self.config)
            handle = await runner.submit(self.pipeline, self.state, run_id=self.config.run_id)
            if self.resume:
                await runner.resume(handle.run_id)
            result, stopped_by = await self._wait(runner, handle)
            waiting: list[Waiting] = []
            if result is not None and result.status is RunStatus.SUSPENDED:
                waiting = await asyncio.to_thread(self.database.store.waiting, result.run_id)
            return result, waiting, stopped_by
        finally:
            await self.database.close()

    async def _wait(
        self, runner: TemporalRunner, handle: RunHandle[BaseModel]
    ) -> tuple[ExecutionResult | None, str | None]:
        if not self.options.quiet:
            timed_lines(
                (clean(self.pipeline.name, 60), "bold"),
                f": run {id_word(handle.run_id)} on {self.cluster.name}",
            )
        task = asyncio.current_task()
        assert task is not None
        stopping = asyncio.ensure_future(handle.until_stopped())

        def leave() -> None:
            stopping.cancel()

        messages = {
            "SIGINT": "cancelling the run; finished nodes are stored. Repeat the signal to leave it running",
            "SIGTERM": "leaving; the run continues without this command",
        }
        shown = self.database.hint("show", id_word(handle.run_id))
        after = f"the run continues unless it was cancelled; see: {shown}"
        stop = StopSignals(task, leave, patience="", after=after, messages=messages)
        watching = asyncio.ensure_future(self._watch_for_workers(handle))
        try:
            try:
                return await asyncio.shield(stopping), stop.signal
            except asyncio.CancelledError:
                if stop.signal != "SIGINT":
                    return None, stop.signal
                await runner.cancel(handle.run_id)
                return await stopping, stop.signal
        finally:
            watching.cancel()
            stopping.cancel()

    async def _watch_for_workers(self, handle: RunHandle[BaseModel]) -> None:
        """Print a note while no worker polls the task queue of a run that has not started."""
        delay, client = _QUIET_SECONDS, await self.cluster.connect()
        while True:
            await asyncio.sleep(delay)
            if await handle.status() == "QUEUED" and not await self.cluster.has_workers(client):
                err.line(
                    ("note: ", "yellow"),
                    f"no worker polls {self.cluster.name}; start one: ",
                    self.database.hint("worker", self.target, options=self.cluster.words),
                )
                delay = 60.0
