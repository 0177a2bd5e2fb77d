"""--temporal: which cluster, reached so that every way in which that fails is one message."""

from __future__ import annotations

import asyncio
import contextlib
import re
import time
from collections.abc import Callable, Coroutine, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, TypeVar

import click

from stroma._utils.text import clean
from stroma.checkpoint.errors import CheckpointNotFound, PipelineChanged, RunBusy, RunExists, StoreError
from stroma.cli.errors import Code, Problem, command

if TYPE_CHECKING:
    from temporalio.client import Client, WorkflowExecution

    from stroma.drivers.temporal.runner import TemporalRunner
    from stroma.engine.config import RunConfig

__all__ = ["Cluster", "cluster_options", "only_here", "worker_options"]

F = TypeVar("F", bound=Callable[..., Any])
T = TypeVar("T")
#: Where runs and workers meet that were given no task queue.
TASK_QUEUE: Final = "stroma"
#: Seconds for one question to the server; a question to a run is answered by a worker.
_ANSWER_SECONDS: Final = 10.0
#: Seconds for which the server remembers a worker that polls no more.
_POLLS_SECONDS: Final = 90.0
_ADDRESS_HELP: Final = "The Temporal server."


def _address(_ctx: click.Context, _parameter: click.Parameter, value: str | None) -> str | None:
    if value is not None:
        host, _, port = value.rpartition(":")
        if not host or not port.isdecimal() or not 0 < int(port) < 65536:
            raise click.BadParameter(
                f"{value!r} is no address of a Temporal server; give HOST:PORT: localhost:7233"
            )
    return value


def _shared(func: F) -> F:
    for option in (
        click.option("--payloads", envvar="STROMA_PAYLOADS", metavar="DIR_OR_URL", help="Where states of 256 KiB and more are, the same for all.  [env: STROMA_PAYLOADS]"),
        click.option("--tls", is_flag=True, help="Talk TLS; certificates and the API key come from TEMPORAL_TLS_... and TEMPORAL_API_KEY."),
        click.option("--namespace", metavar="NAME", help="The namespace on the server.  [env: TEMPORAL_NAMESPACE; default: default]"),
        click.option("--task-queue", metavar="QUEUE", help=f"Where the workers are.  [default: {TASK_QUEUE}]"),
    ):  # fmt: skip
        func = option(func)
    return func


def cluster_options(func: F) -> F:
    """The options of every command that can work on a cluster in place of a store."""
    help_text = "On the cluster of this Temporal server, in place of this process and its store."
    return click.option("--temporal", "address", callback=_address, metavar="HOST:PORT", help=help_text)(
        _shared(func)
    )


def worker_options(func: F) -> F:
    """Those of a command that is on a cluster, whatever it is given."""
    return click.option(
        "--temporal", "address", callback=_address, required=True, envvar="TEMPORAL_ADDRESS", metavar="HOST:PORT",
        help=f"{_ADDRESS_HELP}  [env: TEMPORAL_ADDRESS]",
    )(_shared(func))  # fmt: skip


def only_here(why: str, *names: str) -> None:
    """Raise UsageError if an option was given on the command line that means nothing on a cluster."""
    context = click.get_current_context()
    for parameter in context.command.params:
        given = context.get_parameter_source(parameter.name or "")
        if parameter.name in names and given is click.core.ParameterSource.COMMANDLINE:
            raise click.UsageError(f"{parameter.opts[-1]} does not go with --temporal: {why}")


@dataclass(frozen=True, slots=True)
class Cluster:
    """The cluster that a command was given, and the words that give it again."""

    address: str
    task_queue: str
    namespace: str | None
    tls: bool
    payloads: str | None
    words: tuple[str, ...]

    keeps = True

    @classmethod
    def take(cls, options: dict[str, Any]) -> Cluster | None:
        """From what click has read; takes its part out of that. None without --temporal."""
        given = {
            name: options.pop(name) for name in ("address", "task_queue", "namespace", "tls", "payloads")
        }
        if given["address"] is None:
            left = [name for name in ("task_queue", "namespace", "tls") if given[name]]
            if left:
                raise click.UsageError(f"--{left[0].replace('_', '-')} needs --temporal HOST:PORT")
            return None
        words = ["--temporal", given["address"]]
        for name in ("task_queue", "namespace", "payloads"):
            if given[name] is not None:
                words += [f"--{name.replace('_', '-')}", given[name]]
        if given["tls"]:
            words.append("--tls")
        return cls(**{**given, "task_queue": given["task_queue"] or TASK_QUEUE}, words=tuple(words))

    @property
    def name(self) -> str:
        return f"task queue {clean(self.task_queue, 100)!r} of {self.address}"

    def command(self, name: str, *arguments: str, options: Sequence[str] = ()) -> str:
        """A command line of ours on the same cluster."""
        return command(name, *arguments, options=(*options, *self.words))

    hint = command

    @property
    def worker_hint(self) -> str:
        return self.command("worker", "FILE.py:NAME")

    # ------------------------------------------------------------------ reaching it

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Do something with the cluster. Raises Problem."""
        with self.explained():
            return asyncio.run(work)

    async def connect(self) -> Client:
        """A client. Raises Problem."""
        try:
            from temporalio.client import Client
            from temporalio.envconfig import ClientConfigProfile

            import stroma.drivers.temporal  # noqa: F401
        except ImportError as error:
            raise Problem(
                "--temporal needs the package temporalio", "install it with: pip install 'stroma[temporal]'",
                code=Code.ENVIRONMENT,
            ) from error  # fmt: skip
        try:
            profile = ClientConfigProfile.load()
        except Exception as error:
            raise Problem(
                f"the settings of the Temporal client cannot be read: {clean(str(error), 300)}",
                "correct the variables TEMPORAL_... or the file that TEMPORAL_CONFIG_FILE names",
                code=Code.USAGE,
            ) from error
        settings: dict[str, Any] = {**profile.to_client_connect_config(), "target_host": self.address}
        if self.namespace is not None:
            settings["namespace"] = self.namespace
        if self.tls and not settings.get("tls"):
            settings["tls"] = True
        try:
            return await Client.connect(**settings)
        except (RuntimeError, ValueError) as error:
            # It quotes the structures of its own library; what the system said is among them.
            said = re.search(r'message: "([^"]+)"', str(error))
            why = clean(said[1] if said else str(error).removeprefix("Failed client connect: "), 300)
            raise Problem(
                f"no Temporal server answers at {self.address}: {why}",
                "check the address, --tls and the API key; a server for trying things out: temporal server start-dev",
                code=Code.ENVIRONMENT,
            ) from error

    def runner(self, client: Client, config: RunConfig | None = None) -> TemporalRunner:
        from stroma.drivers.temporal.runner import TemporalRunner

        return TemporalRunner(client, self.task_queue, config=config, payloads=self.payloads)

    @contextlib.contextmanager
    def explained(self) -> Iterator[None]:
        """What the cluster raises ends the command with words that say what to do."""
        try:
            yield
        except Problem:
            raise
        except CheckpointNotFound as error:
            see = f"see which there are: {self.hint('runs')}"
            raise Problem(clean(str(error), 1000), see, code=Code.NOT_FOUND) from error
        except RunBusy as error:
            raise Problem(
                clean(str(error), 1000),
                f"or have it stop: {self.hint('cancel', 'RUN')}",
                code=Code.ENVIRONMENT,
            ) from error
        except StoreError as error:
            usage = isinstance(error, (PipelineChanged, RunExists))
            raise Problem(clean(str(error), 1000), code=Code.USAGE if usage else Code.ENVIRONMENT) from error
        except TimeoutError as error:
            raise Problem(
                f"nobody answered for the run within {_ANSWER_SECONDS:g} s: no worker of {self.name} is there, or all are busy",
                f"start one: {self.worker_hint}",
                code=Code.ENVIRONMENT,
            ) from error
        except Exception as error:
            problem = self._of_server(error)
            if problem is None:
                raise
            raise problem from error

    def _of_server(self, error: Exception) -> Problem | None:
        """What the server said, as the end of a command."""
        from temporalio.client import WorkflowFailureError, WorkflowQueryFailedError
        from temporalio.service import RPCError, RPCStatusCode

        if isinstance(error, (WorkflowFailureError, WorkflowQueryFailedError)):
            return Problem(
                f"that workflow is none of Stroma's, or cannot be replayed: {clean(str(error.cause or error), 300)}",
                f"see what it is with Temporal's own tools, and which runs there are: {self.hint('runs')}",
                code=Code.ENVIRONMENT,
            )
        if not isinstance(error, RPCError):
            return None
        said = clean(error.message, 300)
        if error.status == RPCStatusCode.NOT_FOUND and "amespace" in error.message:
            return Problem(
                f"{self.address} has no such namespace: {said}", "check --namespace", code=Code.NOT_FOUND
            )
        if error.status in (RPCStatusCode.PERMISSION_DENIED, RPCStatusCode.UNAUTHENTICATED):
            return Problem(
                f"{self.address} lets nobody in without a key: {said}",
                "set TEMPORAL_API_KEY, or the certificates in TEMPORAL_TLS_CLIENT_CERT_PATH and ..._KEY_PATH",
                code=Code.ENVIRONMENT,
            )
        return Problem(
            f"{self.address} says {error.status.name}: {said}",
            "what was finished is kept there; call this again once the server answers",
            code=Code.ENVIRONMENT,
        )

    # ------------------------------------------------------------------ asking it

    async def has_workers(self, client: Client) -> bool:
        """Whether anybody has lately asked the task queue for work."""
        from temporalio.api.enums.v1 import TaskQueueType
        from temporalio.api.taskqueue.v1 import TaskQueue
        from temporalio.api.workflowservice.v1 import DescribeTaskQueueRequest

        found = await client.workflow_service.describe_task_queue(
            DescribeTaskQueueRequest(
                namespace=client.namespace,
                task_queue=TaskQueue(name=self.task_queue),
                task_queue_type=TaskQueueType.TASK_QUEUE_TYPE_ACTIVITY,
            )
        )
        since = time.time() - _POLLS_SECONDS
        return any(poller.last_access_time.ToSeconds() >= since for poller in found.pollers)

    async def answer(self, question: Coroutine[Any, Any, T]) -> T:
        """What a run says of itself, by a worker. Raises TimeoutError if none is there."""
        async with asyncio.timeout(_ANSWER_SECONDS):
            return await question

    async def knows(self, run_id: str) -> bool:
        """Whether there is a run with exactly this id."""
        from temporalio.service import RPCError, RPCStatusCode

        client = await self.connect()
        try:
            await client.get_workflow_handle(run_id).describe()
        except RPCError as error:
            if error.status != RPCStatusCode.NOT_FOUND:
                raise
            return False
        return True

    async def find_id(self, run: str) -> str:
        """The run id of :meth:`find`."""
        return (await self.find(await self.connect(), run)).id

    async def find(self, client: Client, run: str) -> WorkflowExecution:
        """The last workflow of the one run that an id, its beginning, or "last" names. Raises Problem."""
        from temporalio.service import RPCError, RPCStatusCode

        if run != "last":
            try:
                return await client.get_workflow_handle(run).describe()
            except RPCError as error:
                if error.status not in (RPCStatusCode.NOT_FOUND, RPCStatusCode.INVALID_ARGUMENT):
                    raise
        found = await self.list(client, limit=20, beginning="" if run == "last" else run)
        if run == "last":
            found = found[:1]
        ids = list(dict.fromkeys(one.id for one in found))
        if len(ids) == 1:
            return found[0]
        if ids:
            lines = [clean(one, 80) for one in ids]
            raise Problem(
                f"{run!r} begins the ids of {len(ids)} runs; give more of the one you mean",
                *lines,
                code=Code.USAGE,
            )
        what = "there is no run yet" if run == "last" else f"there is no run whose id begins with {run!r}"
        raise Problem(
            f"{what} on {self.address}", f"see which there are: {self.hint('runs')}", code=Code.NOT_FOUND
        )

    async def list(
        self, client: Client, *, limit: int, beginning: str = "", where: Sequence[str] = ()
    ) -> list[WorkflowExecution]:
        """Workflows of runs, the newest first."""
        from stroma.drivers.temporal.names import WORKFLOW

        asked = [f"WorkflowType = {_quoted(WORKFLOW)}", *where]
        if beginning:
            asked.append(f"WorkflowId STARTS_WITH {_quoted(beginning)}")
        found: list[WorkflowExecution] = []
        async for one in client.list_workflows(" AND ".join(asked), limit=limit):
            found.append(one)
        return found


def _quoted(text: str) -> str:
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"
